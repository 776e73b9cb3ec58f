"""The settings of each program, read from the environment once, as one frozen value."""

# ruff: noqa: RUF009 - `_setting` only makes a dataclass field

import argparse
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

from shared import __version__
from shared.units import format_watts, parse_watts

DEFAULT_RUN_DIR = "/run/power-agent"
# sun_path of sockaddr_un holds 108 bytes with its final zero (unix(7)).
_SOCKET_PATH_BYTES = 107
# Kubelet's id of a static pod, which its cgroup shows in place of the uid.
CONFIG_HASH = "kubernetes.io/config.hash"
# Names as the API takes them (apimachinery validation.IsDNS1123Label, IsDNS1123Subdomain).
_DNS_LABEL = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
_DNS_SUBDOMAIN = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*"


class SettingsError(Exception):
    """A setting that cannot be used; the text names variable, value and remedy in one line."""


@dataclass(frozen=True, slots=True)
class SafeDefault:
    """A limit for GPUs whose pods ask nothing usable: milliwatts, or a share of the factory's."""

    limit_mw: int | None = None
    percent: int | None = None

    def for_gpu(self, default_mw: int) -> int:
        """Return the milliwatts for a GPU whose factory default is `default_mw`, rounded down."""
        return (
            self.limit_mw if self.limit_mw is not None else default_mw * (self.percent or 0) // 100
        )


@dataclass(frozen=True, slots=True)
class Address:
    """A TCP address to listen on."""

    host: str
    port: int


@dataclass(frozen=True, slots=True)
class _Variable:
    name: str
    default: str | None
    meaning: str
    parse: Callable[[str], Any]
    required: bool = False


def _text(value: str) -> str:
    # A byte that is no UTF-8 (os.environ has it as a surrogate) fits into no message.
    if not value.isprintable():
        raise ValueError("not printable text")
    return value


def _path(value: str) -> Path:
    if not _text(value).startswith("/"):
        raise ValueError("not an absolute path")
    return Path(value)


def _run_dir(value: str) -> Path:
    path = _path(value)
    if len(os.fsencode(path / "control.sock")) > _SOCKET_PATH_BYTES:
        raise ValueError(f"too long: a socket path has at most {_SOCKET_PATH_BYTES} bytes")
    return path


def _cgroup_root(value: str) -> str:
    if value != "auto" and not _text(value).startswith("/"):
        raise ValueError("neither `auto` nor a cgroup path such as / or /kubelet.slice")
    return value if value == "auto" else value.rstrip("/") or "/"


def _seconds(value: str) -> float:
    if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,3})?", value) or not float(value) >= 0.05:
        raise ValueError("not a number of seconds of at least 0.05")
    return float(value)


def _uid(value: str) -> int:
    if not re.fullmatch(r"[0-9]{1,10}", value) or int(value) >= 2**32 - 1:
        raise ValueError("not a numeric user id")
    return int(value)


def _uids(value: str) -> frozenset[int]:
    return frozenset(_uid(part.strip()) for part in value.split(",") if part.strip())


def _flag(value: str) -> bool:
    if value.lower() not in ("true", "false", "1", "0"):
        raise ValueError("neither true nor false")
    return value.lower() in ("true", "1")


def _choice(*choices: str) -> Callable[[str], str]:
    def parse(value: str) -> str:
        if value not in choices:
            raise ValueError(f"not one of {', '.join(choices)}")
        return value

    return parse


def _namespace(value: str) -> str:
    # Of one that cannot exist the API lists no pods, without an error: limits would be given back.
    if not re.fullmatch(_DNS_LABEL, value):
        raise ValueError("not the name of one namespace such as team-a")
    return value


def _node(value: str) -> str:
    if len(value) > 253 or not re.fullmatch(_DNS_SUBDOMAIN, value):
        raise ValueError("not the name of a node such as node-1.example.com")
    return value


def _annotation(value: str) -> str:
    # A qualified name (apimachinery validation.IsQualifiedName): an optional DNS prefix, a name.
    prefix = r"(?:[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?/)?"
    if not re.fullmatch(prefix + r"[A-Za-z0-9](?:[-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?", value):
        raise ValueError("not an annotation key such as example.com/name")
    if value == CONFIG_HASH:
        raise ValueError("the kubelet's own: it holds the id of a static pod")
    return value


def _safe_default(value: str) -> SafeDefault:
    percent = re.fullmatch(r"([0-9]{1,3})%", value)
    if percent is None:
        return SafeDefault(limit_mw=parse_watts(value))
    if not 1 <= int(percent.group(1)) <= 100:
        raise ValueError("a share is between 1% and 100%")
    return SafeDefault(percent=int(percent.group(1)))


def _lease(value: str) -> float | None:
    if value == "hold":
        return None
    kind, _, seconds = value.partition(":")
    if kind != "release":
        raise ValueError("neither `hold` nor `release:<seconds>`")
    return _seconds(seconds)


def _address(value: str) -> Address | None:
    if value == "off":
        return None
    host, colon, port = _text(value).rpartition(":")
    if not colon or not re.fullmatch(r"[0-9]{1,5}", port) or int(port) > 65535:
        raise ValueError("neither `off` nor an address such as 0.0.0.0:9100")
    return Address(host.strip("[]"), int(port))


def _log_format(value: str) -> str:
    if value == "auto":
        return "text" if sys.stdout.isatty() else "json"
    return _choice("json", "text")(value)


def _setting(
    name: str,
    default: str | None,
    meaning: str,
    parse: Callable[[str], Any] = _text,
    *,
    required: bool = False,
) -> Any:  # noqa: ANN401 - a field takes the type of its annotation
    return field(metadata={"variable": _Variable(name, default, meaning, parse, required)})


@dataclass(frozen=True, kw_only=True, slots=True)
class CommonSettings:
    """What every program reads."""

    run_dir: Path = _setting(
        "POWER_AGENT_RUN_DIR", DEFAULT_RUN_DIR, "holds control.sock and events.sock", _run_dir
    )
    log_level: Literal["debug", "info", "warning", "error"] = _setting(
        "POWER_AGENT_LOG_LEVEL",
        "info",
        "debug, info, warning or error",
        _choice("debug", "info", "warning", "error"),
    )
    log_format: Literal["json", "text"] = _setting(
        "POWER_AGENT_LOG_FORMAT", "auto", "json or text (auto: text on a terminal)", _log_format
    )
    in_kubernetes: bool = _setting(
        "KUBERNETES_SERVICE_HOST", "", "set by the kubelet: this program runs in a pod", bool
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class EnforcerSettings(CommonSettings):
    """What the enforcer reads; limits in milliwatts, None where nothing is set."""

    state_dir: Path = _setting(
        "POWER_AGENT_STATE_DIR",
        "/var/lib/power-agent",
        "the ledger, on disk that outlives the pod",
        _path,
    )
    proc_root: Path = _setting("POWER_AGENT_PROC_ROOT", "/proc", "the host's proc", _path)
    cgroup_root: str = _setting(
        "POWER_AGENT_CGROUP_ROOT",
        "auto",
        "parent of the kubelet's kubepods cgroup; auto learns it from the own pod",
        _cgroup_root,
    )
    watcher_uid: int = _setting(
        "POWER_AGENT_WATCHER_UID", "65532", "the only uid whose snapshots count", _uid
    )
    reader_uids: frozenset[int] = _setting(
        "POWER_AGENT_READER_UIDS", "0", "uids that may ask and listen, comma separated", _uids
    )
    scan_s: float = _setting(
        "POWER_AGENT_SCAN_SECONDS", "1", "how often GPU process lists are read", _seconds
    )
    reconcile_s: float = _setting(
        "POWER_AGENT_RECONCILE_SECONDS",
        "15",
        "how often every limit is read back and drift mended",
        _seconds,
    )
    min_mw: int | None = _setting(
        "POWER_AGENT_MIN_WATTS", None, "administrator's lower bound in watts", parse_watts
    )
    max_mw: int | None = _setting(
        "POWER_AGENT_MAX_WATTS", None, "administrator's upper bound in watts", parse_watts
    )
    safe_default: SafeDefault | None = _setting(
        "POWER_AGENT_SAFE_DEFAULT",
        None,
        "limit for GPUs whose pods ask nothing usable: 300 or 70%",
        _safe_default,
    )
    conflict: Literal["lowest", "safe-default"] = _setting(
        "POWER_AGENT_CONFLICT",
        "lowest",
        "several pods, different limits: lowest or safe-default",
        _choice("lowest", "safe-default"),
    )
    release_to: Literal["original", "default"] = _setting(
        "POWER_AGENT_RELEASE_TO",
        "original",
        "given back: the limit found (original) or the factory default",
        _choice("original", "default"),
    )
    on_exit: Literal["restore", "hold"] = _setting(
        "POWER_AGENT_ON_EXIT",
        "restore",
        "on SIGTERM: restore every GPU, or hold the limits",
        _choice("restore", "hold"),
    )
    lease_s: float | None = _setting(
        "POWER_AGENT_LEASE", "hold", "watcher silent: hold, or release:<seconds>", _lease
    )
    dry_run: bool = _setting(
        "POWER_AGENT_DRY_RUN", "false", "decide and report, never write a limit", _flag
    )
    supervised: bool = _setting(
        "POWER_AGENT_SUPERVISED", "false", "shares its container with the watcher", _flag
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class WatcherSettings(CommonSettings):
    """What the watcher reads."""

    node: str = _setting("NODE_NAME", None, "node whose pods are watched", _node, required=True)
    kubeconfig: str | None = _setting(
        "KUBECONFIG", None, "used outside a cluster (in-cluster configuration comes first)"
    )
    namespace: str | None = _setting(
        "WATCH_NAMESPACE", None, "only pods of this namespace", _namespace
    )
    annotation: str = _setting(
        "POWER_AGENT_ANNOTATION",
        "dynamo.nvidia.com/gpu-power-limit",
        "annotation key",
        _annotation,
    )
    metrics: Address | None = _setting(
        "POWER_AGENT_METRICS_ADDR",
        "0.0.0.0:9100",
        "/metrics, /healthz, /readyz; off disables",
        _address,
    )
    events: bool = _setting(
        "POWER_AGENT_EVENTS", "false", "write Kubernetes Events (needs the extra rule)", _flag
    )


S = TypeVar("S", bound=CommonSettings)


def _variables(kind: type[CommonSettings]) -> dict[str, _Variable]:
    return {f.name: f.metadata["variable"] for f in fields(kind)}


def parse_settings(kind: type[S], environment: Mapping[str, str]) -> S:
    """Return the settings in `environment`; raises SettingsError naming the first wrong one."""
    values: dict[str, Any] = {}
    for key, variable in _variables(kind).items():
        # An empty value is what templates write for "not set".
        text = environment.get(variable.name) or variable.default
        if text is None and variable.required:
            raise SettingsError(f"{variable.name} is not set: set it to the {variable.meaning}")
        try:
            values[key] = None if text is None else variable.parse(text)
        except ValueError as error:
            remedy = f"correct it ({variable.meaning})" + " or unset it" * (not variable.required)
            shown = repr(text if len(text or "") <= 80 else f"{text:.80}...")
            raise SettingsError(f"{variable.name}={shown}: {error}; {remedy}") from error
    settings = kind(**values)
    if isinstance(settings, EnforcerSettings):
        _check_limits(settings)
    return settings


def _check_limits(settings: EnforcerSettings) -> None:
    low, high = settings.min_mw, settings.max_mw
    if low is not None and high is not None and low > high:
        raise SettingsError(
            f"POWER_AGENT_MIN_WATTS={format_watts(low)} is above "
            f"POWER_AGENT_MAX_WATTS={format_watts(high)}: lower the first or raise the second"
        )
    if settings.conflict == "safe-default" and settings.safe_default is None:
        raise SettingsError(
            "POWER_AGENT_CONFLICT='safe-default' needs POWER_AGENT_SAFE_DEFAULT: "
            "set that to watts (300) or a share (70%)"
        )


def _help(kind: type[CommonSettings]) -> str:
    lines = ["environment:"]
    for variable in _variables(kind).values():
        default = "required" if variable.required else f"default: {variable.default or 'none'}"
        lines.append(f"  {variable.name}\n      {variable.meaning} ({default})")
    return "\n".join(lines)


def exit_usage(program: str, message: str) -> NoReturn:
    """Say what is wrong with the configuration in one line and exit with status 2."""
    sys.stderr.write(f"{program}: {message}\n")
    raise SystemExit(2)


def from_command_line(program: str, purpose: str, kind: type[S]) -> S:
    """Return the settings of this process; answers --help and --version, exits 2 if wrong."""
    parser = argparse.ArgumentParser(
        prog=program,
        description=purpose,
        epilog=_help(kind),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"{program} {__version__}")
    parser.parse_args()
    try:
        return parse_settings(kind, os.environ)
    except SettingsError as error:
        exit_usage(program, str(error))


def colour_from_environment() -> bool:
    """Tell whether coloured text is welcome (https://no-color.org)."""
    return not os.environ.get("NO_COLOR")


def run_dir_from_environment() -> Path:
    """Return POWER_AGENT_RUN_DIR or its default, for clients that read nothing else."""
    return Path(os.environ.get("POWER_AGENT_RUN_DIR") or DEFAULT_RUN_DIR)

"""How a program's settings are read: from the environment, once, into one frozen value."""

# ruff: noqa: RUF009 - `setting` only makes a dataclass field

import argparse
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

from shared import __version__, unknown

DEFAULT_RUN_DIR = "/run/power-agent"
# sun_path of sockaddr_un holds 108 bytes with its final zero (unix(7)).
_SOCKET_PATH_BYTES = 107


class SettingsError(Exception):
    """A setting that cannot be used; the text names variable, value and remedy in one line."""


@dataclass(frozen=True, slots=True)
class _Variable:
    name: str
    default: str | None
    meaning: str
    parse: Callable[[str], Any]
    required: bool = False


def text_value(value: str) -> str:
    """Return `value`; raises ValueError where it cannot be printed."""
    # Bytes that are not UTF-8 (os.environ has them as surrogates) cannot be put into a message.
    if not value.isprintable():
        raise ValueError("not printable text")
    return value


def path_value(value: str) -> Path:
    """Return an absolute path; raises ValueError."""
    if not text_value(value).startswith("/"):
        raise ValueError("not an absolute path")
    return Path(value)


def _run_dir(value: str) -> Path:
    path = path_value(value)
    if len(os.fsencode(path / "control.sock")) > _SOCKET_PATH_BYTES:
        raise ValueError(f"too long: a socket path has at most {_SOCKET_PATH_BYTES} bytes")
    return path


def without_password(url: str) -> str:
    """Return the address of a proxy without user and password, whatever these hold."""
    scheme, separator, rest = url.partition("://")
    if not separator or not scheme.isalnum():  # no scheme: the client takes http
        scheme, rest = "http", url
    return f"{scheme}://{rest.rpartition('@')[2]}"


def seconds(value: str) -> float:
    """Return a number of seconds; raises ValueError."""
    if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,3})?", value) or not float(value) >= 0.05:
        raise ValueError("not a number of seconds of at least 0.05")
    return float(value)


def flag(value: str) -> bool:
    """Return what true, false, 1 or 0 means; raises ValueError."""
    if value.lower() not in ("true", "false", "1", "0"):
        raise ValueError("neither true nor false")
    return value.lower() in ("true", "1")


def choice(*choices: str) -> Callable[[str], str]:
    """Return a parser that takes nothing but `choices`."""

    def parse(value: str) -> str:
        if value not in choices:
            raise ValueError(f"not one of {', '.join(choices)}")
        return value

    return parse


def _log_format(value: str) -> str:
    if value == "auto":
        return "text" if sys.stdout.isatty() else "json"
    return choice("json", "text")(value)


def setting(
    name: str,
    default: str | None,
    meaning: str,
    parse: Callable[[str], Any] = text_value,
    *,
    required: bool = False,
) -> Any:  # noqa: ANN401 - a field takes the type of its annotation
    """Return the field of one variable; `parse` raises ValueError for what it cannot be."""
    return field(metadata={"variable": _Variable(name, default, meaning, parse, required)})


@dataclass(frozen=True, kw_only=True, slots=True)
class CommonSettings:
    """What every program reads."""

    run_dir: Path = setting(
        "POWER_AGENT_RUN_DIR", DEFAULT_RUN_DIR, "holds control.sock and events.sock", _run_dir
    )
    log_level: Literal["debug", "info", "warning", "error"] = setting(
        "POWER_AGENT_LOG_LEVEL",
        "info",
        "debug, info, warning or error",
        choice("debug", "info", "warning", "error"),
    )
    log_format: Literal["json", "text"] = setting(
        "POWER_AGENT_LOG_FORMAT", "auto", "json or text (auto: text on a terminal)", _log_format
    )
    in_kubernetes: bool = setting(
        "KUBERNETES_SERVICE_HOST", "", "set by the kubelet: this program runs in a pod", bool
    )

    def check(self) -> None:
        """Raise SettingsError if two settings contradict each other."""


S = TypeVar("S", bound=CommonSettings)


def _variables(kind: type[CommonSettings]) -> dict[str, _Variable]:
    return {f.name: f.metadata["variable"] for f in fields(kind)}


def parse_settings(kind: type[S], environment: Mapping[str, str]) -> S:
    """Return the settings in `environment`; raises SettingsError naming the first wrong one."""
    _refuse_misspelt(kind, environment)
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
    settings.check()
    return settings


def _names(kind: type[CommonSettings]) -> frozenset[str]:
    return frozenset(variable.name for variable in _variables(kind).values())


def _refuse_misspelt(kind: type[CommonSettings], environment: Mapping[str, str]) -> None:
    """Raise SettingsError for a variable whose name is nearly that of one of this program's."""
    for name in unknown.unread(environment):
        if right := unknown.meant(name, _names(kind)):
            raise SettingsError(f"{name} is no setting: did you mean {right}? correct or unset it")


def unread_variables(kind: type[CommonSettings], environment: Mapping[str, str]) -> list[str]:
    """Return a sentence on each variable that looks like a setting and that nobody reads."""
    found = []
    for name in unknown.unread(environment):
        near = unknown.meant(name, unknown.EVERY) or unknown.alike(name, _names(kind))
        hint = f"; did you mean {near}?" if near else ""
        found.append(f"{name} is no setting of version {__version__} and has no effect{hint}")
    return found


def unread_here(kind: type[CommonSettings]) -> list[str]:
    """Return the same of this process's environment."""
    return unread_variables(kind, os.environ)


def effective(kind: type[CommonSettings]) -> dict[str, str | None]:
    """Return the settings of this process as texts by variable, None where there is none."""
    return {
        variable.name: os.environ.get(variable.name) or variable.default
        for variable in _variables(kind).values()
    }


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
    """Tell whether coloured text is wanted (https://no-color.org)."""
    return not os.environ.get("NO_COLOR")


def whole_environment() -> Mapping[str, str]:
    """Return every variable, for what other programs define and we only look at."""
    return os.environ


def run_dir_from_environment() -> Path:
    """Return POWER_AGENT_RUN_DIR or its default, for clients that read nothing else."""
    return Path(os.environ.get("POWER_AGENT_RUN_DIR") or DEFAULT_RUN_DIR)

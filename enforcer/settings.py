"""What the enforcer reads from its environment; limits in milliwatts.

It says what a text means. shared/settings.py reads the environment.
"""

# ruff: noqa: RUF009 - `setting` only makes a dataclass field

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shared.settings import (
    CommonSettings,
    SettingsError,
    choice,
    flag,
    path_value,
    seconds,
    setting,
    text_value,
)
from shared.units import format_watts, parse_watts

_MOST_CGROUP_ROOTS = 16


@dataclass(frozen=True, slots=True)
class SafeDefault:
    """A limit for GPUs whose pods ask nothing usable: milliwatts, or a share of the factory's."""

    limit_mw: int | None = None
    percent: int | None = None

    def for_gpu(self, default_mw: int | None) -> int | None:
        """Return the milliwatts for a GPU whose factory default is `default_mw`, rounded down.

        None where this is a share and the GPU does not tell its default.
        """
        if self.percent is None:
            return self.limit_mw
        return None if default_mw is None else default_mw * self.percent // 100


def _cgroup_roots(value: str) -> str:
    if value.strip() == "auto":
        return "auto"
    parts = [part.strip() for part in text_value(value).split(",")]
    if len(parts) > _MOST_CGROUP_ROOTS:
        raise ValueError(f"{len(parts)} cgroup paths; at most {_MOST_CGROUP_ROOTS}")
    return ",".join(dict.fromkeys(_cgroup_path(part) for part in parts))


def _cgroup_path(value: str) -> str:
    """Return `value` as the kernel spells it: another spelling would match no process at all."""
    names = [name for name in value.split("/") if name not in ("", ".")]
    path = "/" + "/".join(names)
    if not value.startswith("/") or ".." in names:
        raise ValueError("neither `auto` nor cgroup paths such as / or /kubelet.slice")
    if names[:3] == ["sys", "fs", "cgroup"]:
        raise ValueError("a cgroup path begins below /sys/fs/cgroup: leave that out")
    if names and re.fullmatch(r"kubepods|(.+-)?kubepods\.slice", names[-1]):
        parent = "/" + "/".join(names[:-1])
        raise ValueError(f"'{path}' is kubepods itself; name its parent, '{parent}'")
    return path


def _patterns(value: str) -> tuple[str, ...]:
    parts = tuple(part.strip() for part in value.split(",") if part.strip())
    if not parts or not all(re.fullmatch(r"[A-Za-z0-9./_*?-]{1,256}", part) for part in parts):
        raise ValueError("not resource names such as nvidia.com/gpu or nvidia.com/*")
    return parts


def _uid(value: str) -> int:
    if not re.fullmatch(r"[0-9]{1,10}", value) or int(value) >= 2**32 - 1:
        raise ValueError("not a numeric user id")
    return int(value)


def _uids(value: str) -> frozenset[int]:
    return frozenset(_uid(part.strip()) for part in value.split(",") if part.strip())


def _safe_default(value: str) -> SafeDefault:
    percent = re.fullmatch(r"([0-9]{1,3})%", value)
    if percent is None:
        return SafeDefault(limit_mw=parse_watts(value))
    if not 1 <= int(percent.group(1)) <= 100:
        raise ValueError("a share is between 1% and 100%")
    return SafeDefault(percent=int(percent.group(1)))


# Three of the watcher's heartbeats, which come every two seconds (watcher/publisher.py): a shorter
# lease runs out between two of them, and every GPU would be given back and taken again for ever.
LEAST_LEASE_S = 6.0


def _lease(value: str) -> float | None:
    if value == "hold":
        return None
    kind, _, after = value.partition(":")
    if kind != "release":
        raise ValueError("neither `hold` nor `release:<seconds>`")
    lease_s = seconds(after)
    if lease_s < LEAST_LEASE_S:
        raise ValueError(f"shorter than three of the watcher's heartbeats ({LEAST_LEASE_S:g} s)")
    return lease_s


# supervisord kills what has not ended 15 seconds after SIGTERM (stopwaitsecs in supervisord.conf).
MOST_EXIT_SUPERVISED_S = 13.0


@dataclass(frozen=True, kw_only=True, slots=True)
class EnforcerSettings(CommonSettings):
    """What the enforcer reads; limits in milliwatts, None where nothing is set."""

    state_dir: Path = setting(
        "POWER_AGENT_STATE_DIR",
        "/var/lib/power-agent",
        "the ledger, on disk that outlives the pod",
        path_value,
    )
    proc_root: Path = setting("POWER_AGENT_PROC_ROOT", "/proc", "the host's proc", path_value)
    sysfs_root: Path = setting(
        "POWER_AGENT_SYSFS_ROOT", "/sys", "the host's sysfs: which GPUs are on the bus", path_value
    )
    cgroup_root: str = setting(
        "POWER_AGENT_CGROUP_ROOT",
        "auto",
        "parents of the kubelet's kubepods cgroup, comma separated; auto learns them",
        _cgroup_roots,
    )
    kubelet_dir: Path | None = setting(
        "POWER_AGENT_KUBELET_DIR",
        None,
        "the kubelet's root: a limit stands when a pod is assigned a GPU, before it starts",
        path_value,
    )
    kubelet_resources: tuple[str, ...] = setting(
        "POWER_AGENT_KUBELET_RESOURCES",
        "nvidia.com/*",
        "resources whose devices are GPUs: names with * and ?, comma separated",
        _patterns,
    )
    watcher_uid: int = setting(
        "POWER_AGENT_WATCHER_UID", "65532", "the only uid whose snapshots count", _uid
    )
    reader_uids: frozenset[int] = setting(
        "POWER_AGENT_READER_UIDS", "0", "uids that may ask and listen, comma separated", _uids
    )
    scan_s: float = setting(
        "POWER_AGENT_SCAN_SECONDS", "1", "how often GPU process lists are read", seconds
    )
    reconcile_s: float = setting(
        "POWER_AGENT_RECONCILE_SECONDS",
        "15",
        "how often every limit is read back and drift mended",
        seconds,
    )
    min_mw: int | None = setting(
        "POWER_AGENT_MIN_WATTS", None, "administrator's lower bound in watts", parse_watts
    )
    max_mw: int | None = setting(
        "POWER_AGENT_MAX_WATTS", None, "administrator's upper bound in watts", parse_watts
    )
    safe_default: SafeDefault | None = setting(
        "POWER_AGENT_SAFE_DEFAULT",
        None,
        "limit for GPUs whose pods ask nothing usable: 300 or 70%",
        _safe_default,
    )
    conflict: Literal["lowest", "safe-default"] = setting(
        "POWER_AGENT_CONFLICT",
        "lowest",
        "several pods, different limits: lowest or safe-default",
        choice("lowest", "safe-default"),
    )
    release_to: Literal["original", "default"] = setting(
        "POWER_AGENT_RELEASE_TO",
        "original",
        "given back: the limit found (original) or the factory default",
        choice("original", "default"),
    )
    on_exit: Literal["restore", "hold"] = setting(
        "POWER_AGENT_ON_EXIT",
        "restore",
        "on SIGTERM: restore every GPU, or hold the limits",
        choice("restore", "hold"),
    )
    exit_s: float = setting(
        "POWER_AGENT_EXIT_SECONDS",
        "10",
        "on SIGTERM: how long to try to restore; below the pod's grace period",
        seconds,
    )
    lease_s: float | None = setting(
        "POWER_AGENT_LEASE",
        "hold",
        "watcher silent: hold, or release:<seconds>, at least 6",
        _lease,
    )
    dry_run: bool = setting(
        "POWER_AGENT_DRY_RUN", "false", "decide and report, never write a limit", flag
    )
    supervised: bool = setting(
        "POWER_AGENT_SUPERVISED", "false", "shares its container with the watcher", flag
    )

    def check(self) -> None:
        """Raise SettingsError where two settings contradict each other."""
        low, high = self.min_mw, self.max_mw
        if low is not None and high is not None and low > high:
            raise SettingsError(
                f"POWER_AGENT_MIN_WATTS={format_watts(low)} is above "
                f"POWER_AGENT_MAX_WATTS={format_watts(high)}: lower the first or raise the second"
            )
        if self.conflict == "safe-default" and self.safe_default is None:
            raise SettingsError(
                "POWER_AGENT_CONFLICT='safe-default' needs POWER_AGENT_SAFE_DEFAULT: "
                "set that to watts (300) or a share (70%)"
            )
        if self.supervised and self.exit_s > MOST_EXIT_SUPERVISED_S:
            raise SettingsError(
                f"POWER_AGENT_EXIT_SECONDS={self.exit_s:g} is too long under supervisord, "
                f"which kills after 15: set it to at most {MOST_EXIT_SUPERVISED_S:g}"
            )

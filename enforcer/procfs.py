"""Whose process a pid is, from the host's /proc.

It knows no NVML, and of pods only what a cgroup says.
"""

import contextlib
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from enforcer import cgroups
from enforcer.policy import Stranger

_ENDED = (FileNotFoundError, ProcessLookupError)  # ENOENT on opening, ESRCH on reading
_PF_EXITING = 0x4  # linux/sched.h
_THREADS = 64  # of a process whose first one exits
_SHOWN_BYTES = 300
_PID_MAX_LIMIT = 4 * 1024 * 1024  # include/linux/threads.h, with 64 bits


def _read(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:  # noqa: PTH123 - a third of the time of Path's
        return file.readall()


def _stat(directory: str) -> tuple[int | None, bool]:
    """Return when a task started (field 22 of stat, proc(5)) and whether it exits (field 9).

    None and False where there is no stat: a test's proc root may have only cgroup files.
    """
    try:
        # The name in parentheses may hold anything, also parentheses.
        fields = _read(f"{directory}/stat").rpartition(b")")[2].split()
    except FileNotFoundError:
        return None, False
    return int(fields[19]), bool(int(fields[6]) & _PF_EXITING)


def _cgroup_of_a_living_thread(directory: str) -> bytes:
    """Return what a thread shows that does not exit; raises ProcessLookupError without any.

    In a version 1 hierarchy a task that exits shows `/` (kernel/cgroup/cgroup.c,
    proc_cgroup_show), and a process may outlive its first thread. Returns an empty text
    where none of the first threads is alive.
    """
    threads = os.listdir(f"{directory}/task")  # noqa: PTH208 - names are all it takes
    for thread in threads[:_THREADS]:
        task = f"{directory}/task/{thread}"
        with contextlib.suppress(*_ENDED):
            text = _read(f"{task}/cgroup")
            started, exits = _stat(task)
            if started is not None and not exits:
                return text
    if len(threads) > _THREADS:
        return b""
    raise ProcessLookupError


_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def now_ticks() -> int:
    """Return the time in the unit and from the origin of a process's start time."""
    return int(time.clock_gettime(time.CLOCK_BOOTTIME) * _TICKS_PER_S)


class Found(NamedTuple):
    """Whose process a pid is, what shows it, and when it started, in seconds since the boot.

    The owner is None where it has ended, the start None where it is not known.
    """

    owner: str | Stranger | None
    evidence: str
    started_s: float | None = None


class ProcessReader:
    """Tells whose process a pid is; believes of no process anything beyond one call."""

    def __init__(self, proc_root: Path, roots: Sequence[str]) -> None:
        self._proc = proc_root
        self.roots = tuple(roots)
        self._most_pid = 0

    def may_exist(self, pid: int) -> bool:
        """Tell whether this kernel gives such a number to a process.

        A number above the largest has that read anew: a node's tuning may raise it at any time.
        """
        if pid > self._most_pid:
            self._most_pid = self._read_most_pid()
        return 0 < pid <= self._most_pid

    def _read_most_pid(self) -> int:
        """Return the largest pid of this kernel, or of any where this one does not tell."""
        try:
            return int(_read(f"{self._proc}/sys/kernel/pid_max"))
        except (OSError, ValueError):
            return _PID_MAX_LIMIT

    def owner(self, pid: int, listed_ticks: int) -> Found:
        """Return the pod's uid or what else `pid` is, None if it ended, and the evidence.

        `listed_ticks` is when the list that holds `pid` was asked for: a process that started
        later only has the same number.
        """
        directory = f"{self._proc}/{pid}"
        try:
            before, _ = _stat(directory)
            text = _read(f"{directory}/cgroup")
            after, exits = _stat(directory)
            if exits and cgroups.pod_of(text, self.roots) is Stranger.OTHER:
                text = _cgroup_of_a_living_thread(directory)
                after, _ = _stat(directory)
        except _ENDED:
            return Found(None, "ended")
        except (OSError, ValueError, IndexError) as error:
            return Found(Stranger.UNKNOWN, f"{directory} cannot be read: {error}")
        if before != after or (before is not None and before > listed_ticks):
            return Found(None, "ended, its number went to another")
        shown = text[:_SHOWN_BYTES].decode("utf-8", "replace").strip()
        started_s = None if before is None else before / _TICKS_PER_S
        return Found(cgroups.pod_of(text, self.roots), shown, started_s)


def boot_id(proc_root: Path) -> str:
    """Return the id of this boot: with another one, hardware has forgotten its limits."""
    own = proc_root / "sys/kernel/random/boot_id"
    return _read(str(own if own.exists() else Path("/proc/sys/kernel/random/boot_id"))).decode()

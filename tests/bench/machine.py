"""The machine: what it is, how busy, two cores of it for everything that is measured; and what a
process costs it."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path

CORES = 2
# linux/posix-timers_types.h: the clock of a whole process, threads that ended included.
_CPUCLOCK_SCHED = 2


def use_two_cores() -> None:
    """For this process and all that it starts, so that figures of different machines compare."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])


def facts() -> dict[str, str]:
    """What a reader of the figures has to know."""
    used = len(os.sched_getaffinity(0))
    return {
        "processor": _processor(),
        "cores": f"{used} of {os.cpu_count()} used",
        "kernel": f"{platform.system()} {platform.release()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
    }


def load(before: float) -> str:
    """What else the machine did: the load of the minute before the figures, and of their last."""
    after = os.getloadavg()[0]
    warning = " (busy: figures are worse than this machine can)" if max(before, after) > 1 else ""
    return f"{before:.2f} before, {after:.2f} at the end{warning}"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def cpu_s(pid: int) -> float:
    """Processor time that a process has used, user and system, to the nanosecond."""
    return time.clock_gettime(~pid << 3 | _CPUCLOCK_SCHED)


def resident_mib(pid: int) -> float:
    """VmRSS (proc(5): in units of 1024 bytes)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise LookupError(f"process {pid} has no memory: it has ended")

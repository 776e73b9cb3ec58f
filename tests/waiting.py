"""Waits until something is so: one set of helpers for all tests, which knows nothing of the agent.

A deadline here is for hangs alone. It says nothing about how fast the agent is to be: that is
measured by `make bench`. A test that means "by itself, not by the next scan" sets the next scan far
beyond the deadline, and then simply waits.
"""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

# What takes longest is the start of a Python program: 0.3 s alone, 5 s with eight busy loops beside
# it on two cores. pytest's own `timeout` (pyproject.toml) must be longer than this.
HANG_S = 60.0
POLL_S = 0.01

# How many times slower than an ordinary machine the one is that the tests look at, for instance an
# emulated one. It multiplies every deadline here, and what tests/cluster gives kubectl and probes.
SLOWNESS_VARIABLE = "POWER_AGENT_TEST_SLOWNESS"


def slowness(environment: Mapping[str, str]) -> float:
    """The factor that the environment names; 1 where it names none."""
    text = environment.get(SLOWNESS_VARIABLE) or "1"
    try:
        factor = float(text)
    except ValueError:
        factor = 0.0
    if not 1 <= factor <= 100:
        raise ValueError(f"{SLOWNESS_VARIABLE}={text}: a factor from 1 to 100 is wanted")
    return factor


SLOWNESS = slowness(os.environ)

T = TypeVar("T")


class NotInTimeError(AssertionError):
    """What was waited for did not come."""


def until(
    condition: Callable[[], T],
    what: str,
    *,
    deadline_s: float = HANG_S,
    poll_s: float = POLL_S,
    explain: Callable[[], object] = str,
) -> T:
    """The first true value of the condition; NotInTimeError with its last value otherwise.

    `explain` is asked when the time is over, for whoever reads the failure. The condition may do a
    little work of its own each time.
    """
    deadline_s *= SLOWNESS
    end_s = time.monotonic() + deadline_s
    began_s = time.monotonic()
    while not (found := condition()):
        if time.monotonic() > end_s:
            raise NotInTimeError(f"{what}: not within {deadline_s:g} s: {found!r}\n{explain()}")
        time.sleep(rest_s(poll_s, time.monotonic() - began_s, SLOWNESS))
        began_s = time.monotonic()
    return found


def rest_s(poll_s: float, looked_s: float, factor: float) -> float:
    """How long until the next look. On a slow machine a look takes time from what is waited for."""
    return poll_s if factor == 1 else max(poll_s, looked_s)


def stays(
    condition: Callable[[], object],
    for_s: float,
    *,
    poll_s: float = POLL_S,
    explain: Callable[[], object] = str,
) -> None:
    """Fail as soon as the condition does not hold, up to `for_s` from now.

    The time is an input: for so long it is looked for what must not happen.
    """
    end_s = time.monotonic() + for_s
    while time.monotonic() < end_s:
        assert condition(), explain()
        time.sleep(poll_s)


def ended(process: subprocess.Popen[Any]) -> int:
    """The exit status of a process that ends, or is to end now."""
    try:
        return process.wait(HANG_S)
    except subprocess.TimeoutExpired:
        raise NotInTimeError(f"{process.args!r}: still there after {HANG_S:g} s") from None


def joined(thread: threading.Thread) -> None:
    """Wait for a thread that is to end now."""
    thread.join(HANG_S)
    if thread.is_alive():
        raise NotInTimeError(f"{thread.name}: still there after {HANG_S:g} s")


def gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody has reaped yet has ended all the same."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return after_name.split()[0] == b"Z"

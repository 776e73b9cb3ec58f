"""The clock that is handed in: tests hand in one that they move themselves.

It knows nothing of what is due.
"""

import time
from typing import Protocol


class Clock(Protocol):
    """Time as the enforcer needs it."""

    def now_s(self) -> float:
        """Return the time for durations; its origin means nothing."""

    def wall_s(self) -> float:
        """Return the time for people, in seconds since 1970."""

    def boot_s(self) -> float:
        """Return the time since the boot, by which the kernel says when a process began."""

    def rest(self, span_s: float) -> None:
        """Let time pass."""


class SystemClock:
    """The machine's own."""

    def now_s(self) -> float:
        """Return CLOCK_MONOTONIC."""
        return time.monotonic()

    def wall_s(self) -> float:
        """Return CLOCK_REALTIME."""
        return time.time()

    def boot_s(self) -> float:
        """Return CLOCK_BOOTTIME (proc(5), starttime)."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    def rest(self, span_s: float) -> None:
        """Sleep."""
        time.sleep(span_s)

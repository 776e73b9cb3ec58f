"""The pulse: a file that says when the loop last turned, for probes; knows nothing of the loop.

A probe that finds it fresh need not start a Python to ask (deploy/probe). It only ever spares the
question: where the file is missing, old or unreadable the probe asks all the same. So nothing here
may end the loop or keep it waiting, and nothing has to be said when the file cannot be written.
"""

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path

from shared.sockets import pulse_path

_EVERY_S = 1.0
# O_NOFOLLOW and O_NONBLOCK: no link is followed, and a pipe in its place is not waited for. Opened
# each time, so that a file that somebody removed comes again.
_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def _uptime_s() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Pulse:
    """One file of one line: whole seconds of CLOCK_BOOTTIME, which is what /proc/uptime shows.

    That clock goes on while the machine sleeps, and no one can set it (clock_gettime(2)).
    """

    def __init__(self, run_dir: Path, clock: Callable[[], float] = _uptime_s) -> None:
        """Remove what an enforcer before this one left: this one does not work yet."""
        self._path = pulse_path(run_dir)
        self._clock = clock
        self._due_s = 0.0
        self._remove()

    def beat(self) -> None:
        """Say that the loop turns; costs a look at the clock, and a write once a second."""
        now_s = self._clock()
        if now_s < self._due_s:
            return
        if not self._due_s:
            self._remove()  # others could write here until the directory was made root's own
        self._due_s = now_s + _EVERY_S
        with contextlib.suppress(OSError):
            self._write(int(now_s))

    def _write(self, now_s: int) -> None:
        file = os.open(self._path, _FLAGS, 0o644)
        try:
            # Always as long as before: on a full tmpfs writing needs no new page, and a reader that
            # comes between finds digits of both at worst, which is no fresh time. Filled with
            # blanks, since a shell takes 09 for a wrong octal number.
            os.pwrite(file, b"%10d\n" % now_s, 0)
        finally:
            os.close(file)

    def _remove(self) -> None:
        with contextlib.suppress(OSError):
            self._path.unlink()

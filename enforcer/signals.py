"""SIGTERM and SIGINT as a socket that becomes readable, so that a loop ends between two steps.

It knows nothing of what ends.
"""

import select
import signal
import socket
from types import FrameType


class StopSignal:
    """Made once in the main thread; from then on both signals only set it."""

    def __init__(self) -> None:
        self._end, self._wake = socket.socketpair()
        self._end.setblocking(False)
        self._wake.setblocking(False)
        self.requested = False
        # Written to by the interpreter's own handler, in C, at the very moment. Python's handlers
        # below run between two steps: where the signal comes just before a wait, after that wait.
        signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self.requested = True

    def fileno(self) -> int:
        """Return the descriptor to poll."""
        return self._end.fileno()

    def wait(self, timeout_s: float) -> bool:
        """Wait at most `timeout_s`; tells whether a stop was requested."""
        select.select([self._end], [], [], timeout_s)
        return self.requested

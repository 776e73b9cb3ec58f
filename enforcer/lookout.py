"""Finds out whose connections are refused: for a moment another socket lies at the path.

libzmq closes the connection of a uid that may not connect before anybody can ask whose it is. Here
the kernel is asked (SO_PEERCRED), and the connection is closed without a byte being read. Who may
connect and comes in that moment comes again, as libzmq does by itself. It knows no message.
"""

import contextlib
import socket
import struct
from collections.abc import Collection
from pathlib import Path

# Longer than libzmq waits before it connects again (ZMQ_RECONNECT_IVL, 100 ms).
_LOOKS_S = 0.25
# From one look to the next, after one that has found somebody and after one that has not.
_FOUND_S, _NOBODY_S = 60.0, 20.0
_BACKLOG = 8
_CREDENTIALS = struct.Struct("iII")  # struct ucred: pid, uid, gid


class Lookout:
    """Looks at most once in a while, and for a moment only."""

    def __init__(self, uids: Collection[int]) -> None:
        """Prepare; `uids` may connect."""
        self._uids = uids
        self._next_s = 0.0
        self._ends_s = 0.0
        self._path: Path | None = None
        self._socket: socket.socket | None = None
        self._found: tuple[int, int] | None = None

    @property
    def is_looking(self) -> bool:
        """Whether it lies in front of a socket now."""
        return self._socket is not None

    @property
    def fd(self) -> int | None:
        """What becomes readable when somebody comes, None while it does not look."""
        return None if self._socket is None else self._socket.fileno()

    def left_s(self, now_s: float) -> float:
        """Return how long it goes on looking."""
        return max(0.0, self._ends_s - now_s)

    def take(self) -> tuple[int, int] | None:
        """Return the uid and pid of one that was refused, once."""
        found, self._found = self._found, None
        return found

    def begin(self, path: Path, now_s: float) -> None:
        """Look at who comes to `path`, where it is time for that."""
        if self._socket is not None or now_s < self._next_s:
            return
        self._next_s, self._ends_s = now_s + _NOBODY_S, now_s + _LOOKS_S
        front, behind = _front(path), _behind(path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            for left in (front, behind):  # by an enforcer that was killed
                left.unlink(missing_ok=True)
            listener.bind(str(front))
            front.chmod(0o666)
            listener.listen(_BACKLOG)
            behind.hardlink_to(path)
            front.replace(path)  # at no moment is there nothing at the path
        except OSError:  # it is only told to people
            listener.close()
            return
        self._path, self._socket = path, listener

    def look(self, now_s: float) -> None:
        """Take note of who has come, and end where somebody was found or it is time."""
        if self._socket is None:
            return
        with contextlib.suppress(OSError):
            while self._found is None:
                self._found = self._refused(self._socket)
        if self._found is not None:
            self._next_s = now_s + _FOUND_S
        if self._found is not None or now_s >= self._ends_s:
            self.end()

    def _refused(self, listener: socket.socket) -> tuple[int, int] | None:
        """Return who has come next, None where that one may connect; raises OSError for nobody."""
        visitor, _ = listener.accept()
        with visitor:
            said = visitor.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        pid, uid, _ = _CREDENTIALS.unpack(said)
        return None if uid in self._uids else (uid, pid)

    def end(self) -> None:
        """Give the path back to whose it is."""
        if self._socket is None or self._path is None:
            return
        with contextlib.suppress(OSError):
            _behind(self._path).replace(self._path)
        self._socket.close()
        self._path = self._socket = None


def _front(path: Path) -> Path:
    # Not longer than the path itself: a socket's may have 107 characters.
    return path.with_name(f".f-{path.name[:6]}")


def _behind(path: Path) -> Path:
    return path.with_name(f".b-{path.name[:6]}")

"""Writes to a descriptor and hardly waits for its reader; knows nothing of logs.

O_NONBLOCK cannot be set on standard output itself: the flag belongs to the open file
description (fcntl(2)), which a terminal, supervisord or another program shares. So:

- A regular file or /dev/null has no reader that could stop: it is written as it is.
- A socket is told for each message that it must not wait (MSG_DONTWAIT, send(2)).
- A pipe or a terminal is opened once more through /dev/fd (proc_pid_fd(5)). That makes an open
  file description of our own, and O_NONBLOCK on it touches nobody else.
- Where that is refused (a pipe that another user made, as for the supervised watcher) poll(2) is
  asked first. A pipe says POLLOUT when a page of it is free (pipe_poll in fs/pipe.c), and what is
  written has at most PIPE_BUF bytes, so it fits. That is sure as long as nobody else writes to the
  same pipe, and each program has its own from supervisord and from a container runtime.

A pipe takes PIPE_BUF bytes whole or not at all (pipe(7)), so lines of two writers never mix.

A reader that is only slow, as on a busy node, should not cost lines. So it is waited for: a fifth
of a second at first, and after that a hundredth of the time that passes.
"""

import os
import select
import socket
import stat
import time
from collections.abc import Callable

from shared.pace import Bucket

# limits.h; a page, and so what one free place of a pipe takes, is never smaller.
MOST_BYTES = select.PIPE_BUF
# Seconds of waiting: at once, and gained each second.
_PATIENCE_S = 0.2
_PATIENCE_GAINED_S = 0.01
_LEAST_S = 0.001  # poll(2) counts in milliseconds


class Output:
    """One descriptor; what it does not take at once is not written at all."""

    def __init__(self, fd: int | None) -> None:
        """Find out what `fd` is; None takes nothing."""
        self._some = _nothing if fd is None else _writer(fd)
        self._room = select.poll()
        if fd is not None:
            self._room.register(fd, select.POLLOUT)
        self._patience = Bucket.full(_PATIENCE_GAINED_S, _PATIENCE_S, time.monotonic())
        # Only a terminal, a socket or a full disk takes part of a line. Its rest is written first.
        self._rest = b""

    def write(self, line: bytes) -> bool:
        """Write all of `line`, at most MOST_BYTES, or nothing; tells whether it was taken."""
        if self._rest:
            self._rest = self._rest[self._take(self._rest) :]
        if self._rest:
            return False
        taken = self._take(line)
        self._rest = line[taken:] if taken else b""
        return taken > 0

    def _take(self, data: bytes) -> int:
        """Return how many bytes were taken; 0 if none can be written now."""
        while True:
            try:
                taken = self._some(data)
            except BlockingIOError:
                taken = 0
            except OSError:  # the reader has gone, or a disk has no room
                return 0
            if taken or not self._waited():
                return taken

    def _waited(self) -> bool:
        """Wait for room while there is patience; tells whether to try again."""
        began_s = time.monotonic()
        self._patience = self._patience.filled(began_s)
        if self._patience.credit < _LEAST_S:
            return False
        ready = self._room.poll(self._patience.credit * 1000)
        self._patience = self._patience.spent(time.monotonic() - began_s)
        return bool(ready)


def _nothing(_data: bytes) -> int:
    raise OSError("there is no standard output")


def _writer(fd: int) -> Callable[[bytes], int]:
    """Return what writes to `fd` without waiting, and returns how much it took."""
    mode = os.fstat(fd).st_mode
    if stat.S_ISSOCK(mode):
        connection = socket.socket(fileno=os.dup(fd))
        return lambda data: connection.send(data, socket.MSG_DONTWAIT)
    if not stat.S_ISFIFO(mode) and not os.isatty(fd):
        return lambda data: os.write(fd, data)
    try:
        own = os.open(f"/dev/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:
        return _asking_first(fd)
    return lambda data: os.write(own, data)


def _asking_first(fd: int) -> Callable[[bytes], int]:
    """Return a writer for a descriptor that waits, but not while it says that it has room."""
    room = select.poll()
    room.register(fd, select.POLLOUT)
    return lambda data: os.write(fd, data) if room.poll(0) else 0

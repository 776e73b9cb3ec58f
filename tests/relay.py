"""Carries bytes between two sockets, both ways, as a front before an API server does."""

from __future__ import annotations

import contextlib
import socket
import threading


def relay(client: socket.socket, server: socket.socket) -> None:
    """Return when either side has ended; then both have."""
    back = threading.Thread(target=_carry, args=(server, client))
    back.start()
    _carry(client, server)
    back.join()


def _carry(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    for end in (source, target):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)

"""Asking the enforcer and listening to it: the clients' end, for the watcher and powerctl."""

import time
from pathlib import Path

import zmq

from shared import messages
from shared.sockets import (
    TransportError,
    connection_event,
    control_path,
    events_path,
    hindrance,
    open_control,
)

_AGAIN_S = 0.05  # how soon a client tries again to send what was not taken
# The longest single wait for an answer. A signal that comes after Python has looked for signals and
# before poll(2) begins does not end that wait: its handler runs only afterwards.
_WAIT_S = 0.25


class Client:
    """A DEALER towards the enforcer that knows whether somebody is there.

    One message at most waits and none is kept for an enforcer that is away (IMMEDIATE): after a
    reconnect only what is sent then arrives, never something stale.
    """

    def __init__(self, run_dir: Path) -> None:
        """Connect, now or whenever the enforcer is there."""
        self._run_dir = run_dir
        self._context = zmq.Context(io_threads=1)
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        self._socket.linger = 0
        self._socket.sndhwm = 1
        self._socket.immediate = True
        self._socket.reconnect_ivl = 50
        self._socket.handshake_ivl = 2000
        self._monitor = self._socket.get_monitor_socket(
            zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
        )
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)
        self.connected = False
        self.connections = 0  # rises with each connection, so that a restart is noticed
        self._socket.connect(f"ipc://{control_path(run_dir)}")

    def watch(self, fd: int) -> None:
        """Let `wait` return when `fd` is readable too."""
        self._poller.register(fd, zmq.POLLIN)

    def send(self, request: messages.Request) -> bool:
        """Send `request`; False where the enforcer is away or does not take it now."""
        try:
            self._socket.send(messages.encode(request), zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def wait(self, timeout_s: float) -> list[messages.Reply]:
        """Wait for answers, a change of `connected` or a watched fd; raises msgspec.DecodeError."""
        ready = dict(self._poller.poll(max(0, round(timeout_s * 1000 + 0.499))))
        if self._monitor in ready:
            self._note()
        replies: list[messages.Reply] = []
        while self._socket in ready:
            try:
                replies.append(messages.decode_reply(self._socket.recv(zmq.NOBLOCK)))
            except zmq.Again:
                break
        return replies

    def _note(self) -> None:
        event = connection_event(self._monitor.recv_multipart(zmq.NOBLOCK)[0])
        self.connected = event == zmq.EVENT_HANDSHAKE_SUCCEEDED
        self.connections += self.connected

    def request(self, request: messages.Request, timeout_s: float) -> messages.Reply:
        """Ask and return the answer; raises TransportError when none came in time."""
        deadline = time.monotonic() + timeout_s
        while self._monitor.poll(0):
            self._note()
        # The connection that the request went over: this one, or the next if it is not up yet.
        sent_over = self.connections + (not self.connected) if self.send(request) else None
        while (left_s := deadline - time.monotonic()) > 0:
            # The socket may say that it is connected before it accepts a message (socket_base.cpp,
            # process_commands).
            unsent = sent_over != self.connections
            replies = self.wait(min(left_s, _AGAIN_S if unsent else _WAIT_S))
            if replies:
                return replies[0]
            if self.connected and sent_over != self.connections and self.send(request):
                sent_over = self.connections  # an answer is lost with its connection
        raise TransportError(f"no answer within {timeout_s:g} s")

    def hindrance(self) -> tuple[str, str] | None:
        """Return what keeps from connecting and the remedy; None where the socket can be opened."""
        try:
            open_control(self._run_dir).close()
        except OSError as error:
            return hindrance(control_path(self._run_dir), error)
        return None

    def close(self) -> None:
        """Let go of the socket; nothing is sent after this."""
        self._context.destroy(linger=0)


class Subscriber:
    """A listener to the enforcer's events."""

    def __init__(self, run_dir: Path) -> None:
        """Connect, now or whenever the enforcer is there."""
        self._context = zmq.Context(io_threads=1)
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.SUB)
        self._socket.linger = 0
        self._socket.subscribe(b"")
        self._socket.connect(f"ipc://{events_path(run_dir)}")

    def receive(self, timeout_s: float) -> messages.Event | None:
        """Return the next event, None when none came in time; raises msgspec.DecodeError."""
        if not self._socket.poll(round(timeout_s * 1000)):
            return None
        return messages.decode_event(self._socket.recv())

    def close(self) -> None:
        """Stop listening."""
        self._context.destroy(linger=0)

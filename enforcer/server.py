"""The enforcer's end of the sockets, and the only file of the root side that imports zmq.

What is relied on, and why (libzmq 4.3.5):
- libzmq's own bind unlinks whatever lies at the path and gives the socket the umask's mode.
  So the listening socket is made here and handed over by ZMQ_USE_FD.
- ZMQ_IPC_FILTER_UID asks the kernel (SO_PEERCRED) at accept, before a byte is parsed. It is the
  only measure that acts against endless multipart messages, which ZMQ_MAXMSGSIZE does not bound.
- Without a ZAP domain a ZMTP 1.0/2.0 client delivers messages that carry no credentials.
- `Peer-Address` of a received frame is `localhost:<uid>:<gid>:<pid>` as of connect time.
- A ROUTER numbers its peers from rand(), which nobody seeds, and aborts where a peer has claimed
  the next number as its identity (socket_base.cpp, add_out_pipe).
- A PUB reads subscriptions when it is asked for anything, all there are, and a topic costs it a
  node for each byte; each node is visited for each listener that goes (generic_mtrie_impl.hpp).
"""

import contextlib
import ctypes
import os
import socket
import stat
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import zmq

from enforcer.lookout import Lookout
from shared import messages
from shared.pace import Bucket
from shared.sockets import TransportError, connection_event, control_path, events_path

_M_ARENA_MAX = -8  # malloc.h
_ZAP_ENDPOINT = "inproc://zeromq.zap.01"  # RFC 27
_HANDSHAKE_MS = 500
_QUEUE = 64  # answers or events that may wait for a peer
_ASKED = 4  # requests that may wait of a peer: an honest one waits for the answer to its last
_FRAMES = 4  # kept of a message: one more than any may have
_TURN = 64  # requests taken in one turn, so that a flood cannot starve the limits
_BACKLOG = 64
_CONNECTIONS = 128  # of one socket; a watcher and a few readers need a handful
_OWN_FILES = 64  # that the enforcer has open for itself, at most: about thirty
_SUBSCRIPTION_BYTES = 64  # a listener sends subscriptions and its handshake, nothing else
_TOPICS = 256  # of all listeners; `powerctl` has one, the empty one
# Connections of one uid: a second, and at once.
_ENTRIES_PER_S = 100.0
_ENTRIES = 200.0
_CLOSED_S = 0.2  # how long nobody can connect when there were more
# Time that requests may take: a second of it buys a thousand small ones, or 16 MiB.
_CREDIT_S = 1.0
_MESSAGE_S = 1 / 1000
_BYTE_S = 1 / (16 << 20)
_REST_S = 0.001


@dataclass(frozen=True, slots=True)
class Incoming:
    """One request as it came: where the answer goes, who sent it, and the payload."""

    envelope: tuple[bytes, ...]
    payload: bytes
    uid: int | None
    pid: int


def _credentials(address: str) -> tuple[int | None, int]:
    """Return (uid, pid) of a kernel-made peer address; uid None where there is no proof."""
    parts = address.rsplit(":", 3)  # from the right: nothing before can shift the fields
    if len(parts) != 4 or not all(part.isascii() and part.isdigit() for part in parts[1:]):
        return None, 0
    return int(parts[1]), int(parts[3])


def connections_for(descriptors: int) -> int:
    """Return how many connections a socket may have where so many files may be open in all.

    There are two sockets, and half of what is left is for those that come within a turn.
    """
    return max(1, min(_CONNECTIONS, (descriptors - _OWN_FILES) // 4))


def prepare_directory(run_dir: Path) -> None:
    """Make `run_dir` a directory that only its owner may write: an emptyDir comes as 0777.

    Raises TransportError. Done again by Server, who needs no privilege for it any more.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        held = os.open(run_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            os.fchown(held, os.geteuid(), os.getegid())
            os.fchmod(held, 0o755)
        finally:
            os.close(held)
    except OSError as error:
        raise TransportError(
            f"POWER_AGENT_RUN_DIR='{run_dir}': {error.strerror}; "
            "name a directory that this user owns or may create"
        ) from error


def _listen(path: Path) -> int:
    """Return a listening socket at `path` that everyone can connect to; the filter decides."""
    if path.exists() or path.is_symlink():
        if stat.S_ISDIR(path.lstat().st_mode):
            raise TransportError(f"{path} is a directory: remove it")
        path.unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        listener.bind(str(path))
        path.chmod(0o666)  # connecting needs write permission (unix(7))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise TransportError(f"cannot listen at {path}: {error.strerror}") from error
    return listener.detach()


@dataclass(slots=True)
class _Endpoint:
    """A listening socket of libzmq, and how many connections it has."""

    socket: zmq.Socket[bytes]
    monitor: zmq.Socket[bytes]
    path: Path
    most: int  # connections
    connections: int = 0
    topics: int = 0  # counted before it listened
    closed_until: float | None = None

    def listen(self) -> int:
        """Listen, again or for the first time; return how many were refused before."""
        refused = 0
        # bind waits for libzmq, and libzmq waits for this side while too many events lie unread.
        # So they are read first.
        while self.monitor.poll(0):
            refused += self.note()
        self.socket.setsockopt(zmq.USE_FD, _listen(self.path))
        self.socket.bind(f"ipc://{self.path}")
        self.closed_until = None
        self.connections = 0
        if self.socket.type == zmq.PUB:
            self.topics = int(self.socket.getsockopt(zmq.TOPICS_COUNT))
        return refused

    def drop(self) -> int:
        """Drop all connections and listen no more for a moment; return how many there were."""
        self.socket.unbind(f"ipc://{self.path}")
        self.closed_until = time.monotonic() + _CLOSED_S
        return self.connections

    def note_topics(self) -> int:
        """Drop all listeners where they have too many topics; return how many there were.

        libzmq counts a topic when it gets its first listener and no less when they all have gone
        (generic_mtrie_impl.hpp, rm), so those of honest listeners add up too: they come again.
        """
        if self.closed_until is not None:
            return 0
        topics = int(self.socket.getsockopt(zmq.TOPICS_COUNT))
        return self.drop() if topics > self.topics + _TOPICS else 0

    def note(self) -> int:
        """Take what happened to connections; return how many were refused.

        libzmq aborts the process where accept finds no descriptor (ipc_listener.cpp), so beyond
        a number all are dropped (that is what unbind does) and the honest ones come again. A
        monitor that is not read for long stops libzmq from accepting, so the number cannot run
        away while this side is busy.
        """
        refused = 0
        with contextlib.suppress(zmq.Again):
            for _ in range(_TURN):
                event = connection_event(self.monitor.recv_multipart(zmq.NOBLOCK)[0])
                refused += event == zmq.EVENT_ACCEPT_FAILED
                self.connections += event == zmq.EVENT_ACCEPTED
                self.connections -= event == zmq.EVENT_DISCONNECTED and self.connections > 0
        # A socket lets go of what ended connections leave behind when it is asked something, and
        # nothing else asks the PUB while there is nothing to publish.
        self.socket.getsockopt(zmq.EVENTS)
        if self.closed_until is None and self.connections > self.most:
            refused += self.drop()
        return refused


class Server:
    """The enforcer's end: a ROUTER for requests and a PUB for events, for proven uids only."""

    def __init__(self, run_dir: Path, uids: Iterable[int], connections: int = _CONNECTIONS) -> None:
        """Listen in `run_dir` for `uids`, `connections` a socket at most; raises TransportError."""
        prepare_directory(run_dir)
        self._connections = connections
        self._uids = frozenset(uids)
        self._context = zmq.Context(io_threads=1)
        self._zap: zmq.Socket[bytes] = self._context.socket(zmq.REP)
        self._zap.linger = 0
        self._zap.bind(_ZAP_ENDPOINT)
        libc = ctypes.CDLL(None)
        libc.srand(int.from_bytes(os.urandom(4), "little"))
        # With a heap for each thread (mallopt(3)), what an attack has filled serves no other.
        libc.mallopt(_M_ARENA_MAX, 1)
        self._router = self._open(zmq.ROUTER, control_path(run_dir), messages.MAX_MESSAGE_BYTES)
        self._events = self._open(zmq.PUB, events_path(run_dir), _SUBSCRIPTION_BYTES)
        self._poller = zmq.Poller()
        self._resting = zmq.Poller()
        for watched in (self._zap, self._router.monitor, self._events.monitor):
            self._poller.register(watched, zmq.POLLIN)
            self._resting.register(watched, zmq.POLLIN)
        self._poller.register(self._router.socket, zmq.POLLIN)
        self._refused: int = 0
        self._whose: tuple[int, int] | None = None
        self._lookout = Lookout(self._uids)
        now_s = time.monotonic()
        self._entries = {uid: Bucket.full(_ENTRIES_PER_S, _ENTRIES, now_s) for uid in self._uids}
        self._credit = Bucket.full(1.0, _CREDIT_S, now_s)

    def watch(self, fd: int) -> None:
        """Let `receive` return when `fd` is readable too."""
        self._poller.register(fd, zmq.POLLIN)
        self._resting.register(fd, zmq.POLLIN)

    def _open(self, kind: int, path: Path, largest: int) -> _Endpoint:
        sock: zmq.Socket[bytes] = self._context.socket(kind)
        sock.linger = 0
        sock.maxmsgsize = largest
        sock.sndhwm = _QUEUE
        sock.rcvhwm = _ASKED if kind == zmq.ROUTER else 1
        sock.handshake_ivl = _HANDSHAKE_MS
        sock.zap_domain = b"power-agent"
        for uid in self._uids:
            # pyzmq takes a C int where libzmq takes a uid_t.
            sock.setsockopt(zmq.IPC_FILTER_UID, uid - (1 << 32) * (uid >= 1 << 31))
        monitor = sock.get_monitor_socket(
            zmq.EVENT_ACCEPTED | zmq.EVENT_ACCEPT_FAILED | zmq.EVENT_DISCONNECTED
        )
        endpoint = _Endpoint(sock, monitor, path, self._connections)
        endpoint.listen()
        return endpoint

    def take_refused(self) -> int:
        """Return how many connections of other uids were refused since this was last asked."""
        refused, self._refused = self._refused, 0
        return refused

    def take_whose(self) -> tuple[int, int] | None:
        """Return the uid and pid of one whose connection was refused, once, where it was seen."""
        whose, self._whose = self._whose, None
        return whose

    @property
    def is_looking(self) -> bool:
        """Whether it is just being found out whose connections are refused."""
        return self._lookout.is_looking

    def receive(self, timeout_s: float) -> list[Incoming]:
        """Wait at most `timeout_s` and return the requests that came, at most a turn's worth.

        Who sends more than the credit allows waits, by the queues of ZeroMQ, and nobody else.
        """
        now_s = time.monotonic()
        timeout_s = self._listen_again(now_s, timeout_s)
        self._credit = self._credit.filled(now_s)
        rests = self._credit.credit <= 0
        if rests:
            timeout_s = min(timeout_s, self._credit.short_s(_REST_S))
        if self._lookout.is_looking:
            timeout_s = min(timeout_s, self._lookout.left_s(now_s))
        poller = self._resting if rests else self._poller
        ready = dict(poller.poll(max(0, round(timeout_s * 1000 + 0.499))))
        if self._zap in ready:
            self._answer_zaps()
        for endpoint in (self._router, self._events):
            if endpoint.monitor in ready:
                self._note(endpoint)
        self._look()
        self._refused += self._events.note_topics()
        return self._take() if self._router.socket in ready else []

    def _note(self, endpoint: _Endpoint) -> None:
        """Count who was refused, and find out who that is."""
        refused = endpoint.note()
        self._refused += refused
        if refused and endpoint.closed_until is None and not self._lookout.is_looking:
            self._lookout.begin(endpoint.path, time.monotonic())
            if (fd := self._lookout.fd) is not None:
                self.watch(fd)

    def _look(self) -> None:
        fd = self._lookout.fd
        self._lookout.look(time.monotonic())
        self._stop_watching(fd)
        self._whose = self._lookout.take() or self._whose

    def _stop_watching(self, fd: int | None) -> None:
        """Forget the lookout's descriptor where it was closed."""
        if fd is not None and not self._lookout.is_looking:
            self._poller.unregister(fd)
            self._resting.unregister(fd)

    def _listen_again(self, now_s: float, timeout_s: float) -> float:
        """Listen again where that is due; return `timeout_s`, or less where it is due before."""
        for endpoint in (self._router, self._events):
            if endpoint.closed_until is not None and now_s >= endpoint.closed_until:
                fd = self._lookout.fd
                self._lookout.end()  # else it would take the new socket's place later
                self._stop_watching(fd)
                self._refused += endpoint.listen()
            if endpoint.closed_until is not None:
                timeout_s = min(timeout_s, endpoint.closed_until - now_s)
        return timeout_s

    def _take(self) -> list[Incoming]:
        """Take the requests that wait, as far as the credit goes."""
        taken: list[Incoming] = []
        while len(taken) < _TURN and self._credit.credit > 0:
            began_s = time.monotonic()
            try:
                frames = self._frames()
            except zmq.Again:
                break
            # The time that a dropped message took is charged too: honest clients wait no longer.
            nominal_s = _MESSAGE_S + sum(map(len, frames)) * _BYTE_S
            self._credit = self._credit.spent(max(nominal_s, time.monotonic() - began_s))
            taken.append(self._incoming(frames))
        return taken

    def _frames(self) -> list[zmq.Frame]:
        """Take one message; raises zmq.Again. Of one with too many frames only four are kept."""
        frames = [self._router.socket.recv(zmq.NOBLOCK, copy=False)]
        last = frames[0]
        while last.more:
            last = self._router.socket.recv(zmq.NOBLOCK, copy=False)
            if len(frames) < _FRAMES:
                frames.append(last)
        return frames

    @staticmethod
    def _incoming(frames: list[zmq.Frame]) -> Incoming:
        try:
            uid, pid = _credentials(str(frames[-1].get("Peer-Address")))
        except zmq.ZMQError:
            uid, pid = None, 0
        # A REQ puts an empty frame before its payload, a DEALER need not. Anything longer is
        # passed on as an empty payload, which no decoder takes.
        delimited = len(frames) == 3 and len(frames[1].bytes) == 0
        payload = frames[-1].bytes if len(frames) == 2 or delimited else b""
        envelope = (frames[0].bytes, b"") if delimited else (frames[0].bytes,)
        return Incoming(envelope, payload, uid, pid)

    def _answer_zaps(self) -> None:
        """Answer all who wait, up to a turn's worth: one who has gone is asked about too."""
        with contextlib.suppress(zmq.Again):
            for _ in range(_TURN):
                self._answer_zap()

    def _answer_zap(self) -> None:
        """Admit a connection whose kernel-proved uid may connect (RFC 27, NULL mechanism)."""
        request = self._zap.recv_multipart(zmq.NOBLOCK)
        version, sequence = request[0], request[1] if len(request) > 1 else b""
        address = request[3].decode("ascii", "replace") if len(request) > 3 else ""
        (uid, pid), code = _credentials(address), b"400"
        if version == b"1.0" and uid in self._entries:
            code = b"200" if self._enters(uid) else b"300"  # "try later", in RFC 27
        if code != b"200":
            self._refused += 1
            self._whose = None if uid is None else (uid, pid)
        self._zap.send_multipart([b"1.0", sequence, code, b"", b"", b""])

    def _enters(self, uid: int) -> bool:
        """Tell whether one more of that uid may enter now.

        Requests of a client that has gone are still delivered (router.cpp), before those of others.
        So no more of them may arrive than are taken.
        """
        entries = self._entries[uid].filled(time.monotonic())
        enters = entries.credit >= 1
        self._entries[uid] = entries.spent(1) if enters else entries
        return enters

    def reply(self, incoming: Incoming, message: messages.Reply) -> None:
        """Send the answer; dropped where the client no longer takes it."""
        with contextlib.suppress(zmq.ZMQError):
            frames = [*incoming.envelope, messages.encode(message)]
            self._router.socket.send_multipart(frames, zmq.NOBLOCK)

    def publish(self, event: messages.Event | messages.GpuEvent) -> None:
        """Tell whoever listens; losing one never matters."""
        with contextlib.suppress(zmq.ZMQError):
            self._events.socket.send(messages.encode(event), zmq.NOBLOCK)

    def close(self) -> None:
        """Stop listening and remove the sockets' names."""
        self._lookout.end()
        self._context.destroy(linger=200)
        for endpoint in (self._router, self._events):
            endpoint.path.unlink(missing_ok=True)

"""A taken-over watcher: has its uid, speaks as it likes, for some seconds; prints what it sent.

`python -m tests.chaos.attacker ATTACK UID RUN_DIR SECONDS SEED POD_UID...`
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import resource
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import zmq

from shared.messages import MAX_MESSAGE_BYTES, MAX_PODS
from shared.sockets import control_path, events_path

# ZMTP 3.0 (RFC 23): signature, version, mechanism, as-server and filler.
GREETING = b"\xff" + bytes(7) + b"\x01\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
_MORE, _LONG = 1, 2


def ready(kind: bytes = b"DEALER") -> bytes:
    """The command that ends the handshake."""
    body = b"\x05READY" + b"\x0bSocket-Type" + len(kind).to_bytes(4, "big") + kind
    return b"\x04" + bytes([len(body)]) + body


def frame(payload: bytes, *, more: bool) -> bytes:
    """A message frame with a length of eight bytes."""
    return bytes([_LONG | _MORE * more]) + len(payload).to_bytes(8, "big") + payload


def connected(path: Path) -> socket.socket:
    """A bare connection; raises OSError."""
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(2)
    sock.connect(str(path))
    return sock


def shake_hands(sock: socket.socket, kind: bytes = b"DEALER") -> None:
    """The handshake to its end: what is said before the other side's READY ends the connection.

    Raises OSError.
    """
    sock.sendall(GREETING + ready(kind))
    heard = b""
    while b"READY" not in heard:
        heard += (some := sock.recv(4096))
        if not some:
            raise ConnectionResetError


class Attack:
    """One attacker: where, as whom, how long, with which pods."""

    def __init__(self, run_dir: Path, for_s: float, seed: int, pods: list[str]) -> None:
        self.control, self.events = control_path(run_dir), events_path(run_dir)
        self._end_s = time.monotonic() + for_s
        self.chance, self.pods = random.Random(seed), pods
        self.sent = 0

    @property
    def goes_on(self) -> bool:
        return time.monotonic() < self._end_s

    # -- well formed --

    def snapshots(self) -> None:
        """Everything that a decoder takes, over some connections, as fast as they take it."""
        sockets = [self._dealer() for _ in range(4)]
        for payload in self._snapshots():
            if not self.goes_on:
                return
            self._send(self.chance.choice(sockets), payload)

    def garbage(self) -> None:
        """Messages that none takes: cut, of other types and versions, with frames too many."""
        sock = self._dealer()
        for payload in self._snapshots():
            if not self.goes_on:
                return
            cut = payload[: self.chance.randrange(len(payload))]
            self._send(sock, self.chance.choice([cut, b"", b"\xc1", payload + b"\xc0", b"\xdf"]))

    def _dealer(self) -> zmq.Socket[bytes]:
        sock: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        sock.linger = 0
        sock.connect(f"ipc://{self.control}")
        return sock

    def _send(self, sock: zmq.Socket[bytes], payload: bytes) -> None:
        try:
            sock.send(payload, zmq.NOBLOCK)
            self.sent += 1
        except zmq.Again:
            time.sleep(0.001)  # it takes no more for now
        with contextlib.suppress(zmq.Again):
            while True:
                sock.recv(zmq.NOBLOCK)

    def _snapshots(self) -> Iterator[bytes]:
        session, encode = uuid.uuid4().hex, msgspec.msgpack.encode
        while True:
            if self.chance.random() < 0.3:
                session = uuid.uuid4().hex
            revision = self.chance.choice([0, 1, 2**53, self.chance.randrange(2**53)])
            pods = [self._pod(uid) for uid in self.pods if self.chance.random() < 0.8]
            others = [uid for uid in self.pods if self.chance.random() < 0.2]
            if self.chance.random() < 0.03:  # all that fit, none of this node
                others += [str(uuid.uuid4()) for _ in range(MAX_PODS - len(pods) - len(others))]
            node = self.chance.choice(["node-1", "another-node", "n" * 253])
            yield encode(
                {
                    "type": "snapshot",
                    "v": 1,
                    "session": session,
                    "revision": revision,
                    "node": node,
                    "pods": pods,
                    "others": others,
                }
            )

    def _pod(self, uid: str) -> dict[str, object]:
        limit = self.chance.choice([None, 1, 10**8, self.chance.randrange(1, 10**8), 333_000])
        aliases = self.chance.sample(self.pods, min(len(self.pods), self.chance.randrange(4)))
        raw = self.chance.choice(["", "9" * 64, "\x00\x1b[2J", "350"])
        named = {"namespace": self.chance.choice(["d", "../..", "\n"]), "name": "p" * 253}
        return {"uid": uid, "aliases": aliases, **named, "limit_mw": limit, "raw": raw}

    # -- below the messages --

    def connections(self) -> None:
        """As many connections as descriptors allow, again and again."""
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = min(hard, 4000)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        held: list[socket.socket] = []
        while self.goes_on:
            sock = socket.socket(socket.AF_UNIX)
            sock.setblocking(False)
            try:
                sock.connect(str(self.chance.choice([self.control, self.events])))
                sock.send(GREETING[: self.chance.choice([0, 0, 1, 10, 64])])
            except OSError as error:
                sock.close()
                if error.errno not in (errno.EAGAIN, errno.ECONNREFUSED, errno.ENOENT):
                    continue
                time.sleep(0.001)  # its backlog is full, or it is closed for a moment
                continue
            held.append(sock)
            self.sent += 1
            if len(held) > most - 50:
                for each in held:
                    each.close()
                held.clear()

    def greetings(self) -> None:
        """Connections that go when the enforcer has begun to ask who they are."""
        held: list[socket.socket] = []
        while self.goes_on:
            with contextlib.suppress(OSError):
                held.append(connected(self.chance.choice([self.control, self.events])))
                held[-1].sendall(GREETING)
                self.sent += 1
            if len(held) > 60:
                held.pop(0).close()

    def listeners(self) -> None:
        """Listeners that come and go, some with topics that nobody has."""
        while self.goes_on:
            with contextlib.suppress(OSError), connected(self.events) as sock:
                shake_hands(sock, b"SUB")
                self.sent += 1
                for _ in range(self.chance.choice([0, 1, 300, 3000])):
                    topic = b"\x01" + self.chance.randbytes(60)
                    sock.sendall(bytes([0, len(topic)]) + topic)

    def full_queues(self) -> None:
        """Requests that nobody waits for, more than there is room for."""
        while self.goes_on:
            with contextlib.suppress(OSError), connected(self.control) as sock:
                shake_hands(sock)
                self.sent += 1
                sock.sendall(b"\x00\x01\xc1" * 20)

    def half_handshakes(self) -> None:
        """Greetings cut off anywhere, READY of any kind, commands before their time."""
        begun = GREETING + ready()
        while self.goes_on:
            kind = self.chance.choice([b"DEALER", b"ROUTER", b"PUB", b"X" * 200, b""])
            whole = self.chance.choice([begun, GREETING + ready(kind), GREETING + begun])
            cut = bytearray(whole[: self.chance.randrange(1, len(whole))])
            if self.chance.random() < 0.5:
                cut[self.chance.randrange(len(cut))] = self.chance.randrange(256)
            self._raw(lambda sock, said=bytes(cut): sock.sendall(said))  # type: ignore[misc]

    def oversized(self) -> None:
        """Frames just above the bound, far above it, and of a length that nobody has."""
        while self.goes_on:
            size = self.chance.choice([MAX_MESSAGE_BYTES + 1, 8 << 20])
            claimed = self.chance.choice([2**31, 2**40, 2**63, 2**64 - 1])
            lie = bytes([_LONG]) + claimed.to_bytes(8, "big") + b"x" * 4096
            chosen = self.chance.choice([frame(bytes(size), more=False), lie])
            self._raw(lambda sock, said=chosen: self._say(sock, said))  # type: ignore[misc]

    def multipart(self) -> None:
        """One message that never ends: libzmq keeps all of it until the last frame comes."""
        part = frame(bytes(200_000), more=True)

        def never_end(sock: socket.socket) -> None:
            shake_hands(sock)
            while self.goes_on:
                sock.sendall(part)
                self.sent += 1

        while self.goes_on:
            self._raw(never_end)

    @staticmethod
    def _say(sock: socket.socket, said: bytes) -> None:
        shake_hands(sock)
        sock.sendall(said)
        sock.recv(1)  # until it is cut off

    def _raw(self, talk: Callable[[socket.socket], None]) -> None:
        try:
            with connected(self.control) as sock:
                self.sent += 1
                talk(sock)
        except OSError:
            time.sleep(0.002)  # refused, cut off, or away


def main() -> None:
    """Become the watcher's user and attack."""
    attack, uid, run_dir, for_s, seed, *pods = sys.argv[1:]
    if os.geteuid() == 0 and int(uid) != 0:
        os.setgroups([])
        os.setgid(int(uid))
        os.setuid(int(uid))
    attacker = Attack(Path(run_dir), float(for_s), int(seed), pods)
    getattr(attacker, attack)()
    sys.stdout.write(f"{attacker.sent}\n")
    sys.stdout.flush()
    os._exit(0)  # no farewell on the wire


if __name__ == "__main__":
    main()

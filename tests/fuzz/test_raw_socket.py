"""A living enforcer gets mutated ZMTP from an admitted uid: it lives, or dies bounded, and serves.

The bytes go to both sockets. What limits it may have set meanwhile are a pod's wish, in bounds.
"""

from __future__ import annotations

import random
import socket
from collections import deque
from contextlib import suppress
from pathlib import Path

import msgspec

from shared.sockets import control_path, events_path
from tests.chaos.attacker import GREETING, frame, ready, shake_hands
from tests.chaos.scale import HOSTILE_S, SEED
from tests.fuzz.mutation import mutated
from tests.fuzz.targets import seeds
from tests.node.enforcer_harness import EnforcerNode, pod_uid

A = pod_uid(1)


def conversations() -> list[bytes]:
    """What is said after the handshake, whole: a request in each form of frame, a ping."""
    pod = {"uid": A, "aliases": [], "namespace": "d", "name": "p"}
    wish = {
        "type": "snapshot",
        "v": 1,
        "session": "raw",
        "revision": 7,
        "node": "n",
        "pods": [{**pod, "limit_mw": 300_000, "raw": "300"}],
        "others": [],
    }
    requests = [*seeds("request"), msgspec.msgpack.encode(wish)]
    short = [bytes([0, len(each)]) + each for each in requests if len(each) < 256]
    long = [frame(b"", more=True) + frame(each, more=False) for each in requests]
    pinging = b"\x04\x07\x04PING\x00\x01"  # RFC 37
    return [*short, *long, pinging]


HELD = 24  # open at a time: who closes at once is not listened to
SAID = 8  # over one connection, for a uid may open only so many a second


class Talker:
    """Says something to a socket and stays a little."""

    def __init__(self, run_dir: Path, chance: random.Random) -> None:
        self._run_dir, self._chance = run_dir, chance
        self._said = conversations()
        self._held: deque[socket.socket] = deque()
        self.sent = 0

    def talk(self) -> None:
        """After a handshake, or in place of it."""
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(0.2)
        self._held.append(sock)
        with suppress(OSError):
            self._talk(sock)
            self.sent += 1
        if len(self._held) > HELD:
            self._held.popleft().close()

    def _talk(self, sock: socket.socket) -> None:
        match self._chance.randrange(4):
            case 0:
                sock.connect(str(control_path(self._run_dir)))
                said = mutated(self._chance, self._said)
                sock.sendall(mutated(self._chance, [GREETING + ready() + said]))
            case 1:
                sock.connect(str(events_path(self._run_dir)))
                shake_hands(sock, b"SUB")
                sock.sendall(mutated(self._chance, [b"\x00\x01\x01", b"\x04\x0a\x09SUBSCRIBE"]))
            case _:
                sock.connect(str(control_path(self._run_dir)))
                shake_hands(sock)
                sock.sendall(self._chance.choice(self._said))  # so that there is a state to harm
                for _ in range(SAID):
                    sock.sendall(mutated(self._chance, self._said))

    def end(self) -> None:
        while self._held:
            self._held.pop().close()


def taken(node: EnforcerNode) -> int:
    """How many snapshots the enforcer has taken."""
    return node.status().counters.snapshots


def test_mutated_bytes_on_the_wire() -> None:
    with EnforcerNode(max_watts="600") as node:
        node.gpus[0].limit_mw = 650_000
        node.start()
        node.run_pod(A)
        talker = Talker(node.run_dir, random.Random(SEED))
        # Until enough was said, and some of it whole enough to be taken.
        while talker.sent % 50 or talker.sent < 100 * HOSTILE_S or taken(node) <= 10:
            talker.talk()
            node.lives_for(0)
        talker.end()
        node.session, node.revision = "honest", 0
        node.snapshot({A: 310})
        node.wait_limit(310)
        assert {record.uuid for record in node.gpus.sets()} == {node.gpus[0].uuid}
        assert all(200_000 <= r.requested_mw <= 650_000 for r in node.gpus.sets())
        counted = node.status().counters
        assert counted.malformed > 10
        print(f"{talker.sent} connections; {counted}")

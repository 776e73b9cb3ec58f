"""Who may ask the enforcer what: denied, stale and malformed requests change nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from shared import messages as m
from tests.node.enforcer_harness import REPOSITORY, EnforcerNode, pod_uid
from tests.waiting import HANG_S, until

A, B = pod_uid(1), pod_uid(2)
WATCHER, READER, NOBODY = 40_001, 40_002, 40_003

# Loads everything as root, then becomes somebody else: the kernel reports who connects.
AS_ANOTHER = """
import json, os, sys
from pathlib import Path
from shared import messages as m
from shared.client import Client
from shared.sockets import TransportError
uid, what, run_dir = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
os.setgroups([])
os.setgid(uid)
os.setuid(uid)
pod = m.DesiredPod(uid=sys.argv[4], aliases=[], namespace="d", name="p", limit_mw=300000, raw="300")
request = {
    "snapshot": m.Snapshot(session="s", revision=1, node="n", pods=[pod], others=[]),
    "status": m.Status(),
    "ping": m.Ping(),
}[what]
client = Client(run_dir)
try:
    reply = client.request(request, 0.7 if uid == 40003 else 60.0)
    print(json.dumps([type(reply).__name__, getattr(reply, "code", None)]))
except TransportError:
    print(json.dumps([None, None]))
client.close()
"""


def ask_as(node: EnforcerNode, uid: int, what: str) -> tuple[str | None, str | None]:
    """The type of the answer and the code of the error that a process of `uid` gets."""
    command = [sys.executable, "-c", AS_ANOTHER, str(uid), what, str(node.run_dir), A]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kind, code = json.loads(done.stdout)
    return kind, code


def divided() -> EnforcerNode:
    """A node on which neither watcher nor second reader is whoever runs the test."""
    if os.geteuid() != 0:
        pytest.skip("becoming another uid needs root")
    return EnforcerNode(watcher_uid=str(WATCHER), reader_uids=f"0,{READER}")


@pytest.mark.root
def test_i8_only_the_watchers_uid_changes_the_desired_state() -> None:
    with divided() as node:
        node.start()
        node.run_pod(A)
        assert ask_as(node, READER, "snapshot") == ("Error", "denied")
        assert node.status().counters.denied == 1
        assert node.limit() == 700
        assert node.status().watcher.session is None
        assert ask_as(node, WATCHER, "snapshot") == ("Report", None)
        assert node.limit() == 300
        # Root is a reader like any other here.
        reply = node.send(node.message({}))
        assert isinstance(reply, m.Error)
        assert reply.code == "denied"
        node.looks()
        assert node.limit() == 300
        assert node.status().counters.denied == 2
        assert len(node.logs("message_denied")) == 2


@pytest.mark.root
def test_i8_readers_read_and_the_watcher_may_too() -> None:
    with divided() as node:
        node.start()
        for uid in (READER, WATCHER):
            assert ask_as(node, uid, "status") == ("StatusReply", None)
            assert ask_as(node, uid, "ping") == ("Pong", None)
        assert node.status().counters.denied == 0


@pytest.mark.root
def test_i8_another_uid_gets_nothing_and_is_counted() -> None:
    with divided() as node:
        node.start()
        node.run_pod(A)
        assert ask_as(node, NOBODY, "snapshot") == (None, None)
        until(lambda: node.status().counters.refused_connections, "they are counted")
        assert node.status().counters.denied == 0  # no message came of them
        assert node.limit() == 700


@pytest.mark.root
def test_whose_connections_are_refused_is_said_once_a_minute() -> None:
    """libzmq closes them before it can be asked, and tries again ten times a second."""
    with divided() as node:
        node.start()
        for _ in range(3):
            ask_as(node, NOBODY, "status")
        until(lambda: node.logs("connections_refused"), "the log line")
        (line,) = node.logs("connections_refused")
        assert (line["uid"], line["level"]) == (NOBODY, "warning")
        assert node.status().counters.refused_connections > line["count"]
        sockets = {path.name for path in node.run_dir.iterdir() if path.is_socket()}
        assert sockets == {"control.sock", "events.sock"}
        assert ask_as(node, READER, "ping") == ("Pong", None)


@pytest.mark.root
def test_the_sockets_lie_where_only_root_may_write() -> None:
    with divided() as node:
        node.run_dir.mkdir()
        node.run_dir.chmod(0o777)  # as an emptyDir comes
        os.chown(node.run_dir, WATCHER, WATCHER)
        node.start()
        mode = node.run_dir.stat()
        assert (mode.st_uid, mode.st_mode & 0o777) == (0, 0o755)


def test_a_stale_revision_is_refused_and_changes_nothing() -> None:
    with EnforcerNode() as node:
        node.start()
        node.run_pod(A)
        old = node.message({A: 500})
        node.revision = 5
        node.snapshot({A: 300})
        reply = node.send(old)
        assert isinstance(reply, m.Error)
        assert reply.code == "stale"
        node.looks()
        assert node.limit() == 300
        assert node.status().counters.stale == 1
        assert node.status().watcher.revision == 6


def test_a_replaced_session_is_refused_whatever_its_revision() -> None:
    with EnforcerNode() as node:
        node.start()
        node.run_pod(A)
        node.snapshot({A: 500})
        first = node.session
        node.session, node.revision = "the-next-watcher", 0
        node.snapshot({A: 300})
        assert node.limit() == 300
        node.session, node.revision = first, 1000
        reply = node.send(node.message({A: 600}))
        assert isinstance(reply, m.Error)
        assert reply.code == "stale"
        node.looks()
        assert node.limit() == 300
        assert node.status().watcher.session == "the-next-watcher"
        assert [line["session"] for line in node.logs("watcher_session")] == ["the-next-watcher"]


def test_a_storm_of_sessions_is_no_storm_of_lines() -> None:
    with EnforcerNode() as node:
        node.start()
        node.run_pod(A)
        for number in range(20):
            node.session, node.revision = f"session-{number}", 0
            node.snapshot({A: 300})
        assert node.status().watcher.session == "session-19"
        told = [line["session"] for line in node.logs("watcher_session")]
        assert told == [f"session-{number}" for number in range(1, 5)]


def test_a_second_watcher_right_after_a_restart_of_the_real_one_is_logged() -> None:
    with EnforcerNode() as node:
        node.start()
        for session in ("before", "restarted", "intruder"):
            node.session, node.revision = session, 0
            node.snapshot({A: 300})
        told = [(line["replaces"], line["session"]) for line in node.logs("watcher_session")]
        assert told == [("before", "restarted"), ("restarted", "intruder")]


def test_a_heartbeat_is_answered_and_changes_nothing() -> None:
    with EnforcerNode() as node:
        node.start()
        node.run_pod(A)
        node.snapshot({A: 300})
        report = node.heartbeat()
        assert report.pods[0].state == "enforced"
        assert node.writes() == 1
        assert report.counters.snapshots == 2


def good() -> dict[str, Any]:
    pod = {
        "uid": A,
        "aliases": [],
        "namespace": "default",
        "name": "a",
        "limit_mw": 300_000,
        "raw": "300",
    }
    return {
        "type": "snapshot",
        "v": 1,
        "session": "s",
        "revision": 1,
        "node": "n",
        "pods": [pod],
        "others": [],
    }


def changed(**changes: object) -> dict[str, Any]:
    return good() | changes


def changed_pod(**changes: object) -> dict[str, Any]:
    return good() | {"pods": [good()["pods"][0] | changes]}


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in good().items() if key != name}


UIDS = [pod_uid(k) for k in range(2000)]
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown-type": (changed(type="set_limit"), "unknown_type"),
    "an-answer": ({"type": "pong", "v": 1, "version": "1", "uptime_s": 1.0}, "unknown_type"),
    "no-type": (without("type"), "malformed"),
    "version-2": (changed(v=2), "unsupported_version"),
    "no-version": (without("v"), "malformed"),
    "unknown-field": (changed(pid=1), "malformed"),
    "unknown-field-of-a-pod": (changed_pod(pid=1), "malformed"),
    "no-pods": (without("pods"), "malformed"),
    "no-others": (without("others"), "malformed"),
    "pods-no-list": (changed(pods={}), "malformed"),
    "revision-text": (changed(revision="1"), "malformed"),
    "revision-negative": (changed(revision=-1), "malformed"),
    "session-empty": (changed(session=""), "malformed"),
    "session-long": (changed(session="s" * 65), "malformed"),
    "limit-zero": (changed_pod(limit_mw=0), "malformed"),
    "limit-negative": (changed_pod(limit_mw=-1), "malformed"),
    "limit-fraction": (changed_pod(limit_mw=300_000.5), "malformed"),
    "limit-text": (changed_pod(limit_mw="300000"), "malformed"),
    "limit-true": (changed_pod(limit_mw=True), "malformed"),
    "limit-huge": (changed_pod(limit_mw=10**12), "malformed"),
    "raw-long": (changed_pod(raw="x" * 65), "malformed"),
    "uid-empty": (changed_pod(uid=""), "malformed"),
    "uid-long": (changed_pod(uid="u" * 65), "malformed"),
    "uid-bytes": (changed_pod(uid=b"\xff\xfe"), "malformed"),
    "five-aliases": (changed_pod(aliases=["a"] * 5), "malformed"),
    "1025-pods": (changed(others=UIDS[:1024]), "too_many"),
}


@pytest.fixture(scope="module")
def running() -> Iterator[EnforcerNode]:
    """One enforcer for all the malformed ones: they must leave nothing behind."""
    with EnforcerNode() as node:
        node.start()
        node.run_pod(A)
        node.snapshot({A: 250})
        yield node
        # Whatever came: it still does its work.
        node.snapshot({A: 260})
        node.wait_limit(260)


@pytest.mark.parametrize(("message", "code"), REFUSED.values(), ids=REFUSED.keys())
def test_malformed_is_answered_and_changes_nothing(
    running: EnforcerNode, message: dict[str, Any], code: str
) -> None:
    before = running.status()
    reply = running.raw(msgspec.msgpack.encode(message))
    assert isinstance(reply, m.Error)
    assert reply.code == code
    after = running.status()
    assert after.counters.malformed == before.counters.malformed + 1
    assert after.counters.snapshots == before.counters.snapshots
    assert after.watcher.session == before.watcher.session
    assert running.limit() == 250


GARBAGE = {
    "empty": b"",
    "zero": b"\x00",
    "text": b"GET / HTTP/1.1\r\n\r\n",
    "cut": msgspec.msgpack.encode(good())[:-5],
    "trailing": msgspec.msgpack.encode(good()) + b"x",
    "not-a-map": msgspec.msgpack.encode([1, 2]),
    "deep": b"\x91" * 100_000,
    "huge-length": b"\xdf\xff\xff\xff\xff",
    "json": json.dumps(good()).encode(),
}


@pytest.mark.parametrize("payload", GARBAGE.values(), ids=GARBAGE.keys())
def test_garbage_is_answered_and_changes_nothing(running: EnforcerNode, payload: bytes) -> None:
    reply = running.raw(payload)
    assert isinstance(reply, m.Error)
    assert reply.code == "malformed"
    assert running.limit() == 250


def test_frames_that_do_not_belong_are_answered_and_change_nothing(running: EnforcerNode) -> None:
    payload = msgspec.msgpack.encode(good())
    for frames in ((payload, payload), (b"", b"", payload), (b"x", payload)):
        reply = running.raw(*frames)
        assert isinstance(reply, m.Error)
        assert reply.code == "malformed"
    # A REQ client's empty delimiter is none of these.
    assert isinstance(running.raw(b"", msgspec.msgpack.encode({"type": "ping", "v": 1})), m.Pong)
    assert running.limit() == 250


def test_a_frame_above_the_bound_is_dropped_and_hurts_nobody(running: EnforcerNode) -> None:
    assert running.raw(b"x" * (m.MAX_MESSAGE_BYTES + 1), answered=False) is None
    assert running.limit() == 250
    assert running.status().gpus


def test_the_largest_snapshot_is_taken() -> None:
    with EnforcerNode() as node:
        node.start()
        node.run_pod(UIDS[1])
        pods: dict[str, float | None] = dict.fromkeys(UIDS[1:513], 300)
        report = node.snapshot(pods, others=UIDS[513:1025])
        assert len(report.pods) == 512
        assert node.limit() == 300


def test_a_flood_is_counted_not_logged() -> None:
    with EnforcerNode() as node:
        node.start()
        for _ in range(50):
            node.raw(b"garbage")
        assert node.status().counters.malformed == 50
        assert len(node.logs("message_denied")) == 1


def test_i11_a_client_that_never_reads_delays_nobody() -> None:
    with EnforcerNode() as node:
        node.start()
        node.run_pod(A)
        node.snapshot({A: 300})
        deaf = node.deaf_client()
        try:
            for _ in range(500):
                deaf.send(msgspec.msgpack.encode({"type": "status", "v": 1}))
            node.snapshot({A: 250})
            node.wait_limit(250)
        finally:
            deaf.context.destroy(linger=0)


def test_a_replaced_session_counts_again_when_the_newer_one_is_gone() -> None:
    with EnforcerNode() as node:
        node.start()
        node.run_pod(A)
        older = node.message({A: 300})
        node.send(older)
        node.session = "newer"
        node.revision = 0
        node.snapshot({A: 320})
        assert isinstance(node.client.request(older, HANG_S), m.Error)

        # Ten seconds without a word from the newer one.
        def counts_again() -> bool:
            return isinstance(node.client.request(older, HANG_S), m.Report)

        until(counts_again, "the older one is taken")
        assert isinstance(node.client.request(older, HANG_S), m.Report)

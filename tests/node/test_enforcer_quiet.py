"""How much the enforcer does: nothing in steady state, never too much, and lets NVML go."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from shared import messages as m
from tests.node.enforcer_harness import EnforcerNode, pod_uid
from tests.waiting import until

A, B = pod_uid(1), pod_uid(2)
WRITE_GAP_NS = 100_000_000
FAR_S = "3600"  # far beyond any deadline: what comes is not due to the next scan


@pytest.fixture(scope="module", autouse=True)
def silent() -> Iterator[tuple[EnforcerNode, float]]:
    """A node whose watcher is silent from now on, and since when.

    An enforcer takes a watcher for silent after ten seconds: the other tests use that time.
    """
    with EnforcerNode() as node:
        node.start()
        node.run_pod(A)
        node.snapshot({A: 300, B: 250})
        yield node, time.monotonic()


def heartbeats_for(node: EnforcerNode, span_s: float) -> int:
    """Repeat the last snapshot, oftener than a watcher does, over `span_s`."""
    count, end_s = 0, time.monotonic() + span_s
    while time.monotonic() < end_s:
        node.heartbeat()
        count += 1
        node.lives_for(0.2)
    return count


def test_i10_quiet_in_steady_state() -> None:
    with EnforcerNode(gpus=8, scan_seconds="0.2", reconcile_seconds="0.5") as node:
        node.start()
        uids = [pod_uid(10 + number) for number in range(8)]
        for number, uid in enumerate(uids):
            node.run_pod(uid, number)
        node.snapshot(dict.fromkeys(uids, 300), others=[A])
        assert [node.limit(number) for number in range(8)] == [300] * 8
        written, said = node.writes(), node.log_text()
        inits = len(node.gpus.inits())
        assert heartbeats_for(node, 3.0) >= 5
        assert node.writes() == written
        assert node.log_text() == said
        assert len(node.gpus.inits()) == inits


def test_i10_quiet_where_nothing_is_asked() -> None:
    with EnforcerNode() as node:
        node.start()
        node.run_host()
        node.snapshot({}, others=[A, B])
        said = node.log_text()
        heartbeats_for(node, 1.0)
        assert node.log_text() == said
        assert node.writes() == 0


def test_contradictory_snapshots_are_written_ten_times_a_second_and_the_latest_wins() -> None:
    with EnforcerNode(scan_seconds=FAR_S, reconcile_seconds=FAR_S) as node:
        node.start()
        node.run_pod(A)

        def contradict() -> bool:
            node.revision += 1
            node.client.send(node.message({A: 300.0 + node.revision % 300}))
            node.client.wait(0.005)
            return node.writes() >= 10

        until(contradict, "ten writes", poll_s=0)
        assert node.revision > 2 * node.writes()
        last_w = 250.0
        node.session, node.revision = "the-latest", 1
        until(lambda: node.client.send(node.message({A: last_w})), "sent")
        node.wait_limit(last_w)  # by its own time: the next scan is an hour away
        sets = node.gpus[0].sets()
        span_ns = sets[-1].monotonic_ns - sets[0].monotonic_ns
        assert len(sets) - 2 <= span_ns / WRITE_GAP_NS


def test_a_second_change_soon_after_the_first_waits_for_its_gap_not_for_the_scan() -> None:
    with EnforcerNode(scan_seconds=FAR_S, reconcile_seconds=FAR_S) as node:
        node.start()
        node.run_pod(A)
        node.snapshot({A: 300})
        assert node.limit() == 300
        node.snapshot({A: 400})
        node.wait_limit(400)
        assert node.writes() == 2


def test_i11_the_pace_is_each_gpus_own() -> None:
    with EnforcerNode(scan_seconds=FAR_S, reconcile_seconds=FAR_S) as node:
        node.start()
        node.run_pod(A, 0)
        node.run_pod(B, 1)
        node.snapshot({A: 300, B: 300})
        assert (node.limit(0), node.limit(1)) == (300, 300)  # when it is answered, both are set


@pytest.fixture(scope="module")
def unasked() -> Iterator[EnforcerNode]:
    """A node whose enforcer gets snapshots and, from now on, no question: one keeps NVML open."""
    with EnforcerNode() as node:
        yield node.start()


def test_nvml_is_let_go_when_nothing_is_desired_and_taken_again_when_something_is(
    unasked: EnforcerNode,
) -> None:
    node = unasked
    pid = node.run_pod(A)
    node.snapshot({A: 300})
    assert node.gpus.open_by() == {node.pid}
    node.end(pid)
    node.snapshot({})
    node.wait_limit(700)
    until(lambda: not node.gpus.open_by(), "NVML is let go")
    node.snapshot({}, others=[B])
    assert node.gpus.open_by() == set()
    pid = node.run_pod(A)
    node.snapshot({A: 300})
    assert node.limit() == 300
    assert node.gpus.open_by() == {node.pid}
    node.end(pid)
    node.snapshot({})


def test_a_wish_that_is_withdrawn_while_its_write_waits_leaves_nothing_behind(
    unasked: EnforcerNode,
) -> None:
    """Given back, wanted again and not wanted any more, all within the gap between two writes."""
    node = unasked
    until(lambda: not node.gpus.open_by(), "NVML is let go")
    node.run_pod(A)
    node.snapshot({A: 300})
    node.snapshot({}, others=[A])
    assert node.limit() == 700
    node.revision += 1
    node.client.send(node.message({A: 300}))
    node.client.wait(0.04)  # long enough to be decided on, too short to be written
    node.revision += 1
    withdrawn = node.message({}, others=[A])
    node.client.send(withdrawn)

    def answered() -> bool:
        replies = node.client.wait(0.1)
        return any(isinstance(r, m.Report) and r.revision == node.revision for r in replies)

    until(answered, "the last snapshot is answered")
    for _ in range(5):
        node.send(withdrawn)
        node.lives_for(0.2)
    assert node.limit() == 700


def test_i12_what_was_said_of_a_gpu_ends_with_its_pod_though_nobody_asks() -> None:
    with EnforcerNode(gpus=1, max_watts="100") as node:  # bounds that leave nothing
        node.start()
        until(lambda: not node.gpus.open_by(), "NVML is let go")
        pid = node.run_pod(A)
        (said,) = node.snapshot({A: 300}).gpus
        assert said.state == "failed"
        node.end(pid)
        (said,) = node.snapshot({}).gpus
        assert (said.state, said.reason) == ("free", "nobody uses it")


def test_a_question_opens_nvml_and_the_answer_shows_the_gpus(unasked: EnforcerNode) -> None:
    until(lambda: not unasked.gpus.open_by(), "NVML is let go")
    unasked.gpus[0].limit_mw = 600_000
    shown = unasked.gpu()
    assert (shown.limit_mw, shown.state) == (600_000, "free")
    assert unasked.gpus.open_by() == {unasked.pid}


def test_without_a_lease_a_silent_watcher_holds(
    silent: tuple[EnforcerNode, float],
) -> None:
    node, since_s = silent
    node.lives_for(since_s + 10.2 - time.monotonic())
    # Nobody has asked anything meanwhile, yet something is owned.
    assert node.gpus.open_by() == {node.pid}
    until(lambda: not node.status().watcher.connected, "silence")
    for pid in node.gpus[0].processes():
        node.end(pid)
    node.run_host()
    node.looks()
    assert node.gpu().state == "held"
    assert "silent" in node.gpu().reason
    assert node.limit() == 300
    node.run_pod(B)  # lowering needs no living watcher
    node.wait_limit(250)

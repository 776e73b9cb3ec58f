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

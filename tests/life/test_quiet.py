"""How much the enforcer does: nothing in steady state, never too much, and lets NVML go."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.life.node import LifeNode as EnforcerNode
from tests.life.node import pod_uid, until

A, B = pod_uid(1), pod_uid(2)
WRITE_GAP_NS = 100_000_000
FAR_S = "3600"  # far beyond any deadline: what comes is not due to the next scan


def heartbeats_for(node: EnforcerNode, span_s: float) -> int:
    """Repeat the last snapshot, oftener than a watcher does, over `span_s`."""
    count, end_s = 0, node.clock.now_s() + span_s
    while node.clock.now_s() < end_s:
        node.heartbeat()
        count += 1
        node.lives_for(0.2)
    return count


def test_i10_quiet_in_steady_state() -> None:
    with EnforcerNode(gpus=8) as node:
        node.start()
        uids = [pod_uid(10 + number) for number in range(8)]
        for number, uid in enumerate(uids):
            node.run_pod(uid, number)
        node.snapshot(dict.fromkeys(uids, 300), others=[A])
        assert [node.limit(number) for number in range(8)] == [300] * 8
        written, said = node.writes(), node.log_text()
        inits = len(node.gpus.inits())
        assert heartbeats_for(node, 60.0) >= 100
        assert node.writes() == written
        assert node.log_text() == said
        assert len(node.gpus.inits()) == inits


def test_i10_quiet_where_nothing_is_asked() -> None:
    with EnforcerNode() as node:
        node.start()
        node.run_host()
        node.snapshot({}, others=[A, B])
        said = node.log_text()
        heartbeats_for(node, 60.0)
        assert node.log_text() == said
        assert node.writes() == 0


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

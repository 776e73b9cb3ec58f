"""Ends and beginnings of the enforcer: kill -9, SIGTERM, ledger, lease, dry run, two at once."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.life.node import LifeNode as EnforcerNode
from tests.life.node import pod_uid, until

A, B = pod_uid(1), pod_uid(2)


Change = Callable[[EnforcerNode, int], None]


def take_over(node: EnforcerNode, pid: int) -> None:
    node.run_host()
    node.end(pid)


@pytest.mark.parametrize(
    ("meanwhile", "pods", "others", "after_w"),
    [
        pytest.param(lambda _n, _p: None, {A: 300}, [], 300, id="nothing"),
        pytest.param(lambda _n, _p: None, {A: 500}, [], 500, id="raised"),
        pytest.param(lambda _n, _p: None, {A: 250}, [], 250, id="lowered"),
        pytest.param(lambda _n, _p: None, {A: None}, [], 300, id="unusable"),
        pytest.param(lambda _n, _p: None, {}, [A], 650, id="annotation-gone"),
        pytest.param(lambda _n, _p: None, {}, [], 300, id="pod-gone-process-runs"),
        pytest.param(lambda n, p: n.end(p), {A: 300}, [], 300, id="process-gone"),
        pytest.param(lambda n, p: n.end(p), {}, [], 650, id="both-gone"),
        pytest.param(take_over, {A: 300}, [], 650, id="taken-over"),
    ],
)
def test_i9_whatever_happens_while_it_is_away_ends_as_without_the_crash(
    meanwhile: Change, pods: dict[str, float | None], others: list[str], after_w: float
) -> None:
    with EnforcerNode() as node:
        node.gpus[0].limit_mw = 650_000
        node.start()
        pid = node.run_pod(A)
        node.snapshot({A: 300})
        node.kill()
        meanwhile(node, pid)
        node.start()
        assert node.limit() == 300  # not before a watcher has spoken
        node.snapshot(pods, others)
        node.wait_limit(after_w)
        node.looks()
        assert node.limit() == after_w
        assert list(node.owned().values()) in ([650_000], [])


@pytest.mark.parametrize("neighbour", ["host", "unannotated", "elsewhere", "annotated"])
def test_i9_after_a_crash_who_ran_beside_the_worker_has_not_taken_its_gpu(neighbour: str) -> None:
    pods = {A: 300.0} | ({B: 500.0} if neighbour == "annotated" else {})
    others = [B] if neighbour == "unannotated" else []
    with EnforcerNode() as node:
        node.scope = "namespace" if neighbour == "elsewhere" else "node"
        node.start()
        pid = node.run_pod(A)
        _ = node.run_host() if neighbour == "host" else node.run_pod(B)
        node.snapshot(pods, others)
        node.looks()
        node.kill()
        node.end(pid)  # the worker restarts meanwhile
        node.start()
        node.snapshot(pods, others)
        node.looks()
        assert node.limit() == 300
        if neighbour != "annotated":
            node.run_host()  # this one was never there
            node.wait_limit(700)


def test_i9_without_the_file_of_who_ran_beside_all_are_strangers() -> None:
    with EnforcerNode() as node:
        node.start()
        pid = node.run_pod(A)
        node.run_host()
        node.snapshot({A: 300})
        node.looks()
        node.kill()
        (node.state_dir / "beside.json").write_bytes(b"\x00garbage")
        node.end(pid)
        node.start()
        node.snapshot({A: 300})
        node.wait_limit(700)


def test_i9_killed_again_and_again_the_original_stands() -> None:
    with EnforcerNode() as node:
        node.gpus[0].limit_mw = 650_000
        pid = node.run_pod(A)
        for number in range(4):
            node.start()
            node.snapshot({A: 300 + 10 * number})
            node.wait_limit(300 + 10 * number)
            node.kill()
        node.start()
        assert node.gpu().original_mw == 650_000
        node.end(pid)
        node.snapshot({})
        node.wait_limit(650)


def test_i9_the_watcher_may_be_replaced_while_the_enforcer_is_away() -> None:
    with EnforcerNode() as node:
        node.start()
        node.run_pod(A)
        node.snapshot({A: 300})
        node.kill()
        node.session, node.revision = "another", 0
        node.start()
        node.snapshot({A: 350})
        node.wait_limit(350)


def test_sigterm_restores_what_was_found() -> None:
    with EnforcerNode() as node:
        node.gpus[0].limit_mw = 650_000
        node.start()
        node.run_pod(A, 0, 1)
        node.snapshot({A: 300})
        assert node.stop() == 0
        assert (node.limit(0), node.limit(1)) == (650, 700)
        assert node.owned() == {}
        assert node.logs("stopped")
        assert not node.run_dir.joinpath("control.sock").exists()
        assert node.errors() == ""


def test_sigterm_restores_also_what_was_just_written_or_refused() -> None:
    with EnforcerNode() as node:
        node.start()
        node.run_pod(A)
        node.gpus[0].fault("nvmlDeviceSetPowerManagementLimit", error=999, count=2)
        node.snapshot({A: 300})
        node.run_pod(B, 1)
        node.snapshot({A: 300, B: 300})
        node.gpus[0].clear_faults()
        assert node.stop() == 0
        assert (node.limit(0), node.limit(1)) == (700, 700)
        assert node.owned() == {}


def test_sigterm_tries_again_what_is_refused_for_a_moment() -> None:
    """Where the agent is uninstalled there is no next start."""
    with EnforcerNode() as node:
        node.start()
        node.run_pod(A)
        node.run_pod(B, 1)
        node.snapshot({A: 300, B: 300})
        node.gpus[0].fault("nvmlDeviceSetPowerManagementLimit", error=999, count=2)
        assert node.stop() == 0
        assert (node.limit(0), node.limit(1)) == (700, 700)
        assert node.owned() == {}


def test_sigterm_while_nvml_is_away_ends_and_keeps_the_ledger() -> None:
    with EnforcerNode() as node:
        node.start()
        node.run_pod(A)
        node.snapshot({A: 300})
        node.gpus.driver_missing()
        assert node.stop() == 0
        assert node.owned() == {node.gpus[0].uuid: 700_000}


def test_a_garbage_ledger_is_said_and_the_generation_before_adopted() -> None:
    with EnforcerNode() as node:
        node.start()
        node.run_pod(A)
        node.snapshot({A: 300})
        node.snapshot({A: 310})
        node.wait_limit(310)
        node.kill()
        (node.state_dir / "ledger.json").write_bytes(b"\x00garbage")
        node.start()
        assert node.gpu().original_mw == 700_000
        assert any("damaged" in line["why"] for line in node.logs("ledger"))
        assert list(node.state_dir.glob("*damaged*"))


def test_lease_gives_back_after_the_watcher_fell_silent_and_takes_again_when_it_is_back() -> None:
    with EnforcerNode(lease="release:6") as node:
        node.start()
        node.run_pod(A)
        node.snapshot({A: 300})
        node.wait_limit(700)
        until(lambda: node.logs("limit_released"), "it is said")
        assert "lease" in node.logs("limit_released")[0]["why"]
        node.heartbeat()
        node.wait_limit(300)


def test_lease_heartbeats_keep_the_limit() -> None:
    with EnforcerNode(lease="release:6") as node:
        node.start()
        node.run_pod(A)
        node.snapshot({A: 300})
        first = node.status().enforcer.uptime_s

        def beaten() -> bool:
            node.heartbeat()
            assert node.limit() == 300
            return node.status().enforcer.uptime_s > first + 9

        until(beaten, "longer than the lease")
        assert node.writes() == 1


def test_lease_counts_from_the_start_when_no_watcher_ever_comes() -> None:
    with EnforcerNode() as node:
        node.start()
        node.run_pod(A)
        node.snapshot({A: 300})
        node.kill()
        node.start(lease="release:6")
        node.wait_limit(700)


def test_dry_run_does_not_touch_what_an_enforcer_before_it_owns() -> None:
    with EnforcerNode() as node:
        node.start()
        pid = node.run_pod(A)
        node.snapshot({A: 300})
        node.kill()
        node.end(pid)
        node.start(dry_run="true")
        node.snapshot({})
        node.gpus[0].limit_mw = 500_000
        node.looks()
        assert "dry run" in node.gpu().reason
        assert node.stop() == 0
        assert node.limit() == 500
        assert node.writes() == 1
        assert node.owned() == {node.gpus[0].uuid: 700_000}

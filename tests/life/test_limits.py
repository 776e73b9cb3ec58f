"""The main job, by the whole enforcer process: limits are set, kept, and given back as found."""

from __future__ import annotations

import json
from functools import partial

import pytest

from tests.life.node import LifeNode as EnforcerNode
from tests.life.node import pod_uid, until
from tests.simnode.gpus import Kind

A, B, C = pod_uid(1), pod_uid(2), pod_uid(3)


def test_acquire_adjust_release_and_the_original_is_restored() -> None:
    with EnforcerNode() as node:
        node.gpus[0].limit_mw = 650_000  # not the factory's: what is found is given back
        node.start()
        pid = node.run_pod(A)
        report = node.snapshot({A: 300})
        assert node.limit() == 300
        (gpu,) = (g for g in report.gpus if g.managed)
        assert (gpu.original_mw, gpu.target_mw, gpu.limit_mw) == (650_000, 300_000, 300_000)
        assert (gpu.state, gpu.pods) == ("managed", [A])
        (pod,) = report.pods
        assert (pod.state, pod.effective_mw, pod.gpus) == ("enforced", 300_000, [gpu.uuid])

        node.snapshot({A: 450.5})
        node.wait_limit(450.5)
        node.end(pid)
        node.snapshot({})
        node.wait_limit(650)
        until(lambda: node.owned() == {}, "no longer owned")
        assert node.gpu().state == "free"
        assert [s.requested_mw for s in node.gpus.sets()] == [300_000, 450_500, 650_000]
        assert node.gpu().writes == {"acquire": 1, "adjust": 1, "release": 1}
        assert node.limit(1) == 700
        assert node.writes(node.gpus[1]) == 0


def test_a_limit_of_a_pod_holds_on_each_of_its_gpus() -> None:
    with EnforcerNode(gpus=4) as node:
        node.start()
        node.run_pod(A, 0, 2, 3)
        node.snapshot({A: 300})
        assert [node.limit(k) for k in range(4)] == [300, 700, 300, 300]
        assert len(node.pod(A).gpus) == 3


def test_another_pod_that_asks_for_the_same_is_entered_and_nothing_is_written() -> None:
    """Also where the hardware keeps whole watts, so that the limit is not to the milliwatt."""
    with EnforcerNode() as node:
        node.start()
        node.run_pod(A)
        node.snapshot({A: 350.5})
        node.gpus[0].limit_mw = 350_000
        node.run_pod(B)
        node.snapshot({A: 350.5, B: 350.5})
        until(lambda: node.gpu().pods == sorted([A, B]), "both pods")
        node.looks()
        assert node.writes() == 1
        assert node.gpu().writes == {"acquire": 1}
        (entry,) = json.loads((node.state_dir / "ledger.json").read_bytes())["gpus"].values()
        assert entry["pods"] == sorted([A, B])


def test_a_first_gpu_process_of_a_waiting_pod_is_found_soon() -> None:
    with EnforcerNode(scan_seconds="3600", reconcile_seconds="3600") as node:
        node.start()
        assert node.snapshot({A: 300}).pods[0].state == "waiting"
        node.run_pod(A)
        node.wait_limit(300)


@pytest.mark.parametrize("kind", ["compute", "graphics", "mps"])
def test_processes_of_every_list_count(kind: Kind) -> None:
    with EnforcerNode() as node:
        node.start()
        node.run_pod(A, kind=kind)
        node.snapshot({A: 300})
        assert node.limit() == 300


def test_clamped_by_hardware_and_by_administrator() -> None:
    with EnforcerNode(max_watts="500", min_watts="250") as node:
        node.start()
        node.run_pod(A, 0)
        node.run_pod(B, 1)
        report = node.snapshot({A: 100, B: 900})
        assert (node.limit(0), node.limit(1)) == (250, 500)
        assert [pod.state for pod in report.pods] == ["clamped", "clamped"]
        assert "250" in report.pods[0].reason
        assert [pod.requested_mw for pod in report.pods] == [100_000, 900_000]


def test_conflict_the_lowest_holds_and_is_shown() -> None:
    with EnforcerNode() as node:
        node.start()
        node.run_pod(A)
        second = node.run_pod(B)
        node.snapshot({A: 400, B: 300})
        assert node.limit() == 300
        assert (node.pod(A).state, node.pod(B).state) == ("conflict", "enforced")
        node.end(second)
        node.snapshot({A: 400})
        node.wait_limit(400)


def test_conflict_the_safe_default_holds_where_so_configured() -> None:
    with EnforcerNode(conflict="safe-default", safe_default="50%") as node:
        node.start()
        node.run_pod(A)
        node.run_pod(B)
        node.snapshot({A: 400, B: 300})
        assert node.limit() == 350


def test_invalid_annotation_keeps_the_limit_that_the_pod_has() -> None:
    with EnforcerNode() as node:
        node.start()
        node.run_pod(A)
        node.snapshot({A: 300})
        report = node.snapshot({A: None})
        assert node.limit() == 300
        assert report.pods[0].state == "invalid"
        assert "much" in report.pods[0].reason
        assert node.writes() == 1


def test_invalid_annotation_takes_the_safe_default_else_nothing() -> None:
    with EnforcerNode() as node:
        node.start()
        node.run_pod(A)
        assert node.snapshot({A: None}).pods[0].state == "invalid"
        assert node.writes() == 0
        assert node.stop() == 0
        node.start(safe_default="60%")
        node.snapshot({A: None})
        assert node.limit() == 420


def test_a_pod_without_the_annotation_is_left_alone_and_gives_back_what_it_had() -> None:
    with EnforcerNode() as node:
        node.start()
        node.run_pod(A)
        node.run_pod(B, 1)
        node.snapshot({A: 300}, others=[B])
        assert (node.limit(0), node.limit(1)) == (300, 700)
        node.snapshot({}, others=[A, B])
        node.wait_limit(700)
        assert node.writes(node.gpus[1]) == 0


def test_pod_gone_but_its_process_runs_is_held_until_it_ends() -> None:
    with EnforcerNode() as node:
        node.start()
        pid = node.run_pod(A)
        node.snapshot({A: 300})
        node.snapshot({})
        node.looks()
        held = node.gpu()
        assert (held.state, held.limit_mw) == ("held", 300_000)
        assert "still run" in held.reason
        node.end(pid)
        node.wait_limit(700)


def test_process_gone_while_its_pod_exists_is_kept() -> None:
    with EnforcerNode() as node:
        node.start()
        pid = node.run_pod(A)
        node.snapshot({A: 300})
        node.end(pid)
        node.looks()
        assert node.limit() == 300
        assert node.gpu().state == "managed"
        node.run_pod(A)
        node.looks()
        assert node.writes() == 1


@pytest.mark.parametrize("taker", ["host", "unannotated"])
def test_another_process_takes_over_is_given_back(taker: str) -> None:
    with EnforcerNode() as node:
        node.start()
        pid = node.run_pod(A)
        node.snapshot({A: 300}, others=[B])
        node.end(pid)
        node.looks()
        assert node.limit() == 300  # its worker restarts
        if taker == "host":
            node.run_host()
        else:
            node.run_pod(B)
        node.wait_limit(700)
        until(lambda: node.owned() == {}, "no longer owned")


@pytest.mark.parametrize("neighbour", ["host", "unannotated"])
def test_who_ran_beside_the_worker_does_not_take_its_gpu(neighbour: str) -> None:
    """A weight server or an MPS daemon keeps its context while the worker restarts."""
    with EnforcerNode() as node:
        node.start()
        pid = node.run_pod(A)
        node.snapshot({A: 300}, others=[B, C])
        run = node.run_host if neighbour == "host" else partial(node.run_pod, B)
        beside = run()
        for _ in range(3):  # the worker restarts again and again
            node.looks()
            node.end(pid)
            node.looks()
            assert node.limit() == 300
            pid = node.run_pod(A)
            node.looks()
        node.end(pid)
        node.end(beside)  # it restarts too: a pod is known again, a process of the host is not
        node.looks()
        run()
        if neighbour == "host":
            node.wait_limit(700)
        else:
            node.looks()
            assert node.limit() == 300
            node.run_pod(C)  # this one was never there
            node.wait_limit(700)
        until(lambda: node.owned() == {}, "no longer owned")


def test_a_stranger_ends_a_pods_rest_also_beside_another_annotated_pod() -> None:
    with EnforcerNode() as node:
        node.start()
        pid = node.run_pod(A)
        node.run_pod(B)
        node.snapshot({A: 300, B: 500})
        node.looks()
        node.end(pid)
        node.looks()
        assert node.limit() == 300  # the lower one's worker restarts
        node.run_host()
        node.wait_limit(500)
        node.looks()
        assert node.limit() == 500


def test_who_ran_beside_does_not_hold_a_gone_pods_limit() -> None:
    with EnforcerNode() as node:
        node.start()
        pid = node.run_pod(A)
        node.run_pod(B)
        node.snapshot({A: 300}, others=[B])
        node.looks()
        node.end(pid)
        node.looks()
        assert node.limit() == 300
        node.snapshot({}, others=[B])
        node.wait_limit(700)


def test_a_pod_that_the_api_never_told_of_takes_no_gpu() -> None:
    with EnforcerNode() as node:
        node.start()
        pid = node.run_pod(A)
        node.snapshot({A: 300})
        node.end(pid)
        node.run_pod(C)
        node.looks()
        assert node.limit() == 300
        assert f"never told of pod {C}" in node.gpu().reason
        node.gpus[0].limit_mw = 600_000  # it may ask for less, so this is mended down, never up
        node.wait_limit(300)
        node.gpus[0].limit_mw = 250_000
        node.looks()
        assert node.limit() == 250
        node.snapshot({A: 300}, others=[C])  # the event was late
        node.wait_limit(700)


def test_milliwatts_by_mistake_are_no_limit_and_the_pod_says_what_was_meant() -> None:
    with EnforcerNode() as node:
        node.start()
        node.run_pod(A)
        node.snapshot({A: 70_000})
        node.looks()
        assert node.limit() == 700
        assert node.pod(A).state == "invalid"
        assert "at least ten times what this GPU takes at most (700 W)" in node.pod(A).reason
        assert "did you mean" not in node.pod(A).reason  # 70 W are not for this board
        node.gpus[0].limit_mw = 650_000  # nobody limits it
        node.looks()
        assert node.limit() == 650


def test_static_pod_is_known_by_the_kubelets_id() -> None:
    kubelet_id = "9aac5b5c8815def09a2ef9e37b89da55"
    with EnforcerNode() as node:
        node.start()
        node.run_pod(kubelet_id)
        node.snapshot({A: 300}, aliases={A: [kubelet_id]})
        assert node.limit() == 300
        assert node.pod(A).state == "enforced"


def test_drift_is_mended_and_counted_and_logged_once_a_value() -> None:
    with EnforcerNode() as node:
        node.start()
        node.run_pod(A)
        node.snapshot({A: 300})
        for mended in (1, 2, 3):  # a host script that comes again and again
            node.gpus[0].limit_mw = 600_000
            node.wait_limit(300)
            node.wait_drifts(mended)
        assert node.gpu().writes["drift"] == 3
        assert len(node.logs("limit_drifted")) == 1
        assert node.logs("limit_drifted")[0]["from_watts"] == 600
        node.gpus[0].limit_mw = 500_000
        node.wait_limit(300)
        until(lambda: len(node.logs("limit_drifted")) == 2, "another value is said")


def test_a_stronger_limiter_is_shown_and_not_fought() -> None:
    with EnforcerNode() as node:
        node.start()
        node.run_pod(A)
        node.snapshot({A: 300})
        node.gpus[0].enforced_cap_mw = 250_000
        until(lambda: node.gpu().enforced_mw == 250_000, "the lower limit is shown")
        assert node.gpu().limit_mw == 300_000
        node.looks(5)
        assert node.writes() == 1
        assert node.status().counters.drifts == 0


def test_release_to_the_factory_default_where_so_configured() -> None:
    with EnforcerNode(release_to="default") as node:
        node.gpus[0].limit_mw = 650_000
        node.start()
        pid = node.run_pod(A)
        node.snapshot({A: 300})
        node.end(pid)
        node.snapshot({})
        node.wait_limit(700)


def test_many_gpus_and_pods_at_once() -> None:
    with EnforcerNode(gpus=8) as node:
        node.start()
        uids = [pod_uid(10 + k) for k in range(8)]
        for number, uid in enumerate(uids):
            node.run_pod(uid, number)
        node.snapshot({uid: 300 + 10 * k for k, uid in enumerate(uids)})
        assert [node.limit(k) for k in range(8)] == [300 + 10 * k for k in range(8)]
        node.snapshot(dict.fromkeys(uids[:4], 500), others=uids[4:])
        for number in range(8):
            node.wait_limit(500 if number < 4 else 700, number)


def test_bounds_that_leave_nothing_on_a_board_are_said_and_nothing_is_written() -> None:
    with EnforcerNode(model="L4", min_watts="300") as node:
        node.start()
        node.run_pod(A)
        node.snapshot({A: 400})
        assert node.gpu().state == "failed"
        assert "300" in node.gpu().reason
        assert node.pod(A).state == "failed"
        assert node.writes() == 0


def test_more_processes_than_an_answer_shows_are_still_seen() -> None:
    with EnforcerNode() as node:
        node.start()
        for _ in range(40):
            node.run_host()
        node.run_pod(A)  # the last one started has, as a rule, the highest pid
        node.snapshot({A: 300})
        assert node.limit() == 300
        assert node.pod(A).state == "enforced"
        assert len(node.gpu().processes) <= 32

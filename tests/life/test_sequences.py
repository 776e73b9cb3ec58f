"""Sequences in which one rule meets another: silence, leases, strangers, restarts, dry runs."""

from __future__ import annotations

from shared import messages as m
from tests.life.node import LifeNode as EnforcerNode
from tests.life.node import pod_uid, until

A, B = pod_uid(1), pod_uid(2)
UNKNOWN = 999
SET = "nvmlDeviceSetPowerManagementLimit"
LISTS = "nvmlDeviceGetComputeRunningProcesses"


def test_i3_a_pod_clamped_up_on_one_of_its_gpus_is_not_enforced() -> None:
    with EnforcerNode() as node:
        (node.gpus[0].folder / "min_mw").write_text("100000\n")  # an A100 beside an H100
        node.start()
        node.run_pod(A, 0, 1)
        node.snapshot({A: 150})
        assert (node.limit(0), node.limit(1)) == (150, 200)
        pod = node.pod(A)
        assert pod.state == "clamped", (pod.state, pod.reason)


def test_a_pod_whose_other_gpu_has_the_safe_default_is_not_enforced() -> None:
    with EnforcerNode(conflict="safe-default", safe_default="350") as node:
        node.start()
        node.run_pod(A, 0, 1)
        node.run_pod(B, 1)
        node.snapshot({A: 300, B: 400})
        assert (node.limit(0), node.limit(1)) == (300, 350)
        pod = node.pod(A)
        assert pod.state == "conflict", (pod.state, pod.reason)


def test_a_pod_alone_on_a_held_gpu_is_no_conflict() -> None:
    with EnforcerNode() as node:
        node.start()
        node.run_pod(A)
        node.snapshot({A: 300})
        node.gpus[0].fault(LISTS, error=UNKNOWN)
        node.wait_state("held")
        node.snapshot({A: 500})
        pod = node.pod(A)
        assert node.limit() == 300
        assert pod.state != "conflict", (pod.state, pod.reason)


def test_i1_a_restart_writes_nothing_to_a_gpu_that_a_stranger_has_taken() -> None:
    with EnforcerNode() as node:
        node.start()
        pid = node.run_pod(A)
        node.snapshot({A: 300})
        node.kill()
        node.end(pid)
        node.run_host(0)
        node.gpus[0].limit_mw = 500_000  # by its new owner
        before = node.writes()
        node.start()
        node.looks(5)
        assert node.writes() == before, f"written to {node.limit()} W before any snapshot"


def test_i1_a_silent_watcher_is_no_reason_to_write_to_a_strangers_gpu() -> None:
    with EnforcerNode() as node:
        node.start()
        pid = node.run_pod(A)
        node.snapshot({A: 300})
        until(lambda: not node.status().watcher.connected, "silence")
        node.end(pid)
        node.run_host(0)
        node.wait_state("held")
        node.gpus[0].limit_mw = 500_000  # by its new owner
        before = node.writes()
        node.looks(5)
        assert node.writes() == before, f"written to {node.limit()} W"


def hostile(node: EnforcerNode, number: int) -> m.Snapshot:
    """A snapshot that the decoder takes: one pod, named again and again with other aliases."""
    node.revision += 1
    pods = [
        m.DesiredPod(
            uid=A,
            aliases=[f"{number:08d}-{entry:08d}-{k}".ljust(64, "x") for k in range(4)],
            namespace="d",
            name="p",
            limit_mw=300_000 + number % 2 * 1000,
            raw="300",
        )
        for entry in range(600)
    ]
    return m.Snapshot(session=node.session, revision=node.revision, node="n", pods=pods, others=[])


def test_i2_a_taken_over_watcher_cannot_outgrow_the_ledger() -> None:
    with EnforcerNode(gpus=1) as node:
        node.start()
        node.run_pod(A)
        node.snapshot({A: 300})
        for number in range(40):
            node.send(hostile(node, number))  # taken or refused
        size = (node.state_dir / "ledger.json").stat().st_size
        node.kill()
        node.start()  # and the original is what it was
        assert node.stop() == 0
        said = [line["why"][:150] for line in node.logs("ledger")]
        assert node.limit() == 700, f"ledger of {size} bytes: {said}"


def test_a_report_on_the_snapshot_that_ends_a_lease_is_of_after_it_was_acted_on() -> None:
    with EnforcerNode(lease="release:6", scan_seconds="5") as node:
        node.start()
        node.run_pod(A)
        node.snapshot({A: 300})
        assert node.limit() == 300
        until(lambda: node.limit() == 700, "lease")
        report = node.heartbeat()  # the watcher is back and repeats what it wants
        assert report.pods[0].state == "enforced", report.pods[0].reason
        assert node.limit() == 300


def test_i4_silence_raises_nothing_after_a_release_that_was_refused() -> None:
    with EnforcerNode() as node:
        node.start()
        pid = node.run_pod(A)
        node.snapshot({A: 300})
        node.gpus[0].fault(SET, error=UNKNOWN)
        node.end(pid)
        node.snapshot({B: 500})  # A is gone: given back, which the board refuses
        node.wait_state("failed")
        until(lambda: not node.status().watcher.connected, "silence")
        node.gpus[0].clear_faults()
        node.looks()
        assert node.limit() == 300
        assert "silent" in node.gpu().reason
        node.run_pod(B)
        node.looks(5)
        assert node.limit() == 300, f"raised to {node.limit()} W: {node.gpu().reason}"


def test_i10_questions_about_a_held_gpu_are_no_log_lines() -> None:
    with EnforcerNode() as node:
        node.gpus[0].fault(LISTS, error=UNKNOWN)
        node.start()
        node.snapshot({})
        node.wait_state("held")
        lines = len(node.logs("gpu_state"))
        shut = len(node.gpus.inits())
        until(lambda: len(node.gpus.inits()) > shut, "NVML is let go")
        node.status()  # a dashboard that asks now and then
        node.looks()
        assert len(node.logs("gpu_state")) == lines


def test_a_living_watcher_is_not_refused_until_the_lease_has_given_everything_back() -> None:
    with EnforcerNode(lease="release:8") as node:
        node.start()
        node.run_pod(A)
        node.snapshot({A: 300})
        old = node.session
        node.session = "f" * 32
        node.snapshot({A: 300})  # a second watcher starts, and dies
        node.session = old
        end_s = node.clock.now_s() + 10
        while node.clock.now_s() < end_s:  # the first lives and repeats itself
            node.revision += 1
            node.send(node.message({A: 300}))
            assert node.limit() == 300, "given back though a watcher with the same wish lives"
            node.lives_for(0.5)


def test_i12_a_pod_on_a_gpu_with_many_processes_is_not_waiting() -> None:
    with EnforcerNode() as node:
        node.start()
        for _ in range(33):
            node.run_host(0)
        node.run_pod(A)
        broken = node.run_host(0)
        (node.work.root / str(broken) / "cgroup").write_text("0::/../..\n")
        node.snapshot({A: 300})
        node.looks()
        pod = node.pod(A)
        assert node.gpu().state == "held"
        assert pod.gpus, (pod.state, pod.reason)


def test_dry_run_with_an_owned_entry_promises_no_write() -> None:
    with EnforcerNode() as node:
        node.start(on_exit="hold")
        node.run_pod(A)
        node.snapshot({A: 300})
        node.stop()
        node.start(dry_run="true")
        node.snapshot({A: 400})
        node.looks()
        pod = node.pod(A)
        assert "about to be written" not in pod.reason, (pod.state, pod.reason)
        assert pod.state == "waiting"
        assert "dry run, nothing is written" in pod.reason


def test_a_short_lease_does_not_let_a_replaced_watcher_take_over_between_two_heartbeats() -> None:
    with EnforcerNode(lease="release:6") as node:
        node.start()
        node.run_pod(A)
        node.snapshot({A: 300})
        old = node.message({A: 300})
        node.session, node.revision = "f" * 32, 0
        node.snapshot({A: 500})
        node.lives_for(4.5)  # more than half of it, and the newer one beats every two seconds
        refused = node.send(old)
        assert isinstance(refused, m.Error)
        assert refused.code == "stale"
        assert node.limit() == 500

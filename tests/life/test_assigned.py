"""A limit that stands before the first process: by the kubelet's word, as long as the pod lives."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.life.node import LifeNode, pod_uid
from tests.simnode.checkpoint import Checkpoint, Claims

A, B, C = pod_uid(1), pod_uid(2), pod_uid(3)


@pytest.fixture
def node() -> Iterator[LifeNode]:
    with LifeNode() as made:
        made.settings["POWER_AGENT_KUBELET_DIR"] = str(made.folder / "kubelet")
        yield made


@pytest.fixture
def kubelet(node: LifeNode) -> Checkpoint:
    made = Checkpoint(node.folder / "kubelet")
    made.write()
    return made


def starts_assigned(node: LifeNode, kubelet: Checkpoint) -> None:
    """The first GPU is A's by the kubelet's word, and has its limit, without any process."""
    node.start()
    kubelet.assign(A, node.gpus[0].uuid)
    node.snapshot({A: 300})
    node.wait_limit(300)


def test_the_limit_stands_before_the_pods_first_process(
    node: LifeNode, kubelet: Checkpoint
) -> None:
    node.start()
    node.snapshot({A: 300})
    assert node.pod(A).state == "waiting"
    kubelet.assign(A, node.gpus[0].uuid)
    node.wait_limit(300)
    assert node.pod(A).state == "enforced"
    assert [each.owner for each in node.gpu().assigned] == [A]
    pid = node.run_pod(A)
    node.looks()
    node.end(pid)
    node.run_host()  # whoever else comes between two processes
    node.looks()
    assert node.limit() == 300
    node.snapshot({})  # the checkpoint still names it
    node.wait_limit(700)
    assert node.owned() == {}


def test_a_deleted_pods_processes_hold_it_and_then_it_is_given_back(
    node: LifeNode, kubelet: Checkpoint
) -> None:
    node.start()
    kubelet.assign(A, node.gpus[0].uuid)
    pid = node.run_pod(A)
    node.snapshot({A: 300})
    node.snapshot({})
    node.looks()
    assert node.limit() == 300
    node.end(pid)
    node.wait_limit(700)


def test_an_annotation_that_goes_takes_the_limit_with_it(
    node: LifeNode, kubelet: Checkpoint
) -> None:
    starts_assigned(node, kubelet)
    node.snapshot({}, others=[A])
    node.wait_limit(700)


def test_replicas_of_one_gpu_are_several_pods_on_it(node: LifeNode, kubelet: Checkpoint) -> None:
    node.start()
    kubelet.assign(A, f"{node.gpus[0].uuid}::0")
    kubelet.assign(B, f"{node.gpus[0].uuid}::1")
    node.snapshot({A: 400, B: 300})
    node.wait_limit(300)
    assert (node.pod(A).state, node.pod(B).state) == ("conflict", "enforced")


def test_mig_instances_and_device_nodes_mean_their_boards(
    node: LifeNode, kubelet: Checkpoint
) -> None:
    part = "MIG-41c2a8a6-8a30-5a2e-a1c5-0d3d6f6c2b11"
    node.start()
    kubelet.assign(A, f"{part}::0", resource="nvidia.com/mig-1g.10gb")
    kubelet.assign(B, "nvidia0/vgpu1")
    node.snapshot({A: 300, B: 400})
    node.wait_limit(400)
    assert node.pod(A).state == "waiting"  # NVML knows no such instance yet
    (node.gpus[1].folder / "mig_uuids").write_text(f"MIG-other {part}\n")
    node.wait_limit(300, 1)
    assert node.limit(0) == 400


def test_the_pods_of_a_claim_hold_its_gpus_before_any_process(node: LifeNode) -> None:
    """By DRA alone: no plugin, so no checkpoint. The claim is entered first, its devices later."""
    claims = Claims(node.folder / "kubelet")
    claims.prepare(A, B, devices=[])
    node.start()
    node.snapshot({A: 400, B: 300})
    assert node.pod(A).state == "waiting"
    claims.claims.clear()
    claims.prepare(A, B, devices=["gpu-0"])
    node.wait_limit(300)
    assert (node.pod(A).state, node.pod(B).state) == ("conflict", "enforced")
    assert {each.owner for each in node.gpu().assigned} == {A, B}
    assert node.gpu().assigned[0].evidence == "device gpu-0 of claim default/worker-gpu"
    claims.path.write_text("{")  # what was read before holds
    node.looks()
    assert node.limit() == 300
    assert "dra_manager_state" in node.status().enforcer.kubelet
    node.snapshot({A: 400})
    node.wait_limit(400)
    node.snapshot({})
    node.wait_limit(700)


def test_processes_outvote_an_assignment_that_is_evidently_wrong(
    node: LifeNode, kubelet: Checkpoint
) -> None:
    starts_assigned(node, kubelet)
    node.run_pod(A, 1)
    node.wait_limit(300, 1)
    kept = node.run_pod(C, 0)
    node.snapshot({A: 300}, others=[C])
    node.wait_limit(700)  # a stranger took it, and its pod runs elsewhere
    node.end(kept)


def test_a_pod_with_two_gpus_that_runs_on_one_keeps_both(
    node: LifeNode, kubelet: Checkpoint
) -> None:
    node.start()
    kubelet.assign(A, *(gpu.uuid for gpu in node.gpus))
    node.snapshot({A: 300})
    node.wait_limit(300, 1)
    node.run_pod(A, 0)
    node.looks()
    assert (node.limit(0), node.limit(1)) == (300, 300)


def test_an_unreadable_list_does_not_keep_the_limit_away_but_raises_nothing(
    node: LifeNode, kubelet: Checkpoint
) -> None:
    node.gpus[0].fault("nvmlDeviceGetComputeRunningProcesses", error=999)
    node.gpus[1].fault("nvmlDeviceGetComputeRunningProcesses", error=999)
    node.gpus[1].limit_mw = 250_000
    node.start()
    kubelet.assign(A, *(gpu.uuid for gpu in node.gpus))
    node.snapshot({A: 300})
    node.wait_limit(300)
    node.looks()
    assert node.limit(1) == 250
    assert "_v3: UNKNOWN" in node.gpu(1).reason


def test_a_damaged_checkpoint_leaves_processes_alone_as_evidence(
    node: LifeNode, kubelet: Checkpoint
) -> None:
    kubelet.path.write_text("{")
    node.start()
    node.snapshot({A: 300})
    assert node.pod(A).state == "waiting"
    node.run_pod(A)
    node.wait_limit(300)
    assert "not a checkpoint that is known" in node.status().enforcer.kubelet


def test_an_enforcer_that_starts_anew_knows_the_assignment_again(
    node: LifeNode, kubelet: Checkpoint
) -> None:
    starts_assigned(node, kubelet)
    node.kill()
    node.run_host()
    node.start()
    node.snapshot({A: 300})
    node.looks()
    assert node.limit() == 300

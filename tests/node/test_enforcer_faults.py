"""NVML, GPUs and disks that fail, under the whole enforcer process: faults stay where they are."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.node.enforcer_harness import EnforcerNode, pod_uid
from tests.simnode.undrained import Undrained
from tests.small_disk import fill, small_disk
from tests.waiting import until

A, B = pod_uid(1), pod_uid(2)
NO_PERMISSION, GPU_IS_LOST, UNKNOWN_ERROR = 4, 15, 999
NOT_SUPPORTED, FUNCTION_NOT_FOUND = 3, 13
SET = "nvmlDeviceSetPowerManagementLimit"
LIMIT = "nvmlDeviceGetPowerManagementLimit"
COMPUTE = "nvmlDeviceGetComputeRunningProcesses"


def test_driver_that_goes_and_comes_keeps_limits_and_enforces_again() -> None:
    with EnforcerNode() as node:
        node.start()
        node.run_pod(A)
        node.snapshot({A: 300})
        node.gpus.driver_missing()
        until(lambda: node.gpu().state in ("held", "lost", "failed"), "it is noticed")
        assert node.process is not None
        assert node.process.poll() is None
        assert node.owned() == {node.gpus[0].uuid: 700_000}
        node.gpus.driver_present()
        node.gpus.forget_limits()  # what the unloading of the driver does
        node.wait_limit(300)
        node.wait_state("managed")


def test_i11_gpu_lost_midway_delays_no_other_and_is_back_under_another_index() -> None:
    with EnforcerNode(gpus=3) as node:
        node.start()
        node.run_pod(A, 0)
        node.run_pod(B, 1)
        node.snapshot({A: 300, B: 400})
        uuid = node.gpus[0].uuid
        node.gpus[0].vanish()
        lost = node.wait_state("lost")
        assert lost.index is None
        assert lost.managed
        assert node.pod(A).state == "failed"
        node.snapshot({A: 350, B: 450})
        assert node.limit(1) == 450
        assert node.owned()[uuid] == 700_000  # kept until it returns
        node.gpus[0].reappear(index=2)
        node.wait_limit(350)
        back = node.wait_state("managed")
        assert back.index == 2
        assert len(node.logs("gpu_lost")) == 1
        assert [line["index"] for line in node.logs("gpu_back")] == [2]


def test_set_refused_is_said_once_with_the_remedy_and_tried_again() -> None:
    with EnforcerNode() as node:
        node.start()
        node.run_pod(A)
        node.run_pod(B, 1)
        node.gpus[0].fault(SET, error=NO_PERMISSION)
        report = node.snapshot({A: 300, B: 300})
        assert node.limit(1) == 300
        gpu = node.gpu()
        assert gpu.state == "failed"
        assert "CAP_SYS_ADMIN" in gpu.reason
        assert gpu.write_failures["NO_PERMISSION"] >= 1
        assert report.counters.limit_write_failures >= 1
        assert node.pod(A).state == "failed"
        until(lambda: len(node.gpus[0].sets()) >= 2, "tried again")
        said = [line for line in node.logs() if "CAP_SYS_ADMIN" in line.get("why", "")]
        assert [line["event"] for line in said] == ["limit_failed"]
        assert said[0]["level"] == "error"
        node.gpus[0].clear_faults()
        node.snapshot({A: 310, B: 300})  # another value does not wait for the pause to end
        node.wait_limit(310)
        node.wait_state("managed")
        assert node.pod(A).state == "enforced"


# ---- disks ----


@pytest.fixture
def node_on_a_small_disk() -> Iterator[EnforcerNode]:
    """A node whose state directory is on a file system of 64 KiB of its own."""
    with EnforcerNode() as node, small_disk(node.state_dir):
        yield node


@pytest.mark.root
def test_i2_a_full_disk_no_first_write_and_owned_ones_are_kept(
    node_on_a_small_disk: EnforcerNode,
) -> None:
    node = node_on_a_small_disk.start()
    node.run_pod(A)
    second = node.run_pod(B, 1)
    node.snapshot({A: 300})
    ballast = fill(node.state_dir)
    node.snapshot({A: 250, B: 300})
    assert node.limit(0) == 250  # owned: kept, and changed as asked
    assert node.writes(node.gpus[1]) == 0
    assert node.gpu(1).state == "failed"
    assert "No space left" in node.gpu(1).reason
    assert not node.gpu(1).managed
    assert "No space left" in node.status().enforcer.ledger_fault
    node.gpus[0].limit_mw = 600_000
    node.wait_limit(250)
    said = [line for line in node.logs("ledger") if line["level"] == "error"]
    assert len(said) == 1
    assert list(node.owned()) == [node.gpus[0].uuid]

    node.end(second)
    node.snapshot({A: 250})
    node.wait_state("free", 1)
    node.run_pod(B, 1)
    node.snapshot({A: 250, B: 300})
    assert node.writes(node.gpus[1]) == 0
    ballast.unlink()
    node.wait_limit(300, 1)
    assert set(node.owned()) == {gpu.uuid for gpu in node.gpus}
    assert "No space left" not in (node.status().enforcer.ledger_fault or "")


# ---------------------------------------------------------------------- standard output


def test_a_standard_output_that_nobody_drains_costs_lines_and_no_limit() -> None:
    """A container runtime that hangs, or a full disk behind it."""
    with Undrained() as output, EnforcerNode() as node:
        node.output = output.writer
        node.start()
        node.run_pod(A)
        for watts in (300, 320, 310):
            node.snapshot({A: watts})
            node.wait_limit(watts)
        output.drain()
        node.snapshot({A: 400})
        node.wait_limit(400)
        said, *after = output.lines(lambda got: any(line.get("to_watts") == 400 for line in got))
        assert (said["level"], said["event"]) == ("warning", "log_lines_dropped")
        assert said["count"] > 3  # how it began, and each of the limits
        assert "log_lines_dropped" not in [line["event"] for line in after]

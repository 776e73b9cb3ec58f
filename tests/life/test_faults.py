"""NVML, GPUs and disks that fail, under the whole enforcer process: faults stay where they are."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.life.node import LifeNode as EnforcerNode
from tests.life.node import pod_uid, until
from tests.small_disk import fill, small_disk

A, B = pod_uid(1), pod_uid(2)
NO_PERMISSION, GPU_IS_LOST, UNKNOWN_ERROR = 4, 15, 999
NOT_SUPPORTED, FUNCTION_NOT_FOUND = 3, 13
SET = "nvmlDeviceSetPowerManagementLimit"
LIMIT = "nvmlDeviceGetPowerManagementLimit"
COMPUTE = "nvmlDeviceGetComputeRunningProcesses"


def test_nvml_missing_at_start_and_appearing_later() -> None:
    with EnforcerNode() as node:
        node.gpus.driver_missing()
        node.run_pod(A)
        node.start()
        (pod,) = node.snapshot({A: 300}).pods
        missing = "NVML: nvmlInit: DRIVER_NOT_LOADED; load the NVIDIA driver"
        assert pod.reason == f"no process of it is seen on a GPU yet; {missing}"  # one runs there
        assert node.status().enforcer.nvml == "absent"
        assert "driver" in node.status().enforcer.nvml_message
        node.gpus.driver_present()
        node.wait_limit(300)
        assert node.status().enforcer.nvml == "ok"
        said = [line["state"] for line in node.logs("nvml")]
        assert said == ["absent", "ok"]  # once each, however often it was tried


def test_nvml_missing_at_start_does_not_hide_what_the_ledger_owns() -> None:
    with EnforcerNode() as node:
        node.start()
        node.run_pod(A)
        node.snapshot({A: 300})
        node.kill()
        node.gpus.driver_missing()
        node.start()
        shown = node.gpu()
        assert shown.managed
        assert shown.state in ("lost", "held")
        node.gpus.driver_present()
        node.snapshot({})
        assert node.limit() == 300


def test_nvml_missing_at_start_shows_what_the_ledger_owns() -> None:
    with EnforcerNode() as node:
        node.start()
        node.run_pod(A)
        node.snapshot({A: 300})
        node.kill()
        node.gpus.driver_missing()
        node.start()
        shown = node.gpu()
        assert (shown.original_mw, shown.target_mw, shown.pods) == (700_000, 300_000, [A])
        assert shown.reason == node.status().enforcer.nvml_message  # there is no list to be on


def test_library_of_another_version_is_failing_with_the_remedy() -> None:
    with EnforcerNode() as node:
        node.gpus.driver_fails(18)
        node.start()
        until(lambda: node.status().enforcer.nvml == "failing", "failing")
        assert "restart" in node.status().enforcer.nvml_message


def test_gpu_lost_whose_pod_goes_meanwhile_is_given_back_when_it_returns() -> None:
    with EnforcerNode() as node:
        node.start()
        pid = node.run_pod(A)
        node.snapshot({A: 300})
        node.gpus[0].vanish()
        node.wait_state("lost")
        node.end(pid)
        node.snapshot({})
        assert node.limit() == 300
        node.gpus[0].reappear()
        node.wait_limit(700)


def test_a_gpu_that_is_lost_while_it_is_taken_is_no_busy_loop() -> None:
    with EnforcerNode() as node:
        node.start()
        node.run_pod(A)
        node.run_pod(B, 1)
        node.gpus[0].fault(LIMIT, error=GPU_IS_LOST)
        node.snapshot({A: 300, B: 300})
        assert node.limit(1) == 300
        node.wait_state("lost")
        assert node.writes(node.gpus[0]) == 0
        node.lives_for(1.5)
        assert node.writes(node.gpus[0]) == 0
        assert len(node.logs()) < 20
        node.gpus[0].clear_faults()
        node.wait_limit(300)


def test_a_refused_first_set_that_succeeds_later_is_no_drift() -> None:
    """Nobody else had changed it: the counters and the log must not say so."""
    with EnforcerNode() as node:
        node.start()
        node.run_pod(A)
        node.gpus[0].fault(SET, error=NO_PERMISSION, count=1)
        node.snapshot({A: 300})
        node.wait_limit(300)
        node.wait_state("managed")
        assert node.status().counters.drifts == 0
        assert node.logs("limit_drifted") == []


def test_a_refused_first_set_that_succeeds_later_is_counted_as_the_first() -> None:
    with EnforcerNode() as node:
        node.start()
        node.run_pod(A)
        node.gpus[0].fault(SET, error=NO_PERMISSION, count=1)
        node.snapshot({A: 300})
        node.wait_limit(300)
        node.wait_state("managed")
        assert node.gpu().writes == {"acquire": 1}


def test_a_refused_set_is_tried_again_by_itself() -> None:
    with EnforcerNode(scan_seconds="3600", reconcile_seconds="3600") as node:
        node.start()
        node.run_pod(A)
        node.gpus[0].fault(SET, error=NO_PERMISSION, count=1)
        node.snapshot({A: 300})
        assert node.gpu().state == "failed"
        assert node.writes() == 1
        # The pause ends by itself, not with the next scan in an hour.
        node.wait_limit(300)
        assert node.writes() == 2


def test_a_set_refused_for_one_value_does_not_delay_another() -> None:
    with EnforcerNode() as node:
        node.start()
        node.run_pod(A)
        node.gpus[0].fault(SET, error=UNKNOWN_ERROR, count=3)
        node.snapshot({A: 300})
        until(lambda: node.writes() >= 2, "tried again, so that the pause is two seconds")
        node.gpus[0].clear_faults()
        node.snapshot({A: 310})
        node.wait_limit(310)


def test_a_set_that_reports_success_and_changes_nothing_is_failed() -> None:
    with EnforcerNode() as node:
        node.start()
        node.run_pod(A)
        node.gpus[0].fault(SET, ignore=True)
        node.snapshot({A: 300})
        gpu = node.gpu()
        assert gpu.state == "failed"
        assert "700000" in gpu.reason.replace(" ", "") or "700" in gpu.reason
        assert node.pod(A).state == "failed"
        until(lambda: node.writes() >= 2, "tried again")
        assert len(node.logs("limit_failed")) == 1
        node.gpus[0].clear_faults()
        node.snapshot({A: 310})
        node.wait_limit(310)
        node.wait_state("managed")


def test_a_refused_release_is_tried_until_it_works() -> None:
    with EnforcerNode() as node:
        node.start()
        pid = node.run_pod(A)
        node.snapshot({A: 300})
        node.gpus[0].fault(SET, error=UNKNOWN_ERROR, count=1)
        node.end(pid)
        node.snapshot({})
        assert node.owned() == {node.gpus[0].uuid: 700_000}
        node.wait_limit(700)
        until(lambda: node.owned() == {}, "no longer owned")
        assert node.gpu().state == "free"


def test_i2_a_refused_release_whose_pod_is_back_with_that_wish_loses_no_original() -> None:
    with EnforcerNode(release_to="default") as node:
        node.gpus[0].limit_mw = 650_000
        node.start()
        pid = node.run_pod(A)
        node.snapshot({A: 300})
        node.gpus[0].fault(SET, error=UNKNOWN_ERROR)
        node.end(pid)
        node.snapshot({})
        node.wait_state("failed")
        node.run_pod(A)
        node.gpus[0].clear_faults()
        node.snapshot({A: 700})  # what would have been given back
        node.wait_limit(700)
        node.looks()
        assert node.owned() == {node.gpus[0].uuid: 650_000}
        assert node.logs("limit_released") == []
        assert node.logs("limit_drifted") == []


def test_a_fault_that_is_over_is_no_longer_shown_when_its_pod_goes() -> None:
    with EnforcerNode() as node:
        node.start()
        pid = node.run_pod(A)
        node.gpus[0].fault(SET, error=NO_PERMISSION)
        node.snapshot({A: 300})
        assert node.gpu().state == "failed"
        node.end(pid)
        node.snapshot({})
        # Nothing was ever written, so there is nothing to give back that could be refused.
        node.wait_state("free")
        assert node.owned() == {}
        assert node.limit() == 700


@pytest.mark.parametrize(
    "query", [COMPUTE, "nvmlDeviceGetGraphicsRunningProcesses", "nvmlDeviceGetMPSComputeRunning*"]
)
def test_i5_an_unreadable_process_list_is_held(query: str) -> None:
    with EnforcerNode() as node:
        node.start()
        pid = node.run_pod(A)
        node.run_pod(B, 1)
        node.snapshot({A: 300, B: 300})
        node.gpus[0].fault(query, error=UNKNOWN_ERROR)
        node.end(pid)
        node.snapshot({B: 250})
        node.looks()
        held = node.gpu()
        assert (held.state, held.limit_mw) == ("held", 300_000)
        assert node.limit(1) == 250
        node.gpus[0].clear_faults()
        node.wait_limit(700)


@pytest.mark.parametrize("lacking", [NOT_SUPPORTED, FUNCTION_NOT_FOUND])
def test_a_board_without_graphics_and_mps_lists_is_no_fault(lacking: int) -> None:
    with EnforcerNode() as node:
        for query in ("nvmlDeviceGetGraphicsRunning*", "nvmlDeviceGetMPSComputeRunning*"):
            node.gpus[0].fault(query, error=lacking)
        node.start()
        node.run_pod(A)
        node.snapshot({A: 300})
        assert node.limit() == 300


def test_i5_a_driver_older_than_the_list_of_compute_processes_is_held() -> None:
    with EnforcerNode() as node:
        node.gpus.fault(COMPUTE, error=FUNCTION_NOT_FOUND)
        node.start()
        node.run_pod(A)
        node.snapshot({A: 300})
        gpu = node.gpu()
        assert (gpu.state, node.limit()) == ("held", 700)
        assert "FUNCTION_NOT_FOUND" in gpu.processes[0].evidence


def test_a_process_list_that_outgrows_its_buffer_is_read_again() -> None:
    with EnforcerNode() as node:
        node.start()
        node.run_pod(A)
        node.gpus[0].fault(COMPUTE, grow=2, count=1)
        node.snapshot({A: 300})
        node.wait_limit(300)


def test_i5_a_pid_whose_cgroup_is_unreadable_is_held() -> None:
    with EnforcerNode() as node:
        node.start()
        pid = node.run_pod(A)
        node.snapshot({A: 300})
        cgroup = node.work.root / str(pid) / "cgroup"
        text = cgroup.read_text()
        cgroup.unlink()
        cgroup.mkdir()
        node.snapshot({})
        node.looks()
        assert node.gpu().state == "held"
        assert node.limit() == 300
        assert any(process.owner == "unknown" for process in node.gpu().processes)
        cgroup.rmdir()
        cgroup.write_text(text)
        node.snapshot({}, others=[A])
        node.wait_limit(700)


def test_i11_a_slow_gpu_does_not_keep_another_from_its_limit() -> None:
    with EnforcerNode() as node:
        node.start()
        node.run_pod(A)
        node.run_pod(B, 1)
        node.gpus[0].fault(SET, delay_ms=300, error=UNKNOWN_ERROR)
        node.snapshot({A: 300, B: 300})
        assert node.limit(1) == 300


def test_a_board_that_cannot_be_read_at_start_delays_no_other() -> None:
    with EnforcerNode() as node:
        node.gpus[0].fault("nvmlDeviceGetPowerManagementLimitConstraints", error=UNKNOWN_ERROR)
        node.start()
        node.run_pod(A, 0, 1)
        node.snapshot({A: 300})
        assert node.limit(1) == 300
        enforcer = node.status().enforcer
        assert enforcer.nvml == "ok"  # it can be used: one board is no reason to call it failing
        assert "GPU 0: nvmlDeviceGetPowerManagementLimitConstraints" in enforcer.nvml_message
        assert node.logs("nvml")[-1]["level"] == "error"
        assert node.gpu(0).state == "failed"
        node.gpus[0].clear_faults()
        node.wait_limit(300)
        assert node.status().enforcer.nvml_message == "ok"


def test_where_no_board_can_be_read_nvml_is_failing() -> None:
    with EnforcerNode() as node:
        for gpu in node.gpus:
            gpu.fault("nvmlDeviceGetPowerManagementLimitConstraints", error=UNKNOWN_ERROR)
        node.start()
        assert node.status().enforcer.nvml == "failing"


# ---- disks ----


@pytest.fixture
def node_on_a_small_disk() -> Iterator[EnforcerNode]:
    """A node whose state directory is on a file system of 64 KiB of its own."""
    with EnforcerNode() as node, small_disk(node.state_dir):
        yield node


@pytest.mark.root
def test_i2_on_a_full_disk_what_is_owned_can_still_be_given_back(
    node_on_a_small_disk: EnforcerNode,
) -> None:
    node = node_on_a_small_disk.start()
    pid = node.run_pod(A)
    node.snapshot({A: 300})
    fill(node.state_dir)
    node.end(pid)
    node.snapshot({})
    node.wait_limit(700)
    node.looks()
    assert node.limit() == 700
    assert node.gpu().state == "free"

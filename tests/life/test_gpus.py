"""GPUs that answer in part, or not at all: what of it bears on them, on others, on the log."""

from __future__ import annotations

import pytest

from shared import messages as m
from tests.life.node import LifeNode as EnforcerNode
from tests.life.node import pod_uid, until
from tests.simnode.gpus import Kind

A, B = pod_uid(1), pod_uid(2)
GPU_IS_LOST, UNKNOWN, NOT_SUPPORTED, RESET_REQUIRED = 15, 999, 3, 16
FUNCTION_NOT_FOUND = 13
LISTS = "nvmlDeviceGetComputeRunningProcesses"


def test_i11_a_missing_gpu_delays_no_question_and_no_new_pod_on_an_idle_node() -> None:
    with EnforcerNode() as node:
        node.start()
        node.snapshot({})
        node.gpus[1].vanish()
        node.wait_state("lost", 1)

        def searched() -> int:
            node.heartbeat()
            return len(node.gpus.inits())

        seen = searched()
        until(lambda: searched() >= seen + 6, "three searches, each opens and shuts")
        assert node.gpu(0).limit_mw == 700_000  # the next search is seconds away
        node.run_pod(A, 0)
        node.snapshot({A: 300})
        assert node.limit(0) == 300  # at once


def in_three_seconds(node: EnforcerNode) -> tuple[int, int]:
    """How often NVML is opened and shut, and how many lines are logged."""
    lines, inits = len(node.logs()), len(node.gpus.inits())
    node.lives_for(3)
    return len(node.gpus.inits()) - inits, len(node.logs()) - lines


def is_no_storm(node: EnforcerNode, lines_at_most: int) -> None:
    """NVML is opened and shut for searches after 1 and 2 s."""
    inits, lines = in_three_seconds(node)
    assert inits <= 6
    assert lines <= lines_at_most


@pytest.mark.parametrize("error", [GPU_IS_LOST, RESET_REQUIRED])
def test_i10_a_gpu_whose_process_list_is_lost_is_no_storm(error: int) -> None:
    with EnforcerNode() as node:
        node.start()
        node.run_pod(B, 1)
        node.snapshot({B: 300})
        node.gpus[0].fault(LISTS, error=error)
        node.wait_state("lost", 0)
        is_no_storm(node, 12)


def test_i10_with_the_default_pace_too() -> None:
    with EnforcerNode(scan_seconds="1", reconcile_seconds="15") as node:
        node.start()
        node.run_pod(A, 0)
        node.run_pod(B, 1)
        node.snapshot({A: 300, B: 300})
        node.gpus[0].fault(LISTS, error=GPU_IS_LOST)
        node.wait_state("lost", 0)
        is_no_storm(node, 12)


def test_i10_a_gpu_that_refuses_the_set_as_lost_is_no_storm() -> None:
    with EnforcerNode() as node:
        node.start()
        node.run_pod(A, 0)
        node.gpus[0].fault("nvmlDeviceSetPowerManagementLimit", error=GPU_IS_LOST)
        node.snapshot({A: 300})
        is_no_storm(node, 16)


def test_a_power_reading_that_fails_is_no_failed_release() -> None:
    with EnforcerNode() as node:
        node.start()
        pid = node.run_pod(A)
        node.snapshot({A: 300})
        node.gpus[0].fault("nvmlDeviceGetPowerUsage", error=UNKNOWN)
        node.end(pid)
        node.run_host(0)
        node.snapshot({})
        node.wait_limit(700)
        node.looks()
        node.gpus[0].limit_mw = 500_000  # by its new owner
        node.lives_for(2)  # a write that failed would be tried again after one second
        assert node.limit() == 500, "written again after it was given back"
        assert node.owned() == {}
        assert node.gpu().state == "free"


def test_a_power_reading_that_fails_is_no_failed_limit() -> None:
    with EnforcerNode() as node:
        node.start()
        node.run_pod(A)
        node.gpus[0].fault("nvmlDeviceGetPowerUsage", error=UNKNOWN)
        report = node.snapshot({A: 300})
        assert node.limit() == 300
        assert report.pods[0].state == "enforced", report.pods[0].reason
        assert report.counters.limit_write_failures == 0


def test_i12_an_owned_limit_that_cannot_be_read_is_said() -> None:
    with EnforcerNode() as node:
        node.start()
        node.run_pod(A)
        node.snapshot({A: 300})
        node.gpus[0].fault("nvmlDeviceGetPowerManagementLimit", error=UNKNOWN)
        until(lambda: node.gpu().limit_mw is None, "the reading fails")
        gpu, pod = node.gpu(), node.pod(A)
        assert gpu.state in ("held", "failed"), (gpu.state, gpu.reason)
        assert "about to be written" not in pod.reason, (pod.state, pod.reason)
        assert (pod.state, "its limit cannot be read" in pod.reason) == ("failed", True)


def test_a_board_without_power_limits_is_said_and_not_looked_for_again() -> None:
    with EnforcerNode() as node:
        node.gpus[1].fault("nvmlDeviceGetPowerManagementLimitConstraints", error=NOT_SUPPORTED)
        node.start()
        node.run_pod(A, 1)
        node.snapshot({A: 300})
        pod = node.pod(A)
        assert pod.state == "failed"
        assert "takes no power limit" in pod.reason
        assert node.status().enforcer.nvml == "ok"
        inits, _ = in_three_seconds(node)
        assert inits == 0
        assert node.gpus.sets() == []


@pytest.mark.parametrize("release_to", ["original", "default"])
def test_a_board_that_no_longer_tells_its_limits_is_given_back_as_found(release_to: str) -> None:
    with EnforcerNode(release_to=release_to) as node:
        node.gpus[0].limit_mw = 650_000
        node.start()
        pid = node.run_pod(A)
        node.snapshot({A: 300})
        node.kill()
        for what in ("LimitConstraints", "DefaultLimit"):
            node.gpus[0].fault(f"nvmlDeviceGetPowerManagement{what}", error=UNKNOWN)
        node.start()
        node.looks()
        assert node.limit() == 300
        node.end(pid)
        node.snapshot({})
        node.wait_limit(650)
        until(lambda: node.owned() == {}, "its entry goes when the limit was read back")


def test_i2_an_odd_original_does_not_cost_the_ledger() -> None:
    with EnforcerNode() as node:
        node.start()
        node.run_pod(A, 0)
        node.snapshot({A: 300})
        node.gpus[1].limit_mw = 0  # what a broken board answers
        node.run_pod(B, 1)
        node.snapshot({A: 300, B: 300})
        node.snapshot({A: 310, B: 310})
        node.looks()
        node.kill()
        node.start()
        assert node.stop() == 0
        assert node.limit(0) == 700


def test_i11_a_waiting_pod_does_not_cost_another_its_gpu() -> None:
    """The search for the GPU of B opens NVML anew, and forgets a GPU that it had well in hand."""
    with EnforcerNode() as node:
        node.start()
        node.run_pod(A, 0)
        node.snapshot({A: 300})
        node.gpus[0].fault("nvmlDeviceGetPowerManagementDefaultLimit", error=UNKNOWN)
        node.lives_for(1.5)
        assert node.snapshot({A: 310}).pods[0].state == "enforced"  # all is well without B
        node.snapshot({A: 310, B: 400})  # B has no process yet
        node.lives_for(2.5)
        node.snapshot({A: 250, B: 400})
        node.looks()
        gpu = node.gpu()
        assert node.limit() == 250, (gpu.state, gpu.reason)


def test_i11_a_gpu_that_is_gone_for_good_does_not_keep_another_from_coming_back() -> None:
    with EnforcerNode() as node:
        node.start()
        node.run_pod(A, 0)
        node.snapshot({A: 300})
        node.gpus[1].vanish()
        node.wait_state("lost", 1)
        count = len(node.gpus.inits())
        until(lambda: len(node.gpus.inits()) >= count + 6, "the next search is far away")
        node.gpus[0].fault(LISTS, error=GPU_IS_LOST, count=1)
        # By the log: it may be back before anybody asks.
        lost = node.gpus[0].uuid
        until(lambda: any(line["uuid"] == lost for line in node.logs("gpu_lost")), "it is lost")
        node.snapshot({A: 250})
        node.wait_limit(250, 0)


def test_i12_a_gpu_that_is_found_amid_two_scans_is_looked_at() -> None:
    with EnforcerNode(scan_seconds="3600") as node:
        node.start()
        node.run_pod(A, 0, 1)
        node.gpus[1].vanish()
        node.wait_state("lost", 1)
        node.snapshot({A: 300})
        node.gpus[1].reappear()

        def found() -> m.Gpu | None:
            """What is said of it in answer to a snapshot, which is no scan."""
            gpus = node.snapshot({A: 300 + node.revision % 2}).gpus
            gpu = next(gpu for gpu in gpus if gpu.uuid == node.gpus[1].uuid)
            return gpu if gpu.state != "lost" else None

        gpu = until(found, "it is found")
        assert gpu is not None
        assert gpu.state == "managed", gpu.reason


def resting_on_a_board_that_does_not_tell(node: EnforcerNode) -> None:
    """A GPU owned since before the start, whose worker restarts."""
    node.start()
    pid = node.run_pod(A, 0)
    node.snapshot({A: 300})
    node.kill()
    node.end(pid)
    node.gpus[0].fault("nvmlDeviceGetPowerManagementLimitConstraints", error=UNKNOWN)
    node.start()


def test_i3_a_resting_gpu_that_does_not_tell_its_bounds_is_not_written() -> None:
    with EnforcerNode() as node:
        resting_on_a_board_that_does_not_tell(node)
        before = node.writes()
        node.snapshot({A: 300})
        node.looks(3)
        assert node.writes() == before
        assert node.gpu().target_mw == 300_000


def test_i2_a_resting_gpu_that_does_not_tell_its_bounds_costs_no_ledger() -> None:
    with EnforcerNode() as node:
        resting_on_a_board_that_does_not_tell(node)
        node.snapshot({A: 300})
        node.run_pod(B, 1)
        node.snapshot({A: 300, B: 300})
        node.wait_limit(300, 1)
        node.kill()
        node.gpus[0].clear_faults()
        node.start()
        assert node.logs("ledger") == []
        assert node.stop() == 0
        assert (node.limit(0), node.limit(1)) == (700, 700)


# ---- process lists that cannot be right, or are not there ----


@pytest.mark.parametrize("kind", ["Compute", "Graphics", "MPSCompute"])
def test_a_list_with_entries_of_another_size_is_not_believed(kind: str) -> None:
    """Of three entries two are read as pid 0 and a huge one: a pod would be unseen, in silence."""
    name = f"nvmlDeviceGet{kind}RunningProcesses"
    kinds: dict[str, Kind] = {"Compute": "compute", "Graphics": "graphics", "MPSCompute": "mps"}
    with EnforcerNode() as node:
        node.gpus.driver_present("550.127.08")  # it is not known for the fault, and has it
        node.start()
        pids = [node.run_pod(uid, kind=kinds[kind]) for uid in (A, B)]
        node.snapshot({A: 300, B: 400})
        node.wait_limit(300)
        node.gpus[0].fault(name, wide=True)
        gpu = node.wait_state("held")
        assert "is not believed; update the driver" in gpu.reason
        assert "550.127.08" in gpu.reason
        for pid in pids:
            node.end(pid)
        node.looks()
        assert node.limit() == 300


def test_a_byte_count_that_could_be_a_pid_is_found_out_by_what_stands_beside_it() -> None:
    """With confidential computing the first process's protected memory is read as a pid."""
    entry = "{} 1073741824 4294967295 4294967295 2097152"
    with EnforcerNode() as node:
        node.gpus.driver_present("550.127.08")
        node.start()
        pids = [node.run_pod(uid) for uid in (A, B)]
        node.snapshot({A: 300, B: 400})
        node.wait_limit(300)
        node.gpus[0].fault(LISTS, wide=True)
        node.gpus[0].list_processes(map(entry.format, pids))
        gpu = node.wait_state("held")
        assert "pid 2097152 in MIG instance 1073741824/0 cannot be" in gpu.reason
        assert "driver 550.127.08" in gpu.reason
        node.snapshot({B: 400}, others=[A])  # A is seen, B is not
        node.looks()
        assert node.limit() == 300


def test_mig_instances_are_believed() -> None:
    with EnforcerNode() as node:
        node.start()
        pid = node.run_pod(A)
        node.gpus[0].list_processes([f"{pid} 1073741824 13 0"])
        node.snapshot({A: 300})
        assert node.limit() == 300


@pytest.mark.parametrize("claims", [1, 4_000_000_000])
def test_a_list_that_claims_more_than_was_read_is_unknown(claims: int) -> None:
    with EnforcerNode() as node:
        node.start()
        node.run_pod(A)
        node.snapshot({A: 300})
        node.gpus[0].fault(LISTS, claims=claims)
        gpu = node.wait_state("held")
        assert "NO_SENSE; nvidia-ml-py cannot take the driver's answer" in gpu.reason
        node.snapshot({}, others=[A])
        node.looks()
        assert node.limit() == 300


@pytest.mark.parametrize(
    ("version", "believed"),
    [
        ("535.42.01", True),
        ("535.43.02", False),
        ("535.54.03", False),
        ("535.86.10", False),
        ("535.98", True),
        ("535.104.05", True),
        ("53.54", True),
        ("5354.3", True),
    ],
)
def test_a_driver_known_for_such_lists_is_not_believed_at_all(version: str, believed: bool) -> None:
    with EnforcerNode() as node:
        node.gpus.driver_present(version)
        node.start()
        node.run_pod(A)
        node.snapshot({A: 300})
        node.looks()
        assert node.limit() == (300 if believed else 700)
        if not believed:
            assert version in node.pod(A).reason
            assert "535.98 or later" in node.pod(A).reason
            assert node.pod(A).state == "waiting"


def test_who_waits_is_told_of_each_gpu_that_cannot_be_seen() -> None:
    with EnforcerNode(gpus=3) as node:
        for number in (0, 2):
            node.gpus[number].fault(LISTS, error=UNKNOWN)
        node.start()
        node.snapshot({A: 300})
        said = f"the process list of GPU 0, 2 cannot be read: {LISTS}_v3: UNKNOWN"
        assert said in node.pod(A).reason
        node.run_pod(A, 1)
        node.looks()
        assert node.pod(A).reason == "300 W on 1 GPU"


def without(node: EnforcerNode, *versions: str) -> None:
    for kind in ("Compute", "Graphics", "MPSCompute"):
        for version in versions:
            name = f"=nvmlDeviceGet{kind}RunningProcesses{version}"
            node.gpus[0].fault(name, error=FUNCTION_NOT_FOUND)


def test_a_driver_below_510_has_an_older_list_that_is_used() -> None:
    with EnforcerNode() as node:
        without(node, "_v3")
        node.start()
        node.run_pod(A)
        node.run_pod(B, kind="graphics")
        node.snapshot({A: 300, B: 250})
        assert node.limit() == 250


def test_a_driver_without_any_list_is_named_with_what_it_takes() -> None:
    with EnforcerNode() as node:
        without(node, "_v3", "_v2")
        node.gpus.driver_present("418.226.00")
        node.start()
        node.run_pod(A)
        node.snapshot({A: 300})
        node.looks()
        assert node.limit() == 700
        for reason in (node.gpu().reason, node.pod(A).reason):
            assert "driver 418.226.00" in reason
            assert "510 or later" in reason


@pytest.mark.parametrize("pid", [0, 4_194_305, 4_294_967_295])
def test_a_pid_that_no_kernel_gives_makes_its_list_unknown(pid: int) -> None:
    with EnforcerNode() as node:
        node.start()
        worker = node.run_pod(A)
        node.snapshot({A: 300})
        node.gpus[0].add_process(pid)
        assert f"pid {pid} in a list" in node.wait_state("held").reason
        node.end(worker)
        node.snapshot({})
        node.looks()
        assert node.limit() == 300


def test_the_kernels_own_bound_is_read() -> None:
    with EnforcerNode() as node:
        (node.work.root / "sys/kernel").mkdir(parents=True)
        (node.work.root / "sys/kernel/pid_max").write_text("32768\n")
        node.start()
        node.gpus[0].add_process(32_769)
        node.snapshot({A: 300})
        assert "pid 32769 in a list" in node.wait_state("held").reason
        (node.work.root / "sys/kernel/pid_max").write_text("4194304\n")  # the node is tuned later
        node.wait_state("free")

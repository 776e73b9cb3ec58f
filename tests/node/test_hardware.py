"""`make hardware-check` and `make hardware-test`, on simulated GPUs: what they tell, and that each
GPU is as it was, however they end.
"""

from __future__ import annotations

import ast
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from enforcer.ledger import Ledger
from tests.hardware import PERMISSION, QUALIFY
from tests.kube.chart import kustomize, literals, named
from tests.simnode.gpus import SimGpu, SimGpus
from tests.waiting import HANG_S, gone, until

ROOT = Path(__file__).resolve().parents[2]
NO_PERMISSION, UNKNOWN = 4, 999
SET, LIST = "nvmlDeviceSetPowerManagementLimit", "nvmlDeviceGetComputeRunningProcesses"
NO_GPU = 3
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


class Machine:
    """Simulated GPUs with their driver, and the two programs on them."""

    def __init__(self, folder: Path, gpus: int) -> None:
        self.gpus = SimGpus(folder / "gpus").create(gpus)
        self.state_dir, self.json = folder / "state", folder / "check.json"
        self.environment = {
            "PATH": os.environ["PATH"],
            "TMPDIR": str(folder),
            "POWER_AGENT_STATE_DIR": str(self.state_dir),
            "POWER_AGENT_EXIT_SECONDS": "1",
            PERMISSION: "1",
            **self.gpus.environment(cuda=True),
        }
        self.found = self.limits()

    def limits(self) -> list[int]:
        return [gpu.limit_mw for gpu in self.gpus]

    def start(self, *command: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def check(self) -> subprocess.CompletedProcess[str]:
        """`make hardware-check`, of few runs."""
        script = str(QUALIFY.with_name("check.py"))
        few = ("--json", str(self.json), "--runs", "2", "--session-runs", "1")
        return self._to_end(self.start(script, *few))

    def report(self) -> dict[str, Any]:
        done = self.check()
        assert done.returncode == 0, done.stderr
        assert f"written: {self.json}" in done.stdout
        told: dict[str, Any] = json.loads(self.json.read_text())
        return told

    def start_test(self, *arguments: str) -> subprocess.Popen[str]:
        """`make hardware-test`."""
        return self.start("-m", "tests.hardware", *arguments)

    def test(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self._to_end(self.start_test("--patience", "2", *arguments))

    @staticmethod
    def _to_end(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
        out, err = process.communicate(timeout=HANG_S)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def first_set(self) -> int:
        """Wait for the first write; returns the pid of the enforcer, which made it."""
        return until(self.gpus.sets, "a first write")[0].pid


MakeMachine = Callable[[int], Machine]


@pytest.fixture
def make_machine() -> Iterator[MakeMachine]:
    # Not pytest's folder: a socket's path must be short. What is killed leaves its own in there.
    with tempfile.TemporaryDirectory(prefix="power-agent-hw-") as folder:
        yield lambda gpus: Machine(Path(folder), gpus)


@pytest.fixture
def machine(make_machine: MakeMachine) -> Machine:
    """One GPU."""
    return make_machine(1)


def steps(text: str) -> list[tuple[str, str, str]]:
    """The table's rows, as GPU, step and result."""
    rows = [re.split(r" {2,}", line) for line in text.splitlines()[1:]]
    return [(row[0], row[1], row[2]) for row in rows]


# ---------------------------------------------------------------------- the check reads


def test_the_check_tells_what_the_board_tells_and_sets_nothing(make_machine: MakeMachine) -> None:
    machine = make_machine(2)
    (machine.gpus[1].folder / "module_limit_mw").write_text("1000000")
    told = machine.report()
    assert told["format"] == 1
    assert told["driver_version"] == "570.124.06"
    for gpu, board in zip(machine.gpus, told["boards"], strict=True):
        for fact in ("uuid", "name", "min_mw", "max_mw", "default_mw", "limit_mw", "enforced_mw"):
            assert board[fact] == getattr(gpu, fact), fact
        assert board["bus_id"] == (gpu.folder / "pci").read_text().strip()
        assert (board["persistence"], board["mig_mode"]) == (True, False)
        assert board["power_scopes"]["gpu"]["max_mw"] == gpu.max_mw
        assert all(times["median_ms"] > 0 for times in board["times"].values())
    assert told["boards"][1]["power_scopes"]["module"]["current_mw"] == 1_000_000
    assert machine.gpus.sets() == []
    assert machine.limits() == machine.found


def test_a_cuda_context_of_its_own_is_found_and_ends_with_the_check(machine: Machine) -> None:
    (board,) = machine.report()["boards"]
    context = board["context"]
    assert context["pid"] in machine.gpus[0].processes()
    assert gone(context["pid"])
    assert context["listed_after_ms"] >= 0
    assert context["owner"] == "other"  # the tests run in no pod, or in one of another root
    assert re.search(r"^\d+:.*:/", context["cgroup"])


def test_each_number_of_open_files_has_its_init_and_memory(machine: Machine) -> None:
    shell = f"ulimit -n 8192; exec {sys.executable} {QUALIFY.with_name('check.py')} --runs 1"
    done = subprocess.run(
        ["/bin/bash", "-c", f"{shell} --session-runs 1 --json {machine.json}"],
        env=machine.environment,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    costs = json.loads(machine.json.read_text())["open_files"]
    for few in ("1024", "4096"):
        assert costs[few]["init_ms"] > 0
        assert costs[few]["hwm_kib"] >= costs[few]["rss_kib"] > 0
    assert costs["1048576"] == {
        "skipped": "the hard limit of open files is 8192: raise it (ulimit -Hn)"
    }


def forget(*names: str) -> Callable[[SimGpu], None]:
    def change(gpu: SimGpu) -> None:
        for name in names:
            (gpu.folder / name).unlink()

    return change


def no_text(gpu: SimGpu) -> None:
    (gpu.folder / "name").write_bytes(b"\xf8\x10\x00")


UNKNOWN_FACTS: dict[str, tuple[Callable[[SimGpu], None], set[str]]] = {
    "a laptop's": (forget("default_mw", "persistence", "mig"), {
        "default_mw", "persistence", "mig_mode"}),
    "without limits": (forget("min_mw", "max_mw", "limit_mw"), {
        "min_mw", "max_mw", "limit_mw", "enforced_mw", "power_mw"}),
    "a name that is no text": (no_text, {"name"}),
    "no scopes": (lambda gpu: gpu.fault("nvmlDeviceGetFieldValues", error=3), {"power_scopes"}),
    "no bus id": (lambda gpu: gpu.fault("nvmlDeviceGetPciInfo", error=999), {"bus_id", "pci"}),
}  # fmt: skip


def test_what_a_board_does_not_tell_is_null_and_the_rest_is_there(
    make_machine: MakeMachine,
) -> None:
    """A board for each case, and all in one check."""
    machine = make_machine(len(UNKNOWN_FACTS))
    for gpu, (change, _) in zip(machine.gpus, UNKNOWN_FACTS.values(), strict=True):
        change(gpu)
    boards = machine.report()["boards"]
    for board, (case, (_, unknown)) in zip(boards, UNKNOWN_FACTS.items(), strict=True):
        assert {fact for fact, value in board.items() if value is None} == unknown, case
        assert "listed_after_ms" in board["context"], case


def test_a_list_that_cannot_be_read_is_told_and_the_rest_is_there(machine: Machine) -> None:
    machine.gpus[0].fault(LIST, error=UNKNOWN)
    (board,) = machine.report()["boards"]
    assert "UNKNOWN" in board["times"]["processes"]["error"]
    assert "UNKNOWN" in board["context"]["error"]
    assert board["times"]["reading"]["median_ms"] > 0


def test_without_cuda_the_rest_is_there(machine: Machine) -> None:
    machine.environment |= machine.gpus.environment(cuda=False)
    (board,) = machine.report()["boards"]
    assert "libcuda.so.1" in board["context"]["error"]
    assert board["times"]["processes"]["median_ms"] > 0


def test_a_context_that_is_refused_says_why(machine: Machine) -> None:
    (machine.gpus[0].folder / "cuda_error").write_text("46")
    (board,) = machine.report()["boards"]
    assert "cuDevicePrimaryCtxRetain: error 46 (the device is busy" in board["context"]["error"]


@pytest.mark.parametrize(
    ("program", "missing"),
    [
        ("check", "library"),
        ("check", "driver"),
        ("check", "boards"),
        # It asks by the same code.
        pytest.param("test", "driver", marks=[as_root, pytest.mark.root]),
    ],
)
def test_without_a_gpu_it_says_what_it_takes(machine: Machine, missing: str, program: str) -> None:
    if missing == "library":
        del machine.environment["LD_LIBRARY_PATH"]
    elif missing == "driver":
        machine.gpus.driver_missing()
    else:
        machine.gpus[0].vanish()
    done = machine.check() if program == "check" else machine.test()
    assert done.returncode == NO_GPU
    assert "no GPU here" in done.stderr
    assert "libnvidia-ml.so.1" in done.stderr
    assert "Traceback" not in done.stderr
    assert not machine.json.exists()


@pytest.mark.parametrize("name", ["check", "hardware", "holder"])
def test_nothing_that_the_check_is_made_of_can_set_anything(name: str) -> None:
    tree = ast.parse(QUALIFY.with_name(f"{name}.py").read_text())
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert {each for each in used if "set_limit" in each or re.match("nvml.*Set", each)} == set()


# ---------------------------------------------------------------------- the test writes

STEPS = ["acquire", "change", "clamp", "drift", "kill", "give back", "stop"]


def test_it_asks_before_it_sets_anything(machine: Machine) -> None:
    del machine.environment[PERMISSION]
    done = machine.test()
    assert done.returncode == 2
    assert "This sets power limits" in done.stderr
    assert f"{PERMISSION}=1" in done.stderr
    assert machine.gpus.sets() == []


def mig_on(gpu: SimGpu) -> None:
    (gpu.folder / "mig").write_text("1 1")


def used(gpu: SimGpu) -> None:
    gpu.add_process(os.getpid())


SKIPPED: dict[str, tuple[Callable[[SimGpu], None], str]] = {
    "no bounds": (forget("min_mw"), "does not tell its limit or its bounds"),
    "its limit is the least": (lambda gpu: setattr(gpu, "limit_mw", 200_000), "at its minimum"),
    "mig": (mig_on, "MIG is on"),
    "used": (used, "others use it"),
    "who uses it is not known": (lambda gpu: gpu.fault(LIST, error=UNKNOWN), "cannot be told"),
}  # fmt: skip


@as_root
@pytest.mark.root
class TestOnRealCgroups:
    """What needs a cgroup of a pod."""

    def test_every_step_is_right_and_the_limit_was_never_above(
        self, make_machine: MakeMachine
    ) -> None:
        machine = make_machine(2)
        machine.gpus[1].limit_mw = machine.found[1] = 600_000
        done = machine.test()
        assert done.returncode == 0, done.stderr
        expected = [(gpu, step, "ok") for gpu in ("0", "1") for step in STEPS]
        assert steps(done.stdout) == expected + [("-", "as found", "ok")] * 2
        assert machine.limits() == machine.found
        for gpu, found_mw in zip(machine.gpus, machine.found, strict=True):
            asked = {record.requested_mw for record in gpu.sets()}
            assert len(asked) >= 4
            assert asked <= set(range(gpu.min_mw, found_mw + 1))
        assert [path.name for path in machine.state_dir.iterdir()] == ["lock"]

    def test_only_the_named_gpu_is_touched(self, make_machine: MakeMachine) -> None:
        machine = make_machine(2)
        assert machine.test("--gpu", machine.gpus[1].uuid).returncode == 0
        assert machine.gpus[0].sets() == []
        assert machine.gpus[1].sets() != []

    def test_it_refuses_where_an_agent_runs(self, machine: Machine) -> None:
        agent = Ledger(machine.state_dir, "boot")
        assert agent.try_lock()
        done = machine.test()
        agent.close()
        assert done.returncode == 2
        assert "a Power Agent runs on this node" in done.stderr
        assert machine.gpus.sets() == []

    def test_a_gpu_that_cannot_be_tried_is_left_alone(self, make_machine: MakeMachine) -> None:
        """A GPU for each case, and all in one run."""
        machine = make_machine(len(SKIPPED))
        for gpu, (change, _) in zip(machine.gpus, SKIPPED.values(), strict=True):
            change(gpu)
        done = machine.test()
        assert done.returncode == 1
        assert steps(done.stdout) == [(str(k), "-", "skipped") for k in range(len(SKIPPED))]
        for row, (case, (_, why)) in zip(
            done.stdout.splitlines()[1:], SKIPPED.items(), strict=True
        ):
            assert why in row, case
        assert machine.gpus.sets() == []

    def test_a_gpu_that_others_use_is_tried_where_that_is_allowed(self, machine: Machine) -> None:
        used(machine.gpus[0])
        assert machine.test("--shared").returncode == 0
        assert machine.limits() == machine.found

    def test_a_refused_set_is_a_failure_with_its_reason(self, machine: Machine) -> None:
        machine.gpus[0].fault(SET, error=NO_PERMISSION)
        done = machine.test()
        assert done.returncode == 1
        assert steps(done.stdout) == [("0", "acquire", "FAILED"), ("-", "as found", "ok")]
        assert "CAP_SYS_ADMIN" in done.stdout

    def test_a_step_that_is_not_done_is_a_failure(self, machine: Machine) -> None:
        """The driver says success and changes nothing."""
        machine.gpus[0].fault(SET, ignore=True)
        done = machine.test()
        assert done.returncode == 1
        assert steps(done.stdout)[0] == ("0", "acquire", "FAILED")

    def test_without_a_context_nothing_is_set(self, machine: Machine) -> None:
        (machine.gpus[0].folder / "cuda_error").write_text("2")
        done = machine.test()
        assert done.returncode == 1
        assert "error 2 (out of memory)" in done.stdout
        assert machine.gpus.sets() == []

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    def test_a_signal_leaves_the_gpu_as_found(
        self, machine: Machine, number: signal.Signals
    ) -> None:
        process = machine.start_test()
        machine.first_set()
        process.send_signal(number)
        out, err = process.communicate(timeout=HANG_S)
        assert process.returncode == 128 + number, err
        assert steps(out)[-1] == ("-", "as found", "ok")
        assert machine.limits() == machine.found

    def test_where_it_is_killed_the_enforcer_gives_back(self, machine: Machine) -> None:
        process = machine.start_test()
        os.kill(parent(machine.first_set()), signal.SIGKILL)
        process.communicate(timeout=HANG_S)
        assert machine.limits() == machine.found

    def test_where_all_of_it_is_killed_the_next_run_puts_back(self, machine: Machine) -> None:
        process = machine.start_test()
        enforcer = machine.first_set()
        test = parent(enforcer)
        os.kill(test, signal.SIGSTOP)
        for pid in (enforcer, test):
            os.kill(pid, signal.SIGKILL)
        process.communicate(timeout=HANG_S)
        assert machine.limits() != machine.found
        done = machine.test()
        assert done.returncode == 0, done.stderr
        assert steps(done.stdout)[0] == ("-", "run before", "put back")
        assert machine.limits() == machine.found

    def test_what_the_driver_refuses_to_take_back_is_said_and_not_forgotten(
        self, machine: Machine
    ) -> None:
        process = machine.start_test("--patience", "1")
        machine.first_set()
        machine.gpus[0].fault(SET, error=UNKNOWN)
        out, _ = process.communicate(timeout=HANG_S)
        assert process.returncode == 1
        assert steps(out)[-1] == ("-", "as found", "FAILED")
        assert "run this again" in out
        machine.gpus[0].clear_faults()
        assert machine.test().returncode == 0
        assert machine.limits() == machine.found

    def test_the_job_tries_the_gpu_that_its_pod_was_given(self, make_machine: MakeMachine) -> None:
        """Its scripts alone, by its command, with what the kubelet and the device plugin set."""
        machine = make_machine(2)
        objects = {kind: each for (kind, _), each in named(kustomize(QUALIFY.parent)).items()}
        scripts = machine.state_dir.with_name("scripts")
        scripts.mkdir()
        for name, text in objects["ConfigMap"]["data"].items():
            (scripts / name).write_text(text)
        (container,) = objects["Job"]["spec"]["template"]["spec"]["containers"]
        _, *options, script = container["command"]
        command = [sys.executable, *options, str(scripts / Path(script).name)]
        machine.environment |= literals(container) | {
            "KUBERNETES_SERVICE_HOST": "10.0.0.1",
            "NVIDIA_VISIBLE_DEVICES": machine.gpus[1].uuid,
            "POWER_AGENT_CGROUP_ROOT": "auto",
        }
        run = "import sys, os; from tests.hardware import run_as_a_pod as run; "
        process = machine.start("-c", f"{run} sys.exit(run(sys.argv[1:], os.environ))", *command)
        out, err = process.communicate(timeout=HANG_S)
        assert process.returncode == 0, err
        assert steps(out) == [*(("1", step, "ok") for step in STEPS), ("-", "as found", "ok")]
        assert machine.gpus[0].sets() == []
        assert machine.limits() == machine.found


def parent(pid: int) -> int:
    """Of the enforcer: the test's own process."""
    stat = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    return int(stat[1])

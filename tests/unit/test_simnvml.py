"""The simulated NVML, through the real nvidia-ml-py in processes of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.simnode.gpus import MODELS, Kind, SimGpu, SimGpus
from tests.simnode.nvml import SONAME, build_library
from tests.waiting import until

UNINITIALIZED, INVALID_ARGUMENT, NOT_SUPPORTED, NO_PERMISSION = 1, 2, 3, 4
NOT_FOUND, INSUFFICIENT_SIZE, DRIVER_NOT_LOADED, GPU_IS_LOST = 6, 7, 9, 15
VERSION_MISMATCH, UNKNOWN = 25, 999

# Calls what a line names and answers with a line. Handles stay here and travel as numbers.
CLIENT = """
import ctypes, itertools, json, os, sys
import pynvml

class ProcessV1(ctypes.Structure):
    _fields_ = [("pid", ctypes.c_uint), ("usedGpuMemory", ctypes.c_ulonglong)]

structures = {"v1": ProcessV1, "v2": pynvml.c_nvmlProcessInfo_v2_t}

handles = []

def show(value):
    if isinstance(value, pynvml.c_nvmlDevice_t):
        handles.append(value)
        return {"handle": len(handles) - 1}
    if isinstance(value, list):
        return [show(item) for item in value]
    if isinstance(value, pynvml.nvmlFriendlyObject):
        return value.__dict__
    if isinstance(value, ctypes.Structure):
        return {name: getattr(value, name) for name, _ in value._fields_}
    return value

def raw(name, *arguments):
    return getattr(pynvml.nvmlLib, name)(*arguments)

def text_of_size(name, handle, size):
    buffer = ctypes.create_string_buffer(size)
    before = () if handle is None else (handle,)
    return [raw(name, *before, buffer, ctypes.c_uint(size)), buffer.value.decode()]

def list_of_size(name, handle, size, structure):
    count = ctypes.c_uint(size)
    kind = structures.get(structure)
    array = (kind * size)() if kind else None
    code = raw(name, handle, ctypes.byref(count), array)
    pids = [array[i].pid for i in range(min(count.value, size))] if array and code == 0 else []
    return [code, count.value, pids]

def set_v2(handle, version, scope, milliwatts):
    value = pynvml.c_nvmlPowerValue_v2_t()
    value.version, value.powerScope, value.powerValueMw = version, scope, milliwatts
    return raw("nvmlDeviceSetPowerManagementLimit_v2", handle, ctypes.byref(value))

def null_argument(name, handle):
    return raw(name, handle, None, None)

def drop_sys_admin():
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    data = (ctypes.c_uint32 * 6)()
    assert libc.capget(header, data) == 0
    data[0] &= ~(1 << 21)
    assert libc.capset(header, data) == 0

def become(uid):
    os.setresuid(uid, uid, uid)

def set_for_ever(handle):
    for number in itertools.cycle(range(500_000)):
        pynvml.nvmlDeviceSetPowerManagementLimit(handle, 200_000 + number)

def failures(name, handle, calls):
    return sum(raw(name, handle, ctypes.byref(ctypes.c_uint())) != 0 for _ in range(calls))

own = {f.__name__: f for f in (text_of_size, list_of_size, set_v2, null_argument,
                               drop_sys_admin, become, set_for_ever, failures)}
for line in sys.stdin:
    name, arguments = json.loads(line)
    arguments = [handles[a["handle"]] if isinstance(a, dict) else a for a in arguments]
    try:
        answer = {"value": show((own.get(name) or getattr(pynvml, name))(*arguments))}
    except pynvml.NVMLError as error:
        answer = {"error": error.value}
    print(json.dumps(answer), flush=True)
"""


class NvmlCallError(Exception):
    """The client's NVMLError, with its code."""

    def __init__(self, code: int) -> None:
        super().__init__(f"NVML error {code}")
        self.code = code


class Client:
    """A process that has loaded the library through nvidia-ml-py, driven call by call."""

    def __init__(self, sim: SimGpus) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", CLIENT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **sim.environment()},
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    def send(self, name: str, *arguments: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([name, arguments]) + "\n")
        self.process.stdin.flush()

    def __call__(self, name: str, *arguments: object) -> Any:  # noqa: ANN401 what JSON carries
        self.send(name, *arguments)
        return self.receive()

    def receive(self) -> Any:  # noqa: ANN401
        assert self.process.stdout is not None
        answer = json.loads(self.process.stdout.readline())
        if "error" in answer:
            raise NvmlCallError(answer["error"])
        return answer["value"]

    def fails(self, name: str, *arguments: object) -> int:
        with pytest.raises(NvmlCallError) as caught:
            self(name, *arguments)
        return caught.value.code

    def opened(self) -> Client:
        self("nvmlInit")
        return self

    def device(self, index: int = 0) -> object:
        return self("nvmlDeviceGetHandleByIndex", index)

    def limit(self, device: object) -> int:
        return int(self("nvmlDeviceGetPowerManagementLimit", device))

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def directory() -> Iterator[Path]:
    """Not below pytest's own folder: other uids must reach it."""
    path = Path(tempfile.mkdtemp(prefix="simnvml-"))
    path.chmod(0o755)
    yield path / "gpus"
    shutil.rmtree(path)


@pytest.fixture
def sim(directory: Path) -> SimGpus:
    return SimGpus(directory).create(3)


@pytest.fixture
def client(sim: SimGpus) -> Iterator[Callable[[], Client]]:
    clients: list[Client] = []

    def start() -> Client:
        clients.append(Client(sim))
        return clients[-1]

    yield start
    for each in clients:
        each.end()


@pytest.fixture
def nvml(client: Callable[[], Client]) -> Client:
    return client().opened()


@pytest.fixture
def sleeper() -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    """Processes that live until the test kills them."""
    processes: list[subprocess.Popen[bytes]] = []

    def start() -> subprocess.Popen[bytes]:
        processes.append(subprocess.Popen(["sleep", "1000"]))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()


as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to change capabilities and uid")

# ---- initialising ----


def test_nothing_works_before_init_and_after_the_last_shutdown(
    client: Callable[[], Client],
) -> None:
    nvml = client()
    nvml("nvmlInit")
    nvml("nvmlInit")
    device = nvml.device()
    nvml("nvmlShutdown")
    assert nvml("nvmlDeviceGetCount") == 3, "init is counted"
    nvml("nvmlShutdown")
    assert nvml.fails("nvmlShutdown") == UNINITIALIZED
    assert nvml.fails("nvmlDeviceGetCount") == UNINITIALIZED
    assert nvml.fails("nvmlSystemGetDriverVersion") == UNINITIALIZED
    assert nvml.fails("nvmlDeviceGetPowerManagementLimit", device) == UNINITIALIZED
    assert nvml.fails("nvmlDeviceSetPowerManagementLimit", device, 300_000) == UNINITIALIZED


def test_a_handle_from_before_a_shutdown_is_refused(nvml: Client) -> None:
    device = nvml.device()
    nvml("nvmlShutdown")
    nvml("nvmlInit")
    assert nvml.fails("nvmlDeviceGetPowerManagementLimit", device) == INVALID_ARGUMENT
    assert nvml.limit(nvml.device()) == 700_000


def test_driver_comes_and_goes(sim: SimGpus, client: Callable[[], Client]) -> None:
    sim.driver_missing()
    nvml = client()
    assert nvml.fails("nvmlInit") == DRIVER_NOT_LOADED
    sim.driver_fails(18)
    assert nvml.fails("nvmlInit") == 18
    sim.driver_present("580.65.06")
    nvml("nvmlInit")
    assert nvml("nvmlSystemGetDriverVersion") == "580.65.06"
    device = nvml.device()
    sim.driver_missing()
    assert nvml.fails("nvmlDeviceGetPowerManagementLimit", device) == DRIVER_NOT_LOADED
    assert nvml.fails("nvmlDeviceGetCount") == DRIVER_NOT_LOADED
    assert [record.result for record in sim.inits()] == [DRIVER_NOT_LOADED, 18, 0]


def test_without_persistence_mode_the_last_client_takes_the_limit_along(
    sim: SimGpus, client: Callable[[], Client], sleeper: Callable[[], subprocess.Popen[bytes]]
) -> None:
    for number in (0, 1):
        sim[number].persistence = False
    worker = sleeper()
    sim[1].add_process(worker.pid)
    first, second = client().opened(), client().opened()
    for number in range(3):
        first("nvmlDeviceSetPowerManagementLimit", first.device(number), 300_000)
    first("nvmlShutdown")
    assert [gpu.limit_mw for gpu in sim] == [300_000] * 3, "another one still has it open"
    second("nvmlShutdown")
    assert [gpu.limit_mw for gpu in sim] == [700_000, 300_000, 300_000]
    worker.kill()
    worker.wait()
    first("nvmlInit")
    assert [gpu.limit_mw for gpu in sim] == [700_000, 700_000, 300_000]
    # Killed clients close nothing themselves; the next init sees that they are gone.
    first("nvmlDeviceSetPowerManagementLimit", first.device(), 300_000)
    first.end()
    second("nvmlInit")
    assert [gpu.limit_mw for gpu in sim] == [700_000, 700_000, 300_000]


def test_without_persistence_mode_the_first_init_takes_long(
    sim: SimGpus, client: Callable[[], Client]
) -> None:
    sim.cold_init_ms = 300

    def init_s() -> float:
        nvml, began = client(), time.monotonic()
        nvml("nvmlInit")
        return time.monotonic() - began

    sim[0].persistence = False
    assert init_s() >= 0.3
    sim.cold_init_ms = 60_000
    assert init_s() < 60, "the driver is awake: another one has it open"


def test_who_has_nvml_open_is_known(sim: SimGpus, client: Callable[[], Client]) -> None:
    first, second = client(), client()
    first.opened()
    second.opened()
    assert sim.open_by() == {first.pid, second.pid}
    first("nvmlShutdown")
    assert sim.open_by() == {second.pid}
    os.kill(second.pid, signal.SIGKILL)
    # Nobody has reaped it yet: a zombie has nothing open.
    until(lambda: sim.open_by() == set(), "nothing open")
    assert [(r.pid, r.what) for r in sim.inits()] == [
        (first.pid, "init"),
        (second.pid, "init"),
        (first.pid, "shutdown"),
    ]


def test_marker_of_a_dead_process_does_not_name_its_pids_heir(
    sim: SimGpus, sleeper: Callable[[], subprocess.Popen[bytes]]
) -> None:
    (sim.directory / "open" / str(sleeper().pid)).write_text("1\n")
    assert sim.open_by() == set()


def test_system_answers(nvml: Client) -> None:
    assert nvml("nvmlSystemGetDriverVersion") == "570.124.06"
    assert nvml("nvmlSystemGetNVMLVersion") == "12.570.124.06"
    assert nvml("nvmlSystemGetCudaDriverVersion") == 12080
    assert nvml("nvmlSystemGetCudaDriverVersion_v2") == 12080
    assert nvml("nvmlErrorString", GPU_IS_LOST) == "GPU is lost"
    assert nvml("nvmlErrorString", UNKNOWN) == "Unknown Error"
    assert nvml("nvmlErrorString", -1) == "Unknown Error"


# ---- devices ----


def test_a_gpu_is_found_by_index_uuid_and_bus(sim: SimGpus, nvml: Client) -> None:
    gpu = sim[1]
    bus = nvml("nvmlDeviceGetPciInfo", nvml.device(1))
    assert bus["busId"] == "00000000:17:00.0"
    assert bus["busIdLegacy"] == "0000:17:00.0"
    assert bus["pciDeviceId"] == MODELS["H100"].pci_device_id
    for device in (
        nvml.device(1),
        nvml("nvmlDeviceGetHandleByUUID", gpu.uuid),
        nvml("nvmlDeviceGetHandleByPciBusId", bus["busId"]),
        nvml("nvmlDeviceGetHandleByPciBusId", bus["busIdLegacy"].lower()),
    ):
        assert nvml("nvmlDeviceGetUUID", device) == gpu.uuid
        assert nvml("nvmlDeviceGetIndex", device) == 1
        assert nvml("nvmlDeviceGetMinorNumber", device) == 1
        assert nvml("nvmlDeviceGetName", device) == "NVIDIA H100 80GB HBM3"
        assert nvml("nvmlDeviceGetPersistenceMode", device) == 1
        assert nvml("nvmlDeviceGetMigMode", device) == [0, 0]


def test_devices_that_do_not_exist(nvml: Client) -> None:
    assert nvml.fails("nvmlDeviceGetHandleByIndex", 3) == INVALID_ARGUMENT
    unknown = "GPU-00000000-0000-0000-0000-000000000000"
    assert nvml.fails("nvmlDeviceGetHandleByUUID", unknown) == NOT_FOUND
    assert nvml.fails("nvmlDeviceGetHandleByPciBusId", "0000:FE:00.0") == NOT_FOUND
    assert nvml.fails("nvmlDeviceGetHandleByPciBusId", "nonsense") == INVALID_ARGUMENT
    assert nvml.fails("nvmlDeviceGetPowerUsage", None) == INVALID_ARGUMENT


@pytest.mark.parametrize(
    "name",
    [
        "nvmlDeviceGetIndex",
        "nvmlDeviceGetUUID",
        "nvmlDeviceGetName",
        "nvmlDeviceGetMinorNumber",
        "nvmlDeviceGetPciInfo_v3",
        "nvmlDeviceGetPowerUsage",
        "nvmlDeviceGetPowerManagementMode",
        "nvmlDeviceGetPowerManagementLimit",
        "nvmlDeviceGetPowerManagementDefaultLimit",
        "nvmlDeviceGetPowerManagementLimitConstraints",
        "nvmlDeviceGetEnforcedPowerLimit",
        "nvmlDeviceGetComputeRunningProcesses_v3",
        "nvmlDeviceGetMigMode",
        "nvmlDeviceGetPersistenceMode",
        "nvmlDeviceSetPowerManagementLimit_v2",
    ],
)
def test_null_is_refused(nvml: Client, name: str) -> None:
    assert nvml("null_argument", name, nvml.device()) == INVALID_ARGUMENT


def test_text_buffers_are_measured(sim: SimGpus, nvml: Client) -> None:
    device = nvml.device()
    for name, handle, text in (
        ("nvmlDeviceGetUUID", device, sim[0].uuid),
        ("nvmlDeviceGetName", device, sim[0].name),
        ("nvmlSystemGetDriverVersion", None, "570.124.06"),
        ("nvmlSystemGetNVMLVersion", None, "12.570.124.06"),
    ):
        fits = len(text) + 1
        assert nvml("text_of_size", name, handle, fits) == [0, text]
        assert nvml("text_of_size", name, handle, fits - 1) == [INSUFFICIENT_SIZE, ""]


def test_mixed_fleet_has_its_own_limits(directory: Path) -> None:
    names = list(MODELS)
    sim = SimGpus(directory).create(models=names)
    nvml = Client(sim)
    try:
        nvml("nvmlInit")
        for index, name in enumerate(names):
            model, device = MODELS[name], nvml.device(index)
            bounds = nvml("nvmlDeviceGetPowerManagementLimitConstraints", device)
            assert nvml("nvmlDeviceGetName", device) == model.name
            assert bounds == [model.min_mw, model.max_mw]
            default = nvml("nvmlDeviceGetPowerManagementDefaultLimit", device)
            assert default == nvml.limit(device) == model.default_mw
            if not model.mig:
                assert nvml.fails("nvmlDeviceGetMigMode", device) == NOT_SUPPORTED
    finally:
        nvml.end()


# ---- limits ----


def test_a_limit_outlives_its_process(sim: SimGpus, client: Callable[[], Client]) -> None:
    first = client().opened()
    first("nvmlDeviceSetPowerManagementLimit", first.device(1), 333_333)
    first.end()
    second = client().opened()
    assert [second.limit(second.device(index)) for index in range(3)] == [700_000, 333_333, 700_000]
    sim.forget_limits()
    assert second.limit(second.device(1)) == 700_000


def test_limits_outside_the_bounds_are_refused(sim: SimGpus, nvml: Client) -> None:
    device = nvml.device()
    for limit_mw in (199_999, 700_001, 0, 0xFFFFFFFF):
        code = nvml.fails("nvmlDeviceSetPowerManagementLimit", device, limit_mw)
        assert code == INVALID_ARGUMENT
    for limit_mw in (200_000, 700_000):
        nvml("nvmlDeviceSetPowerManagementLimit", device, limit_mw)
        assert sim[0].limit_mw == limit_mw


def test_every_set_is_logged(sim: SimGpus, nvml: Client) -> None:
    before = (time.time_ns(), time.monotonic_ns())
    nvml("nvmlDeviceSetPowerManagementLimit", nvml.device(0), 300_000)
    nvml.fails("nvmlDeviceSetPowerManagementLimit", nvml.device(1), 1)
    after = (time.time_ns(), time.monotonic_ns())
    records = sim.sets()
    assert [(r.pid, r.uuid, r.requested_mw, r.result) for r in records] == [
        (nvml.pid, sim[0].uuid, 300_000, 0),
        (nvml.pid, sim[1].uuid, 1, INVALID_ARGUMENT),
    ]
    for record in records:
        assert before[0] <= record.wall_ns <= after[0]
        assert before[1] <= record.monotonic_ns <= after[1]
    assert sim[1].sets() == records[1:]


def test_the_second_version_of_set_checks_version_and_scope(sim: SimGpus, nvml: Client) -> None:
    device = nvml.device()
    assert nvml("set_v2", device, 0x0200000C, 0, 350_000) == 0
    assert sim[0].limit_mw == 350_000
    assert nvml("set_v2", device, 0x0100000C, 0, 400_000) == VERSION_MISMATCH
    assert nvml("set_v2", device, 0x0200000C, 1, 400_000) == NOT_SUPPORTED
    assert nvml("set_v2", device, 0x0200000C, 9, 400_000) == INVALID_ARGUMENT
    assert nvml("set_v2", device, 0x0200000C, 0, 1) == INVALID_ARGUMENT
    assert sim[0].limit_mw == 350_000


def test_another_writer_and_a_stronger_limiter_are_seen(sim: SimGpus, nvml: Client) -> None:
    device = nvml.device()
    sim[0].limit_mw = 450_000
    sim[0].power_mw = 600_000
    assert nvml.limit(device) == 450_000
    assert nvml("nvmlDeviceGetEnforcedPowerLimit", device) == 450_000
    assert nvml("nvmlDeviceGetPowerUsage", device) == 450_000
    sim[0].enforced_cap_mw = 400_000
    assert nvml.limit(device) == 450_000
    assert nvml("nvmlDeviceGetEnforcedPowerLimit", device) == sim[0].enforced_mw == 400_000
    assert nvml("nvmlDeviceGetPowerUsage", device) == 400_000
    sim[0].enforced_cap_mw = None
    sim[0].power_mw = 80_000
    assert nvml("nvmlDeviceGetEnforcedPowerLimit", device) == 450_000
    assert nvml("nvmlDeviceGetPowerUsage", device) == 80_000
    assert nvml("nvmlDeviceGetPowerManagementMode", device) == 1
    assert sim.sets() == []


def test_a_gpu_without_power_management(sim: SimGpus, nvml: Client) -> None:
    (sim[0].folder / "limit_mw").unlink()
    device = nvml.device()
    assert nvml("nvmlDeviceGetPowerManagementMode", device) == 0
    assert nvml.fails("nvmlDeviceGetPowerManagementLimit", device) == NOT_SUPPORTED
    assert nvml.fails("nvmlDeviceGetEnforcedPowerLimit", device) == NOT_SUPPORTED


@as_root
def test_a_set_needs_the_capability_not_the_uid(sim: SimGpus, nvml: Client) -> None:
    device = nvml.device()
    nvml("nvmlDeviceSetPowerManagementLimit", device, 600_000)
    nvml("drop_sys_admin")
    code = nvml.fails("nvmlDeviceSetPowerManagementLimit", device, 500_000)
    assert code == NO_PERMISSION, "uid 0 alone is not enough"
    assert nvml.limit(device) == sim[0].limit_mw == 600_000
    assert [record.result for record in sim.sets()] == [0, NO_PERMISSION]


@as_root
def test_an_ordinary_user_reads_and_is_refused_to_set(sim: SimGpus, nvml: Client) -> None:
    nvml("become", 65532)
    nvml("nvmlShutdown")
    nvml("nvmlInit")
    device = nvml.device()
    assert nvml.limit(device) == 700_000
    code = nvml.fails("nvmlDeviceSetPowerManagementLimit", device, 500_000)
    assert code == NO_PERMISSION
    assert sim.sets()[0].result == NO_PERMISSION
    assert sim.open_by() == {nvml.pid}


@as_root
def test_a_listed_uid_may_set(directory: Path) -> None:
    sim = SimGpus(directory).create(1, allow_uids=[7, 65532])
    for path in (directory, sim[0].folder):
        os.chown(path, 65532, 65532)
    nvml = Client(sim)
    try:
        nvml("nvmlInit")
        nvml("become", 65532)
        nvml("nvmlDeviceSetPowerManagementLimit", nvml.device(), 500_000)
        assert sim[0].limit_mw == 500_000
    finally:
        nvml.end()


def test_kill_9_while_setting_leaves_a_whole_state(
    sim: SimGpus, client: Callable[[], Client]
) -> None:
    for _ in range(5):
        nvml = client().opened()
        known = len(sim.sets())
        nvml.send("set_for_ever", nvml.device())
        until(lambda known=known: len(sim.sets()) > known + 20, "more sets")  # type: ignore[misc]
        nvml.process.kill()
        nvml.process.wait()
        asked = [record.requested_mw for record in sim.sets()]
        assert sim[0].limit_mw in asked[-2:], "the last one, or killed between log and change"


def test_a_set_takes_the_time_it_is_given(sim: SimGpus, nvml: Client) -> None:
    sim.set_delay_us = 50_000
    device = nvml.device()
    start = time.monotonic()
    nvml("nvmlDeviceSetPowerManagementLimit", device, 500_000)
    assert time.monotonic() - start >= 0.05


# ---- processes ----

LISTS: list[tuple[Kind, str]] = [
    ("compute", "nvmlDeviceGetComputeRunningProcesses"),
    ("graphics", "nvmlDeviceGetGraphicsRunningProcesses"),
    ("mps", "nvmlDeviceGetMPSComputeRunningProcesses"),
]


@pytest.mark.parametrize(("kind", "name"), LISTS)
def test_each_list_has_its_own_processes(
    sim: SimGpus,
    nvml: Client,
    sleeper: Callable[[], subprocess.Popen[bytes]],
    kind: Kind,
    name: str,
) -> None:
    pids = [sleeper().pid, os.getpid()]
    for pid in pids:
        sim[0].add_process(pid, kind)
    for each, function in LISTS:
        found = nvml(function, nvml.device(0))
        assert [process["pid"] for process in found] == (pids if each == kind else [])
        assert nvml(function, nvml.device(1)) == []
    process = nvml(name, nvml.device(0))[0]
    assert process["usedGpuMemory"] is None
    assert process["gpuInstanceId"] == process["computeInstanceId"] == 0xFFFFFFFF
    assert sim[0].processes() == sim[0].processes(kind) == pids
    sim[0].remove_process(pids[0])
    assert [process["pid"] for process in nvml(name, nvml.device(0))] == pids[1:]


@pytest.mark.parametrize("version", ["", "_v2", "_v3"])
@pytest.mark.parametrize("name", [name for _, name in LISTS])
def test_sizes_are_asked_the_real_way(sim: SimGpus, nvml: Client, name: str, version: str) -> None:
    structure = "v2" if version else "v1"
    device = nvml.device()
    assert nvml("list_of_size", name + version, device, 0, None) == [0, 0, []], "nothing: success"
    pids = [os.getpid(), os.getppid()]
    for kind, function in LISTS:
        for pid in pids if function == name else []:
            sim[0].add_process(pid, kind)
    small = [INSUFFICIENT_SIZE, 2, []]
    assert nvml("list_of_size", name + version, device, 0, None) == small
    assert nvml("list_of_size", name + version, device, 1, structure) == small
    assert nvml("list_of_size", name + version, device, 2, structure) == [0, 2, pids]
    assert nvml("list_of_size", name + version, device, 9, structure) == [0, 2, pids]
    assert nvml("list_of_size", name + version, device, 9, None)[0] == INVALID_ARGUMENT


def test_ended_processes_leave_the_list_reaped_or_not(
    sim: SimGpus, nvml: Client, sleeper: Callable[[], subprocess.Popen[bytes]]
) -> None:
    process = sleeper()
    sim[0].add_process(process.pid)
    name, device = "nvmlDeviceGetComputeRunningProcesses", nvml.device()
    assert len(nvml(name, device)) == 1
    process.kill()
    # Nobody has waited for it: a zombie is not listed.
    until(lambda: nvml(name, device) == [], "it is listed no more")
    sim[0].keep_dead = True
    assert [p["pid"] for p in nvml(name, device)] == [process.pid]
    process.wait()
    assert [p["pid"] for p in nvml(name, device)] == [process.pid]
    sim[0].keep_dead = False
    assert nvml(name, device) == []


def test_a_list_that_grows_between_the_two_calls(sim: SimGpus, nvml: Client) -> None:
    name, device = "nvmlDeviceGetComputeRunningProcesses", nvml.device()
    sim[0].add_process(os.getpid())
    sim[0].fault(name, grow=3, count=1)
    assert nvml("list_of_size", name + "_v3", device, 0, None) == [INSUFFICIENT_SIZE, 1, []]
    grown = nvml("list_of_size", name + "_v3", device, 4, "v2")
    assert grown == [INSUFFICIENT_SIZE, 7, []]
    assert len(nvml(name, device)) == 1
    sim[0].fault(name, grow=1)
    assert nvml.fails(name, device) == INSUFFICIENT_SIZE


def test_memory_and_mig_instances_can_be_given(sim: SimGpus, nvml: Client) -> None:
    (sim[0].folder / "compute").write_text(f"{os.getpid()} 4096 7 0\n\n")
    (process,) = nvml("nvmlDeviceGetComputeRunningProcesses", nvml.device())
    assert process == {
        "pid": os.getpid(),
        "usedGpuMemory": 4096,
        "gpuInstanceId": 7,
        "computeInstanceId": 0,
    }


# ---- faults ----


def test_a_fault_happens_as_often_as_ordered(sim: SimGpus, nvml: Client) -> None:
    name, device = "nvmlDeviceSetPowerManagementLimit", nvml.device()
    sim[0].fault(name, error=GPU_IS_LOST, count=2)
    codes = [nvml.fails(name, device, 500_000) for _ in range(2)]
    assert codes == [GPU_IS_LOST] * 2
    assert sim[0].faults() == []
    nvml(name, device, 500_000)
    assert [record.result for record in sim.sets()] == [GPU_IS_LOST, GPU_IS_LOST, 0]


def test_processes_share_one_count(sim: SimGpus, client: Callable[[], Client]) -> None:
    clients = [client().opened(), client().opened()]
    sim[0].fault("nvmlDeviceGetPowerUsage", error=UNKNOWN, count=100)
    for nvml in clients:
        nvml.send("failures", "nvmlDeviceGetPowerUsage", nvml.device(), 90)
    assert sum(nvml.receive() for nvml in clients) == 100
    assert sim[0].faults() == []


def test_a_fault_stays_on_its_gpu_and_function(sim: SimGpus, nvml: Client) -> None:
    first, second = nvml.device(0), nvml.device(1)
    sim[0].fault("nvmlDeviceGetPowerManagementLimit", error=UNKNOWN)
    for _ in range(3):
        assert nvml.fails("nvmlDeviceGetPowerManagementLimit", first) == UNKNOWN
    assert nvml.limit(second) == 700_000
    assert nvml("nvmlDeviceGetPowerManagementLimitConstraints", first) == [200_000, 700_000]
    sim[0].clear_faults()
    assert nvml.limit(first) == 700_000


def test_a_star_means_every_function_of_the_gpu(sim: SimGpus, nvml: Client) -> None:
    device = nvml.device()
    sim[0].fault("*", error=GPU_IS_LOST)
    assert nvml.fails("nvmlDeviceGetPowerUsage", device) == GPU_IS_LOST
    assert nvml.fails("nvmlDeviceGetComputeRunningProcesses", device) == GPU_IS_LOST
    assert nvml.fails("nvmlDeviceGetHandleByIndex", 0) == GPU_IS_LOST
    assert nvml("nvmlDeviceGetCount") == 3
    assert nvml.limit(nvml.device(1)) == 700_000


def test_a_fault_of_a_family(sim: SimGpus, nvml: Client) -> None:
    device = nvml.device()
    sim[0].fault("nvmlDeviceGetPower*", error=UNKNOWN)
    assert nvml.fails("nvmlDeviceGetPowerUsage", device) == UNKNOWN
    assert nvml("nvmlDeviceGetIndex", device) == 0


def test_a_set_that_is_ignored_looks_like_success(sim: SimGpus, nvml: Client) -> None:
    device = nvml.device()
    sim[0].fault("nvmlDeviceSetPowerManagementLimit", ignore=True, count=2)
    nvml("nvmlDeviceSetPowerManagementLimit", device, 500_000)
    assert nvml("set_v2", device, 0x0200000C, 0, 500_000) == 0
    assert nvml.limit(device) == 700_000
    nvml("nvmlDeviceSetPowerManagementLimit", device, 500_000)
    assert nvml.limit(device) == 500_000
    assert [record.result for record in sim.sets()] == [0, 0, 0]


def test_a_call_that_takes_long(sim: SimGpus, nvml: Client) -> None:
    device = nvml.device()
    sim[0].fault("nvmlDeviceGetPowerUsage", delay_ms=40, count=2)
    for least_s in (0.04, 0.04, 0):
        start = time.monotonic()
        nvml("nvmlDeviceGetPowerUsage", device)
        assert time.monotonic() - start >= least_s
    assert sim[0].faults() == []


def test_faults_of_the_node(sim: SimGpus, client: Callable[[], Client]) -> None:
    sim.fault("nvmlInit", error=UNKNOWN, count=1)
    nvml = client()
    assert nvml.fails("nvmlInit") == UNKNOWN
    nvml("nvmlInit")
    devices = [nvml.device(0), nvml.device(1)]
    sim.fault("nvmlDeviceGetCount", error=GPU_IS_LOST)
    sim.fault("nvmlDeviceGetPowerManagementLimit", error=UNKNOWN)
    assert nvml.fails("nvmlDeviceGetCount") == GPU_IS_LOST
    for device in devices:
        assert nvml.fails("nvmlDeviceGetPowerManagementLimit", device) == UNKNOWN
    sim.clear_faults()
    assert nvml.limit(devices[0]) == 700_000


def test_a_fault_with_a_slip_of_the_pen_is_not_overlooked(sim: SimGpus, nvml: Client) -> None:
    (sim[0].folder / "faults").write_text("nvmlDeviceGetPowerUsage eror=15\n")
    assert nvml.fails("nvmlDeviceGetPowerUsage", nvml.device()) == UNKNOWN


# ---- presence ----


def uuids(nvml: Client) -> list[str]:
    devices = [nvml.device(index) for index in range(nvml("nvmlDeviceGetCount"))]
    return [nvml("nvmlDeviceGetUUID", device) for device in devices]


def names(*gpus: SimGpu) -> list[str]:
    return [gpu.uuid for gpu in gpus]


def test_a_vanished_gpu_is_lost_until_nvml_is_opened_again(sim: SimGpus, nvml: Client) -> None:
    a, b, c = sim.gpus
    devices = [nvml.device(index) for index in range(3)]
    nvml("nvmlDeviceSetPowerManagementLimit", devices[0], 400_000)
    a.vanish()
    assert a.index is None
    assert b.index == 0
    assert nvml.fails("nvmlDeviceGetPowerUsage", devices[0]) == GPU_IS_LOST
    assert nvml.fails("nvmlDeviceSetPowerManagementLimit", devices[0], 400_000) == GPU_IS_LOST
    assert nvml.fails("nvmlDeviceGetHandleByIndex", 0) == GPU_IS_LOST
    assert nvml.fails("nvmlDeviceGetHandleByUUID", a.uuid) == GPU_IS_LOST
    assert nvml("nvmlDeviceGetCount") == 3
    assert nvml("nvmlDeviceGetIndex", devices[1]) == 1
    a.reappear()
    assert nvml.fails("nvmlDeviceGetPowerUsage", devices[0]) == GPU_IS_LOST
    nvml("nvmlShutdown")
    nvml("nvmlInit")
    assert uuids(nvml) == names(b, c, a)
    assert nvml.limit(nvml.device(2)) == 400_000
    assert nvml("nvmlDeviceGetMinorNumber", nvml.device(2)) == 0


def test_who_opens_nvml_after_a_gpu_vanished_does_not_see_it(
    sim: SimGpus, client: Callable[[], Client]
) -> None:
    a, b, c = sim.gpus
    b.vanish()
    nvml = client().opened()
    assert uuids(nvml) == names(a, c)
    assert nvml.fails("nvmlDeviceGetHandleByUUID", b.uuid) == NOT_FOUND


def test_live_enumeration_follows_at_once(sim: SimGpus, client: Callable[[], Client]) -> None:
    sim.live_enumeration = True
    nvml = client().opened()
    a, b, c = sim.gpus
    devices = [nvml.device(index) for index in range(3)]
    a.vanish()
    assert uuids(nvml) == names(b, c)
    assert nvml.fails("nvmlDeviceGetPowerUsage", devices[0]) == GPU_IS_LOST
    assert nvml("nvmlDeviceGetIndex", devices[1]) == 0
    a.reappear(index=1)
    assert uuids(nvml) == names(b, a, c)
    assert nvml("nvmlDeviceGetIndex", devices[0]) == 1
    assert nvml.limit(devices[0]) == 700_000


def test_a_node_without_gpus(directory: Path) -> None:
    nvml = Client(SimGpus(directory).create(0))
    try:
        nvml("nvmlInit")
        assert nvml("nvmlDeviceGetCount") == 0
        assert nvml.fails("nvmlDeviceGetHandleByIndex", 0) == INVALID_ARGUMENT
    finally:
        nvml.end()


# ---- building ----


def test_concurrent_builds_end_in_one_library(tmp_path: Path) -> None:
    found: list[Path] = []
    builders = [
        threading.Thread(target=lambda: found.append(build_library(tmp_path))) for _ in range(3)
    ]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join()
    assert len(set(found)) == 1
    assert len(found) == 3
    assert [path.name for path in tmp_path.iterdir()] == [found[0].name]
    library = found[0] / SONAME
    built = library.stat().st_mtime_ns
    assert build_library(tmp_path) == found[0]
    assert library.stat().st_mtime_ns == built, "compiled once"

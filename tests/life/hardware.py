"""Hardware, processes and a clock of the test's own, in the shapes that the enforcer asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from enforcer.device import Board, DeviceError, Facts, Listing, Reading
from enforcer.policy import Stranger
from enforcer.procfs import Found
from enforcer.sources import Assignment

H100 = Facts("H100", 700_000, 200_000, 700_000)
ABSENT = ("DRIVER_NOT_LOADED", "LIBRARY_NOT_FOUND")
LACKING = ("NOT_SUPPORTED", "FUNCTION_NOT_FOUND")
STALE = ("GPU_IS_LOST", "UNINITIALIZED")
CUT_OFF = ("UNKNOWN", "LIB_RM_VERSION_MISMATCH")


class Killed(BaseException):
    """`kill -9` at this very instant: nothing of the enforcer may catch it."""


class HandClock:
    """Time that passes only when somebody lets it."""

    def __init__(self) -> None:
        self.time_s = 1000.0

    def now_s(self) -> float:
        return self.time_s

    def wall_s(self) -> float:
        return 1.7e9 + self.time_s

    def boot_s(self) -> float:
        return self.time_s

    def rest(self, span_s: float) -> None:
        self.time_s += span_s


def error(call: str, name: str) -> DeviceError:
    """The error `name` of a call, sorted as the enforcer's NVML sorts it."""
    made = DeviceError(name, f"{call}: {name}")
    made.absent = name in ABSENT
    made.lacking = name in LACKING
    made.stale = name in STALE
    made.cut_off = name in CUT_OFF
    return made


@dataclass
class FakeGpu:
    """One board: what it has, who runs on it, and which calls fail with what."""

    uuid: str
    facts: Facts = H100
    limit_mw: int = 700_000
    enforced_cap_mw: int | None = None
    step_mw: int = 1
    pids: set[int] = field(default_factory=set)
    faults: dict[str, str] = field(default_factory=dict)
    ignores_sets: bool = False
    there: bool = True
    # Without it the limit is forgotten when nobody has the GPU open; None: it does not tell.
    persistence: bool | None = None

    def sleeps(self) -> bool:
        """Whether the driver lets it go when NVML is closed."""
        return self.persistence is False and not self.pids


@dataclass(frozen=True)
class Set:
    """One set that reached a board."""

    at_s: float
    uuid: str
    before_mw: int
    limit_mw: int


class FakeDevice:
    """A `Device` whose sessions cost time, and which never lists in one what came after it."""

    def __init__(self, gpus: list[FakeGpu], clock: HandClock) -> None:
        self.gpus = {gpu.uuid: gpu for gpu in gpus}
        self.clock = clock
        self.driver_version: str | None = None
        self.faults: dict[str, str] = {}
        # What opening says in this container; another one has its devices again.
        self.cut_off: str | None = None
        self.open_costs_s = 1.0
        self.cold_open_costs_s = 30.0
        self.opens: list[float] = []
        self.is_open = False
        self.sets: list[Set] = []
        self.readings = 0
        self.before_set: Callable[[str, int], None] = lambda _uuid, _limit_mw: None
        self.after_set: Callable[[str, int], None] = lambda _uuid, _limit_mw: None
        self._session = 0
        self._listed: list[str] = []
        self._lost: set[str] = set()

    # -- what the test does --

    def vanish(self, uuid: str) -> None:
        """Let a board fall off the bus: it stays lost to the session that is open."""
        self.gpus[uuid].there = False
        self._lost.add(uuid)

    def reappear(self, uuid: str) -> None:
        self.gpus[uuid].there = True

    # -- Device --

    def open(self) -> None:
        assert not self.is_open, "opened twice"
        self.opens.append(self.clock.time_s)
        cold = any(gpu.sleeps() for gpu in self.gpus.values())
        self.clock.rest(self.cold_open_costs_s if cold else self.open_costs_s)
        if name := self.faults.get("open", self.cut_off):
            raise error("nvmlInit", name)
        self._session += 1
        self.is_open = True
        self.driver_version = "570.1"
        self._lost.clear()
        self._listed = [uuid for uuid, gpu in self.gpus.items() if gpu.there]

    def close(self) -> None:
        self.is_open = False
        for gpu in self.gpus.values():
            if gpu.sleeps() and gpu.facts.default_mw is not None:
                gpu.limit_mw = gpu.facts.default_mw

    def boards(self) -> Listing:
        if "count" in self.faults:
            raise error("nvmlDeviceGetCount", self.faults["count"])
        boards, faults = [], []
        for index, uuid in enumerate(self._listed):
            gpu = self.gpus[uuid]
            name = "GPU_IS_LOST" if uuid in self._lost else gpu.faults.get("handle")
            if name:
                faults.append(f"GPU {index}: handle: {name}")
                continue
            facts = gpu.facts
            if fault := gpu.faults.get("facts"):
                facts = Facts(name=gpu.facts.name)
                if fault not in LACKING:
                    faults.append(f"GPU {index}: facts: {fault}")
            pci = f"00000000:{list(self.gpus).index(uuid) + 1:02X}:00.0"
            facts = replace(facts, persistence=gpu.persistence, pci=pci)
            boards.append(Board(uuid, index, (self._session, uuid), facts))
        return Listing(tuple(boards), tuple(faults))

    def whole_of(self, _instance: str) -> str | None:
        return None

    def pids(self, board: Board) -> set[int]:
        return set(self._asked(board, "pids").pids)

    def limit_mw(self, board: Board) -> int:
        return self._asked(board, "limit").limit_mw

    def read(self, board: Board) -> Reading:
        self.readings += 1
        gpu = self._asked(board, "limit")
        enforced_mw = min(gpu.limit_mw, gpu.enforced_cap_mw or gpu.limit_mw)
        return Reading(gpu.limit_mw, enforced_mw, None if "power" in gpu.faults else 90_000)

    def set_limit(self, board: Board, limit_mw: int) -> None:
        gpu = self._asked(board, "set")
        self.before_set(gpu.uuid, limit_mw)
        if gpu.ignores_sets:
            return
        before_mw, gpu.limit_mw = gpu.limit_mw, limit_mw // gpu.step_mw * gpu.step_mw
        self.sets.append(Set(self.clock.time_s, gpu.uuid, before_mw, limit_mw))
        self.after_set(gpu.uuid, limit_mw)

    def _asked(self, board: Board, call: str) -> FakeGpu:
        assert self.is_open, f"{call} with no session"
        assert board.handle == (self._session, board.uuid), f"{call} with a handle of another"
        if board.uuid in self._lost:
            raise error(call, "GPU_IS_LOST")
        gpu = self.gpus[board.uuid]
        if name := gpu.faults.get(call):
            raise error(call, name)
        return gpu


class FakeBus:
    """The bus with the boards that are there; None where sysfs cannot be read."""

    def __init__(self, device: FakeDevice) -> None:
        self._device = device
        self.readable = True

    def devices(self) -> frozenset[str] | None:
        if not self.readable:
            return None
        return frozenset(uuid for uuid, gpu in self._device.gpus.items() if gpu.there)


class FakeKubelet:
    """What the kubelet has assigned, by GPU."""

    state = "ok"

    def __init__(self) -> None:
        self.pods: dict[str, str] = {}

    def assigned(self, board: Board) -> tuple[Assignment, ...]:
        pod = self.pods.get(board.uuid)
        return () if pod is None else (Assignment(pod, "nvidia.com/gpu"),)


class FakeProc:
    """Whose process each pid is, as /proc would tell."""

    def __init__(self) -> None:
        self.owners: dict[int, str | Stranger] = {}
        self.began_s: dict[int, float] = {}

    def may_exist(self, pid: int) -> bool:
        return 0 < pid <= 4 * 1024 * 1024

    def owner(self, pid: int, _listed_ticks: int) -> Found:
        return Found(self.owners.get(pid), f"cgroup of {pid}", self.began_s.get(pid))

"""Drives the simulated GPUs: reads and writes the state that nvml/nvml_sim.h lays out."""

from __future__ import annotations

import fcntl
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tests.simnode.cuda import build_library as build_cuda
from tests.simnode.nvml import build_library

DRIVER_VERSION = "570.124.06"
MISSING = "missing"

Kind = Literal["compute", "graphics", "mps"]
KINDS: tuple[Kind, ...] = ("compute", "graphics", "mps")


@dataclass(frozen=True)
class Model:
    """What one kind of board answers; limits as its data sheet gives them."""

    name: str
    min_mw: int
    default_mw: int
    max_mw: int
    idle_mw: int
    pci_device_id: int
    mig: bool


MODELS = {
    "A100": Model("NVIDIA A100-SXM4-80GB", 100_000, 400_000, 400_000, 62_000, 0x20B210DE, True),
    "H100": Model("NVIDIA H100 80GB HBM3", 200_000, 700_000, 700_000, 71_000, 0x233010DE, True),
    "H100-PCIe": Model("NVIDIA H100 PCIe", 200_000, 310_000, 350_000, 48_000, 0x233110DE, True),
    "H200": Model("NVIDIA H200", 200_000, 700_000, 700_000, 76_000, 0x233510DE, True),
    "B200": Model("NVIDIA B200", 200_000, 1_000_000, 1_000_000, 142_000, 0x290110DE, True),
    "L40S": Model("NVIDIA L40S", 100_000, 350_000, 350_000, 33_000, 0x26B910DE, False),
    "L4": Model("NVIDIA L4", 40_000, 72_000, 72_000, 16_500, 0x27B810DE, False),
    "A16": Model("NVIDIA A16", 48_750, 62_500, 62_500, 14_800, 0x25B610DE, False),
}


# ---- files ----


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Exclude the library's own writers of this folder, and other users of this module."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _replace(path: Path, text: str) -> None:
    """Write as one step; the folder must be locked (the temporary name is the library's)."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    temporary.chmod(0o644)
    temporary.rename(path)


def _write(path: Path, value: object) -> None:
    with _locked(path.parent):
        _replace(path, f"{value}\n")


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        return None


def _read_number(path: Path) -> int:
    return int(path.read_text())


def _add_fault(
    folder: Path,
    function: str,
    *,
    error: int | None,
    count: int | None,
    delay_ms: float | None,
    ignore: bool,
    wide: bool = False,
    grow: int | None,
    claims: int | None = None,
) -> None:
    values = {"error": error, "delay_ms": delay_ms, "grow": grow, "claims": claims, "count": count}
    words = [function, *(f"{key}={value}" for key, value in values.items() if value is not None)]
    words += [word for word, is_on in (("ignore", ignore), ("wide", wide)) if is_on]
    line = " ".join(words)
    with _locked(folder):
        lines = [*(_read(folder / "faults") or "").splitlines(), line]
        _replace(folder / "faults", "\n".join(lines) + "\n")


def _clear_faults(folder: Path) -> None:
    with _locked(folder):
        (folder / "faults").unlink(missing_ok=True)


def _start_ticks(pid: int) -> str | None:
    """Start time of a process that runs; None when it has ended, reaped or not."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else fields[19]


# ---- what the library wrote ----


@dataclass(frozen=True)
class SetRecord:
    """One call that asked for another limit, refused ones included."""

    wall_ns: int
    monotonic_ns: int
    pid: int
    uuid: str
    requested_mw: int
    result: int


@dataclass(frozen=True)
class InitRecord:
    """One nvmlInit or nvmlShutdown."""

    wall_ns: int
    monotonic_ns: int
    pid: int
    what: Literal["init", "shutdown"]
    result: int


# ---- one GPU ----


class SimGpu:
    """One board. It keeps its folder, uuid and minor number wherever it is enumerated."""

    def __init__(self, node: SimGpus, folder: Path) -> None:
        self.node = node
        self.folder = folder

    def __repr__(self) -> str:
        return f"SimGpu({self.folder.name}, {self.uuid}, index {self.index})"

    @property
    def uuid(self) -> str:
        return (self.folder / "uuid").read_text().strip()

    @property
    def name(self) -> str:
        return (self.folder / "name").read_text().strip()

    @property
    def min_mw(self) -> int:
        return _read_number(self.folder / "min_mw")

    @property
    def default_mw(self) -> int:
        return _read_number(self.folder / "default_mw")

    @property
    def max_mw(self) -> int:
        return _read_number(self.folder / "max_mw")

    @property
    def limit_mw(self) -> int:
        return _read_number(self.folder / "limit_mw")

    @limit_mw.setter
    def limit_mw(self, value: int) -> None:
        """As another writer of the host would: behind the agent's back, not in sets.log."""
        _write(self.folder / "limit_mw", value)

    @property
    def enforced_cap_mw(self) -> int | None:
        """A limiter beside the driver's: thermal, or the data centre's through the BMC."""
        text = _read(self.folder / "enforced_cap_mw")
        return None if text is None else int(text)

    @enforced_cap_mw.setter
    def enforced_cap_mw(self, value: int | None) -> None:
        if value is None:
            (self.folder / "enforced_cap_mw").unlink(missing_ok=True)
        else:
            _write(self.folder / "enforced_cap_mw", value)

    @property
    def enforced_mw(self) -> int:
        cap = self.enforced_cap_mw
        return self.limit_mw if cap is None else min(self.limit_mw, cap)

    @property
    def power_mw(self) -> int:
        """What the load would draw; NVML's reading is this, at most the enforced limit."""
        return _read_number(self.folder / "power_mw")

    @power_mw.setter
    def power_mw(self, value: int) -> None:
        _write(self.folder / "power_mw", value)

    @property
    def persistence(self) -> bool:
        """Persistence mode; without it the limit is forgotten when nobody has the GPU open."""
        return _read_number(self.folder / "persistence") == 1

    @persistence.setter
    def persistence(self, value: bool) -> None:
        _write(self.folder / "persistence", int(value))

    # -- processes --

    def add_process(self, pid: int, kind: Kind = "compute") -> None:
        self._change_processes(kind, lambda pids: [*(p for p in pids if p != pid), pid])

    def list_processes(self, lines: Iterable[str], kind: Kind = "compute") -> None:
        """Replace a list by lines as nvml.c reads them: a pid and what else its entry has."""
        with _locked(self.folder):
            _replace(self.folder / kind, "".join(f"{line}\n" for line in lines))

    def remove_process(self, pid: int, kind: Kind | None = None) -> None:
        for each in KINDS if kind is None else (kind,):
            self._change_processes(each, lambda pids: [p for p in pids if p != pid])

    def processes(self, kind: Kind | None = None) -> list[int]:
        """Pids as written, ended ones included (the library leaves those out)."""
        kinds = KINDS if kind is None else (kind,)
        return [pid for each in kinds for pid in self._pids(each)]

    def _pids(self, kind: Kind) -> list[int]:
        lines = (_read(self.folder / kind) or "").splitlines()
        return [int(line.split()[0]) for line in lines if line.strip()]

    def _change_processes(self, kind: Kind, change: Callable[[list[int]], list[int]]) -> None:
        with _locked(self.folder):
            pids = change(self._pids(kind))
            _replace(self.folder / kind, "".join(f"{pid}\n" for pid in pids))

    @property
    def keep_dead(self) -> bool:
        """List processes that have ended: NVML's answer is older than its reader's next step."""
        return (self.folder / "keep_dead").exists()

    @keep_dead.setter
    def keep_dead(self, value: bool) -> None:
        if value:
            (self.folder / "keep_dead").touch()
        else:
            (self.folder / "keep_dead").unlink(missing_ok=True)

    # -- faults and presence --

    def fault(
        self,
        function: str,
        *,
        error: int | None = None,
        count: int | None = None,
        delay_ms: float | None = None,
        ignore: bool = False,
        wide: bool = False,
        grow: int | None = None,
        claims: int | None = None,
    ) -> None:
        """Order a fault of this GPU; faults.c explains the words."""
        _add_fault(
            self.folder,
            function,
            error=error,
            count=count,
            delay_ms=delay_ms,
            ignore=ignore,
            wide=wide,
            grow=grow,
            claims=claims,
        )

    def faults(self) -> list[str]:
        return (_read(self.folder / "faults") or "").splitlines()

    def clear_faults(self) -> None:
        _clear_faults(self.folder)

    @property
    def index(self) -> int | None:
        """Index for a process that initialises NVML now; None while the GPU has vanished."""
        order = self.node.order()
        return order.index(self.folder.name) if self.folder.name in order else None

    def vanish(self) -> None:
        """Fall off the bus: lost to those who have NVML open, absent for those who open it."""
        self.node.change_order(lambda names: [n for n in names if n != self.folder.name])

    def reappear(self, index: int | None = None) -> None:
        """Come back, as the last one or under another index; the limit is as it was."""

        def insert(names: list[str]) -> list[str]:
            others = [name for name in names if name != self.folder.name]
            others.insert(len(others) if index is None else index, self.folder.name)
            return others

        self.node.change_order(insert)

    def sets(self) -> list[SetRecord]:
        own = self.uuid
        return [record for record in self.node.sets() if record.uuid == own]


# ---- the node's GPUs ----


class SimGpus:
    """All GPUs of one simulated node, and its driver."""

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)

    # -- making them --

    def create(
        self,
        count: int = 8,
        model: str = "H100",
        *,
        models: Sequence[str] | None = None,
        allow_uids: Iterable[int] | None = None,
    ) -> SimGpus:
        """Make `count` boards of one model, or one of each name in `models`.

        `allow_uids` may set limits without CAP_SYS_ADMIN; by default that is whoever runs this,
        if not root.
        """
        fleet = list(models) if models is not None else [model] * count
        if allow_uids is None:
            allow_uids = [] if os.geteuid() == 0 else [os.geteuid()]
        self.directory.mkdir(parents=True, exist_ok=True)
        self.directory.chmod(0o755)
        for number, name in enumerate(fleet):
            self._create_gpu(number, MODELS[name])
        (self.directory / "open").mkdir(exist_ok=True)
        for log in ("sets.log", "inits.log"):
            (self.directory / log).touch()
            (self.directory / log).chmod(0o666)  # refused callers of any uid are logged too
        (self.directory / "open").chmod(0o777)
        _write(self.directory / "allow_uids", "\n".join(map(str, allow_uids)))
        self.change_order(lambda _: [f"gpu{k}" for k in range(len(fleet))])
        self.driver_present()
        return self

    def _create_gpu(self, number: int, model: Model) -> None:
        folder = self.directory / f"gpu{number}"
        folder.mkdir()
        folder.chmod(0o755)
        values: dict[str, object] = {
            "uuid": f"GPU-{uuid.uuid4()}",
            "name": model.name,
            "minor": number,
            "pci": f"{number // 32:08X}:{0x0F + 8 * (number % 32) % 0xF0:02X}:00.0",
            "pci_device_id": hex(model.pci_device_id),
            "persistence": 1,
            "min_mw": model.min_mw,
            "default_mw": model.default_mw,
            "max_mw": model.max_mw,
            "limit_mw": model.default_mw,
            "power_mw": model.idle_mw,
        }
        if model.mig:
            values["mig"] = "0 0"
        for name, value in values.items():
            _write(folder / name, value)

    # -- finding them --

    @property
    def gpus(self) -> list[SimGpu]:
        """Every board, vanished ones too, in the order they were made in."""
        folders = self.directory.glob("gpu*")
        ordered = sorted(folders, key=lambda folder: int(folder.name.removeprefix("gpu")))
        return [SimGpu(self, folder) for folder in ordered]

    def __getitem__(self, number: int) -> SimGpu:
        return self.gpus[number]

    def __iter__(self) -> Iterator[SimGpu]:
        return iter(self.gpus)

    def __len__(self) -> int:
        return len(self.gpus)

    def by_uuid(self, wanted: str) -> SimGpu:
        for gpu in self.gpus:
            if gpu.uuid == wanted:
                return gpu
        raise KeyError(wanted)

    def order(self) -> list[str]:
        return (_read(self.directory / "order") or "").split()

    def change_order(self, change: Callable[[list[str]], list[str]]) -> None:
        with _locked(self.directory):
            names = change(self.order())
            _replace(self.directory / "order", "\n".join(names) + "\n")
            self._show_on_the_bus(names)

    def _show_on_the_bus(self, names: Iterable[str]) -> None:
        """Make the PCI bus below `sysfs_root` as sysfs shows it with these boards on it."""
        devices = self.sysfs_root / "bus/pci/devices"
        devices.mkdir(parents=True, exist_ok=True)
        there = {self._address(name) for name in names}
        for gone in {folder.name for folder in devices.iterdir()} - there:
            shutil.rmtree(devices / gone)
        driver = self.sysfs_root / "bus/pci/drivers/nvidia"
        driver.mkdir(parents=True, exist_ok=True)
        for address in there:
            folder = devices / address
            if not folder.exists():
                # As one step: a reader never sees a device without its vendor.
                new = self.sysfs_root / f".{address}"
                new.mkdir()
                (new / "vendor").write_text("0x10de\n")
                (new / "driver").symlink_to(driver)
                new.rename(folder)

    def _address(self, name: str) -> str:
        """Return a board's address as sysfs has it: NVML's has eight digits for the domain."""
        domain, bus, slot = (self.directory / name / "pci").read_text().strip().lower().split(":")
        return f"{int(domain, 16):04x}:{bus}:{slot}"

    @property
    def sysfs_root(self) -> Path:
        """What POWER_AGENT_SYSFS_ROOT is on this node: its PCI bus and nothing else."""
        return self.directory / "sys"

    # -- driver and machine --

    def driver_missing(self) -> None:
        """The driver is not loaded: nvmlInit fails with DRIVER_NOT_LOADED, open or not."""
        _write(self.directory / "driver", MISSING)

    def driver_fails(self, error: int) -> None:
        """As driver_missing, with another code (18: library and driver of different versions)."""
        _write(self.directory / "driver", error)

    def driver_present(self, version: str = DRIVER_VERSION) -> None:
        _write(self.directory / "driver", version)

    def forget_limits(self) -> None:
        """What a reboot or the unloading of the driver does to every limit."""
        for gpu in self.gpus:
            gpu.limit_mw = gpu.default_mw

    @property
    def live_enumeration(self) -> bool:
        """Whether a process with NVML open sees GPUs come, go and change their index at once.

        By default it does not: it sees those of its nvmlInit, and one that went stays lost to it.
        """
        return _read(self.directory / "enumeration") == "live"

    @live_enumeration.setter
    def live_enumeration(self, value: bool) -> None:
        _write(self.directory / "enumeration", "live" if value else "init")

    @property
    def set_delay_us(self) -> int:
        """How long a set takes (real hardware: 10 to 20 ms)."""
        return int(_read(self.directory / "set_delay_us") or 0)

    @set_delay_us.setter
    def set_delay_us(self, value: int) -> None:
        _write(self.directory / "set_delay_us", value)

    @property
    def cold_init_ms(self) -> int:
        """How long nvmlInit takes where a GPU without persistence mode is not in use (to 30 s)."""
        return int(_read(self.directory / "cold_init_ms") or 0)

    @cold_init_ms.setter
    def cold_init_ms(self, value: int) -> None:
        _write(self.directory / "cold_init_ms", value)

    def fault(
        self,
        function: str,
        *,
        error: int | None = None,
        count: int | None = None,
        delay_ms: float | None = None,
    ) -> None:
        """Order a fault of every GPU, or of a function that belongs to none (nvmlInit)."""
        _add_fault(
            self.directory,
            function,
            error=error,
            count=count,
            delay_ms=delay_ms,
            ignore=False,
            grow=None,
        )

    def clear_faults(self) -> None:
        """Of the node and of every GPU."""
        for folder in (self.directory, *(gpu.folder for gpu in self.gpus)):
            _clear_faults(folder)

    # -- what happened --

    def sets(self) -> list[SetRecord]:
        """Every set since the start."""
        return [
            SetRecord(int(wall), int(monotonic), int(pid), gpu, int(requested), int(result))
            for wall, monotonic, pid, gpu, requested, result in self._lines("sets.log")
        ]

    def forget_sets(self) -> None:
        """From now on it is as if none had been."""
        os.truncate(self.directory / "sets.log", 0)

    def inits(self) -> list[InitRecord]:
        return [
            InitRecord(
                int(wall),
                int(monotonic),
                int(pid),
                "init" if what == "init" else "shutdown",
                int(result),
            )
            for wall, monotonic, pid, what, result in self._lines("inits.log")
        ]

    def _lines(self, log: str) -> list[list[str]]:
        text = (self.directory / log).read_text()
        whole = text[: text.rfind("\n") + 1]
        return [line.split() for line in whole.splitlines()]

    def open_by(self) -> set[int]:
        """Pids of the living processes that have NVML open."""
        found = set()
        for marker in (self.directory / "open").iterdir():
            started = _read(marker)  # None: closed since the folder was listed
            if started is not None and started == _start_ticks(int(marker.name)):
                found.add(int(marker.name))
        return found

    def environment(self, *, cuda: bool = False) -> dict[str, str]:
        """Variables under which a process loads this node's NVML, and its CUDA if asked for."""
        path = [str(build_library()), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
        if cuda:
            path.insert(0, str(build_cuda()))
        return {
            "SIM_NVML_DIR": str(self.directory.absolute()),
            "LD_LIBRARY_PATH": ":".join(path),
            "POWER_AGENT_SYSFS_ROOT": str(self.sysfs_root.absolute()),
        }

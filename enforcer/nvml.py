"""NVML through nvidia-ml-py: the only file that imports pynvml, and where its errors are mapped.

It knows nothing of pods, of the ledger and of when anything is due.
"""

import contextlib
import re
from collections.abc import Callable, Iterable
from typing import Any

import pynvml

from enforcer.device import Board, DeviceError, Facts, Listing, Reading
from enforcer.nodes import Obstacle, obstacle

_NAMES = {v: k.removeprefix("NVML_ERROR_") for k, v in vars(pynvml).items() if "NVML_ERROR_" in k}
_REMEDIES = {
    "LIBRARY_NOT_FOUND": "; is the driver installed, and its libnvidia-ml.so.1 to be seen here?",
    "DRIVER_NOT_LOADED": "; load the NVIDIA driver",
    "LIB_RM_VERSION_MISMATCH": "; the driver was upgraded: restart this pod to get its library",
    "NO_TEXT": "; what the driver answers is no text: update the driver",
    "NOT_UNIQUE": "; another GPU answers the same",
}
# Why the driver is not reached at all; the device nodes may tell (nodes.py).
_SHUT_OUT = {"NO_PERMISSION", "UNKNOWN"}
_REACHING = (pynvml.nvmlInit, pynvml.nvmlDeviceGetHandleByIndex)
_NO_CAPABILITY = "setting a limit takes CAP_SYS_ADMIN in the initial user namespace"
_NO_REASON = (
    "the device nodes can be opened, so a seccomp profile, SELinux or AppArmor may refuse it: "
    "see the kernel's log"
)
# Where NVML worked and these last, a new session helps, or a new container with its own devices
# and the driver's new library.
_CUT_OFF = {"UNKNOWN", "LIB_RM_VERSION_MISMATCH"}
_ABSENT = {"LIBRARY_NOT_FOUND", "DRIVER_NOT_LOADED"}
# What a board or an older driver cannot tell.
_LACKING = {"NOT_SUPPORTED", "FUNCTION_NOT_FOUND"}
# After these, handles are worthless until NVML is initialised anew.
_STALE = {"UNINITIALIZED", "GPU_IS_LOST", "GPU_NOT_FOUND", "NOT_FOUND", "RESET_REQUIRED"}
# The lists by version: where the library lacks one, nvidia-ml-py's unversioned functions raise
# NVMLLibraryMismatchError, which is no NVMLError (pynvml.py, nvmlDeviceGet...RunningProcesses).
# Drivers below 510 have only the second of each pair; both have entries of the same layout.
_COMPUTE = (
    pynvml.nvmlDeviceGetComputeRunningProcesses_v3,
    pynvml.nvmlDeviceGetComputeRunningProcesses_v2,
)
_OPTIONAL_LISTS = (
    (
        pynvml.nvmlDeviceGetGraphicsRunningProcesses_v3,
        pynvml.nvmlDeviceGetGraphicsRunningProcesses_v2,
    ),
    (
        pynvml.nvmlDeviceGetMPSComputeRunningProcesses_v3,
        pynvml.nvmlDeviceGetMPSComputeRunningProcesses_v2,
    ),
)
# These write entries of 32 bytes for _v3 where 24 are read (nvidia-ml-py 12.535.77, nvitop #79), so
# pids are other fields, and the processes at the end are missing.
_MISREAD_FROM, _MISREAD_BELOW = (535, 43), (535, 98)
_MISREAD = "its process lists cannot be read right; update the driver to 535.98 or later"
_TOO_OLD = "no process list that can be read; update the driver to 510 or later"
# A MIG instance's id is a small number, and without MIG it is the last (nvml.h, nvmlProcessInfo_t).
# Where entries are larger than is read, parts of byte counts stand there.
_MOST_INSTANCE, _NO_INSTANCE = 0xFFFF, 0xFFFFFFFF


class NvmlError(DeviceError):
    """A call that NVML refused; `name` is its error without NVML_ERROR_."""

    def __init__(self, operation: str, name: str, why: Obstacle | None = None) -> None:
        remedy = _REMEDIES.get(name, "") if why is None else f"; {why.why}"
        super().__init__(name, f"{operation}: {name}{remedy}")
        self.absent = name in _ABSENT
        self.lacking = name in _LACKING
        self.stale = name in _STALE
        self.cut_off = name in _CUT_OFF or (why is not None and why.lost)


def _call(function: Callable[..., Any], *arguments: object) -> Any:  # noqa: ANN401
    """Call NVML; whatever nvidia-ml-py raises from it is an error of that call."""
    try:
        return function(*arguments)
    except pynvml.NVMLError as error:
        name = _NAMES.get(error.value, f"CODE_{error.value}")
    except UnicodeDecodeError:
        # nvidia-ml-py decodes every text as UTF-8, and some drivers return bytes that are not.
        name = "NO_TEXT"
    except pynvml.NVMLLibraryMismatchError:
        name = "FUNCTION_NOT_FOUND"
    except Exception as error:  # it does not check what it is answered
        why = f"nvidia-ml-py cannot take the driver's answer ({error!r}): update the driver"
        raise NvmlError(function.__name__, "NO_SENSE", Obstacle(why, lost=False)) from error
    raise NvmlError(function.__name__, name, _cause(function, name))


def _cause(function: Callable[..., Any], name: str) -> Obstacle | None:
    """Return why a call was refused, where its error's name does not tell."""
    if name == "NO_PERMISSION" and function is pynvml.nvmlDeviceSetPowerManagementLimit:
        return Obstacle(_NO_CAPABILITY, lost=False)
    found = obstacle() if name in _SHUT_OUT and function in _REACHING else None
    if found is None and name == "NO_PERMISSION":
        return Obstacle(_NO_REASON, lost=False)
    return found


class Nvml:
    """The GPUs of this node, by NVML; see `Device`."""

    def __init__(self) -> None:
        """Prepare; NVML is not touched before `open`."""
        self.driver_version: str | None = None
        self._misreads = False

    def open(self) -> None:
        """Initialise NVML."""
        _call(pynvml.nvmlInit)
        self.driver_version = None  # another driver may have been loaded since
        with contextlib.suppress(NvmlError):  # it is only shown
            self.driver_version = _call(pynvml.nvmlSystemGetDriverVersion)
        self._misreads = _is_misread(self.driver_version or "")

    def close(self) -> None:
        """Let go of the driver."""
        with contextlib.suppress(pynvml.NVMLError):  # not open, or gone with a reloaded driver
            pynvml.nvmlShutdown()

    def boards(self) -> Listing:
        """List the boards. One that does not tell its limits is among them; some have none."""
        boards: list[Board] = []
        faults: list[str] = []
        for index in range(_call(pynvml.nvmlDeviceGetCount)):
            try:
                handle = _call(pynvml.nvmlDeviceGetHandleByIndex, index)
                uuid = _uuid(handle, boards)
            except NvmlError as error:
                faults.append(f"GPU {index}: {error}")
                continue
            facts, missing = _facts(handle)
            which = uuid if facts.pci is None else f"{uuid} at {facts.pci}"
            faults += [f"GPU {index}: {error}; it is {which}" for error in missing]
            minor = _number(pynvml.nvmlDeviceGetMinorNumber, handle)
            boards.append(Board(uuid, index, handle, facts, minor))
        return Listing(tuple(boards), tuple(faults))

    def whole_of(self, instance: str) -> str | None:
        """Return the UUID of the board that a MIG instance is part of, None where it fails."""
        with contextlib.suppress(NvmlError):
            part = _call(pynvml.nvmlDeviceGetHandleByUUID, instance)
            whole = _call(pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle, part)
            return str(_call(pynvml.nvmlDeviceGetUUID, whole))
        return None

    def pids(self, board: Board) -> set[int]:
        """Return the processes on a GPU, those of all MIG instances and MPS clients included.

        nvidia-ml-py fills a buffer for twice as many as there were; a list that has outgrown even
        that (INSUFFICIENT_SIZE) is not known until it is asked for again.
        """
        driver = f"driver {self.driver_version or 'unknown'}"
        if self._misreads:
            raise DeviceError("MISREAD", f"{driver}: {_MISREAD}")
        try:
            found = _listed(_COMPUTE, board.handle)
        except NvmlError as error:
            if error.name == "FUNCTION_NOT_FOUND":
                raise DeviceError(error.name, f"{error}; {driver}: {_TOO_OLD}") from error
            raise
        for queries in _OPTIONAL_LISTS:
            try:
                found += _listed(queries, board.handle)
            except NvmlError as error:
                if not error.lacking:
                    raise
        for entry in found:
            if not _is_instance(entry.gpuInstanceId) or not _is_instance(entry.computeInstanceId):
                raise DeviceError("MISREAD", f"{driver}: {_why_misread(entry)}")
        return {entry.pid for entry in found}

    def limit_mw(self, board: Board) -> int:
        """Return the limit that is configured."""
        return int(_call(pynvml.nvmlDeviceGetPowerManagementLimit, board.handle))

    def set_limit(self, board: Board, limit_mw: int) -> None:
        """Set the limit. Not by the _v2 call, whose result nvidia-ml-py does not check."""
        _call(pynvml.nvmlDeviceSetPowerManagementLimit, board.handle, limit_mw)

    def read(self, board: Board) -> Reading:
        """Return the limit, and the power drawn and the enforced limit where they are known.

        If these two cannot be read, the limit is still believed. A GPU that is lost says so again
        when its processes or its limit are next asked for.
        """
        return Reading(
            limit_mw=self.limit_mw(board),
            enforced_mw=_number(pynvml.nvmlDeviceGetEnforcedPowerLimit, board.handle),
            power_mw=_number(pynvml.nvmlDeviceGetPowerUsage, board.handle),
        )


def _uuid(handle: object, known: Iterable[Board]) -> str:
    """Return a board's UUID; raises where it does not tell this board from the `known` ones."""
    uuid = str(_call(pynvml.nvmlDeviceGetUUID, handle))
    if not uuid:
        raise NvmlError("nvmlDeviceGetUUID", "NO_TEXT")
    if any(board.uuid == uuid for board in known):
        raise NvmlError("nvmlDeviceGetUUID", "NOT_UNIQUE")
    return uuid


def _listed(queries: Iterable[Callable[..., Any]], handle: object) -> list[Any]:
    """Return the entries of the first list that the library has."""
    *newer, oldest = queries
    for query in newer:
        try:
            return list(_call(query, handle))
        except NvmlError as error:
            if error.name != "FUNCTION_NOT_FOUND":
                raise
    return list(_call(oldest, handle))


def _is_instance(number: int) -> bool:
    return number <= _MOST_INSTANCE or number == _NO_INSTANCE


def _why_misread(entry: Any) -> str:  # noqa: ANN401
    where = f"{entry.gpuInstanceId}/{entry.computeInstanceId}"
    why = f"pid {entry.pid} in MIG instance {where} cannot be, so the list is not believed"
    return f"{why}; update the driver"


def _is_misread(version: str) -> bool:
    """Tell whether process lists of this driver cannot be read right."""
    parts = re.match(r"([0-9]{1,4})\.([0-9]{1,4})", version)
    if parts is None:
        return False
    return _MISREAD_FROM <= (int(parts[1]), int(parts[2])) < _MISREAD_BELOW


def _number(function: Callable[..., Any], handle: object) -> int | None:
    with contextlib.suppress(NvmlError):
        return int(_call(function, handle))
    return None


def _facts(handle: object) -> tuple[Facts, list[NvmlError]]:
    """Return what a board tells, and the errors that may pass: what it lacks is none of them."""
    errors: list[NvmlError] = []

    def ask(function: Callable[..., Any]) -> Any:  # noqa: ANN401
        try:
            return _call(function, handle)
        except NvmlError as error:
            if not error.lacking and error.name != "NO_TEXT":
                errors.append(error)
            return None

    bounds = ask(pynvml.nvmlDeviceGetPowerManagementLimitConstraints)
    min_mw, max_mw = bounds or (None, None)
    default_mw = ask(pynvml.nvmlDeviceGetPowerManagementDefaultLimit) or None  # 0 W is no limit
    name = ask(pynvml.nvmlDeviceGetName)
    mode = _number(pynvml.nvmlDeviceGetPersistenceMode, handle)  # no error: no limit depends on it
    persistence = None if mode is None else mode == pynvml.NVML_FEATURE_ENABLED
    pci = None
    with contextlib.suppress(NvmlError):  # it is only shown
        pci = _call(_bus_id, handle)
    return Facts(name, default_mw, min_mw, max_mw, persistence, pci), errors


def _bus_id(handle: object) -> str:
    return str(pynvml.nvmlDeviceGetPciInfo_v3(handle).busId)

"""NVML through nvidia-ml-py: the only file that imports pynvml, and where its errors are mapped.

The library is loaded by its ordinary name; it is initialised on demand and shut down when idle,
because an open handle keeps the driver from being unloaded for an upgrade.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pynvml

_NAMES: dict[int, str] = {
    code: name.removeprefix("NVML_ERROR_")
    for name, code in vars(pynvml).items()
    if name.startswith("NVML_ERROR_")
}
_REMEDIES = {
    "NO_PERMISSION": "setting a limit takes CAP_SYS_ADMIN in the initial user namespace",
    "LIBRARY_NOT_FOUND": "is the driver installed, and its libnvidia-ml.so.1 in this container?",
    "DRIVER_NOT_LOADED": "load the NVIDIA driver",
    "LIB_RM_VERSION_MISMATCH": "the driver was upgraded: restart this pod to get its library",
    "GPU_IS_LOST": "the GPU fell off its bus: look at the kernel log, reset or reboot",
}
# The process lists that a driver or board may lack; without them nobody is there to be listed.
_LACKING = frozenset({"NOT_SUPPORTED", "FUNCTION_NOT_FOUND"})
_ABSENT = frozenset({"LIBRARY_NOT_FOUND", "DRIVER_NOT_LOADED"})
# Errors after which handles are worthless until NVML is initialised anew.
_STALE = frozenset({"UNINITIALIZED", "GPU_IS_LOST", "GPU_NOT_FOUND", "NOT_FOUND", "RESET_REQUIRED"})


class NvmlError(Exception):
    """A call that NVML refused; `name` is its error without NVML_ERROR_."""

    def __init__(self, operation: str, code: int) -> None:
        self.name = _NAMES.get(code, f"CODE_{code}")
        remedy = _REMEDIES.get(self.name)
        super().__init__(f"{operation}: {self.name}" + (f" ({remedy})" if remedy else ""))
        self.absent = self.name in _ABSENT
        self.stale = self.name in _STALE


@dataclass(frozen=True, slots=True)
class Device:
    """One physical GPU and what does not change about it; limits in milliwatts."""

    handle: Any
    index: int
    uuid: str
    name: str
    default_mw: int
    min_mw: int
    max_mw: int


@dataclass(frozen=True, slots=True)
class Reading:
    """What one GPU says of its power now, in milliwatts; None where it does not say."""

    limit_mw: int | None
    enforced_mw: int | None
    power_mw: int | None


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except pynvml.NVMLError as error:
        raise NvmlError(function.__name__, error.value) from None


class Nvml:
    """The GPUs of this node; every method raises NvmlError."""

    def __init__(self) -> None:
        self.is_open = False
        self.driver_version: str | None = None

    def open(self) -> tuple[list[Device], list[str]]:
        """Initialise NVML; return the usable GPUs and what is wrong with the others."""
        self.close()
        _call(pynvml.nvmlInit)
        self.is_open = True
        self.driver_version = _call(pynvml.nvmlSystemGetDriverVersion)
        devices, faults = [], []
        for index in range(_call(pynvml.nvmlDeviceGetCount)):
            try:
                devices.append(self._device(index))
            except NvmlError as error:
                faults.append(f"GPU {index}: {error}")
        return devices, faults

    def close(self) -> None:
        """Let go of the driver."""
        if self.is_open:
            self.is_open = False
            try:
                pynvml.nvmlShutdown()
            except pynvml.NVMLError:
                return  # already gone with a reloaded driver

    @staticmethod
    def _device(index: int) -> Device:
        handle = _call(pynvml.nvmlDeviceGetHandleByIndex, index)
        uuid = _call(pynvml.nvmlDeviceGetUUID, handle)
        name = _call(pynvml.nvmlDeviceGetName, handle)
        low, high = _call(pynvml.nvmlDeviceGetPowerManagementLimitConstraints, handle)
        default = _call(pynvml.nvmlDeviceGetPowerManagementDefaultLimit, handle)
        return Device(handle, index, uuid, name, default, low, high)

    def pids(self, device: Device) -> frozenset[int]:
        """Return the processes on `device`, all MIG instances and MPS clients included."""
        found = {p.pid for p in self._list(pynvml.nvmlDeviceGetComputeRunningProcesses, device)}
        for query in (
            pynvml.nvmlDeviceGetGraphicsRunningProcesses,
            pynvml.nvmlDeviceGetMPSComputeRunningProcesses,
        ):
            try:
                found |= {p.pid for p in self._list(query, device)}
            except NvmlError as error:
                if error.name not in _LACKING:
                    raise
        return frozenset(found)

    @staticmethod
    def _list(query: Callable[..., Any], device: Device) -> list[Any]:
        for _ in range(3):  # the list may outgrow its buffer between asking for size and filling
            try:
                return list(_call(query, device.handle))
            except NvmlError as error:
                if error.name != "INSUFFICIENT_SIZE":
                    raise
        return list(_call(query, device.handle))

    def limit_mw(self, device: Device) -> int:
        """Return the limit that is configured."""
        return int(_call(pynvml.nvmlDeviceGetPowerManagementLimit, device.handle))

    def set_limit(self, device: Device, limit_mw: int) -> None:
        """Set the limit. Not the _v2 call: nvidia-ml-py does not check what that returns."""
        _call(pynvml.nvmlDeviceSetPowerManagementLimit, device.handle, limit_mw)

    def reading(self, device: Device) -> Reading:
        """Return what `device` says of its power; a board may lack the last two."""
        values: list[int | None] = []
        for query in (pynvml.nvmlDeviceGetEnforcedPowerLimit, pynvml.nvmlDeviceGetPowerUsage):
            try:
                values.append(int(_call(query, device.handle)))
            except NvmlError as error:
                if error.name not in _LACKING:
                    raise
                values.append(None)
        return Reading(self.limit_mw(device), *values)

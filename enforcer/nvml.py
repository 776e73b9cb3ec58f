"""NVML through nvidia-ml-py: the only file that imports pynvml, and where its errors are mapped.

Initialised on demand and shut down when idle: an open handle keeps a driver from being upgraded.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import pynvml

from shared.messages import Gpu

Handle = Any  # an opaque pointer of NVML
_NAMES = {v: k.removeprefix("NVML_ERROR_") for k, v in vars(pynvml).items() if "NVML_ERROR_" in k}
_REMEDIES = {
    "NO_PERMISSION": "; setting a limit takes CAP_SYS_ADMIN in the initial user namespace",
    "LIBRARY_NOT_FOUND": "; is the driver installed, and its libnvidia-ml.so.1 to be seen here?",
    "DRIVER_NOT_LOADED": "; load the NVIDIA driver",
    "LIB_RM_VERSION_MISMATCH": "; the driver was upgraded: restart this pod to get its library",
}
# After these, handles are worthless until NVML is initialised anew.
_STALE = {"UNINITIALIZED", "GPU_IS_LOST", "GPU_NOT_FOUND", "NOT_FOUND", "RESET_REQUIRED"}
# By version: without it nvidia-ml-py has an error of another kind for a library that lacks them.
_OPTIONAL_LISTS = (  # which a board may lack
    pynvml.nvmlDeviceGetGraphicsRunningProcesses_v3,
    pynvml.nvmlDeviceGetMPSComputeRunningProcesses_v3,
)


class NvmlError(Exception):
    """A call that NVML refused; `name` is its error without NVML_ERROR_."""

    def __init__(self, operation: str, code: int) -> None:
        self.name = _NAMES.get(code, f"CODE_{code}")
        super().__init__(f"{operation}: {self.name}{_REMEDIES.get(self.name, '')}")
        self.absent = self.name in ("LIBRARY_NOT_FOUND", "DRIVER_NOT_LOADED")
        # What a board or an older driver cannot tell.
        self.lacking = self.name in ("NOT_SUPPORTED", "FUNCTION_NOT_FOUND")
        self.stale = self.name in _STALE


def _call(function: Callable[..., Any], *arguments: object) -> Any:  # noqa: ANN401
    try:
        return function(*arguments)
    except pynvml.NVMLError as error:
        raise NvmlError(function.__name__, error.value) from None


class Nvml:
    """The GPUs of this node; every method raises NvmlError."""

    is_open = False
    driver_version: str | None = None

    def open(self) -> tuple[list[tuple[Handle, Gpu]], list[NvmlError]]:
        """Initialise NVML anew; return the GPUs, and what went wrong that may not do so again.

        A GPU that does not tell its limits is among them without any; some boards have none.
        """
        self.close()
        _call(pynvml.nvmlInit)
        self.is_open = True
        self.driver_version = _call(pynvml.nvmlSystemGetDriverVersion)
        found, faults = [], []
        for index in range(_call(pynvml.nvmlDeviceGetCount)):
            try:
                handle = _call(pynvml.nvmlDeviceGetHandleByIndex, index)
                gpu = Gpu(index=index, uuid=_call(pynvml.nvmlDeviceGetUUID, handle))
                found.append((handle, gpu))
                bounds = _call(pynvml.nvmlDeviceGetPowerManagementLimitConstraints, handle)
                gpu.default_mw = _call(pynvml.nvmlDeviceGetPowerManagementDefaultLimit, handle)
                gpu.min_mw, gpu.max_mw = bounds
                gpu.name = _call(pynvml.nvmlDeviceGetName, handle)
            except NvmlError as error:
                error.args = (f"GPU {index}: {error}",)
                if not (error.lacking and found and found[-1][1].index == index):
                    faults.append(error)
        return found, faults

    def close(self) -> None:
        """Let go of the driver."""
        self.is_open = False
        with contextlib.suppress(pynvml.NVMLError):  # not open, or gone with a reloaded driver
            pynvml.nvmlShutdown()

    def pids(self, handle: Handle) -> set[int]:
        """Return the processes on a GPU, those of all MIG instances and MPS clients included.

        nvidia-ml-py fills a buffer for twice as many as there were; a list that has outgrown even
        that (INSUFFICIENT_SIZE) is not known until it is asked for again.
        """
        found = {p.pid for p in _call(pynvml.nvmlDeviceGetComputeRunningProcesses_v3, handle)}
        for query in _OPTIONAL_LISTS:
            try:
                found |= {p.pid for p in _call(query, handle)}
            except NvmlError as error:
                if not error.lacking:
                    raise
        return found

    def limit_mw(self, handle: Handle) -> int:
        """Return the limit that is configured."""
        return int(_call(pynvml.nvmlDeviceGetPowerManagementLimit, handle))

    def set_limit(self, handle: Handle, limit_mw: int) -> None:
        """Set the limit. Not by the _v2 call, whose result nvidia-ml-py does not check."""
        _call(pynvml.nvmlDeviceSetPowerManagementLimit, handle, limit_mw)

    def read_into(self, handle: Handle, gpu: Gpu) -> None:
        """Read what `gpu` says of its power now; nothing of an older reading survives a failure."""
        gpu.limit_mw = gpu.enforced_mw = gpu.power_mw = None
        gpu.limit_mw = self.limit_mw(handle)
        # Not to know these is no reason to doubt the limit. A GPU that is lost says so again when
        # its processes or its limit are next asked for.
        with contextlib.suppress(NvmlError):
            gpu.enforced_mw = int(_call(pynvml.nvmlDeviceGetEnforcedPowerLimit, handle))
        with contextlib.suppress(NvmlError):
            gpu.power_mw = int(_call(pynvml.nvmlDeviceGetPowerUsage, handle))

"""What check.py and qualify.py share: the GPUs as the product's own code reads them, a process with
a CUDA context, and tables. Nothing here sets a limit.
"""

import contextlib
import os
import select
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pynvml

from enforcer.device import Board, Device, DeviceError, Listing
from enforcer.processes import Processes
from enforcer.procfs import ProcessReader

NO_GPU = 3  # exit status
_HOLDER = Path(__file__).with_name("holder.py")
# cuInit takes seconds on a node with eight GPUs, longer where persistence mode is off.
_CONTEXT_S = 60.0
# nvml.h, NVML_FI_DEV_POWER_*: limits by scope, in milliwatts.
_LIMIT_FIELDS = {
    "requested_mw": pynvml.NVML_FI_DEV_POWER_REQUESTED_LIMIT,
    "current_mw": pynvml.NVML_FI_DEV_POWER_CURRENT_LIMIT,
    "default_mw": pynvml.NVML_FI_DEV_POWER_DEFAULT_LIMIT,
    "min_mw": pynvml.NVML_FI_DEV_POWER_MIN_LIMIT,
    "max_mw": pynvml.NVML_FI_DEV_POWER_MAX_LIMIT,
}
_SCOPES = {
    "gpu": pynvml.NVML_POWER_SCOPE_GPU,
    "module": pynvml.NVML_POWER_SCOPE_MODULE,
    "memory": pynvml.NVML_POWER_SCOPE_MEMORY,
}


class Hardware:
    """The reading half of a device and of what runs on it: there is no way to set anything."""

    def __init__(self, device: Device, reader: ProcessReader) -> None:
        self.open, self.close = device.open, device.close
        self.boards, self.read = device.boards, device.read
        self.look = Processes(device, reader).look
        self._device = device

    @property
    def driver_version(self) -> str | None:
        """The driver's version, None where it is not known."""
        return self._device.driver_version


def no_gpu(error: object) -> str:
    """Say that there is nothing to do here."""
    return f"no GPU here: {error}. This takes an NVIDIA driver and its libnvidia-ml.so.1."


def listing(gpus: Hardware) -> Listing:
    """List the boards; raises DeviceError where there is none, and no sign of one."""
    found = gpus.boards()
    if not found.boards and not found.faults:
        raise DeviceError("NO_GPU", "the driver lists none")
    return found


def ask(function: Callable[..., Any], *arguments: object) -> Any:  # noqa: ANN401
    """Return what NVML tells; None where it does not, for whatever reason."""
    with contextlib.suppress(pynvml.NVMLError, pynvml.NVMLLibraryMismatchError, UnicodeDecodeError):
        return function(*arguments)
    return None


def facts(board: Board) -> dict[str, Any]:
    """Return what a board tells beyond what the product asks it for; None is not known."""
    pci = ask(pynvml.nvmlDeviceGetPciInfo, board.handle)
    mig = ask(pynvml.nvmlDeviceGetMigMode, board.handle)
    return {
        "bus_id": pci and pci.busId,
        "mig_mode": None if mig is None else bool(mig[0]),
        "power_scopes": _power_scopes(board.handle),
    }


def _power_scopes(handle: object) -> dict[str, dict[str, int]] | None:
    """Return the limits of each scope that has any; None where the driver cannot say."""
    wanted = [(field, scope) for scope in _SCOPES.values() for field in _LIMIT_FIELDS.values()]
    answers = ask(pynvml.nvmlDeviceGetFieldValues, handle, wanted)
    if answers is None:
        return None
    found: dict[str, dict[str, int]] = {}
    names = [(scope, field) for scope in _SCOPES for field in _LIMIT_FIELDS]
    for (scope, field), answer in zip(names, answers, strict=True):
        if answer.nvmlReturn == pynvml.NVML_SUCCESS:
            found.setdefault(scope, {})[field] = int(answer.value.uiVal)
    return found


class Holder:
    """A process that has a CUDA context on one GPU, from `ready` to `end`."""

    def __init__(self, gpu: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_HOLDER)],
            env={**os.environ, "CUDA_VISIBLE_DEVICES": gpu},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for whoever started this
        )
        self.pid = self._process.pid
        self.since_s = 0.0
        self.why = ""

    def ready(self) -> bool:
        """Wait for the context; `since_s` is when it was there, or `why` says why it is not."""
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], _CONTEXT_S)[0]:
            self.why = f"no CUDA context within {_CONTEXT_S:g} s"
            return False
        word, _, rest = self._process.stdout.readline().strip().partition(" ")
        if word != "ready":
            self.why = f"{word} {rest}".strip() or "the process that was to hold a context ended"
            return False
        self.since_s = float(rest)
        return True

    def end(self) -> None:
        """End the process and with it the context; the end of its input is enough."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(_CONTEXT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return aligned lines; the last column is as wide as it is."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )

"""Runs a program that kills itself at a named operation; the program itself knows nothing of it.

`python -m tests.chaos.crashpoints OPERATION before|after NTH PROGRAM`. Calls are counted from when
the file exists that CRASH_ARMED names, so that a test chooses the step of the way it happens in.
"""

from __future__ import annotations

import functools
import os
import runpy
import signal
import stat
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pynvml
import zmq

When = Literal["before", "after"]
ARMED = "CRASH_ARMED"


def _always(*_: object) -> bool:
    return True


def _names(name: str) -> Callable[..., bool]:
    return lambda path, *_: str(path) == name


def _is_file(descriptor: int) -> bool:
    return stat.S_ISREG(os.fstat(descriptor).st_mode)


def _is_folder(descriptor: int) -> bool:
    return stat.S_ISDIR(os.fstat(descriptor).st_mode)


def _socket(kind: int) -> Callable[..., bool]:
    return lambda sock, *_: bool(sock.type == kind)


@dataclass(frozen=True)
class Operation:
    """A function of a module or class, and which of its calls are meant."""

    owner: Any
    function: str
    meant: Callable[..., bool] = _always


OPERATIONS = {
    "ledger-open": Operation(os, "open", _names("ledger.next")),
    "ledger-fsync": Operation(os, "fsync", _is_file),
    "ledger-unlink": Operation(os, "unlink", _names("ledger.previous.json")),
    "ledger-link": Operation(os, "link"),
    "ledger-rename": Operation(os, "rename", _names("ledger.next")),
    "directory-fsync": Operation(os, "fsync", _is_folder),
    "list": Operation(pynvml, "nvmlDeviceGetComputeRunningProcesses_v3"),
    "read": Operation(pynvml, "nvmlDeviceGetPowerManagementLimit"),
    "set": Operation(pynvml, "nvmlDeviceSetPowerManagementLimit"),
    "read-back": Operation(pynvml, "nvmlDeviceGetEnforcedPowerLimit"),
    "nvml-shutdown": Operation(pynvml, "nvmlShutdown"),
    "publish": Operation(zmq.Socket, "send", _socket(zmq.PUB)),
    "reply": Operation(zmq.Socket, "send_multipart", _socket(zmq.ROUTER)),
}


def plant(operation: Operation, when: When, nth: int, armed: Path) -> None:
    """Let this process die at the `nth` meant call after `armed` exists."""
    original = getattr(operation.owner, operation.function)
    left = nth

    @functools.wraps(original)
    def wrapped(*arguments: Any, **named: Any) -> Any:  # noqa: ANN401
        nonlocal left
        dies = False
        if operation.meant(*arguments) and armed.exists():
            left -= 1
            dies = left == 0
        if dies and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            return original(*arguments, **named)
        finally:
            if dies:
                os.kill(os.getpid(), signal.SIGKILL)

    setattr(operation.owner, operation.function, wrapped)


def main() -> None:
    """Plant the crash and become the program."""
    name, when, nth, program = sys.argv[1:]
    assert when in ("before", "after")
    plant(OPERATIONS[name], when, int(nth), Path(os.environ[ARMED]))  # type: ignore[arg-type]
    sys.argv[1:] = []
    runpy.run_module(program, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()

"""The faults that a simulated node can play on the command line: `--fault NAME[=GPU]`."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass

from tests.simnode.gpus import SimGpu
from tests.simnode.node import SimNode

# Of nvml.h.
_NO_PERMISSION, _UNKNOWN, _MISMATCH = 4, 999, 18
_SET = "nvmlDeviceSetPowerManagementLimit"
_LISTS = (
    "nvmlDeviceGetComputeRunningProcesses",
    "nvmlDeviceGetGraphicsRunningProcesses",
    "nvmlDeviceGetMPSComputeRunningProcesses",
)


@dataclass(frozen=True)
class Mishap:
    """One kind of fault: `play` does it; with `of_gpu` a number chooses the GPU (else 0)."""

    means: str
    play: Callable[[SimNode, SimGpu], object]
    of_gpu: bool = True
    early: bool = False  # before the agent starts


def _lists(_node: SimNode, gpu: SimGpu) -> None:
    for function in _LISTS:
        gpu.fault(function, error=_UNKNOWN)


def _drift(_node: SimNode, gpu: SimGpu) -> None:
    gpu.limit_mw = gpu.max_mw


def _throttle(_node: SimNode, gpu: SimGpu) -> None:
    gpu.enforced_cap_mw = gpu.min_mw


def _forget(_node: SimNode, gpu: SimGpu) -> None:
    gpu.persistence = False


def _stop(program: str) -> Callable[[SimNode, SimGpu], object]:
    return lambda node, _gpu: os.kill(node.pid(program), signal.SIGSTOP)


MISHAPS: dict[str, Mishap] = {
    "api-down": Mishap(
        "the API server refuses connections", lambda node, _: node.api.go_down(), of_gpu=False
    ),
    "api-down-at-start": Mishap(
        "as api-down, before the watcher has a list",
        lambda node, _: node.api.go_down(),
        of_gpu=False,
        early=True,
    ),
    "api-hangs": Mishap(
        "the API server takes connections and says nothing",
        lambda node, _: node.api.freeze(),
        of_gpu=False,
    ),
    "driver-missing": Mishap(
        "no driver is loaded", lambda node, _: node.gpus.driver_missing(), of_gpu=False, early=True
    ),
    "driver-mismatch": Mishap(
        "the driver was upgraded under its library",
        lambda node, _: node.gpus.driver_fails(_MISMATCH),
        of_gpu=False,
        early=True,
    ),
    "drift": Mishap("another program sets the limit to the most", _drift),
    "enforcer-hangs": Mishap("the enforcer is stopped (SIGSTOP)", _stop("enforcer"), of_gpu=False),
    "gpu-lost": Mishap("the GPU falls off the bus", lambda _, gpu: gpu.vanish()),
    "limit-ignored": Mishap(
        "the board takes a limit and keeps its own",
        lambda _, gpu: gpu.fault(_SET, ignore=True),
        early=True,
    ),
    "limit-refused": Mishap(
        "NVML refuses to set a limit: NO_PERMISSION",
        lambda _, gpu: gpu.fault(_SET, error=_NO_PERMISSION),
        early=True,
    ),
    "list-unreadable": Mishap("its process lists cannot be read", _lists),
    "no-persistence": Mishap("persistence mode is off", _forget, early=True),
    "pod-invalid": Mishap(
        "a pod on it asks for 350W, which is no limit",
        lambda node, gpu: node.add_pod("mistyped", limit="350W", gpus=[_number(node, gpu)]),
    ),
    "stranger": Mishap(
        "a process of the host runs on it", lambda node, gpu: node.workers.of_host([gpu])
    ),
    "throttled": Mishap("a stronger limiter acts (thermal, out of band)", _throttle),
    "watcher-hangs": Mishap("the watcher is stopped (SIGSTOP)", _stop("watcher"), of_gpu=False),
}


def _number(node: SimNode, gpu: SimGpu) -> int:
    return [each.uuid for each in node.gpus].index(gpu.uuid)


@dataclass(frozen=True)
class Ordered:
    """A fault as it was asked for."""

    name: str
    gpu: int

    @property
    def mishap(self) -> Mishap:
        return MISHAPS[self.name]

    def play(self, node: SimNode) -> None:
        self.mishap.play(node, node.gpus[self.gpu])


def ordered(text: str) -> Ordered:
    """`NAME` or `NAME=GPU`; raises ValueError that says what there is."""
    name, equals, number = text.partition("=")
    if name not in MISHAPS:
        raise ValueError(f"{name!r} is none of: {', '.join(MISHAPS)}")
    if equals and not MISHAPS[name].of_gpu:
        raise ValueError(f"{name} is a fault of the whole node: write it without ={number}")
    if equals and not number.isdecimal():
        raise ValueError(f"{text!r}: after = comes the number of a GPU, as in {name}=0")
    return Ordered(name, int(number or 0))


def listed() -> str:
    """All of them, a line each."""
    return "\n".join(
        f"  {name + ('[=GPU]' if mishap.of_gpu else ''):22} {mishap.means}"
        for name, mishap in MISHAPS.items()
    )

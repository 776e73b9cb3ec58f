"""What is measured: each part puts up a node of its own, tries a thing often, returns its figures.

Times of limits come from the simulated NVML's log of sets, which the C library writes as it stores
the limit; only the first part reads the limit back itself (probe.py).
"""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from tests.bench import kubelet, machine, probe
from tests.bench.figures import Figure, Statistic
from tests.kube import assets
from tests.simnode import reachable
from tests.simnode.controlplane import ControlPlane
from tests.simnode.gpus import SimGpu
from tests.simnode.kubeapi import KubeApi
from tests.simnode.node import ANNOTATION, Pod, SimNode
from tests.simnode.workloads import Worker

_GPUS = 8
_WATTS = 400
_MEMORY = Path("/dev/shm")
_LOOK_S = 0.02  # when waiting for what has its time in a log: a faster loop would take a core
_SETTLE_S = 5.0


class SkippedError(Exception):
    """This machine lacks what a part needs; the text says what."""


@dataclass(frozen=True)
class Part:
    """`trials` and `quick`: how often, in full and in a hurry."""

    about: str
    trials: int
    quick: int
    measure: Callable[[int], list[Figure]]


@contextlib.contextmanager
def _node(*, real_api: bool = False, start: bool = True) -> Iterator[SimNode]:
    """Eight GPUs that are files in memory, as hardware is no disk; the ledger is on the disk."""
    reachable.installation()  # what it may have to copy must be executable, and stays
    with tempfile.TemporaryDirectory(prefix="power-agent-bench-") as disk:
        settings = {"POWER_AGENT_STATE_DIR": f"{disk}/state"}
        node = SimNode(gpus=_GPUS, real_api=real_api, start=start, settings=settings)
        before = tempfile.tempdir
        tempfile.tempdir = str(_MEMORY) if os.access(_MEMORY, os.W_OK) else before
        try:
            node.__enter__()
        finally:
            tempfile.tempdir = before
        with contextlib.closing(node):
            yield node


# ---------------------------------------------------------------------- a change


def change(trials: int) -> list[Figure]:
    at_most: dict[Statistic, float] = {"p50": 3, "p99": 10}
    return [_change("annotation to limit, simulated node", at_most, trials, real_api=False)]


def change_real(trials: int) -> list[Figure]:
    folder = assets.find(assets.SERVER)
    if folder is None:
        raise SkippedError("there is no kube-apiserver: make kube-assets")
    os.environ["KUBEBUILDER_ASSETS"] = str(folder)
    at_most: dict[Statistic, float] = {"p50": 4, "p99": 12}
    return [_change("annotation to limit, real kube-apiserver", at_most, trials, real_api=True)]


def _change(
    what: str, at_most: Mapping[Statistic, float], trials: int, *, real_api: bool
) -> Figure:
    """The node's process, with the embedded API in it, does nothing but serve meanwhile."""
    with _node(real_api=real_api) as node:
        pods = _a_pod_on_each(node)
        targets = [
            probe.Target(f"/api/v1/namespaces/{pod.namespace}/pods/{pod.name}", str(gpu.folder))
            for pod, gpu in zip(pods, node.gpus, strict=True)
        ]
        order = probe.Order(node.api.port, _tls(node.api), ANNOTATION, targets, trials)
        done = subprocess.run(
            [sys.executable, "-m", "tests.bench.probe"],
            cwd=reachable.ROOT,
            input=msgspec.json.encode(order),
            stdout=subprocess.PIPE,
            check=True,
        )
    return Figure(what, "ms", msgspec.json.decode(done.stdout, type=list[float]), at_most)


def _tls(api: KubeApi | ControlPlane) -> probe.Tls | None:
    if isinstance(api, KubeApi):
        return None
    files = api.certificates
    return probe.Tls(str(files.ca), str(files.admin), str(files.admin_key))


def _a_pod_on_each(node: SimNode) -> list[Pod]:
    """Eight pods, each with its limit on a GPU of its own."""
    pods = [node.add_pod(f"worker-{k}", _WATTS, [k]) for k in range(len(node.gpus))]
    _wait_for_all(node, _WATTS)
    return pods


# ---------------------------------------------------------------------- a first process


def waiting(trials: int) -> list[Figure]:
    """Annotated pods wait; their processes come to their GPUs one after the other."""
    samples: list[float] = []
    with _node() as node:
        while len(samples) < trials:
            pods = [node.add_pod(f"waiting-{k}", _WATTS) for k in range(_GPUS)]
            for pod in pods:
                node.add_worker(pod, [])
            node.wait_for_state(pods[-1], "waiting")
            started = {}
            for pod, gpu in zip(pods, node.gpus, strict=True):
                time.sleep(random.uniform(0.05, 0.25))
                started[gpu.uuid] = _come(pod.workers[0], gpu)
            samples += _latencies_ms(node, started)
            _clear(node, pods)
    what = "first GPU process of a waiting pod to limit"
    return [Figure(what, "ms", samples[:trials], {"p99": 200})]


def assigned(trials: int) -> list[Figure]:
    """Annotated pods wait without a process; the kubelet gives each a GPU at a random moment."""
    samples: list[float] = []
    with _node() as node:
        while len(samples) < trials:
            pods = [node.add_pod(f"admitted-{k}", _WATTS) for k in range(_GPUS)]
            node.wait_for_state(pods[-1], "waiting")
            written = {}
            for number, (pod, gpu) in enumerate(zip(pods, node.gpus, strict=True)):
                time.sleep(random.uniform(0.05, 0.25))
                node.assign(pod, [number])
                written[gpu.uuid] = time.monotonic_ns()
            samples += _latencies_ms(node, written)
            _clear(node, pods)
    what = "GPU assigned to a waiting pod (checkpoint written) to limit"
    return [Figure(what, "ms", samples[:trials], {"p50": 60, "p99": 120})]


def idle(trials: int) -> list[Figure]:
    """A pod that has a GPU comes to seven more, each at any moment of a second."""
    samples: list[float] = []
    with _node() as node:
        while len(samples) < trials:
            pod = node.add_pod("worker", _WATTS, [0])
            node.wait_for_state(pod, "enforced")
            gpus = list(node.gpus)[1:]
            for _ in gpus:
                node.add_worker(pod, [])
            begin, started = time.monotonic(), {}
            moments = sorted(random.uniform(0, 1) for _ in gpus)
            for worker, gpu, moment in zip(pod.workers[1:], gpus, moments, strict=True):
                time.sleep(max(0.0, begin + moment - time.monotonic()))
                started[gpu.uuid] = _come(worker, gpu)
            samples += _latencies_ms(node, started)
            _clear(node, [pod])
    what = "first GPU process where nothing waits to limit"
    return [Figure(what, "ms", samples[:trials], {"p99": 1200})]


def _come(worker: Worker, gpu: SimGpu) -> int:
    """The process, which runs, is on the GPU from now on; the moment before, in nanoseconds."""
    before_ns = time.monotonic_ns()
    worker.hop(gpu)
    return before_ns


def _latencies_ms(node: SimNode, started_ns: Mapping[str, int]) -> list[float]:
    """From each GPU's moment to the first set of its limit after it."""

    def first_sets() -> dict[str, int]:
        return {
            record.uuid: record.monotonic_ns
            for record in reversed(node.gpus.sets())
            if record.result == 0 and record.monotonic_ns >= started_ns.get(record.uuid, 2**63)
        }

    _wait(node, lambda: len(first_sets()) == len(started_ns), "limits of all new processes")
    sets = first_sets()
    return [(sets[uuid] - moment_ns) / 1e6 for uuid, moment_ns in started_ns.items()]


def _clear(node: SimNode, pods: list[Pod]) -> None:
    """The pods and their processes go, and the GPUs are given back."""
    for pod in pods:
        node.end_workers(pod)
        node.delete_pod(pod, grace=False)
    _wait_for_all(node, node.gpus[0].default_mw // 1000)


# ---------------------------------------------------------------------- a start


def start(trials: int) -> list[Figure]:
    """Pods and their processes are there; then both programs are started at once."""
    samples = []
    with _node(start=False) as node:
        for k in range(_GPUS):
            node.add_pod(f"worker-{k}", _WATTS, [k])
        for _ in range(trials):
            before, begin_ns = len(node.gpus.sets()), time.monotonic_ns()
            node.start_enforcer()
            node.start_watcher()
            _wait_for_all(node, _WATTS)
            samples.append((node.gpus.sets()[before].monotonic_ns - begin_ns) / 1e6)
            node.stop()  # gives everything back
    return [Figure("start of both processes to first limit", "ms", samples, {"p99": 1200})]


# ---------------------------------------------------------------------- nothing changes


def steady(seconds: int) -> list[Figure]:
    """Eight pods on eight GPUs, a scan each second, windows of a second; then with probes."""
    seen: dict[str, list[float]] = {}
    with _node() as node:
        _a_pod_on_each(node)
        time.sleep(_SETTLE_S)
        before, at_s = _reading(node), time.monotonic()
        for _ in range(seconds):
            time.sleep(1)
            now, now_s = _reading(node), time.monotonic()
            for what, value in now.items():
                seen.setdefault(what, []).append(value - before[what])
            seen["cpu"][-1] *= 100 / (now_s - at_s)
            for program in ("enforcer", "watcher"):
                seen.setdefault(program, []).append(machine.resident_mib(node.pid(program)))
            before, at_s = now, now_s
        probed = _probed(node, seconds)
    return [
        Figure("resident memory, enforcer", "MiB", seen["enforcer"], {"max": 26}),
        Figure("resident memory, watcher", "MiB", seen["watcher"], {"max": 56}),
        Figure("processor, both, nothing changing", "% of a core", seen["cpu"], {"mean": 0.4}),
        Figure("processor, both and the probes", "% of a core", probed, {"mean": 0.5}),
        Figure("NVML writes, nothing changing", "a second", seen["writes"], {"max": 0}),
        Figure("API LISTs, nothing changing", "a second", seen["lists"], {"max": 0}),
        Figure("log lines, nothing changing", "a second", seen["lines"], {"max": 0}),
    ]


def _probed(node: SimNode, seconds: int) -> list[float]:
    """Percent of a core, in windows as long as the longest period of the manifest's probes."""
    asked, samples = kubelet.probes(), []
    window = max(probe.period_s for probe in asked)
    for _ in range(max(1, seconds // window)):
        before_s, began_s = _cpu_s(node), time.monotonic()
        used_s = kubelet.play(node, asked, window)
        used_s += _cpu_s(node) - before_s
        samples.append(100 * used_s / (time.monotonic() - began_s))
    return samples


def _cpu_s(node: SimNode) -> float:
    return sum(machine.cpu_s(node.pid(program)) for program in ("enforcer", "watcher"))


def _reading(node: SimNode) -> dict[str, float]:
    assert isinstance(node.api, KubeApi)
    logs = (node.folder / "logs").iterdir()
    return {
        "cpu": _cpu_s(node),
        "writes": len(node.gpus.sets()),
        "lists": node.api.count("list", resource="any"),
        "lines": sum(log.read_bytes().count(b"\n") for log in logs),
    }


# ---------------------------------------------------------------------- waiting


def _wait_for_all(node: SimNode, watts: int) -> None:
    wanted = [watts * 1000] * len(node.gpus)
    _wait(node, lambda: node.limits_mw() == wanted, f"all GPUs at {watts} W")


def _wait(node: SimNode, condition: Callable[[], bool], what: str) -> None:
    """Like the node's own, without taking the processor from what is waited for."""

    def reached() -> bool:
        if condition():
            return True
        time.sleep(_LOOK_S)
        return False

    node.wait_for(reached, what)


PARTS = {
    "change": Part("annotation changed to limit, embedded API", 200, 10, change),
    "change-real": Part("the same with a real kube-apiserver", 200, 10, change_real),
    "waiting": Part("first GPU process of a waiting pod to limit", 104, 16, waiting),
    "assigned": Part("GPU assigned to a waiting pod to limit", 104, 16, assigned),
    "idle": Part("first GPU process where nothing waits to limit", 105, 14, idle),
    "start": Part("start of both processes to first limit", 100, 5, start),
    "steady": Part("memory, processor, writes while nothing changes", 100, 10, steady),
}

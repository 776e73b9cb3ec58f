"""Runs in a pod on the node: makes the simulated GPUs, and is their driver.

A process that has SIM_GPUS=0,1 in its environment has a context on these GPUs: so a worker pod
needs nothing but that variable, as a real one needs nothing but CUDA.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path

from tests.simnode.gpus import SimGpus

NODE = Path("/node")
_LOOK_S = 0.02
# It rests several times as long as it looked: where that takes long the agent needs the processor.
_REST = 4
# Before its exec a container's process still has the runtime's environment.
_SETTLED_TICKS = 2 * os.sysconf("SC_CLK_TCK")


def prepare(count: int, model: str) -> SimGpus:
    """Library and state on the node, once."""
    library = NODE / "lib" / "libnvidia-ml.so.1"
    library.parent.mkdir(exist_ok=True)
    fresh = library.with_suffix(".new")
    shutil.copy("/simulator/libnvidia-ml.so.1", fresh)
    fresh.chmod(0o755)
    fresh.rename(library)
    state = NODE / "state"
    return SimGpus(state) if (state / "order").exists() else SimGpus(state).create(count, model)


class Driver:
    """Tells the GPUs which processes use them."""

    def __init__(self, gpus: SimGpus) -> None:
        self._gpus = list(gpus)
        self._settled: dict[int, int] = {}

    def look(self) -> None:
        living = {int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit()}
        self._settled = {pid: at for pid, at in self._settled.items() if pid in living}
        listed = {k: set(gpu.processes()) for k, gpu in enumerate(self._gpus)}
        for k, pids in listed.items():
            for pid in pids - living:
                self._gpus[k].remove_process(pid)
        for pid in living:
            for k in self._claims(pid):
                if k in listed and pid not in listed[k]:
                    self._gpus[k].add_process(pid)

    def _claims(self, pid: int) -> list[int]:
        try:
            stat = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
            if self._settled.get(pid) == int(stat[19]):
                return []
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except (OSError, IndexError):
            return []
        age = time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK") - int(stat[19])
        if age > _SETTLED_TICKS:
            self._settled[pid] = int(stat[19])
        for variable in variables:
            if variable.startswith(b"SIM_GPUS="):
                return [int(k) for k in variable[9:].split(b",") if k.isdigit()]
        return []


def main() -> None:
    driver = Driver(prepare(int(sys.argv[1]), sys.argv[2]))
    Path("/tmp/ready").touch()
    while True:
        began_s = time.monotonic()
        driver.look()
        time.sleep(max(_LOOK_S, _REST * (time.monotonic() - began_s)))


if __name__ == "__main__":
    main()

"""Faults by chance: driver, API, disk, other writers, stopped and killed programs, attackers."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tests.chaos.outside import Outside
from tests.simnode.gpus import SimGpu
from tests.simnode.kubeapi import KubeApi
from tests.simnode.node import SimNode
from tests.simnode.reachable import ROOT

NVML_CALLS = [
    *("nvmlInit", "nvmlDeviceGetCount", "nvmlDeviceGetHandleByIndex", "nvmlDeviceGetUUID"),
    *("nvmlDeviceGetName", "nvmlDeviceGetPowerManagementLimitConstraints"),
    *("nvmlDeviceGetPowerManagementDefaultLimit", "nvmlDeviceGetPowerManagementLimit"),
    *("nvmlDeviceGetEnforcedPowerLimit", "nvmlDeviceGetPowerUsage"),
    *("nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetGraphicsRunningProcesses"),
    *("nvmlDeviceGetMPSComputeRunningProcesses", "nvmlDeviceSetPowerManagementLimit"),
    "nvmlSystemGetDriverVersion",
]
# Uninitialised, invalid, unsupported, forbidden, not found, size, not loaded, time-out, lost, OS.
NVML_CODES = [1, 2, 3, 4, 6, 7, 9, 10, 13, 15, 17, 999]
_ATTACKS = ["garbage", "connections", "half_handshakes", "oversized"]


class Mishaps:
    """One at a time or several together; `clear` ends them all."""

    def __init__(self, node: SimNode, outside: Outside, chance: random.Random) -> None:
        assert isinstance(node.api, KubeApi)
        self.node, self.api, self._outside, self._chance = node, node.api, outside, chance
        self._stopped: list[int] = []
        self._attackers: list[subprocess.Popen[str]] = []
        self.done: Counter[str] = Counter()
        self.frames = 0  # sent by attackers
        self.missed_a_gpu = False

    def any(self) -> None:
        """One of them; most last until `clear`."""
        happens: Callable[[], object] = self._chance.choice(
            [
                self.nvml_error,
                self.nvml_error,
                self.nvml_slow,
                self.set_ignored,
                self.gpu_away,
                self.driver_away,
                self.api_away,
                self.api_frozen,
                self.api_refuses,
                self.api_cuts,
                self.api_forgets,
                self.disk_full,
                self.program_stopped,
                self.attack,
            ]
        )
        self._outside.calm = False
        self.done[happens.__name__] += 1
        happens()

    # -- the driver --

    def nvml_error(self) -> None:
        call, code = self._chance.choice(NVML_CALLS), self._chance.choice(NVML_CODES)
        count = self._chance.choice([None, None, 1, 3])
        if self._chance.random() < 0.3:
            self.node.gpus.fault(call, error=code, count=count)
        else:
            self._gpu().fault(call, error=code, count=count)

    def nvml_slow(self) -> None:
        delay_ms = self._chance.choice([20, 200, 1500])
        self._gpu().fault(self._chance.choice(NVML_CALLS), delay_ms=delay_ms, count=3)

    def set_ignored(self) -> None:
        self._gpu().fault("nvmlDeviceSetPowerManagementLimit", ignore=True, count=2)

    def gpu_away(self) -> None:
        self._gpu().vanish()

    def driver_away(self) -> None:
        self.node.gpus.driver_missing()

    def _gpu(self) -> SimGpu:
        return self._chance.choice(self.node.gpus.gpus)

    # -- the API --

    def api_away(self) -> None:
        self.api.go_down()

    def api_frozen(self) -> None:
        self.api.freeze()

    def api_refuses(self) -> None:
        status = self._chance.choice([401, 403, 410, 429, 500, 503])
        retry_after_s = 1 if status == 429 else None
        self.api.cut_watches()
        self.api.fail_next(self._chance.randint(1, 4), status, retry_after_s=retry_after_s)

    def api_cuts(self) -> None:
        self.api.cut_watches(mid_line=self._chance.random() < 0.5)

    def api_forgets(self) -> None:
        self.api.compact()
        self._chance.choice([self.api.expire_watches, self.api.cut_watches])()

    # -- the node --

    def disk_full(self) -> None:
        with contextlib.suppress(OSError), self._ballast.open("wb", buffering=0) as file:
            while os.path.ismount(self.node.state_dir):
                file.write(bytes(4096))

    @property
    def _ballast(self) -> Path:
        return self.node.state_dir / "ballast"

    def program_stopped(self) -> None:
        """SIGSTOP: it hangs."""
        if self.node.supervised and not self.node.programs["supervisord"].alive():
            return
        with contextlib.suppress(LookupError):
            pid = self.node.pid(self._chance.choice(["enforcer", "watcher"]))
            os.kill(pid, signal.SIGSTOP)
            self._stopped.append(pid)

    def drift(self, at: int) -> None:
        """Another writer of the host, on a GPU that is held."""
        self.done["drift"] += 1
        self.node.gpus[at].limit_mw = self._chance.randrange(605, 645) * 1000

    def attack(self) -> None:
        """Of the watcher's uid, with nothing that a decoder takes."""
        command = [sys.executable, "-m", "tests.chaos.attacker", self._chance.choice(_ATTACKS)]
        arguments = [str(self.node.watcher_uid), str(self.node.run_dir), "1.5", "1", "pod"]
        self._attackers.append(
            subprocess.Popen([*command, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        )

    # -- the end of all of them --

    def clear(self) -> None:
        for pid in self._stopped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        self._stopped.clear()
        while self._attackers:
            told, _ = self._attackers.pop().communicate()
            self.frames += int(told or 0)
        self.node.gpus.clear_faults()
        for gpu in self.node.gpus:
            if gpu.index is None:
                gpu.reappear(self._chance.choice([None, 0]))
                self.missed_a_gpu = True
        self.node.gpus.driver_present()
        self._ballast.unlink(missing_ok=True)
        self.api.clear_faults()
        self.api.come_back()
        self._outside.look()
        self._outside.calm = True

    def last(self) -> None:
        """Let them work for a moment."""
        time.sleep(self._chance.choice([0.05, 0.2, 0.5, 1.0, 3.0]))

"""The agent's main job as a short tour that checks itself, for `make run`."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from shared import __version__
from shared.messages import Gpu as GpuStatus
from shared.messages import Pod as PodStatus
from shared.powerctl.ask import UnreachableError
from shared.units import format_watts
from tests.simnode.controlplane import ControlPlane
from tests.simnode.gpus import DRIVER_VERSION
from tests.simnode.node import ANNOTATION, Pod, SimNode
from tests.waiting import HANG_S, NotInTimeError

GPUS, MODEL = 4, "H100"
# Drift is noticed when limits are read back; every 15 s by default is long for a tour.
SETTINGS = {"POWER_AGENT_RECONCILE_SECONDS": "1"}
_WIDTH = 76
_PAUSE_S = 0.3


class Paper:
    """What the reader sees."""

    def __init__(self) -> None:
        self._colours = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        unicode = (sys.stdout.encoding or "").lower().replace("-", "").startswith("utf")
        self._marks = ("✓", "✗") if unicode else ("ok  ", "FAIL")
        self._steps = 0

    def say(self, text: str = "") -> None:
        print(text, flush=True)

    def title(self, text: str) -> None:
        self.say(f"\n{self._paint('1', text)}")

    def step(self, text: str, command: str) -> None:
        self._steps += 1
        self.say(f"\n{self._paint('1', f'{self._steps:2}  {text}')}")
        if command:
            self.command(command)

    def command(self, command: str) -> None:
        self.say(f"    {self._paint('36', f'$ {command}')}")

    def result(self, good: bool, text: str, took_ms: float | None = None) -> None:
        mark = self._paint("32" if good else "1;31", self._marks[not good])
        took = "" if took_ms is None else f"{took_ms:9.1f} ms"
        self.say(f"    {mark} {text:{_WIDTH - 18}}{took}".rstrip())

    def _paint(self, colour: str, text: str) -> str:
        return f"\x1b[{colour}m{text}\x1b[0m" if self._colours else text


class Tour:
    """Each step: what a person does, what must follow, what the hardware says."""

    def __init__(self, node: SimNode, paper: Paper) -> None:
        self._node, self._paper = node, paper
        self._found_mw = node.limits_mw()
        self._began = time.monotonic()
        self.checks = self.failures = 0
        self.first_failure: str | None = None

    def run(self) -> bool:
        """Tells whether everything was as it must be."""
        trainer = self._asks_for_a_limit()
        self._changes(trainer)
        self._asks_too_little(trainer)
        self._shares_a_gpu(trainer)
        self._mistypes(trainer)
        self._loses_the_enforcer(trainer)
        self._loses_the_api(trainer)
        self._drifts()
        self._deletes(trainer)
        self._starts_limited()
        self._stops()
        return self._ends()

    # ------------------------------------------------------------------ the steps

    def _asks_for_a_limit(self) -> Pod:
        trainer = self._node.add_pod("trainer", gpus=[0, 1])
        self._step("Annotate a pod: its GPUs get that limit", f"{_annotate('trainer')}=350")
        since = time.monotonic_ns()
        self._node.annotate(trainer, 350)
        self._limit(since, {0: 350, 1: 350})
        self._holds("GPU 2 and 3, which no annotated pod uses, were never written", [2, 3])
        return trainer

    def _changes(self, trainer: Pod) -> None:
        self._step("Change it", f"{_annotate('trainer')}=425.5 --overwrite")
        since = time.monotonic_ns()
        self._node.annotate(trainer, 425.5)
        self._limit(since, {0: 425.5, 1: 425.5})

    def _asks_too_little(self, trainer: Pod) -> None:
        self._step(
            "Ask for less than the hardware takes: clamped",
            f"{_annotate('trainer')}=90 --overwrite",
        )
        since = time.monotonic_ns()
        self._node.annotate(trainer, 90)
        self._limit(since, {0: 200, 1: 200})
        self._state(trainer, "clamped")

    def _shares_a_gpu(self, trainer: Pod) -> None:
        self._node.annotate(trainer, 400)
        self._node.wait_for_limit(1, 400, HANG_S)
        self._step(
            "A second pod on GPU 1 asks for less: the lower limit holds",
            "kubectl apply -f batch.yaml   # annotated with 300",
        )
        since = time.monotonic_ns()
        batch = self._node.add_pod("batch", limit=300, gpus=[1])
        self._limit(since, {1: 300})
        self._check("GPU 0 still at 400 W", lambda: self._node.limit_mw(0) == 400_000)
        self._state(trainer, "conflict")
        self._command("kubectl delete pod batch")
        since = time.monotonic_ns()
        self._node.delete_pod(batch)
        self._limit(since, {1: 400})

    def _mistypes(self, trainer: Pod) -> None:
        self._step(
            "A value that cannot be read changes nothing",
            f"{_annotate('trainer')}=350W --overwrite",
        )
        self._node.annotate(trainer, "350W")
        self._state(trainer, "invalid")
        self._check("both GPUs still at 400 W", lambda: self._node.limits_mw()[:2] == [400_000] * 2)

    def _loses_the_enforcer(self, trainer: Pod) -> None:
        pid = self._node.pid("enforcer")
        self._step("Kill the enforcer, ask for another limit meanwhile", f"kill -9 {pid}")
        self._command(f"{_annotate('trainer')}=320 --overwrite")
        since = time.monotonic_ns()
        killed = self._node.kill_enforcer()
        self._node.annotate(trainer, 320)
        self._check("limits hold in the hardware", lambda: self._node.limit_mw(0) == 400_000)
        self._check("supervisord started it again", lambda: self._enforcer_pid() not in (0, killed))
        self._limit(since, {0: 320, 1: 320})
        self._check(
            "it still knows what it found: "
            + ", ".join(f"GPU {k} {format_watts(self._found_mw[k])} W" for k in (0, 1)),
            lambda: (
                self._originals() == {self._node.gpus[k].uuid: self._found_mw[k] for k in (0, 1)}
            ),
        )

    def _loses_the_api(self, trainer: Pod) -> None:
        self._step("The Kubernetes API goes away, a worker restarts, the API comes back", "")
        with self._node.api_outage():
            writes = len(self._node.gpus.sets())
            self._node.restart_worker(trainer, [0, 1])
            self._check("a worker that restarts keeps its limit", lambda: self._sees(trainer))
            self._check("nothing was written", lambda: len(self._node.gpus.sets()) == writes)
        self._command(f"{_annotate('trainer')}=360 --overwrite   # as soon as it is back")
        since = time.monotonic_ns()
        self._node.annotate(trainer, 360)
        self._limit(since, {0: 360, 1: 360})

    def _drifts(self) -> None:
        self._step("Somebody else raises a limit: mended", "nvidia-smi -i 0 -pl 700")
        since = time.monotonic_ns()
        self._node.gpus[0].limit_mw = 700_000
        self._limit(since, {0: 360})

    def _deletes(self, trainer: Pod) -> None:
        self._step("Delete the pod: its GPUs are given back as found", "kubectl delete pod trainer")
        since = time.monotonic_ns()
        self._node.delete_pod(trainer)
        self._limit(since, {k: self._found_mw[k] / 1000 for k in (0, 1)})

    def _starts_limited(self) -> None:
        worker = self._node.add_pod("worker", limit=280)
        self._step(
            "A pod is assigned GPU 2: the limit stands, then its process starts",
            "kubectl apply -f worker.yaml   # annotated with 280, nvidia.com/gpu: 1",
        )
        since = time.monotonic_ns()
        self._node.assign(worker, [2])
        self._limit(since, {2: 280})
        self._state(worker, "enforced")
        self._node.add_worker(worker, [2])
        self._command("kubectl delete pod worker   # the kubelet still names it")
        since = time.monotonic_ns()
        self._node.delete_pod(worker)
        self._limit(since, {2: self._found_mw[2] / 1000})

    def _stops(self) -> None:
        server = self._node.add_pod("server", limit=500, gpus=[2])
        self._node.wait_for_limit(2, 500, HANG_S)
        self._step("End the agent while a pod has a limit", "kubectl delete ds power-agent")
        since = time.monotonic_ns()
        statuses = self._node.stop()
        self._limit(since, {2: self._found_mw[2] / 1000})
        self._check(
            f"exit status {', '.join(map(str, statuses.values()))}",
            lambda: set(statuses.values()) == {0},
        )
        self._node.delete_pod(server)

    def _ends(self) -> bool:
        self._paper.title("    Everything as found")
        now = ", ".join(f"{format_watts(limit)} W" for limit in self._node.limits_mw())
        self._check(f"GPU 0 to {GPUS - 1}: {now}", lambda: self._node.limits_mw() == self._found_mw)
        self._holds("GPU 3 was never written", [3])
        took_s = time.monotonic() - self._began
        good = self.failures == 0
        text = f"all {self.checks} checks" if good else f"{self.failures} of {self.checks} failed"
        self._paper.say()
        self._paper.result(good, f"{text}, {took_s:.0f} s")
        if self.first_failure:
            self._paper.say(f"\nThe first failure:\n{self.first_failure}")
        return good

    # ------------------------------------------------------------------ checking

    def _step(self, title: str, command: str) -> None:
        # For the reader, and because two writes to one GPU are a tenth of a second apart at least.
        time.sleep(_PAUSE_S)
        self._paper.step(title, command)

    def _command(self, command: str) -> None:
        self._paper.command(command)

    def _check(
        self,
        what: str,
        condition: Callable[[], object],
        took_ms: Callable[[], float | None] = lambda: None,
    ) -> None:
        self.checks += 1
        try:
            self._node.wait_for(condition, what, HANG_S)
        except NotInTimeError as error:
            self.failures += 1
            self.first_failure = self.first_failure or str(error)
            self._paper.result(False, f"{what}: not within {HANG_S:g} s")
        else:
            self._paper.result(True, what, took_ms())

    def _limit(self, since_ns: int, wanted: dict[int, float]) -> None:
        """Read back from the hardware; the time is that of the set, from the log of all sets."""
        watts = {f"{limit:g}" for limit in wanted.values()}
        if len(watts) == 1:
            what = f"GPU {' and '.join(map(str, wanted))} at {watts.pop()} W"
        else:
            what = ", ".join(f"GPU {k} at {limit:g} W" for k, limit in wanted.items())
        self._check(
            what,
            lambda: all(self._node.limit_mw(k) == w * 1000 for k, w in wanted.items()),
            lambda: self._took_ms(since_ns, wanted),
        )

    def _took_ms(self, since_ns: int, wanted: dict[int, float]) -> float | None:
        last = [
            set_.monotonic_ns
            for k, watts in wanted.items()
            for set_ in self._node.gpus[k].sets()
            if set_.result == 0 and set_.requested_mw == watts * 1000
            if set_.monotonic_ns >= since_ns
        ]
        return (max(last) - since_ns) / 1e6 if last else None

    def _state(self, pod: Pod, state: str) -> None:
        def is_so() -> bool:
            return any(p.uid == pod.uid and p.state == state for p in self._pods())

        self._check(f"powerctl says: {state}", is_so)
        for told in self._pods():
            if told.uid == pod.uid:
                self._paper.say(f"      {self._named(told.reason)}")

    def _named(self, text: str) -> str:
        for pod in self._node.pods.values():
            text = text.replace(pod.uid, pod.name)
        return text

    def _pods(self) -> Sequence[PodStatus]:
        with contextlib.suppress(UnreachableError):
            return self._node.status(2.0).pods
        return ()

    def _sees(self, pod: Pod) -> bool:
        """The enforcer has noticed the new process, and left the limits alone."""
        worker = pod.workers[0].pid
        seen = [g for g in self._gpus() if worker in [process.pid for process in g.processes]]
        return len(seen) == 2 and self._node.limits_mw()[:2] == [320_000] * 2

    def _enforcer_pid(self) -> int:
        with contextlib.suppress(UnreachableError):
            return self._node.status(0.5).enforcer.pid
        return 0

    def _gpus(self) -> Sequence[GpuStatus]:
        with contextlib.suppress(UnreachableError):
            return self._node.status(2.0).gpus
        return ()

    def _originals(self) -> dict[str, int | None]:
        return {gpu.uuid: gpu.original_mw for gpu in self._gpus() if gpu.managed}

    def _holds(self, what: str, gpus: list[int]) -> None:
        self._check(what, lambda: not any(self._node.gpus[k].sets() for k in gpus))


def _annotate(pod: str) -> str:
    return f"kubectl annotate pod {pod} {ANNOTATION}"


@contextlib.contextmanager
def node_for_tour() -> Iterator[SimNode]:
    """Somebody had lowered GPU 1 before: that is what must be there again at the end."""
    node = SimNode(gpus=GPUS, model=MODEL, supervised=True, start=False, settings=SETTINGS)
    with node:
        node.gpus[1].limit_mw = 650_000
        node.start()
        yield node


def introduce(node: SimNode, paper: Paper) -> None:
    """What is real here and what is not."""
    kind = "a real kube-apiserver" if isinstance(node.api, ControlPlane) else "an embedded API"
    names = {gpu.name for gpu in node.gpus}
    root = os.geteuid() == 0
    paper.title(f"Power Agent {__version__} on a simulated node")
    paper.say(
        f"    GPUs        {len(node.gpus)} x {', '.join(names)}, simulated NVML {DRIVER_VERSION}"
    )
    paper.say(f"    Kubernetes  {kind} at {node.api.url}")
    users = f"enforcer as uid 0, watcher as uid {node.watcher_uid}" if root else "all as this user"
    paper.say(f"    agent       under supervisord, {users}")
    paper.say(f"    workers     real processes, {node.place.described}")
    paper.say(f"    metrics     {node.metrics_url or 'off'}")
    paper.say(f"    log         {node.log_file}")
    paper.say(f"    ledger      {node.state_dir}")

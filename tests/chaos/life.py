"""The life of a node's pods by chance: annotated, changed, restarted, moved, deleted."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

from tests.chaos.outside import HIGH_W, LOW_W, Outside
from tests.chaos.witness import View
from tests.simnode.node import Pod, SimNode
from tests.simnode.workloads import Worker

_UNUSABLE = ("much", "350W", "-1", "0", "1e3", "", "３５０", "NaN", "100001")
_MOST_PODS = 6


class Life:
    """Does one thing at a time, seen from outside before and after."""

    def __init__(self, node: SimNode, outside: Outside, chance: random.Random) -> None:
        self.node, self._outside, self._chance = node, outside, chance
        self.pods: list[Pod] = []
        self._ghosts: list[Pod] = []  # deleted by force, their workers live on
        self._guests: list[Worker] = []  # of the host
        self._born = 0
        self.done: Counter[str] = Counter()

    # -- what may happen --

    def step(self) -> None:
        """One thing, chosen by chance."""
        choices: list[tuple[int, Callable[[], None]]] = [(1, self.host_comes)]
        if len(self.pods) < _MOST_PODS:
            choices.append((3, self.born))
        if self.pods:
            choices += [
                (6, self.annotate),
                (1, self.annotate_unusable),
                (2, self.unannotate),
                (2, self.restart),
                (2, self.hop),
                (2, self.delete),
                (1, self.delete_by_force),
            ]
        if self._guests:
            choices.append((1, self.host_goes))
        weights, steps = zip(*choices, strict=True)
        chosen = self._chance.choices(steps, weights)[0]
        self.done[chosen.__name__] += 1
        with self._outside.lock:
            self._outside.look()
            chosen()
            self._outside.look()

    def _limit(self) -> str:
        """Now and then outside the bounds; never one that a GPU was found with."""
        watts = self._chance.randrange(LOW_W - 60, HIGH_W + 40)
        return f"{watts}{self._chance.choice(['', '.5', '.125'])}"

    def _some_gpus(self) -> list[int]:
        count = len(self.node.gpus)
        return self._chance.sample(range(count), self._chance.choice([1, 1, min(2, count)]))

    def born(self) -> None:
        self._born += 1
        name = f"pod-{self._born}"
        self._outside.names.add(("default", name))
        limit = self._chance.choice([None, self._limit(), self._limit()])
        static = self._chance.random() < 0.15
        self.pods.append(self.node.add_pod(name, limit, self._some_gpus(), static=static))

    def annotate(self) -> None:
        self.node.annotate(self._chance.choice(self.pods), self._limit())

    def annotate_unusable(self) -> None:
        self.node.annotate(self._chance.choice(self.pods), self._chance.choice(_UNUSABLE))

    def unannotate(self) -> None:
        self.node.annotate(self._chance.choice(self.pods), None)

    def restart(self) -> None:
        pod = self._chance.choice(self.pods)
        self.node.end_workers(pod)
        self._outside.look()
        self.node.add_worker(pod, self._some_gpus())

    def hop(self) -> None:
        pod = self._chance.choice(self.pods)
        for worker in pod.workers:
            worker.hop(*(self.node.gpus[number] for number in self._some_gpus()))

    def delete(self) -> None:
        pod = self._take()
        self.node.delete_pod(pod)

    def delete_by_force(self) -> None:
        pod = self._take()
        self.node.delete_pod(pod, grace=False)
        self._ghosts.append(pod)

    def _take(self) -> Pod:
        return self.pods.pop(self._chance.randrange(len(self.pods)))

    def host_comes(self) -> None:
        gpu = self.node.gpus[self._some_gpus()[0]]
        self._guests.append(self.node.workers.of_host([gpu]))

    def host_goes(self) -> None:
        self._guests.pop(self._chance.randrange(len(self._guests))).end()

    # -- an end that has only one right outcome --

    def settle(self) -> View:
        """Each pod has a worker and a wish that can be read or none; what is gone is gone.

        An idle GPU is kept for a pod that was on it, if that was noticed: so none stays idle.
        """
        kept = {pod.key for pod in self.pods}
        # The kubelet ends a deleted pod in its own time, and until then it still asks.
        self.node.wait_for(lambda: self._outside.only(kept), "deleted pods are gone")
        while self._ghosts:
            self.node.end_workers(self._ghosts.pop())
        for pod in self.pods:
            if not pod.workers:
                self.node.add_worker(pod, self._some_gpus())
        view = self._outside.look()
        for pod in self.pods:
            if view.asks.get(pod.uid, 0) is None:
                self.node.annotate(pod, self._limit())
        for gpu in self.node.gpus:
            if not gpu.processes():
                self._guests.append(self.node.workers.of_host([gpu]))
        return self._outside.look()

    def end(self) -> View:
        """Nobody asks for anything any more."""
        self._outside.look()
        while self.pods:
            self.node.delete_pod(self.pods.pop())
        while self._guests:
            self._guests.pop().end()
        self._outside.look()
        return self.settle()

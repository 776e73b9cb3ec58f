"""I2, I9: killed at each named step of acquire, adjust, release and shut-down, nothing is lost."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.chaos.crashpoints import ARMED, OPERATIONS, When
from tests.chaos.scale import SEED, WHOLE
from tests.node.enforcer_harness import REPOSITORY, EnforcerNode, named, pod_uid
from tests.waiting import ended, until

A, B, C = pod_uid(1), pod_uid(2), pod_uid(3)
FOUND_W = (650.0, 640.0, 630.0)  # distinct, and asked for by nobody

# What happens on the way, in this order, with two GPUs at once: how often each can be met.
_STORE = {"ledger-open": 1, "ledger-unlink": 1, "ledger-link": 1, "ledger-rename": 1}
_WRITE = {"read": 4, "set": 2, "read-back": 2, "publish": 2}
STEPS: dict[str, dict[str, int]] = {
    "acquire": {"list": 1, **_STORE, "ledger-fsync": 1, "directory-fsync": 1, **_WRITE, "reply": 1},
    "adjust": {"list": 2, **_STORE, **_WRITE, "reply": 1},
    "release": {"list": 2, **_WRITE, **_STORE, "reply": 1},
    "shut-down": {**_WRITE, **_STORE, "nvml-shutdown": 1},
}
# A second store follows the second GPU's release.
_TWICE = {("release", name): 2 for name in _STORE} | {("shut-down", name): 2 for name in _STORE}


@dataclass(frozen=True)
class Point:
    step: str
    operation: str
    when: When
    nth: int

    def __str__(self) -> str:
        return f"{self.step}-{self.when}-{self.operation}-{self.nth}"


def _points() -> Iterator[Point]:
    for step, operations in STEPS.items():
        for operation, times in operations.items():
            for nth in range(1, _TWICE.get((step, operation), times) + 1):
                yield Point(step, operation, "before", nth)
                yield Point(step, operation, "after", nth)


POINTS = list(_points())
# Those between which something lasting changes are always played, the others by chance.
_LASTING = {("set", "before"), ("set", "after"), ("ledger-rename", "after")}
_ALWAYS = [p for p in POINTS if (p.operation, p.when) in _LASTING and p.nth == 1]
_SOME = random.Random(SEED).sample([p for p in POINTS if p not in _ALWAYS], 4)
PLAYED = POINTS if WHOLE else [*_ALWAYS, *_SOME]


class CrashingNode(EnforcerNode):
    """Its enforcer dies at `point` once `arm` was called."""

    point: Point | None = None

    def spawn(self, **settings: str) -> subprocess.Popen[bytes]:
        if self.point is None:
            return super().spawn(**settings)
        arguments = [self.point.operation, self.point.when, str(self.point.nth), "enforcer"]
        environment = {"PATH": os.environ["PATH"], **self.gpus.environment(), **self.settings}
        environment |= {ARMED: str(self.folder / "armed"), **named(settings)}
        with self._log.open("ab") as log, self._errors.open("ab") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.chaos.crashpoints", *arguments],
                cwd=REPOSITORY,
                env=environment,
                stdout=log,
                stderr=errors,
            )
        self._processes.append(process)
        return process

    def arm(self) -> None:
        (self.folder / "armed").touch()

    def wish(self, pods: dict[str, float | None]) -> None:
        """Send a snapshot to an enforcer that may never answer."""
        self.revision += 1
        message = self.message(pods)
        until(lambda: self.client.send(message), "the wish is sent")

    def check_nothing_is_lost(self) -> None:
        """I2, with no enforcer alive: whatever differs from what was found is on disk."""
        for name in ("ledger.json", "ledger.previous.json"):
            path = self.state_dir / name
            if path.exists():
                json.loads(path.read_bytes())  # whole, at every instant
        owned = self.owned()
        for gpu, found_w in zip(self.gpus, FOUND_W, strict=True):
            known = owned.get(gpu.uuid)
            assert known in (None, found_w * 1000)
            assert gpu.limit_mw == found_w * 1000 or known is not None

    def check_sets(self) -> None:
        """Bounds, and only where a process of an annotated pod was: never on the third GPU."""
        hands_off = self.gpus[2].uuid
        for record in self.gpus.sets():
            assert record.uuid != hands_off, record
            assert record.requested_mw in {300_000, 310_000, 400_000, 410_000, 650_000, 640_000}


def play(node: CrashingNode, point: Point) -> None:
    """From before the step to the crash in it, from there to the end without a crash."""
    before: dict[str, float | None] = {A: 300, B: 310}
    changed: dict[str, dict[str, float | None]] = {"adjust": {A: 400, B: 410}, "release": {}}
    after = changed.get(point.step, before)
    for gpu, found_w in zip(node.gpus, FOUND_W, strict=True):
        gpu.limit_mw = round(found_w * 1000)
    pids = [node.run_pod(A, 0), node.run_pod(B, 1)]
    node.run_host(2)
    node.point = point
    node.start()
    node.snapshot({} if point.step == "acquire" else before)
    if point.step == "release":
        while pids:
            node.end(pids.pop())
        node.looks()
    node.arm()
    assert node.process is not None
    if point.step == "shut-down":
        node.process.terminate()
    else:
        node.wish(after)
    assert ended(node.process) == -signal.SIGKILL, "it went on: the step lacks that operation"
    node.check_nothing_is_lost()
    node.point = None
    node.start()
    node.snapshot(after)
    want_w = [limit or found for limit, found in zip(after.values(), FOUND_W, strict=False)]
    for number, watts in enumerate(want_w or FOUND_W):
        node.wait_limit(watts, number)
    node.looks()
    node.check_nothing_is_lost()
    while pids:
        node.end(pids.pop())
    node.snapshot({})
    for number, watts in enumerate(FOUND_W):
        node.wait_limit(watts, number)
    until(lambda: node.owned() == {}, "the ledger is empty")
    node.check_sets()


def test_every_operation_is_met() -> None:
    assert {point.operation for point in POINTS} == set(OPERATIONS)
    assert {p.operation for p in POINTS if p.step == "acquire"} >= {"ledger-fsync", "set"}


@pytest.mark.parametrize("point", PLAYED, ids=str)
def test_killed_at_a_named_point_ends_as_without(point: Point) -> None:
    node = CrashingNode(gpus=3)
    with node:
        play(node, point)


def test_i1_killed_between_giving_back_and_its_entry_a_stranger_is_not_limited() -> None:
    """Released on the hardware, still in the ledger: the next start must not write it again.

    Here the watcher is away (or its API server is), so that may last; a stranger has the GPU.
    """
    node = CrashingNode(gpus=3)
    with node:
        node.gpus[0].limit_mw = 650_000
        node.point = Point("release", "set", "after", 1)
        pid = node.run_pod(A)
        node.start()
        node.snapshot({A: 300})
        node.end(pid)
        node.looks()
        node.arm()
        node.wish({})
        assert node.process is not None
        assert ended(node.process) == -signal.SIGKILL
        assert node.limit() == 650
        node.point = None
        node.run_host(0)
        sets = node.writes()
        node.start()
        node.looks(5)
        assert node.limit() == 650
        assert node.writes() == sets

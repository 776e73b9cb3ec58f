"""Hours of a node's life with faults and kills, judged the whole time from outside.

`python -m tests.chaos.soak --minutes 20 --seed 1`. A judge looks at the hardware, the processes
and the annotations ten times a second, and never asks the agent.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from shared.powerctl.ask import UnreachableError
from tests.chaos.life import Life
from tests.chaos.mishaps import Mishaps
from tests.chaos.outside import BOUNDS, Outside
from tests.chaos.witness import View, expected_mw
from tests.simnode.kubeapi import KubeApi
from tests.simnode.node import SimNode
from tests.waiting import NotInTimeError

SETTINGS = {"POWER_AGENT_SCAN_SECONDS": "0.2", "POWER_AGENT_RECONCILE_SECONDS": "1", **BOUNDS}
SETTLED_S = 120.0  # backoffs of thirty seconds, of three parties
LEG_S = 240.0  # then another node, of the other kind
LOOK_S = 0.1
_IN_A_NAMESPACE = "--in-a-mount-namespace"


@dataclass
class Tally:
    """What was done and found, over all legs."""

    rounds: int = 0
    legs: Counter[str] = field(default_factory=Counter)
    kills: Counter[str] = field(default_factory=Counter)
    life: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    seen: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0
    violations: list[str] = field(default_factory=list)

    def table(self, minutes: float) -> str:
        rows: list[tuple[str, object]] = [
            ("minutes", f"{minutes:.1f}"),
            ("rounds that ended in the one right state", self.rounds),
            ("slowest return to it", f"{self.slowest_s:.1f} s"),
        ]
        for title, counter in (
            ("legs", self.legs),
            ("kill -9", self.kills),
            ("pods' life", self.life),
            ("faults", self.faults),
            ("seen", self.seen),
        ):
            rows.append((title, sum(counter.values()) if title != "seen" else ""))
            rows += [(f"  {name}", count) for name, count in sorted(counter.items())]
        rows.append(("invariants violated", len(self.violations)))
        return "\n".join(f"{name:42} {value}" for name, value in rows)


class Judge(threading.Thread):
    """Looks from outside the whole time, whatever happens."""

    def __init__(self, outside: Outside) -> None:
        super().__init__(name="judge", daemon=True)
        self._outside, self._end = outside, threading.Event()
        self.violations: list[str] = []
        self.looks = 0

    def run(self) -> None:
        while not self._end.wait(LOOK_S):
            with self._outside.lock:
                self._outside.look()
                self.violations += self._outside.wrong()
                self.violations += [f"original lost: {lost}" for lost in self._outside.lost()]
            self.looks += 1

    def end(self) -> None:
        self._end.set()
        self.join()


class Leg:
    """One node from its start to a clean end."""

    def __init__(self, node: SimNode, chance: random.Random, tally: Tally) -> None:
        self.node, self._chance, self._tally = node, chance, tally
        self.outside = Outside(node)
        self.life = Life(node, self.outside, chance)
        self.mishaps = Mishaps(node, self.outside, chance)
        self.judge = Judge(self.outside)

    def round(self) -> None:
        """Life amid faults and kills; then all is well again, and so is the node."""
        for _ in range(self._chance.randint(1, 3)):
            for _ in range(self._chance.choice([0, 0, 1, 1, 2])):
                self.mishaps.any()
            for _ in range(self._chance.randint(0, 3)):
                self.life.step()
            if self._chance.random() < 0.6:
                self._kill()
            self.mishaps.last()
        self.mishaps.clear()
        self._start_what_is_down()
        # test_a_gpu_that_was_away_at_the_start_is_found_when_it_comes is expected to fail.
        if self.mishaps.missed_a_gpu:
            self.mishaps.missed_a_gpu = False
            with contextlib.suppress(LookupError):
                self.node.kill_enforcer()
            self._start_what_is_down()
        view = self.settled()
        self._drift(view)
        self._tally.rounds += 1

    def _kill(self) -> None:
        self.outside.calm = False
        names = ["enforcer", "watcher", *["supervisord"] * self.node.supervised]
        for name in self._chance.sample(names, self._chance.choice([1, 1, 2])):
            with contextlib.suppress(LookupError):
                if self.node.programs["supervisord"].alive() or not self.node.supervised:
                    self.outside.kill(name)
                    self._tally.kills[name] += 1
        if self._chance.random() < 0.7:
            time.sleep(self._chance.choice([0, 0.01, 0.1, 1.0]))
            self._start_what_is_down()

    def _start_what_is_down(self) -> None:
        for name in ["supervisord"] if self.node.supervised else ["enforcer", "watcher"]:
            if not self.node.programs[name].alive():
                self.node.programs[name].start()

    def settled(self) -> View:
        """Wait for the one right state."""
        view, began_s = self.life.settle(), time.monotonic()
        self.outside.wait_until_settled(view, SETTLED_S)
        assert not self.judge.violations, self.judge.violations
        self._tally.slowest_s = max(self._tally.slowest_s, time.monotonic() - began_s)
        self._count_snapshots()
        return view

    def _drift(self, view: View) -> None:
        """Another writer changes what is held, and only that is mended."""
        boards = self.outside.boards
        held = [k for k, b in enumerate(boards) if expected_mw(b, view) != b.found_mw]
        if held and self._chance.random() < 0.5:
            self.mishaps.drift(self._chance.choice(held))
            self.outside.wait_until_settled(view, SETTLED_S)

    def _count_snapshots(self) -> None:
        with contextlib.suppress(UnreachableError):
            counters = self.node.status(2.0).counters
            self._tally.seen["snapshots taken, at least"] += counters.snapshots
            self._tally.seen["messages refused, at least"] += counters.malformed

    def end(self) -> None:
        """SIGTERM gives every GPU back."""
        self.settled()
        self.life.end()
        self.settled()
        assert self.node.limits_mw() == [board.found_mw for board in self.outside.boards]
        self.node.stop()
        assert self.node.limits_mw() == [board.found_mw for board in self.outside.boards]
        assert self.outside.owned() == {}

    def count(self) -> None:
        """Add what happened to the tally."""
        records = self.node.gpus.sets()
        tally, api = self._tally, self.node.api
        assert isinstance(api, KubeApi)
        tally.life += self.life.done
        tally.faults += self.mishaps.done
        tally.seen["looks from outside"] += self.judge.looks
        tally.seen["frames and connections of attackers"] += self.mishaps.frames
        tally.seen["sets"] += sum(record.result == 0 for record in records)
        tally.seen["sets that were refused"] += sum(record.result != 0 for record in records)
        tally.seen["times NVML was opened"] += len(self.node.gpus.inits())
        tally.seen["API requests"] += api.count()
        tally.violations += self.judge.violations


@contextmanager
def small_disk(node: SimNode) -> Iterator[None]:
    """The ledger on a file system that can be full, where mounting is allowed."""
    node.state_dir.mkdir(mode=0o700)
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k,mode=700", "tmpfs", str(node.state_dir)]
    mounted = os.geteuid() == 0 and subprocess.run(mount, check=False).returncode == 0
    try:
        yield
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(node.state_dir)], check=True)


def play(seed: int, until_s: float, supervised: bool, tally: Tally) -> None:
    """One leg, up to that moment."""
    options = {"gpus": 4, "real_api": False, "start": False, "settings": SETTINGS}
    with SimNode(supervised=supervised, **options) as node, small_disk(node):  # type: ignore[arg-type]
        leg = Leg(node, random.Random(seed), tally)
        tally.legs["supervised" if supervised else "two processes"] += 1
        node.start()
        leg.judge.start()
        try:
            while time.monotonic() < until_s:
                leg.round()
            leg.end()
        except NotInTimeError as error:
            tally.violations.append(str(error))
        except AssertionError as error:
            tally.violations.append(f"{error}\n{node.explain()}")
        finally:
            leg.mishaps.clear()
            leg.judge.end()
            leg.count()


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="tests.chaos.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(_IN_A_NAMESPACE, action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if os.geteuid() == 0 and not chosen.in_a_mount_namespace:  # so that no mount outlives it
        again = [sys.executable, "-m", "tests.chaos.soak", *sys.argv[1:], _IN_A_NAMESPACE]
        os.execvp("unshare", ["unshare", "--mount", "--propagation", "private", *again])
    tally, began_s, leg = Tally(), time.monotonic(), 0
    end_s = began_s + chosen.minutes * 60
    while time.monotonic() < end_s and not tally.violations:
        until_s = min(end_s, time.monotonic() + LEG_S)
        play(chosen.seed + leg, until_s, leg % 2 == 1, tally)
        leg += 1
        minutes = (time.monotonic() - began_s) / 60
        print(f"{minutes:6.1f} min, leg {leg}: {tally.rounds} rounds so far", flush=True)
    print(tally.table((time.monotonic() - began_s) / 60))
    for violation in tally.violations:
        print(f"--- violated\n{violation}")
    return bool(tally.violations)


if __name__ == "__main__":
    sys.exit(main())

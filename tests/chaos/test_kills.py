"""I9: kill -9 of the programs at random moments of the pods' life, and all is as without."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.chaos.life import Life
from tests.chaos.outside import BOUNDS, Outside
from tests.chaos.scale import ROUNDS, SEED
from tests.simnode.node import FAST, SimNode
from tests.waiting import HANG_S

# Supervisord waits longer and longer for a program that is killed again and again.
SETTLED_S = 2 * HANG_S
PROGRAMS = ["enforcer", "watcher"]


class Killing:
    """Rounds on one node: life, a kill, life without, and a state that has one right outcome."""

    def __init__(self, node: SimNode, chance: random.Random) -> None:
        self.node, self._chance = node, chance
        self.outside = Outside(node)
        self.life = Life(node, self.outside, chance)

    def round(self) -> None:
        for _ in range(self._chance.randint(1, 4)):
            self.life.step()
            self._moment()
        if self.node.supervised:
            self._kill_supervised()
        else:
            self._kill_and_start()
        self.settled()

    def _moment(self) -> None:
        time.sleep(self._chance.choice([0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3]))  # the input here

    def _victims(self) -> list[str]:
        return self._chance.sample(PROGRAMS, self._chance.choice([1, 1, 2]))

    def _kill_and_start(self) -> None:
        victims = self._victims()
        for victim in victims:
            self.node.kill(victim)
        assert not self.outside.lost()
        for _ in range(self._chance.choice([0, 1, 2])):
            self.life.step()
        for victim in victims:
            self.node.programs[victim].start()
            self._moment()  # the second one may come while the first one has just begun

    def _kill_supervised(self) -> None:
        for victim in [*self._victims(), *["supervisord"] * (self._chance.random() < 0.3)]:
            with contextlib.suppress(LookupError):  # it waits for its next start
                self.outside.kill(victim)
        self.life.step()
        if not self.node.programs["supervisord"].alive():
            assert not self.outside.lost()
            self.node.programs["supervisord"].start()

    def settled(self) -> None:
        """The right limits and ledger, and no wrong set on the way."""
        view = self.life.settle()
        self.outside.wait_until_settled(view, SETTLED_S)
        self.outside.look()
        assert self.outside.wrong() == []

    def finish(self) -> None:
        """Every GPU has what it was found with."""
        self.life.end()
        self.settled()
        assert self.node.limits_mw() == [board.found_mw for board in self.outside.boards]


@contextmanager
def killing(seed: int, *, supervised: bool) -> Iterator[Killing]:
    with SimNode(
        gpus=3, real_api=False, start=False, supervised=supervised, settings=FAST | BOUNDS
    ) as node:
        played = Killing(node, random.Random(seed))
        node.start()
        yield played
        played.finish()
        print(f"seed {seed}: {dict(played.life.done)}, {len(node.gpus.sets())} sets")


# Half an hour's worth at most; each round takes a second or two.
@pytest.mark.timeout(180 + 20 * ROUNDS)
@pytest.mark.parametrize("supervised", [False, True], ids=["two-processes", "supervised"])
def test_kill_9_at_random_moments_ends_as_without(supervised: bool) -> None:
    rounds = ROUNDS // 2 or (3 if supervised else 7)
    with killing(SEED, supervised=supervised) as played:
        for number in range(rounds):
            try:
                played.round()
            except AssertionError as error:
                error.add_note(f"round {number} of seed {SEED}, supervised: {supervised}")
                raise

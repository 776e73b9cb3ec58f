"""The invariants as properties over random nodes: I1, I3, I4, I5, idempotence, no order matters.

Each claim is a function of one case. Hypothesis looks for a small counterexample; a seeded sweep
of many more cases, a hundred times cheaper each, for a rare one.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from enforcer.policy import (
    Decision,
    Desired,
    Link,
    Owned,
    SeenGpu,
    Stranger,
    plan,
)
from enforcer.settings import EnforcerSettings, SafeDefault
from shared.settings import parse_settings

# Few values, so that pods meet, limits coincide and bounds cut.
PODS = ("a", "b", "c")
ALIASES = ("hash-a", "hash-b")
LINKS: tuple[Link, ...] = ("living", "living", "living", "silent", "expired", "stopping")
ENDED = ("expired", "stopping")
MW = (1, 150_000, 200_000, 250_400, 300_000, 300_500, 450_000, 700_000, 900_000, 7_000_000)
OWNERS: tuple[str | Stranger, ...] = (
    *PODS,
    *PODS,
    *ALIASES,
    "stranger",
    Stranger.OTHER,
    Stranger.UNKNOWN,
)
BOARDS = ((700_000, 200_000, 700_000), (310_000, 200_000, 350_000), (62_500, 48_750, 62_500))
SWEPT = int(os.environ.get("CASES", "5000"))  # `make chaos` plays more
PLAIN = parse_settings(EnforcerSettings, {})

T = TypeVar("T")


@dataclass(frozen=True)
class Case:
    """One GPU, what is wanted and what is known."""

    desired: Desired
    gpu: SeenGpu
    owned: Owned | None
    rules: EnforcerSettings

    def decision(self) -> Decision:
        known = {} if self.owned is None else {self.gpu.uuid: self.owned}
        return plan(self.desired, [self.gpu], known, self.rules)[self.gpu.uuid]

    def uids(self) -> set[str]:
        """The pods whose processes run on the GPU, by their own uid."""
        found = {o for o in self.gpu.occupants or () if isinstance(o, str)}
        real = self.desired.pods.keys() | self.desired.others
        return {uid if uid in real else self.desired.ids.get(uid, uid) for uid in found}

    def asking(self) -> set[str]:
        return self.uids() & self.desired.pods.keys()

    def ghosts(self) -> set[str]:
        """Pods that the limit was set for, gone from the snapshot, whose processes still run."""
        mine = self.owned.pods if self.owned else frozenset()
        return (self.uids() & mine) - self.desired.pods.keys() - self.desired.others

    def asked(self, uid: str) -> int | None:
        """What a pod asks for; ten times what the board takes is a mistake of units."""
        asked_mw = self.desired.pods[uid]
        most_mw = hardware(self.gpu)[1] * 10
        return asked_mw if asked_mw is None or asked_mw < most_mw else None

    def never_told(self) -> set[str]:
        """Pods that the API should have told of, and has not."""
        known = self.desired.pods.keys() | self.desired.others
        return self.uids() - known - self.ghosts() if self.desired.whole else set()

    def is_uncertain(self) -> bool:
        occupants = self.gpu.occupants
        return occupants is None or Stranger.UNKNOWN in occupants


def hardware(gpu: SeenGpu) -> tuple[int, int]:
    """The bounds of a board, which all of these boards tell."""
    assert gpu.min_mw is not None
    assert gpu.max_mw is not None
    return gpu.min_mw, gpu.max_mw


class Maker:
    """Makes cases from choices, whoever makes those: hypothesis or a seeded generator."""

    def __init__(self, choose: Callable[[int], int]) -> None:
        self._choose = choose  # choose(n) is one of 0 .. n - 1

    def one(self, *values: T) -> T:
        return values[self._choose(len(values))]

    def some(self, values: tuple[T, ...], most: int) -> list[T]:
        return [self.one(*values) for _ in range(self._choose(most + 1))]

    def desired(self) -> Desired:
        asking = {uid: self.one(None, None, *MW) for uid in self.some(PODS, 3)}
        others = frozenset(self.some((*PODS, *ALIASES), 2)) - asking.keys()
        ids = {}
        if asking:
            ids = {alias: self.one(*asking) for alias in self.some((*ALIASES, *PODS), 2)}
        return Desired(self.one(*LINKS), asking, ids, others, self.one(True, False))

    def gpu(self, uuid: str = "GPU-0") -> SeenGpu:
        default_mw, min_mw, max_mw = self.one(*BOARDS)
        occupants = frozenset(self.some(OWNERS, 3))
        limit_mw = self.one(None, default_mw, self.limit(min_mw, max_mw))
        seen = None if self._choose(8) == 0 else occupants
        newcomers = self.one(True, False)
        return SeenGpu(uuid, seen, limit_mw, default_mw, min_mw, max_mw, newcomers)

    def limit(self, min_mw: int, max_mw: int) -> int:
        return self.one(min_mw, max_mw, *(mw for mw in MW if min_mw <= mw <= max_mw))

    def owned(self, gpu: SeenGpu) -> Owned:
        """What this or an earlier enforcer, perhaps with other bounds, wrote to `gpu`."""
        limits = self.limit(*hardware(gpu)), self.limit(*hardware(gpu))
        return Owned(*limits, frozenset([self.one(*PODS), *self.some(PODS, 2)]))

    def rules(self) -> EnforcerSettings:
        low, high = self.one(None, *MW[1:7]), self.one(None, *MW[1:])
        if low is not None and high is not None and low > high:  # an error at start
            low, high = high, low
        default = self.one(
            None, SafeDefault(limit_mw=self.one(*MW)), SafeDefault(percent=self.one(1, 50, 100))
        )
        conflict: Literal["lowest", "safe-default"] = "lowest"
        if default and self._choose(2):
            conflict = "safe-default"
        return replace(
            PLAIN,
            min_mw=low,
            max_mw=high,
            safe_default=default,
            conflict=conflict,
            release_to=self.one("original", "default"),
        )

    def case(self) -> Case:
        gpu = self.gpu()
        owned = self.one(None, self.owned(gpu))
        return Case(self.desired(), gpu, owned, self.rules())


@st.composite
def makers(draw: st.DrawFn) -> Maker:
    return Maker(lambda n: draw(st.integers(0, n - 1)))


def raised(case: Case, decision: Decision) -> bool:
    """Whether this decision gives the GPU more power than it was allowed, or gives it back."""
    if decision.action == "release":
        return True
    before_mw = case.owned.set_mw if case.owned else case.gpu.limit_mw
    if decision.action not in ("acquire", "adjust") or decision.target_mw is None:
        return False
    return before_mw is None or decision.target_mw > before_mw


# ---- the claims ----


def i1_only_where_asked(case: Case) -> None:
    decision = case.decision()
    if case.owned is None:
        assert decision.action in (None, "acquire")
        if decision.action == "acquire":
            assert case.asking()
            assert decision.pods == case.asking()
    elif decision.action == "adjust" and not case.asking():
        # Its pod's processes have left, the pod still asks, and nobody else has taken the GPU.
        assert not case.gpu.occupants or not case.gpu.newcomers
        assert case.owned.pods & case.desired.pods.keys()


def i3_no_write_leaves_the_bounds(case: Case) -> None:
    decision = case.decision()
    if decision.action in (None, "note"):
        return
    assert decision.target_mw is not None
    low_mw, high_mw = hardware(case.gpu)
    if decision.action != "release":  # what was found is given back, whatever was narrowed since
        low_mw = max(low_mw, case.rules.min_mw or 0)
        high_mw = min(high_mw, case.rules.max_mw or high_mw)
    assert low_mw <= decision.target_mw <= high_mw


def i4_up_only_on_evidence(case: Case) -> None:
    decision = case.decision()
    if not raised(case, decision) or case.desired.link in ENDED:
        return
    assert case.desired.link == "living"
    assert not case.is_uncertain()
    if case.owned is None:
        return
    assert not case.ghosts()
    asking = case.asking()
    annotated = case.owned.pods & case.desired.pods.keys()
    if decision.action == "release":
        # Taken by others, or no pod that the limit was set for asks for one any more.
        assert all(case.asked(uid) is None for uid in asking)
        assert not asking & case.owned.pods
        assert (case.gpu.occupants and case.gpu.newcomers) or not annotated
        assert not case.never_told()
    else:
        # Somebody there asks for that much, or the safe default speaks for those who cannot.
        taken = case.gpu.occupants and case.gpu.newcomers
        there = asking if taken else asking | annotated
        usable = [mw for uid in there if (mw := case.asked(uid)) is not None]
        clamped_up = max(hardware(case.gpu)[0], case.rules.min_mw or 0) == decision.target_mw
        by_default = case.rules.safe_default and not there & case.owned.pods
        assert usable or by_default or clamped_up


def i4_silence_never_raises(case: Case) -> None:
    silent = replace(case, desired=replace(case.desired, link="silent"))
    assert not raised(silent, silent.decision())


def i5_unknown_never_releases(case: Case) -> None:
    occupants = (case.gpu.occupants or frozenset()) | {Stranger.UNKNOWN}
    blurred = replace(case, gpu=replace(case.gpu, occupants=occupants))
    blind = replace(case, gpu=replace(case.gpu, occupants=None))
    for uncertain in (blurred, blind):
        if case.desired.link in ENDED:
            return
        decision = uncertain.decision()
        assert decision.state == "held"
        assert decision.action in (None, "drift")
        if case.owned is None:
            assert decision.action is None
        else:
            assert decision.target_mw == case.owned.set_mw
            assert decision.pods == case.owned.pods


def a_decision_says_what_it_does(case: Case) -> None:
    decision = case.decision()
    assert " " in decision.reason
    assert decision.action is None or decision.target_mw is not None
    if decision.action in ("acquire", "adjust", "drift", "note"):
        assert decision.state in ("managed", "held", "failed")
        assert decision.pods
    if decision.action == "release":
        assert decision.state == "free"
        assert case.owned is not None
    if decision.state == "managed":
        assert decision.pods <= case.asking() | case.ghosts() | (
            case.owned.pods if case.owned else frozenset()
        )


def applied(case: Case, decision: Decision, step_mw: int) -> Case:
    """The case after the decision was carried out on hardware that keeps steps of `step_mw`."""
    gpu, owned = case.gpu, case.owned
    if decision.action is None:
        return case
    assert decision.target_mw is not None
    if decision.action == "note":
        assert owned is not None
        return replace(case, owned=replace(owned, pods=decision.pods))
    original_mw = owned.original_mw if owned else gpu.limit_mw or hardware(gpu)[1]
    written = replace(gpu, limit_mw=decision.target_mw // step_mw * step_mw)
    if decision.action == "release":
        return replace(case, gpu=written, owned=None)
    entry = Owned(original_mw, decision.target_mw, decision.pods)
    return replace(case, gpu=written, owned=entry)


def planning_again_after_acting_yields_no_action(case: Case) -> None:
    for step_mw in (1, 100, 1000):
        once = applied(case, case.decision(), step_mw)
        again = once.decision()
        assert again.action is None
        assert applied(once, again, step_mw) == once


CLAIMS = (
    i1_only_where_asked,
    i3_no_write_leaves_the_bounds,
    i4_up_only_on_evidence,
    i4_silence_never_raises,
    i5_unknown_never_releases,
    a_decision_says_what_it_does,
    planning_again_after_acting_yields_no_action,
)


@pytest.mark.parametrize("claim", CLAIMS)
def test_property(claim: Callable[[Case], None]) -> None:
    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(makers())
    def hold(maker: Maker) -> None:
        claim(maker.case())

    hold()


@pytest.mark.parametrize("claim", CLAIMS)
def test_property_over_many_cases(claim: Callable[[Case], None]) -> None:
    seeded = random.Random(claim.__name__)
    maker = Maker(seeded.randrange)
    for _ in range(SWEPT):
        case = maker.case()
        try:
            claim(case)
        except AssertionError:
            pytest.fail(f"{claim.__name__}: {case}\n-> {case.decision()}")


def shuffled(mapping: Mapping[str, T], seeded: random.Random) -> dict[str, T]:
    items = list(mapping.items())
    seeded.shuffle(items)
    return dict(items)


def test_no_order_of_pods_gpus_or_pids_matters() -> None:
    seeded = random.Random("order")
    maker = Maker(seeded.randrange)
    for _ in range(3_000):
        desired, rules = maker.desired(), maker.rules()
        gpus = [maker.gpu(f"GPU-{number}") for number in range(1 + seeded.randrange(4))]
        known = {g.uuid: maker.owned(g) for g in gpus if seeded.randrange(2)}
        known["GPU-gone"] = Owned(700_000, 300_000, frozenset({"a"}))
        first = plan(desired, gpus, known, rules)
        assert first.keys() == {g.uuid for g in gpus} | {"GPU-gone"}

        pods, ids = shuffled(desired.pods, seeded), shuffled(desired.ids, seeded)
        mixed = replace(desired, pods=pods, ids=ids)
        seeded.shuffle(gpus)
        remade = []
        for gpu in gpus:
            pids = list(gpu.occupants or ())
            seeded.shuffle(pids)
            kept = None if gpu.occupants is None else frozenset(pids)
            remade.append(replace(gpu, occupants=kept))
        assert plan(mixed, remade, shuffled(known, seeded), rules) == first


def test_i11_no_gpu_changes_what_is_decided_for_another() -> None:
    seeded = random.Random("apart")
    maker = Maker(seeded.randrange)
    for _ in range(3_000):
        case, beside = maker.case(), maker.gpu("GPU-1")
        known = {beside.uuid: maker.owned(beside)}
        if case.owned is not None:
            known[case.gpu.uuid] = case.owned
        together = plan(case.desired, [beside, case.gpu], known, case.rules)
        assert together[case.gpu.uuid] == case.decision()

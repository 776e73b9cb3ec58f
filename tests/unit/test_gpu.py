"""What happens to a GPU: the tables at the head of enforcer/gpu.py, row by row."""

from __future__ import annotations

from dataclasses import replace

import pytest

from enforcer import gpu as one
from enforcer.device import Board, DeviceError, Facts, Reading
from enforcer.gpu import Gpu, Kind, Lost, Noted, NotEntered, Outcome, Present, Refused, Wrote
from enforcer.policy import UNDECIDED, Action, Decision

NOW = 5000.0
FACTS = Facts("H100", 700_000, 200_000, 700_000)
BOARD = Board("GPU-0", 0, object(), FACTS)
HERE = Gpu("GPU-0", where=Present(BOARD, 1, NOW - 100, Reading(700_000)), facts=FACTS)
ALREADY = 300_000


def decided(action: Action | None, target_mw: int = 300_000) -> Gpu:
    decision = Decision("managed", "asked", target_mw, frozenset({"a"}), action=action)
    return replace(HERE, decision=decision)


def refusal(name: str = "UNKNOWN", *, stale: bool = False) -> DeviceError:
    error = DeviceError(name, f"set: {name}")
    error.stale = stale
    return error


HELD = Wrote(700_000, Reading(300_000))
UNCHANGED = Wrote(700_000, Reading(700_000))
REFUSED = Refused(refusal(), "set")
LOST = Refused(refusal("GPU_IS_LOST", stale=True), "set")
UNREADABLE = NotEntered("UNREADABLE", "not taken: its present limit cannot be read")
FULL = NotEntered("LEDGER", "not taken: no space")

# action, outcome: what is told, whether something is still to be done, counted writes and failures
WRITES: dict[str, tuple[Action, Outcome, list[Kind], bool, dict[str, int], dict[str, int]]] = {
    "acquire held": ("acquire", HELD, ["limit_set"], False, {"acquire": 1}, {}),
    "adjust held": ("adjust", HELD, ["limit_set"], False, {"adjust": 1}, {}),
    "drift held": ("drift", HELD, ["limit_drifted"], False, {"drift": 1}, {}),
    "release held": ("release", HELD, ["limit_released"], False, {"release": 1}, {}),
    "it had it": ("adjust", Wrote(ALREADY, Reading(ALREADY)), [], False, {}, {}),
    "note": ("note", Noted(), [], False, {}, {}),
    "refused": ("acquire", REFUSED, ["limit_failed"], True, {}, {"UNKNOWN": 1}),
    "refused release": ("release", REFUSED, ["limit_failed"], True, {}, {"UNKNOWN": 1}),
    "taken, then unreadable": (
        "adjust",
        Refused(refusal(), "read after"),
        ["limit_failed"],
        True,
        {"adjust": 1},
        {"UNKNOWN": 1},
    ),
    "did not hold": (
        "acquire", UNCHANGED, ["limit_failed"], True, {"acquire": 1}, {"NOT_HELD": 1},
    ),
    "refused as lost": (
        "acquire", LOST, ["limit_failed", "gpu_lost"], False, {}, {"GPU_IS_LOST": 1},
    ),
    "original unreadable": ("acquire", UNREADABLE, ["limit_failed"], True, {}, {"UNREADABLE": 1}),
    "not entered": ("acquire", FULL, ["limit_failed"], True, {}, {"LEDGER": 1}),
}  # fmt: skip


@pytest.mark.parametrize("case", WRITES)
def test_what_becomes_of_a_write(case: str) -> None:
    action, outcome, kinds, pending, writes, failures = WRITES[case]
    after, told = one.after(decided(action), outcome, NOW)
    assert [happening.kind for happening in told] == kinds
    assert (after.decision.action is not None) == pending
    assert (after.writes, after.failures) == (writes, failures)
    assert (after.trouble is not None) == pending
    assert isinstance(after.where, Lost if outcome is LOST else Present)


def test_a_failure_is_told_once_and_waits_for_ever_longer() -> None:
    gpu, waits, told = decided("acquire"), [], []
    for _ in range(7):
        gpu, more = one.after(gpu, REFUSED, NOW)
        told += more
        waits.append((one.may_write_s(gpu) or 0) - NOW)
    assert waits == [1, 2, 4, 8, 16, 32, 32]
    assert len(told) == 1


def test_a_failure_for_another_reason_is_told_and_waits_anew() -> None:
    gpu, _ = one.after(one.after(decided("acquire"), REFUSED, NOW)[0], REFUSED, NOW)
    gpu, told = one.after(gpu, Refused(refusal("TIMEOUT"), "set"), NOW)
    assert [happening.why for happening in told] == ["set: TIMEOUT"]
    assert one.may_write_s(gpu) == NOW + 1


def test_a_failure_does_not_make_another_target_wait() -> None:
    gpu, _ = one.after(decided("acquire"), REFUSED, NOW)
    other = one.decided(gpu, decided("acquire", 310_000).decision)
    assert one.may_write_s(other) == NOW + one.WRITE_GAP_S


def test_after_a_set_the_next_one_waits_for_its_gap() -> None:
    gpu, _ = one.after(decided("acquire"), HELD, NOW)
    again = one.decided(gpu, decided("adjust", 310_000).decision)
    assert not one.is_ready(again, NOW + 0.09)
    assert one.is_ready(again, NOW + 0.1)
    assert one.is_ready(one.at_once(again), NOW)


@pytest.mark.parametrize("was", ["acquire", "adjust", "release"])
def test_a_refused_write_is_tried_again_as_what_it_was(was: Action) -> None:
    gpu, _ = one.after(decided(was), REFUSED, NOW)
    again = one.decided(gpu, decided("drift").decision)
    assert again.decision.action == was


def test_a_drift_to_the_same_value_is_counted_and_told_once() -> None:
    gpu, told = decided("drift"), []
    for before_mw in (650_000, 650_000, 640_000):
        gpu = replace(gpu, decision=decided("drift").decision)
        gpu, more = one.after(gpu, Wrote(before_mw, Reading(300_000)), NOW)
        told += more
    assert gpu.drifts == 3
    assert [happening.from_mw for happening in told] == [650_000, 640_000]


def test_with_nothing_left_to_do_no_trouble_is_left() -> None:
    gpu, _ = one.after(decided("acquire"), REFUSED, NOW)
    free = one.decided(gpu, Decision("free", "nobody uses it"))
    assert free.trouble is None


def test_a_dry_run_decides_and_does_nothing() -> None:
    gpu = one.decided(HERE, decided("acquire").decision, mute="dry run")
    assert one.may_write_s(gpu) is None
    assert gpu.decision.reason == "dry run, nothing is written; would be: asked"
    assert gpu.decision.target_mw == 300_000


# ---- where it is ----

UNSEEN = Gpu("GPU-0")
GONE = replace(HERE, where=Lost("not listed by NVML", None))


@pytest.mark.parametrize(
    ("gpu", "kinds"),
    [(UNSEEN, []), (HERE, []), (GONE, ["gpu_back"])],
    ids=["unseen", "present", "lost"],
)
def test_a_gpu_answers(gpu: Gpu, kinds: list[Kind]) -> None:
    found, told = one.found(gpu, BOARD, 2, NOW)
    assert isinstance(found.where, Present)
    assert found.where.session == 2
    assert [happening.kind for happening in told] == kinds


@pytest.mark.parametrize(
    ("gpu", "kinds"),
    [(UNSEEN, ["gpu_lost"]), (HERE, ["gpu_lost"]), (GONE, [])],
    ids=["unseen", "present", "lost"],
)
def test_a_gpu_does_not_answer(gpu: Gpu, kinds: list[Kind]) -> None:
    lost, told = one.lost(gpu, "gone", NOW)
    assert isinstance(lost.where, Lost)
    assert lost.where.why == "gone"
    assert [happening.kind for happening in told] == kinds
    assert lost.decision.action is None


def test_who_suffers_from_a_loss_is_not_forgotten() -> None:
    decision = replace(decided("drift").decision, stances={"a": "enforced"})
    lost, _ = one.lost(replace(HERE, decision=decision), "gone", NOW)
    assert lost.decision.stances == {"a": "enforced"}


def test_what_a_board_told_once_holds_fact_by_fact() -> None:
    less = replace(BOARD, facts=Facts(min_mw=100_000))
    found, _ = one.found(HERE, less, 2, NOW)
    assert found.facts == Facts("H100", 700_000, 100_000, 700_000)


def test_a_handle_that_became_worthless_is_not_asked_again_at_once() -> None:
    lost, _ = one.lost(HERE, "gone", NOW)
    assert not one.may_be_back(lost, 1, NOW + 0.9)
    assert one.may_be_back(lost, 1, NOW + 1)
    assert one.may_be_back(lost, 2, NOW)


def test_losses_in_a_row_are_searched_for_ever_more_seldom_and_forgotten_in_time() -> None:
    gpu, now_s, waits = HERE, NOW, []
    for _ in range(12):
        waits.append(one.search_s(gpu, now_s) - now_s)
        gpu, _ = one.lost(gpu, "gone", now_s)
        now_s += 0.5
        gpu, _ = one.found(gpu, BOARD, 2, now_s)
    assert waits[:4] == [0, 0.5, 1.5, 3.5]
    assert waits[-1] <= 600
    well_s = now_s + 601
    assert one.search_s(gpu, well_s) == well_s


def test_what_a_gpu_is_held_for_is_news_and_other_numbers_in_it_are_none() -> None:
    """A list that is not believed has another pid in its place each second."""
    lists = [f"350 W: pid {pid} cannot be, so the list is not believed" for pid in (7, 4711)]
    first, second, other = (
        replace(HERE, decision=Decision("held", why)) for why in (*lists, "350 W: UNKNOWN")
    )
    said = one.news(first).said
    assert said != HERE.said
    assert one.news(replace(second, said=said)).said == said
    assert one.news(replace(other, said=said)).said != said


def test_an_undecided_gpu_says_nothing_new() -> None:
    gpu = replace(HERE, said="managed")
    assert one.decided(gpu, UNDECIDED).said == "managed"

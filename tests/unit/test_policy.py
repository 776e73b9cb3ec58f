"""The policy, row by row and invariant by invariant; properties are in test_policy_properties."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from enforcer.policy import (
    Decision,
    Desired,
    Owned,
    SeenGpu,
    Stranger,
    plan,
)
from enforcer.settings import EnforcerSettings, SafeDefault
from shared.settings import parse_settings

A, B, C = "pod-a", "pod-b", "pod-c"
GPU = "GPU-1"
OTHER, UNKNOWN = Stranger.OTHER, Stranger.UNKNOWN
FACTORY_MW, MIN_MW, MAX_MW = 700_000, 200_000, 700_000
PLAIN = parse_settings(EnforcerSettings, {})


def seen(
    *owners: str | Stranger,
    limit_mw: int | None = FACTORY_MW,
    uuid: str = GPU,
    default_mw: int = FACTORY_MW,
    min_mw: int = MIN_MW,
    max_mw: int = MAX_MW,
) -> SeenGpu:
    """An H100 as observed, with the processes of `owners` on it."""
    return SeenGpu(uuid, frozenset(owners), limit_mw, default_mw, min_mw, max_mw)


def unreadable(limit_mw: int = FACTORY_MW) -> SeenGpu:
    return SeenGpu(GPU, None, limit_mw, FACTORY_MW, MIN_MW, MAX_MW)


def living(
    pods: Mapping[str, int | None] | None = None,
    others: tuple[str, ...] = (),
    ids: Mapping[str, str] | None = None,
) -> Desired:
    return Desired("living", pods or {}, ids or {}, frozenset(others))


def silent(desired: Desired) -> Desired:
    return replace(desired, link="silent")


def owned(set_mw: int, *pods: str, original_mw: int = FACTORY_MW) -> Owned:
    return Owned(original_mw, set_mw, frozenset(pods))


def decide(
    desired: Desired, gpu: SeenGpu, entry: Owned | None = None, rules: EnforcerSettings = PLAIN
) -> Decision:
    decisions = plan(desired, [gpu], {} if entry is None else {gpu.uuid: entry}, rules)
    assert set(decisions) == {gpu.uuid}
    assert decisions[gpu.uuid].reason
    return decisions[gpu.uuid]


def outcome(decision: Decision) -> tuple[str, int | None, str | None]:
    return decision.state, decision.target_mw, decision.action


# ---- the table ----


def test_row_one_annotated_pod_gets_its_value() -> None:
    decision = decide(living({A: 300_000}), seen(A))
    assert outcome(decision) == ("managed", 300_000, "acquire")
    assert decision.pods == {A}
    assert A in decision.reason


def test_row_one_annotated_pod_of_changed_value_is_adjusted_down_and_up() -> None:
    gpu = seen(A, limit_mw=300_000)
    down = decide(living({A: 250_000}), gpu, owned(300_000, A))
    up = decide(living({A: 600_000}), gpu, owned(300_000, A))
    assert outcome(down) == ("managed", 250_000, "adjust")
    assert outcome(up) == ("managed", 600_000, "adjust")


def test_row_one_annotated_pod_that_has_its_value_is_left_in_peace() -> None:
    decision = decide(living({A: 300_000}), seen(A, limit_mw=300_000), owned(300_000, A))
    assert outcome(decision) == ("managed", 300_000, None)


@pytest.mark.parametrize(
    ("asked_mw", "rules", "given_mw"),
    [
        pytest.param(100_000, PLAIN, MIN_MW, id="below-hardware"),
        pytest.param(900_000, PLAIN, MAX_MW, id="above-hardware"),
        pytest.param(250_000, replace(PLAIN, min_mw=350_000), 350_000, id="below-administrator"),
        pytest.param(650_000, replace(PLAIN, max_mw=500_000), 500_000, id="above-administrator"),
        pytest.param(
            100_000, replace(PLAIN, min_mw=50_000), MIN_MW, id="administrator-below-hardware"
        ),
        pytest.param(
            900_000, replace(PLAIN, max_mw=950_000), MAX_MW, id="administrator-above-hardware"
        ),
        pytest.param(400_000, replace(PLAIN, min_mw=350_000, max_mw=500_000), 400_000, id="inside"),
        pytest.param(1, PLAIN, MIN_MW, id="one-milliwatt"),
    ],
)
def test_row_one_annotated_pod_is_clamped(
    asked_mw: int, rules: EnforcerSettings, given_mw: int
) -> None:
    decision = decide(living({A: asked_mw}), seen(A), rules=rules)
    assert outcome(decision) == ("managed", given_mw, "acquire")
    assert ("clamped" in decision.reason) == (asked_mw != given_mw)


def test_clamp_rounds_inwards_on_a_board_with_fractional_watts() -> None:
    board = seen(A, limit_mw=62_500, default_mw=62_500, min_mw=48_750, max_mw=62_500)
    assert decide(living({A: 48_000}), board).target_mw == 48_750
    assert decide(living({A: 63_000}), board).target_mw == 62_500


def test_row_several_annotated_pods_lowest() -> None:
    decision = decide(living({A: 400_000, B: 300_000, C: 500_000}), seen(A, B, C))
    assert outcome(decision) == ("managed", 300_000, "acquire")
    assert decision.pods == {A, B, C}


def test_row_several_annotated_pods_lowest_ignores_unusable_values() -> None:
    assert decide(living({A: 400_000, B: None}), seen(A, B)).target_mw == 400_000


def test_row_several_annotated_pods_only_those_on_the_gpu_count() -> None:
    assert decide(living({A: 400_000, B: 300_000}), seen(A)).target_mw == 400_000


def test_row_several_annotated_pods_safe_default_where_so_configured() -> None:
    rules = replace(PLAIN, conflict="safe-default", safe_default=SafeDefault(limit_mw=250_000))
    decision = decide(living({A: 400_000, B: 300_000}), seen(A, B), rules=rules)
    assert outcome(decision) == ("managed", 250_000, "acquire")


def test_row_several_annotated_pods_that_agree_are_no_conflict() -> None:
    rules = replace(PLAIN, conflict="safe-default", safe_default=SafeDefault(limit_mw=250_000))
    gpu = seen(A, B)
    assert decide(living({A: 400_000, B: 400_000}), gpu, rules=rules).target_mw == 400_000
    # Both are clamped to the same limit, so the GPU can honour both.
    assert decide(living({A: 100_000, B: 150_000}), gpu, rules=rules).target_mw == MIN_MW


def test_safe_default_as_a_share_is_of_the_gpus_own_factory_default() -> None:
    rules = replace(PLAIN, safe_default=SafeDefault(percent=70))
    desired = living({A: None})
    assert decide(desired, seen(A), rules=rules).target_mw == 490_000
    pcie = seen(A, limit_mw=310_000, default_mw=310_000, max_mw=350_000)
    assert decide(desired, pcie, rules=rules).target_mw == 217_000


def test_safe_default_is_clamped_too() -> None:
    rules = replace(PLAIN, safe_default=SafeDefault(percent=10))
    assert decide(living({A: None}), seen(A), rules=rules).target_mw == MIN_MW


@pytest.mark.parametrize("stranger", [OTHER, B, C], ids=["host", "unannotated-pod", "unlisted-pod"])
def test_row_annotated_and_others_together_get_the_annotated_pods_value(
    stranger: str | Stranger,
) -> None:
    desired = living({A: 300_000}, others=(B,))
    assert outcome(decide(desired, seen(A, stranger))) == ("managed", 300_000, "acquire")
    kept = decide(desired, seen(A, stranger, limit_mw=300_000), owned(300_000, A))
    assert outcome(kept) == ("managed", 300_000, None)


def test_row_none_usable_keeps_the_limit_owned_for_that_pod() -> None:
    rules = replace(PLAIN, safe_default=SafeDefault(limit_mw=500_000))
    gpu = seen(A, limit_mw=300_000)
    decision = decide(living({A: None}), gpu, owned(300_000, A), rules)
    assert outcome(decision) == ("managed", 300_000, None)


def test_row_none_usable_takes_the_safe_default_else() -> None:
    rules = replace(PLAIN, safe_default=SafeDefault(limit_mw=500_000))
    assert outcome(decide(living({A: None}), seen(A), rules=rules)) == (
        "managed",
        500_000,
        "acquire",
    )


def test_row_none_usable_leaves_alone_without_a_safe_default() -> None:
    decision = decide(living({A: None}), seen(A))
    assert outcome(decision) == ("free", None, None)
    assert "unusable" in decision.reason


def test_row_none_usable_does_not_inherit_another_pods_limit() -> None:
    decision = decide(living({B: None}), seen(B, limit_mw=300_000), owned(300_000, A))
    assert outcome(decision) == ("free", FACTORY_MW, "release")


def test_row_no_live_process_owned_pod_still_in_snapshot_keeps() -> None:
    decision = decide(living({A: 300_000}), seen(limit_mw=300_000), owned(300_000, A))
    assert outcome(decision) == ("managed", 300_000, None)
    assert decision.pods == {A}


def test_row_no_live_process_owned_unusable_now_keeps() -> None:
    decision = decide(living({A: None}), seen(limit_mw=300_000), owned(300_000, A))
    assert outcome(decision) == ("managed", 300_000, None)


def test_row_no_live_process_not_owned_is_left_alone() -> None:
    assert outcome(decide(living({A: 300_000}), seen())) == ("free", None, None)


@pytest.mark.parametrize("takers", [(OTHER,), (B,), (OTHER, B)])
def test_row_only_others_processes_owned_gives_back(takers: tuple[str | Stranger, ...]) -> None:
    desired = living({A: 300_000}, others=(B,))
    decision = decide(desired, seen(*takers, limit_mw=300_000), owned(300_000, A))
    assert outcome(decision) == ("free", FACTORY_MW, "release")


@pytest.mark.parametrize("neighbours", [(OTHER,), (B,), (OTHER, B)])
def test_row_only_those_that_ran_beside_keep_it(neighbours: tuple[str | Stranger, ...]) -> None:
    here = replace(seen(*neighbours, limit_mw=300_000), newcomers=False)
    decision = decide(living({A: 300_000}, others=(B,)), here, owned(300_000, A))
    assert outcome(decision) == ("managed", 300_000, None)
    assert decision.neighbours
    gone = decide(living({}, others=(B,)), here, owned(300_000, A))
    assert outcome(gone) == ("free", FACTORY_MW, "release")


# ---------------------------------------------------------------- a pod that the API never told of


def test_a_pod_that_the_api_never_told_of_does_not_take_a_gpu() -> None:
    for desired in (living({A: 300_000}), living({}), living({}, others=(A,))):
        decision = decide(desired, seen(C, limit_mw=300_000), owned(300_000, A))
        assert outcome(decision) == ("held", 300_000, None)
        assert f"never told of pod {C}" in decision.reason


def test_of_one_namespace_it_cannot_be_known_so_it_is_another_namespaces() -> None:
    desired = replace(living({A: 300_000}), whole=False)
    decision = decide(desired, seen(C, limit_mw=300_000), owned(300_000, A))
    assert outcome(decision) == ("free", FACTORY_MW, "release")


def test_beside_such_a_pod_a_limit_is_set_and_lowered_but_not_raised() -> None:
    desired, here = living({A: 300_000}), seen(A, C, limit_mw=700_000)
    assert outcome(decide(desired, here)) == ("managed", 300_000, "acquire")
    here = seen(A, C, limit_mw=400_000)
    assert outcome(decide(desired, here, owned(400_000, A))) == ("managed", 300_000, "adjust")
    here = seen(A, C, limit_mw=250_000)
    assert outcome(decide(desired, here, owned(250_000, A)))[0] == "held"


def test_a_gpu_that_is_not_owned_is_free_whoever_runs_on_it() -> None:
    decision = decide(living({A: 300_000}), seen(C))
    assert outcome(decision) == ("free", None, None)
    assert f"never told of pod {C}" in decision.reason


# ---------------------------------------------------------------- a mistake of units


@pytest.mark.parametrize(
    ("asked_mw", "stance"),
    [(FACTORY_MW * 10 - 1, "clamped"), (FACTORY_MW * 10, "invalid"), (70_000_000, "invalid")],
)
def test_ten_times_what_the_board_takes_is_a_mistake_of_units(asked_mw: int, stance: str) -> None:
    decision = decide(living({A: asked_mw}), seen(A))
    assert decision.stances == {A: stance}
    rules = replace(PLAIN, safe_default=SafeDefault(limit_mw=asked_mw))
    by_default = decide(living({A: None}), seen(A), rules=rules)
    assert by_default.state == ("managed" if stance == "clamped" else "failed")
    assert (decision.target_mw is None) == (stance == "invalid")


def test_a_mistake_of_units_is_like_an_annotation_that_says_nothing() -> None:
    desired = living({A: 70_000_000})
    decision = decide(desired, seen(A, limit_mw=300_000), owned(300_000, A))
    assert outcome(decision) == ("managed", 300_000, None)
    desired = living({A: 70_000_000, B: 350_000})
    decision = decide(desired, seen(A, B))
    assert outcome(decision) == ("managed", 350_000, "acquire")
    assert decision.stances == {A: "invalid", B: "enforced"}


def test_row_another_annotated_pod_took_the_gpu_gets_its_own_value() -> None:
    desired = living({A: 300_000, B: 600_000})
    decision = decide(desired, seen(B, limit_mw=300_000), owned(300_000, A))
    assert outcome(decision) == ("managed", 600_000, "adjust")
    assert decision.pods == {B}


@pytest.mark.parametrize("owners", [(), (A,), (A, OTHER)], ids=["idle", "running", "shared"])
def test_row_pod_exists_without_the_annotation_gives_back(owners: tuple[str | Stranger]) -> None:
    decision = decide(living({}, others=(A,)), seen(*owners, limit_mw=300_000), owned(300_000, A))
    assert outcome(decision) == ("free", FACTORY_MW, "release")


def test_row_pod_gone_and_no_process_left_gives_back() -> None:
    decision = decide(living({B: 300_000}), seen(limit_mw=300_000), owned(300_000, A))
    assert outcome(decision) == ("free", FACTORY_MW, "release")


@pytest.mark.parametrize("others", [(), (OTHER,), (B,)])
def test_row_pod_gone_but_processes_run_holds(others: tuple[str | Stranger, ...]) -> None:
    desired = living({}, others=(B,))
    decision = decide(desired, seen(A, *others, limit_mw=300_000), owned(300_000, A))
    assert outcome(decision) == ("held", 300_000, None)
    assert decision.pods == {A}


def test_row_pod_gone_but_processes_run_beside_an_annotated_pod_never_raises() -> None:
    desired = living({B: 600_000})
    gpu = seen(A, B, limit_mw=300_000)
    raised = decide(desired, gpu, owned(300_000, A))
    assert raised.target_mw == 300_000
    assert raised.pods == {A, B}
    lower = decide(living({B: 250_000}), gpu, owned(300_000, A))
    assert outcome(lower) == ("managed", 250_000, "adjust")


def test_row_pod_gone_but_processes_run_beside_a_pod_of_unusable_value_holds() -> None:
    decision = decide(living({B: None}), seen(A, B, limit_mw=300_000), owned(300_000, A))
    assert decision.target_mw == 300_000
    assert decision.action != "release"


def test_row_pod_gone_when_its_last_process_has_ended_gives_back() -> None:
    desired = living({B: 600_000})
    decision = decide(desired, seen(B, limit_mw=300_000), owned(300_000, A, B))
    assert outcome(decision) == ("managed", 600_000, "adjust")
    assert decision.pods == {B}


def test_row_process_list_unreadable_holds() -> None:
    assert outcome(decide(living(), unreadable(300_000), owned(300_000, A))) == (
        "held",
        300_000,
        None,
    )
    assert outcome(decide(living({A: 300_000}), unreadable())) == ("held", None, None)


@pytest.mark.parametrize("beside", [(), (A,), (B,), (OTHER,), (A, B, OTHER)])
def test_row_a_pids_cgroup_unreadable_holds(beside: tuple[str | Stranger, ...]) -> None:
    desired = living({A: 600_000}, others=(B,))
    gpu = seen(UNKNOWN, *beside, limit_mw=300_000)
    assert outcome(decide(desired, gpu, owned(300_000, A))) == ("held", 300_000, None)
    assert outcome(decide(desired, gpu)) == ("held", None, None)


@pytest.mark.parametrize("limit_mw", [700_000, 299_000, 301_000, 200_000])
def test_row_limit_read_back_is_not_the_target_is_drift(limit_mw: int) -> None:
    decision = decide(living({A: 300_000}), seen(A, limit_mw=limit_mw), owned(300_000, A))
    assert outcome(decision) == ("managed", 300_000, "drift")


@pytest.mark.parametrize("limit_mw", [300_500, 299_001, 300_999, 300_000])
def test_row_drift_below_one_watt_is_none(limit_mw: int) -> None:
    decision = decide(living({A: 300_000}), seen(A, limit_mw=limit_mw), owned(300_000, A))
    assert decision.action is None


def test_row_drift_while_held_is_mended_too() -> None:
    decision = decide(living(), unreadable(limit_mw=700_000), owned(300_000, A))
    assert outcome(decision) == ("held", 300_000, "drift")


def test_row_an_owned_limit_that_cannot_be_read_is_held() -> None:
    decision = decide(living({A: 250_000}), seen(A, limit_mw=None), owned(300_000, A))
    assert outcome(decision) == ("held", 300_000, None)


@pytest.mark.parametrize(
    ("desired", "gpu"),
    [
        pytest.param(living(), seen(limit_mw=300_000), id="pod-gone"),
        pytest.param(living({}, others=(A,)), seen(A, limit_mw=300_000), id="annotation-gone"),
        pytest.param(living({A: 300_000}), seen(OTHER, limit_mw=300_000), id="others-took-it"),
        pytest.param(living({A: 600_000}), seen(A, limit_mw=300_000), id="value-raised"),
        pytest.param(living({B: 600_000}), seen(B, limit_mw=300_000), id="another-pod-took-it"),
        pytest.param(living({B: None}), seen(B, limit_mw=300_000), id="unusable-pod-took-it"),
    ],
)
def test_row_watcher_silent_holds(desired: Desired, gpu: SeenGpu) -> None:
    entry = owned(300_000, A)
    assert decide(desired, gpu, entry).action in ("release", "adjust")
    held = decide(silent(desired), gpu, entry)
    assert outcome(held) == ("held", 300_000, None)
    assert "silent" in held.reason


def test_row_watcher_silent_still_lowers() -> None:
    desired = silent(living({A: 300_000, B: 250_000}))
    lowered = decide(desired, seen(A, B, limit_mw=300_000), owned(300_000, A))
    assert outcome(lowered) == ("managed", 250_000, "adjust")
    first = decide(desired, seen(A))
    assert outcome(first) == ("managed", 300_000, "acquire")


def test_row_watcher_silent_does_not_raise_a_gpu_that_was_never_touched() -> None:
    decision = decide(silent(living({A: 600_000})), seen(A, limit_mw=300_000))
    assert outcome(decision) == ("held", None, None)


def test_row_watcher_silent_mends_drift() -> None:
    decision = decide(silent(living({A: 300_000})), seen(A, limit_mw=700_000), owned(300_000, A))
    assert decision.action == "drift"


def test_row_watcher_silent_since_the_start_holds_what_the_ledger_has() -> None:
    for gpu in (seen(limit_mw=300_000), seen(A, limit_mw=300_000), seen(OTHER, limit_mw=300_000)):
        assert outcome(decide(Desired(), gpu, owned(300_000, A))) == ("held", 300_000, None)


@pytest.mark.parametrize("gpu", [seen(A, limit_mw=300_000), unreadable(300_000), seen(UNKNOWN)])
def test_row_watcher_silent_beyond_the_lease_gives_back(gpu: SeenGpu) -> None:
    desired = Desired("expired", {A: 300_000})
    decision = decide(desired, gpu, owned(300_000, A))
    assert outcome(decision) == ("free", FACTORY_MW, "release")
    assert "lease" in decision.reason


def test_row_watcher_silent_beyond_the_lease_takes_nothing_new() -> None:
    assert outcome(decide(Desired("expired", {A: 300_000}), seen(A))) == ("free", None, None)


# ---- the invariants, by example ----


@pytest.mark.parametrize("owners", [(), (OTHER,), (B,), (C,), (UNKNOWN,)])
def test_i1_a_gpu_without_an_annotated_pods_process_is_never_written(
    owners: tuple[str | Stranger, ...],
) -> None:
    rules = replace(
        PLAIN, min_mw=300_000, max_mw=400_000, safe_default=SafeDefault(limit_mw=350_000)
    )
    assert decide(living({A: 300_000}, others=(B,)), seen(*owners), rules=rules).action is None


def test_i1_each_gpu_is_decided_for_itself() -> None:
    gpus = [seen(A, uuid="GPU-1"), seen(uuid="GPU-2"), seen(OTHER, uuid="GPU-3"), seen(A, uuid="4")]
    decisions = plan(living({A: 300_000}), gpus, {}, PLAIN)
    assert {u for u, d in decisions.items() if d.action} == {"GPU-1", "4"}


def test_i3_held_limit_outside_narrowed_bounds_is_not_written_again() -> None:
    """The administrator narrowed the bounds and restarted; the ledger still has the old limit."""
    gpu = unreadable(limit_mw=650_000)
    decision = decide(living(), gpu, owned(600_000, A), replace(PLAIN, max_mw=500_000))
    assert decision.action is None or decision.target_mw == 500_000


def test_i3_a_gone_pods_limit_below_narrowed_bounds_is_not_written_again() -> None:
    gpu = seen(A, B, limit_mw=600_000)
    decision = decide(living({B: 600_000}), gpu, owned(250_000, A), replace(PLAIN, min_mw=300_000))
    assert decision.action is None or decision.target_mw == 300_000


def test_i3_bounds_that_cross_for_one_gpu_write_nothing_and_say_so() -> None:
    board = seen(A, limit_mw=310_000, max_mw=350_000)
    decision = decide(living({A: 400_000}), board, rules=replace(PLAIN, min_mw=400_000))
    assert outcome(decision) == ("failed", None, None)
    assert "400" in decision.reason
    assert "350" in decision.reason
    held = decide(
        living({A: 400_000}),
        board,
        owned(310_000, A, original_mw=350_000),
        replace(PLAIN, min_mw=400_000),
    )
    assert outcome(held) == ("failed", 310_000, None)


def test_i3_bounds_that_cross_for_one_gpu_leave_the_others_alone() -> None:
    small = replace(seen(A, uuid="small"), max_mw=350_000)
    decisions = plan(living({A: 400_000}), [small, seen(A)], {}, replace(PLAIN, min_mw=400_000))
    assert decisions[GPU].action == "acquire"


def test_i3_what_was_found_is_given_back_whatever_the_administrators_bounds() -> None:
    decision = decide(
        living(), seen(limit_mw=300_000), owned(300_000, A), replace(PLAIN, max_mw=400_000)
    )
    assert outcome(decision) == ("free", FACTORY_MW, "release")


def test_i3_a_recorded_original_outside_the_hardware_is_clamped_to_it() -> None:
    entry = owned(300_000, A, original_mw=900_000)
    assert decide(living(), seen(limit_mw=300_000), entry).target_mw == MAX_MW


def test_i4_up_only_on_evidence_an_unusable_value_is_none() -> None:
    gpu = seen(A, B, limit_mw=300_000)
    assert decide(living({A: None, B: None}), gpu, owned(300_000, A)).target_mw == 300_000


def test_i4_up_only_on_evidence_a_clean_stop_is() -> None:
    for gpu in (seen(A, limit_mw=300_000), unreadable(300_000), seen(UNKNOWN, limit_mw=300_000)):
        decision = decide(Desired("stopping"), gpu, owned(300_000, A))
        assert outcome(decision) == ("free", FACTORY_MW, "release")


def test_i5_unknown_is_not_absent_for_a_gpu_that_is_not_there() -> None:
    decisions = plan(living(), [], {GPU: owned(300_000, A)}, PLAIN)
    assert outcome(decisions[GPU]) == ("lost", 300_000, None)
    assert decisions[GPU].pods == {A}


def test_i5_unknown_does_not_even_adjust() -> None:
    decision = decide(living({A: 250_000}), seen(A, UNKNOWN, limit_mw=300_000), owned(300_000, A))
    assert outcome(decision) == ("held", 300_000, None)


def test_i11_an_unreadable_gpu_delays_no_other() -> None:
    broken = replace(unreadable(), uuid="broken")
    decisions = plan(living({A: 300_000}), [broken, seen(A)], {}, PLAIN)
    assert decisions["broken"].state == "held"
    assert decisions[GPU].action == "acquire"


# ---- giving back ----


def test_given_back_is_the_limit_found_at_first_touch() -> None:
    entry = owned(300_000, A, original_mw=450_000)
    assert decide(living(), seen(limit_mw=300_000), entry).target_mw == 450_000


def test_given_back_is_the_factory_default_where_so_configured() -> None:
    entry = owned(300_000, A, original_mw=450_000)
    board = seen(limit_mw=300_000, default_mw=310_000, max_mw=350_000)
    rules = replace(PLAIN, release_to="default")
    assert decide(living(), board, entry, rules).target_mw == 310_000


# ---- ids ----


def test_static_pod_is_known_by_its_alias() -> None:
    desired = living({A: 300_000}, ids={"config-hash": A})
    decision = decide(desired, seen("config-hash"))
    assert outcome(decision) == ("managed", 300_000, "acquire")
    assert decision.pods == {A}


def test_static_pod_under_both_ids_is_one_pod() -> None:
    desired = living({A: 300_000}, ids={"config-hash": A})
    assert decide(desired, seen("config-hash", A)).pods == {A}


@pytest.mark.parametrize("annotated", [True, False])
def test_own_uid_wins_an_alias_collision(annotated: bool) -> None:
    """B claims A's uid as its alias: A's processes stay A's."""
    pods: dict[str, int | None] = {B: 250_000}
    if annotated:
        pods[A] = 400_000
    desired = living(pods, others=() if annotated else (A,), ids={A: B})
    decision = decide(desired, seen(A))
    assert decision.target_mw == (400_000 if annotated else None)


def test_static_pod_without_the_annotation_gives_back() -> None:
    decision = decide(
        living({}, others=(A, "config-hash")),
        seen("config-hash", limit_mw=300_000),
        owned(300_000, A),
    )
    assert outcome(decision) == ("free", FACTORY_MW, "release")


def test_static_pod_gone_but_its_processes_run_holds() -> None:
    """Its mirror pod is deleted (by force, or by an API server that is wrong); the kubelet's id
    in the cgroup is then in no snapshot, yet it is the pod's that the limit was set for."""
    gpu = seen("config-hash")
    first = decide(living({A: 300_000}, ids={"config-hash": A}), gpu)
    assert first.target_mw is not None
    entry = Owned(FACTORY_MW, first.target_mw, first.pods, aliases=first.aliases)
    after = decide(living(), replace(gpu, limit_mw=300_000), entry)
    assert after.action is None
    assert after.target_mw == 300_000


@pytest.mark.parametrize("asked", [300_000, 400_000, None])
def test_i3_a_board_that_does_not_tell_its_bounds_is_held(asked: int | None) -> None:
    for gpu in (seen(A, limit_mw=300_000, min_mw=0, max_mw=0, default_mw=0),
                seen(limit_mw=300_000, min_mw=0, max_mw=0, default_mw=0)):  # fmt: skip
        decision = decide(living({A: asked}), gpu, owned(300_000, A))
        assert (decision.target_mw, decision.action) == (300_000, None)


def test_i4_what_a_release_has_not_given_is_not_given_in_silence() -> None:
    gpu = seen(A, limit_mw=200_000)
    for asked in (690_000, 700_000):
        assert decide(silent(living({A: asked})), gpu, owned(700_000)).action is None


# ---- what comes out ----


def test_a_changed_set_of_pods_is_noted_without_a_write() -> None:
    desired = living({A: 300_000, B: 300_000})
    decision = decide(desired, seen(A, B, limit_mw=300_000), owned(300_000, A))
    assert outcome(decision) == ("managed", 300_000, "note")
    assert decision.pods == {A, B}


def test_every_reason_is_plain_words() -> None:
    for desired in (living({A: 300_000}), living(), silent(living()), Desired("expired")):
        for gpu in (seen(), seen(A), seen(OTHER), seen(UNKNOWN), unreadable()):
            for entry in (None, owned(300_000, A)):
                reason = decide(desired, gpu, entry).reason
                assert " " in reason
                assert "{" not in reason
                assert "None" not in reason

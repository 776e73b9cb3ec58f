"""Rates and waits, on a clock that the test holds."""

import pytest

from shared.pace import Backoff, Bucket


def test_a_bucket_fills_up_to_its_most_and_no_further() -> None:
    spent = Bucket.full(per_s=2.0, most=10.0, now_s=100.0).spent(8)
    assert [spent.filled(at).credit for at in (100.0, 101.0, 104.0, 200.0)] == [2, 4, 10, 10]


@pytest.mark.parametrize(
    ("credit", "cost", "wait_s"), [(1.0, 1.0, 0.0), (5.0, 1.0, 0.0), (0.5, 1.0, 0.25), (-1, 1, 1)]
)
def test_a_bucket_tells_how_long_a_cost_has_to_wait(
    credit: float, cost: float, wait_s: float
) -> None:
    assert Bucket(per_s=2.0, most=10.0, credit=credit, at_s=0.0).short_s(cost) == wait_s


def test_a_backoff_doubles_up_to_its_most() -> None:
    waits, backoff = [], Backoff(first_s=1.0, most_s=32.0)
    for _ in range(8):
        backoff = backoff.failed(now_s=50.0)
        assert backoff.due_s is not None
        waits.append(backoff.due_s - 50.0)
    assert waits == [1, 2, 4, 8, 16, 32, 32, 32]
    assert not backoff.may(81.9)
    assert backoff.may(82.0)


def test_a_backoff_that_never_failed_waits_for_nothing() -> None:
    assert Backoff(1.0, 32.0).may(0.0)
    assert Backoff(1.0, 32.0).failed(5.0).cleared() == Backoff(1.0, 32.0)


def test_a_backoff_may_be_told_that_there_was_progress() -> None:
    backoff = Backoff(0.25, 30.0, failures=9).capped(2).failed(0.0)
    assert backoff.due_s == 1.0


def test_a_backoff_survives_any_number_of_failures() -> None:
    assert Backoff(0.25, 30.0, failures=100_000).failed(0.0).due_s == 30.0


def test_chance_shortens_a_wait_and_the_other_side_lengthens_it_up_to_the_most() -> None:
    backoff = Backoff(first_s=8.0, most_s=30.0)
    assert backoff.failed(0.0, share=0.5).due_s == 4.0
    assert backoff.failed(0.0, share=0.5, least_s=7.0).due_s == 7.0
    assert backoff.failed(0.0, least_s=1e300).due_s == 30.0


def test_a_backoff_tells_how_long_is_left() -> None:
    backoff = Backoff(1.0, 32.0)
    assert backoff.left_s(5.0) == 0.0
    assert [backoff.failed(5.0).left_s(at_s) for at_s in (5.0, 5.75, 6.0, 9.0)] == [1, 0.25, 0, 0]

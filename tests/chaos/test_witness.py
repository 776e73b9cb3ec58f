"""The judge of the chaos tests is no rubber stamp: each kind of wrong set is found."""

from __future__ import annotations

import pytest

from tests.chaos.witness import Board, S, View, Witness
from tests.simnode.gpus import SetRecord

G, A, B = "GPU-0", "pod-a", "pod-b"
BOARD = Board(G, 250_000, 600_000, 650_000)


def a_set(at_s: float, limit_mw: int, *, result: int = 0) -> SetRecord:
    return SetRecord(0, round(at_s * S), 1, G, limit_mw, result)


def view(
    at_s: float, *on: str, ending: bool = False, calm: bool = True, **asks: int | None
) -> View:
    named = {name.replace("_", "-"): mw for name, mw in asks.items()}
    return View(round(at_s * S), {G: frozenset(on)}, named, ending, calm)


def judged(views: list[View], *sets: SetRecord) -> list[str]:
    witness = Witness([BOARD], lag_ns=5 * S, views=views)
    return witness.judge(list(sets))


RUNS = [view(t, A, pod_a=300_000) for t in range(20)]


@pytest.mark.parametrize(
    ("views", "sets", "said"),
    [
        pytest.param(RUNS, [a_set(15, 300_000)], None, id="asked-and-there"),
        pytest.param(RUNS, [a_set(15, 200_000)], "out of bounds", id="too-low"),
        pytest.param(RUNS, [a_set(15, 700_000, result=2)], "out of bounds", id="refused-too"),
        pytest.param(RUNS, [a_set(15, 301_000)], "nobody on it asked", id="other-value"),
        pytest.param(
            [view(t, B, pod_a=300_000) for t in range(20)],
            [a_set(15, 300_000)],
            "no process",
            id="not-there",
        ),
        pytest.param(
            [view(t, pod_a=300_000) for t in range(20)],
            [a_set(15, 300_000)],
            "no process",
            id="idle",
        ),
        pytest.param(
            [*RUNS, *(view(t, pod_a=310_000) for t in range(20, 40))],
            [a_set(15, 300_000), a_set(35, 310_000)],
            None,
            id="kept-while-its-pod-rests",
        ),
        pytest.param(
            [*RUNS, *(view(t, pod_a=310_000) for t in range(20, 40))],
            [a_set(15, 300_000), a_set(21, 650_000), a_set(35, 310_000)],
            "no process",
            id="taken-again-while-its-pod-rests",
        ),
        pytest.param(RUNS, [a_set(15, 650_000)], "given back although", id="given-back"),
        pytest.param(
            [*RUNS, view(20, A)], [a_set(20.1, 650_000)], None, id="given-back-annotation-gone"
        ),
        pytest.param(
            [*RUNS, view(20, A, pod_a=300_000, ending=True)],
            [a_set(20.1, 650_000)],
            None,
            id="given-back-at-the-end",
        ),
        pytest.param(
            [*(view(t, pod_a=300_000) for t in range(12)), *(view(t, A) for t in range(12, 20))],
            [a_set(15, 300_000)],
            None,
            id="came-when-it-had-just-ceased-to-ask",
        ),
        pytest.param(
            [*(view(t, pod_a=300_000) for t in range(9)), *(view(t, A) for t in range(9, 20))],
            [a_set(15, 300_000)],
            "no process",
            id="came-long-after-it-had-ceased-to-ask",
        ),
        pytest.param(
            [view(0, A, pod_a=270_000), *RUNS[1:]],
            [a_set(15, 270_000)],
            "nobody on it asked",
            id="asked-long-ago",
        ),
        pytest.param(
            [view(0, A, pod_a=270_000, calm=False), *RUNS[1:]],
            [a_set(15, 270_000)],
            None,
            id="asked-long-ago-amid-trouble",
        ),
        pytest.param(
            RUNS, [a_set(15 + k / 20, 300_000) for k in range(15)], "within", id="too-fast"
        ),
    ],
)
def test_each_kind_of_wrong_set_is_found(
    views: list[View], sets: list[SetRecord], said: str | None
) -> None:
    found = judged(views, *sets)
    assert bool(found) == (said is not None), found
    assert all(said in each for each in found if said)

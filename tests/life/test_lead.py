"""By how much a limit stood before the first process of a pod: measured once, and truly."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.life.life import Life

A, B = "pod-a", "pod-b"


@pytest.fixture
def life(tmp_path: Path) -> Life:
    made = Life(tmp_path)
    made.snapshot({})
    return made


def lead_s(life: Life, pod: str = A) -> float:
    found = life.pod(pod).lead_s
    assert found is not None
    return found


def test_a_limit_that_the_kubelet_announced_stands_before_the_process(life: Life) -> None:
    life.kubelet.pods["GPU-0"] = A
    life.snapshot({A: 300})
    assert life.pod(A).lead_s is None
    life.pass_s(5)
    first = life.run(A)
    life.pass_s(5)
    assert lead_s(life) == pytest.approx(5, abs=0.2)
    life.end(first)
    life.pass_s(60)
    life.run(A)  # its worker's restart is no first process
    life.snapshot({A: 250})
    life.pass_s(5)
    assert lead_s(life) == pytest.approx(5, abs=0.2)


def test_a_limit_that_follows_the_process_comes_after_it(life: Life) -> None:
    life.snapshot({A: 300})
    life.run(A)
    life.pass_s(5)
    assert -1.1 < lead_s(life) < 0


def test_a_limit_that_is_refused_does_not_stand(life: Life) -> None:
    life.kubelet.pods["GPU-0"] = A
    life.board().faults["set"] = "NO_PERMISSION"
    life.snapshot({A: 300})
    life.run(A)
    life.pass_s(10)
    assert life.pod(A).lead_s is None
    life.board().faults.clear()
    life.pass_s(40)
    assert lead_s(life) < -10


def test_of_several_gpus_the_latest_counts(life: Life) -> None:
    life.kubelet.pods["GPU-0"] = A
    life.snapshot({A: 300})
    life.pass_s(5)
    life.proc.began_s[life.run(A, 0, 1)] -= 0.5  # NVML lists it when it has a context
    life.pass_s(5)
    assert lead_s(life) < -0.4


def test_a_pod_that_has_no_value_has_no_lead_and_another_has_its_own(life: Life) -> None:
    life.kubelet.pods["GPU-0"] = A
    life.snapshot({A: 300, B: None})
    life.pass_s(3)
    life.run(B)
    life.run(A)
    life.pass_s(3)
    assert lead_s(life) == pytest.approx(3, abs=0.2)
    assert life.pod(B).lead_s is None


def test_a_process_whose_start_is_not_known_is_no_measure(life: Life) -> None:
    life.kubelet.pods["GPU-0"] = A
    life.snapshot({A: 300})
    del life.proc.began_s[life.run(A)]
    life.pass_s(5)
    assert life.pod(A).lead_s is None

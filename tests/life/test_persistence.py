"""Boards without persistence mode: the driver forgets a limit when its last client has gone."""

from __future__ import annotations

from pathlib import Path

import pytest

from enforcer.device import Facts
from tests.life.life import Life

HOUR_S = 3600.0
H100_PCIE = Facts("H100 PCIe", 310_000, 200_000, 350_000)


def a_life(tmp_path: Path, *, persistence: bool | None = False) -> Life:
    life = Life(tmp_path)
    for gpu in life.device.gpus.values():
        gpu.persistence = persistence
    return life


def test_a_limit_that_went_with_the_enforcer_is_set_again_and_is_no_drift(tmp_path: Path) -> None:
    life = a_life(tmp_path)
    life.board().limit_mw = 650_000  # somebody has NVML open and has set that
    worker = life.run("a")
    life.snapshot({"a": 300})
    life.end(worker)
    life.kill()
    assert life.watts() == 700, "nobody had the GPU open"
    life.snapshot({"a": 300})
    assert life.watts() == 300
    status = life.status()
    assert (status.counters.drifts, status.gpus[0].writes) == (0, {"adjust": 1})
    assert status.gpus[0].original_mw == 650_000, "the ledger's, not what was found"
    assert life.log.events("limit_drifted") == []
    assert "persistence mode is off" in str(life.log.events("limit_set")[-1]["why"])
    life.snapshot({})
    assert life.watts() == 650


def test_a_limit_that_went_with_a_session_is_no_drift_either(tmp_path: Path) -> None:
    """The session is opened anew for another GPU, while the worker of this one restarts."""
    life = a_life(tmp_path)
    worker = life.run("a")
    life.snapshot({"a": 300})
    assert life.watts() == 300
    life.end(worker)
    life.device.vanish("GPU-1")
    life.pass_s(240)
    assert len(life.device.opens) > 1
    assert life.watts() == 300
    assert life.status().counters.drifts == 0


@pytest.mark.parametrize("persistence", [False, True, None])
def test_who_sets_the_default_while_nvml_is_open_has_changed_it(
    tmp_path: Path, persistence: bool | None
) -> None:
    life = a_life(tmp_path, persistence=persistence)
    life.run("a")
    life.snapshot({"a": 300})
    life.board().limit_mw = 700_000
    life.pass_s(20)
    assert life.watts() == 300
    assert life.status().counters.drifts == 1
    assert "somebody else" in str(life.log.events("limit_drifted")[0]["why"])


@pytest.mark.parametrize(("persistence", "set_mw"), [(True, 700_000), (False, 500_000)])
def test_what_the_driver_cannot_have_done_is_a_drift(
    tmp_path: Path, persistence: bool, set_mw: int
) -> None:
    life = a_life(tmp_path, persistence=persistence)
    life.run("a")
    life.snapshot({"a": 300})
    life.board().limit_mw = set_mw
    life.kill()
    life.snapshot({"a": 300})
    assert life.watts() == 300
    assert life.status().counters.drifts == 1


def test_i4_a_forgotten_limit_is_not_raised_while_the_watcher_is_unheard(tmp_path: Path) -> None:
    """An H100 PCIe's default is below its maximum: forgetting can lower a limit."""
    life = a_life(tmp_path)
    board = life.board()
    board.facts = H100_PCIE
    board.limit_mw = 310_000
    worker = life.run("a")
    life.snapshot({"a": 340})
    life.pass_s(4)  # NVML took half a minute, in which the watcher was not heard
    assert life.watts() == 340
    life.end(worker)
    life.kill()
    life.pass_s(60, heartbeats=False)
    assert life.watts() == 310
    life.snapshot({"a": 340})
    life.pass_s(4)  # NVML took half a minute, in which the watcher was not heard
    assert life.watts() == 340


def test_while_a_gpu_is_owned_the_session_stays_open(tmp_path: Path) -> None:
    """Though its worker has no process, and nobody asks, for an hour."""
    life = a_life(tmp_path)
    worker = life.run("a")
    life.snapshot({"a": 300})
    life.end(worker)
    life.pass_s(HOUR_S)
    assert (life.watts(), len(life.device.opens), life.device.is_open) == (300, 1, True)


def test_what_a_board_tells_of_its_persistence_mode_is_shown(tmp_path: Path) -> None:
    life = a_life(tmp_path)
    life.board(1).persistence = None
    shown = {gpu.uuid: gpu.persistence for gpu in life.status().gpus}
    assert shown == {"GPU-0": False, "GPU-1": None}

"""NVML that worked and then says UNKNOWN for good: a container that has lost its devices."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.life.life import Life


def a_life(tmp_path: Path) -> Life:
    """A node whose pod has its limit."""
    life = Life(tmp_path)
    life.run("a")
    life.snapshot({"a": 300})
    assert life.watts() == 300
    return life


@pytest.mark.parametrize("name", ["UNKNOWN", "LIB_RM_VERSION_MISMATCH"])
def test_an_enforcer_on_an_idle_node_ends_after_minutes(tmp_path: Path, name: str) -> None:
    life = a_life(tmp_path)
    life.snapshot({}, others=["a"])
    life.pass_s(20)
    assert not life.device.is_open
    life.device.cut_off = name
    life.snapshot({"a": 300})
    life.pass_s(150)
    assert life.ends == [], "it may be a driver that is exchanged"
    life.pass_s(90)
    (why,) = life.ends
    assert f"nvmlInit: {name}" in why
    assert "systemctl daemon-reload" in why
    life.pass_s(10)
    assert life.watts() == 300, "in the new container"


def test_what_is_owned_is_adopted_in_the_new_container(tmp_path: Path) -> None:
    """A GPU that is lost has the session opened anew, and the devices are gone by then."""
    life = a_life(tmp_path)
    life.board().limit_mw = 350_000  # by somebody else, meanwhile
    life.device.cut_off = "UNKNOWN"
    life.device.vanish("GPU-1")
    life.pass_s(100)
    assert life.gpu().state == "lost"
    assert life.on_disk()["GPU-0"].original_mw == 700_000
    life.pass_s(140)
    assert len(life.ends) == 1
    assert life.watts() == 300
    life.snapshot({}, others=["a"])
    assert life.watts() == 700


def test_never_while_the_session_that_is_open_reaches_the_gpus(tmp_path: Path) -> None:
    life = a_life(tmp_path)
    life.device.cut_off = "UNKNOWN"
    life.pass_s(3600)
    assert life.ends == []
    life.snapshot({}, others=["a"])
    assert life.watts() == 700


def test_a_process_in_which_nvml_never_worked_does_not_end(tmp_path: Path) -> None:
    """Else one that is started again in the same container would end for ever."""
    life = Life(tmp_path)
    life.device.cut_off = "UNKNOWN"
    life.snapshot({"a": 300})
    life.pass_s(3600)
    assert life.ends == []
    assert "UNKNOWN" in life.status().enforcer.nvml_message


@pytest.mark.parametrize("name", ["DRIVER_NOT_LOADED", "NO_PERMISSION", "TIMEOUT"])
def test_what_a_new_container_would_not_mend_ends_nothing(tmp_path: Path, name: str) -> None:
    life = a_life(tmp_path)
    life.device.faults["open"] = name
    life.device.vanish("GPU-1")
    life.pass_s(1800)
    assert life.ends == []
    del life.device.faults["open"]
    life.pass_s(60)
    assert life.gpu().state == "managed"


def test_an_answer_in_between_begins_the_minutes_anew(tmp_path: Path) -> None:
    life = a_life(tmp_path)
    life.device.vanish("GPU-1")
    for name in ["UNKNOWN", "DRIVER_NOT_LOADED", "UNKNOWN"]:
        life.device.faults["open"] = name
        life.pass_s(150)
    assert life.ends == []


def test_one_board_that_says_unknown_for_minutes_is_lost_and_searched_for(tmp_path: Path) -> None:
    life = a_life(tmp_path)
    life.run("b", 1)
    life.snapshot({"a": 300, "b": 300})
    opens = len(life.device.opens)
    bad = life.board(1)
    bad.faults = {"limit": "UNKNOWN", "pids": "UNKNOWN", "handle": "UNKNOWN"}
    life.pass_s(120)
    assert life.gpu(1).state == "held"
    life.pass_s(120)
    assert (life.gpu(1).state, life.gpu(0).state) == ("lost", "managed")
    assert "UNKNOWN" in life.gpu(1).reason
    life.pass_s(600)
    assert len(life.device.opens) == opens + 3, "three tries, and no more while others are used"
    assert life.watts(0) == 300
    bad.faults.clear()
    life.pass_s(700)
    assert life.gpu(1).state == "managed"


def test_a_handle_that_is_mended_by_a_new_session_is_back_at_once(tmp_path: Path) -> None:
    life = a_life(tmp_path)
    life.board().faults = {"limit": "UNKNOWN", "pids": "UNKNOWN"}
    life.pass_s(150)
    opens = len(life.device.opens)
    plain_open = life.device.open

    def mending_open() -> None:
        plain_open()
        life.board().faults.clear()

    life.device.open = mending_open  # type: ignore[method-assign]
    life.pass_s(90)
    assert len(life.device.opens) == opens + 1
    assert life.gpu().state == "managed"
    assert life.ends == []


def test_i5_a_list_that_says_unknown_is_held_as_long_as_the_limit_can_be_read(
    tmp_path: Path,
) -> None:
    life = a_life(tmp_path)
    life.board().faults["pids"] = "UNKNOWN"
    life.pass_s(1200)
    assert (life.gpu().state, life.watts()) == ("held", 300)
    assert len(life.device.opens) == 1


def test_a_board_that_has_no_handle_from_the_start_is_looked_for_in_a_new_session(
    tmp_path: Path,
) -> None:
    """It has no name yet, so it cannot be shown as lost; NVML's message names it."""
    life = Life(tmp_path)
    life.board(1).faults["handle"] = "UNKNOWN"
    life.snapshot({"a": 300})  # a pod that waits
    life.pass_s(700)
    assert len(life.device.opens) == 2
    assert "GPU 1: handle: UNKNOWN" in life.status().enforcer.nvml_message

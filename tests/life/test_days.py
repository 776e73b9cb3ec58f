"""Days in the enforcer's life, one after the other, on a clock that the test moves."""

from __future__ import annotations

from pathlib import Path

import pytest

from enforcer.device import Board, Facts
from enforcer.policy import Stranger
from shared import messages as m
from tests.life.life import Life

A, B = "pod-a", "pod-b"
# Twice the longest wait of the enforcer (ten minutes) and more.
LONG_S = 1300


@pytest.fixture
def life(tmp_path: Path) -> Life:
    return Life(tmp_path / "state")


def test_a_limit_is_set_changed_and_given_back(life: Life) -> None:
    pid = life.run(A)
    life.snapshot({A: 300})
    assert life.watts() == 300
    assert life.pod(A).state == "enforced"
    life.snapshot({A: 100})
    life.pass_s(1)
    assert (life.watts(), life.pod(A).state) == (200, "clamped")
    life.end(pid)
    life.snapshot({})
    life.pass_s(1)
    assert life.watts() == 700
    assert life.on_disk() == {}


def test_a_pod_that_has_gone_keeps_its_name_while_a_gpu_is_kept_for_it(life: Life) -> None:
    life.run(A)
    life.snapshot({A: 300})
    life.snapshot({})  # gone for the API, and its processes still run
    life.pass_s(1)
    [name] = life.gpu().pod_names
    assert (life.gpu().state, life.status().pods) == ("held", [])
    assert (name.uid, name.namespace, name.name) == (A, "default", A)


# ---- the session ----


def test_a_pod_that_never_opens_a_gpu_causes_no_new_session(life: Life) -> None:
    life.snapshot({A: 300})
    life.pass_s(LONG_S)
    assert len(life.device.opens) == 1


def test_a_broken_board_costs_the_others_no_session(life: Life) -> None:
    life.run(A)
    life.snapshot({A: 300})
    life.device.vanish("GPU-1")
    life.pass_s(LONG_S)
    assert life.gpu(1).state == "lost"
    # One after it was lost, and two more in case it is back at once.
    assert len(life.device.opens) == 1 + 3
    assert life.watts() == 300


def test_with_no_gpu_in_use_a_missing_one_is_tried_every_ten_minutes(life: Life) -> None:
    life.run(A)
    life.snapshot({A: 300})
    life.device.vanish("GPU-0")
    life.pass_s(60)
    soon = len(life.device.opens)
    assert soon == 1 + 3
    life.pass_s(1800)
    assert len(life.device.opens) - soon == 3


def test_a_gpu_that_comes_back_to_the_bus_is_had_at_once(life: Life) -> None:
    life.run(A, 0)
    life.run(B, 1)
    life.snapshot({A: 300, B: 400})
    life.device.vanish("GPU-0")
    life.pass_s(300)
    assert life.gpu(0).state == "lost"
    life.board(0).limit_mw = 700_000
    life.device.reappear("GPU-0")
    life.pass_s(5)
    assert (life.gpu(0).state, life.watts(0)) == ("managed", 300)
    opens = len(life.device.opens)
    life.pass_s(LONG_S)
    assert len(life.device.opens) == opens


def test_without_sysfs_a_missing_gpu_is_no_storm_either(life: Life) -> None:
    life.bus.readable = False
    life.run(B, 1)
    life.snapshot({B: 300})
    life.device.vanish("GPU-0")
    life.pass_s(LONG_S)
    assert len(life.device.opens) == 1 + 3


def test_a_gpu_that_is_lost_again_and_again_is_searched_ever_more_seldom(life: Life) -> None:
    life.run(A, 0)
    life.run(B, 1)
    life.board(0).faults["set"] = "GPU_IS_LOST"
    life.snapshot({A: 300, B: 300})
    life.pass_s(3600)
    assert len(life.device.opens) < 40
    assert len(life.log.events("gpu_lost")) < 40
    assert life.watts(1) == 300


def test_a_gpu_whose_list_says_lost_is_not_said_to_be_back(life: Life) -> None:
    life.run(B, 1)
    life.snapshot({B: 300})
    life.board(0).faults["pids"] = "GPU_IS_LOST"
    life.pass_s(600)
    assert life.log.events("gpu_back") == []
    life.board(0).faults.clear()
    life.pass_s(60)
    assert len(life.log.events("gpu_back")) == 1  # in the session that is open
    assert len(life.device.opens) == 1 + 3


def test_a_session_that_is_refused_is_tried_for_ever(life: Life) -> None:
    life.device.faults["open"] = "DRIVER_NOT_LOADED"
    life.run(A)
    life.snapshot({A: 300})
    life.pass_s(600)
    assert 15 < len(life.device.opens) < 30
    assert life.status().enforcer.nvml == "absent"
    life.device.faults.clear()
    life.pass_s(60)
    assert life.watts() == 300
    assert [line["state"] for line in life.log.events("nvml")] == ["absent", "ok"]


def test_a_board_that_tells_its_facts_late_is_asked_again_without_a_new_session(
    life: Life,
) -> None:
    life.board(0).faults["facts"] = "UNKNOWN"
    life.run(A)
    life.snapshot({A: 300})
    assert life.gpu().state == "failed"
    life.board(0).faults.clear()
    life.pass_s(60)
    assert (life.watts(), len(life.device.opens)) == (300, 1)


def test_the_driver_is_let_go_when_nothing_needs_it(life: Life) -> None:
    pid = life.run(A)
    life.snapshot({A: 300})
    life.end(pid)
    life.snapshot({})
    life.pass_s(10)
    assert not life.device.is_open
    life.pass_s(3600)
    assert len(life.device.opens) == 1


def test_with_the_driver_let_go_nothing_that_was_read_is_shown(life: Life) -> None:
    life.snapshot({})
    life.pass_s(10)
    assert not life.device.is_open
    report = life.deliver(life.last or m.Ping())
    assert isinstance(report, m.Report)
    assert [gpu.limit_mw for gpu in report.gpus] == [None, None]


# ---- reading ----


def test_between_two_readings_a_heartbeat_reads_nothing(life: Life) -> None:
    life.run(A)
    life.snapshot({A: 300})
    readings = life.device.readings
    life.pass_s(15 * 10 + 5)
    assert life.device.readings - readings == 10 * 2


def test_a_drift_is_mended_at_the_next_reading(life: Life) -> None:
    life.run(A)
    life.snapshot({A: 300})
    life.board().limit_mw = 650_000
    life.pass_s(16)
    assert life.watts() == 300
    assert life.status().counters.drifts == 1


def test_whoever_asks_is_told_what_holds_now(life: Life) -> None:
    life.run(A)
    life.snapshot({A: 300})
    life.pass_s(2)
    life.board(1).limit_mw = 650_000
    assert life.gpu(1).limit_mw == 650_000


# ---- a lease ----


def test_the_end_of_a_lease_does_not_wait_for_a_scan(tmp_path: Path) -> None:
    life = Life(tmp_path / "state", lease="release:30", scan_seconds="3600")
    life.run(A)
    life.snapshot({A: 300})
    life.pass_s(29.9, heartbeats=False)
    assert life.watts() == 300
    life.pass_s(0.2, heartbeats=False)
    assert life.watts() == 700
    turns = life.server.turns
    life.pass_s(600, heartbeats=False)
    assert life.server.turns - turns < 400  # it is decided once


# ---- stops ----


def test_a_stop_gives_back_with_the_session_that_is_open(life: Life) -> None:
    life.run(A, 0)
    life.run(B, 1)
    life.snapshot({A: 300, B: 300})
    life.device.vanish("GPU-1")
    life.device.faults["open"] = "UNKNOWN"  # a new session would fail
    life.stop()
    assert life.watts(0) == 700
    assert list(life.on_disk()) == ["GPU-1"]


def test_a_stop_tries_again_until_its_time_is_over(life: Life) -> None:
    life.run(A)
    life.snapshot({A: 300})
    refusals = 0

    def refuse_five_times(_uuid: str, _limit_mw: int) -> None:
        nonlocal refusals
        refusals += 1
        if refusals == 5:
            life.board().faults.clear()

    life.board().faults["set"] = "UNKNOWN"
    rest = life.clock.rest

    def rest_and_count(span_s: float) -> None:
        rest(span_s)
        refuse_five_times("", 0)

    life.clock.rest = rest_and_count  # type: ignore[method-assign]
    life.stop()
    assert life.watts() == 700
    assert life.on_disk() == {}


def test_a_stop_ends_in_time_where_nothing_helps(life: Life) -> None:
    life.run(A)
    life.snapshot({A: 300})
    life.board().faults["set"] = "UNKNOWN"
    began_s = life.clock.time_s
    life.stop()
    assert 10 <= life.clock.time_s - began_s < 12
    assert list(life.on_disk()) == ["GPU-0"]


def test_a_stop_opens_a_session_for_a_gpu_that_was_lost(life: Life) -> None:
    life.run(A)
    life.snapshot({A: 300})
    life.device.vanish("GPU-0")
    life.pass_s(20)
    life.device.reappear("GPU-0")
    life.stop()
    assert life.watts() == 700


# ---- facts ----


def test_a_share_of_an_unknown_default_is_refused_in_words(tmp_path: Path) -> None:
    life = Life(tmp_path / "state", safe_default="70%")
    life.board().facts = Facts("GeForce", None, 100_000, 450_000)
    life.run(A)
    life.snapshot({A: None})
    gpu = life.gpu()
    assert (gpu.state, life.device.sets) == ("failed", [])
    assert "70% of its default, which is not known" in gpu.reason
    life.snapshot({A: 300})
    assert life.watts() == 300


def test_what_a_board_told_once_holds_when_it_is_not_told_later(life: Life) -> None:
    life.run(A)
    life.snapshot({A: 300})
    life.board().faults["facts"] = "NOT_SUPPORTED"
    life.device.vanish("GPU-1")
    life.device.reappear("GPU-1")
    life.pass_s(5)
    assert len(life.device.opens) > 1
    life.snapshot({A: 250})
    assert life.watts() == 250
    assert life.gpu().max_mw == 700_000


def test_who_ran_beside_is_known_after_the_gpu_was_lost_for_a_while(life: Life) -> None:
    worker = life.run(A)
    life.run(Stranger.OTHER)
    life.snapshot({A: 300})
    life.pass_s(5)
    life.board(0).faults["pids"] = "GPU_IS_LOST"
    life.pass_s(60)
    assert len(life.log.events("gpu_lost")) == 1
    life.end(worker)  # it restarts meanwhile
    life.board(0).faults.clear()
    life.pass_s(900)
    assert len(life.log.events("gpu_back")) == 1
    assert life.watts() == 300
    life.run(Stranger.OTHER)  # this one was never there
    life.pass_s(5)
    assert life.watts() == 700


def test_a_stranger_beside_nobody_is_left_alone(life: Life) -> None:
    life.run(Stranger.OTHER)
    life.snapshot({}, others=[A])
    life.pass_s(60)
    assert life.device.sets == []


# ---- a driver that takes half a minute to open ----


def slow(tmp_path: Path, lease: str = "hold") -> Life:
    life = Life(tmp_path / "state", lease=lease)
    life.device.open_costs_s = 30.0
    return life


def test_a_lease_does_not_run_out_while_the_enforcer_itself_is_busy(tmp_path: Path) -> None:
    life = slow(tmp_path, lease="release:20")
    life.run(A)
    life.snapshot({A: 300})
    life.snapshot({A: 300})
    life.device.vanish("GPU-1")
    sets = len(life.device.sets)
    life.pass_s(120)
    assert len(life.device.opens) == 1 + 3
    assert len(life.device.sets) == sets
    life.pass_s(25, heartbeats=False)
    assert life.watts() == 700  # that silence was the watcher's


def test_a_start_opens_one_session_for_the_first_snapshot(tmp_path: Path) -> None:
    life = slow(tmp_path)
    life.run(A)
    life.server.until_s = life.clock.time_s + 0.1
    life.agent.turn()
    life.snapshot({A: 300})
    assert life.watts() == 300
    assert len(life.device.opens) == 1


def test_who_asks_on_an_idle_node_is_told_the_limits(tmp_path: Path) -> None:
    life = slow(tmp_path)
    life.snapshot({})
    life.pass_s(60)
    assert not life.device.is_open
    status = life.status()
    assert [gpu.limit_mw for gpu in status.gpus] == [700_000, 700_000]
    assert status.watcher.connected  # not to have listened is no silence
    opens = len(life.device.opens)
    life.pass_s(1)
    assert life.gpu().limit_mw == 700_000  # asked again: the session is still there
    assert len(life.device.opens) == opens
    life.pass_s(10)
    assert not life.device.is_open


def test_a_gpu_that_comes_while_a_session_is_opened_is_not_overlooked(life: Life) -> None:
    life.run(B, 1)
    life.snapshot({B: 300})
    life.device.vanish("GPU-0")
    opened = life.device.open

    def open_and_return() -> None:
        opened()
        if len(life.device.opens) == 1 + 3:  # the last try
            life.device.reappear("GPU-0")

    life.device.open = open_and_return  # type: ignore[method-assign]
    life.pass_s(60)
    assert life.gpu(0).state == "free"


def test_a_pod_on_a_gpu_that_is_owned_and_cannot_be_reached_is_not_said_to_wait(
    life: Life,
) -> None:
    life.run(A)
    life.snapshot({A: 300})
    life.device.faults["open"] = "UNKNOWN"
    life.kill()
    life.snapshot({A: 300})
    pod = life.pod(A)
    assert (pod.state, pod.gpus) == ("failed", ["GPU-0"])
    assert "nvmlInit: UNKNOWN" in pod.reason


def test_a_pod_whose_gpu_is_not_owned_is_not_said_to_wait_where_the_driver_is_gone(
    tmp_path: Path,
) -> None:
    life = Life(tmp_path / "state", dry_run="true")
    life.run(A)
    life.snapshot({A: 300})
    life.device.faults["open"] = "UNKNOWN"
    life.device.vanish("GPU-1")
    life.pass_s(60)
    assert (life.pod(A).state, life.pod(A).gpus) == ("failed", ["GPU-0"])


def test_limits_are_read_in_time_where_processes_are_looked_at_seldom(tmp_path: Path) -> None:
    life = Life(tmp_path / "state", scan_seconds="300", reconcile_seconds="15")
    life.run(A)
    life.snapshot({A: 300})
    life.board().limit_mw = 650_000
    life.pass_s(16)
    assert life.watts() == 300


def test_with_no_driver_nothing_is_read_and_nothing_spins(tmp_path: Path) -> None:
    life = Life(tmp_path / "state", scan_seconds="300", reconcile_seconds="15")
    life.snapshot({})
    life.pass_s(400)
    assert not life.device.is_open
    turns = life.server.turns
    life.pass_s(600, heartbeats=False)
    assert life.server.turns - turns < 400


def test_a_failure_is_told_once_though_the_reason_to_write_changes(life: Life) -> None:
    life.run(A)
    life.snapshot({A: 300})
    life.board().faults["set"] = "NO_PERMISSION"
    life.board().limit_mw = 650_000
    for _ in range(60):
        life.board().faults["pids"] = "UNKNOWN"
        life.pass_s(1.1)
        del life.board().faults["pids"]
        life.pass_s(1.1)
    assert len(life.log.events("limit_failed")) == 1
    assert life.status().counters.limit_write_failures < 12


def test_no_session_is_begun_when_a_stop_is_nearly_over(tmp_path: Path) -> None:
    life = Life(tmp_path / "state", exit_seconds="10")
    life.run(A)
    life.snapshot({A: 300})
    life.device.faults["open"] = "UNKNOWN"
    life.device.vanish("GPU-0")
    began_s = life.clock.time_s
    life.device.opens.clear()
    life.stop()
    assert len(life.device.opens) > 1
    assert max(life.device.opens) <= began_s + 5


def test_who_was_replaced_is_not_heard_again_while_the_enforcer_is_busy(tmp_path: Path) -> None:
    life = slow(tmp_path)
    life.run(A)
    life.snapshot({A: 300})
    old = life.last
    life.session = "newer"
    life.snapshot({A: 400})
    life.device.vanish("GPU-1")
    life.pass_s(2, heartbeats=False)  # it opens a session
    assert old is not None
    reply = life.deliver(old)
    assert isinstance(reply, m.Error)
    assert reply.code == "stale"


def test_a_device_that_comes_to_the_bus_again_and_again_is_no_storm_of_sessions(life: Life) -> None:
    life.run(B, 1)
    life.snapshot({B: 300})
    for _ in range(360):
        life.device.vanish("GPU-0")
        life.pass_s(5)
        life.device.reappear("GPU-0")
        life.pass_s(5)
    assert len(life.device.opens) < 150
    life.pass_s(1200)
    assert life.gpu(0).state == "free"


def test_i4_in_silence_a_gpu_is_not_taken_at_more_than_it_has_by_now(life: Life) -> None:
    life.snapshot({A: 450})
    life.pass_s(12, heartbeats=False)
    life.run(A)
    life.board().limit_mw = 200_000  # since the last reading
    life.pass_s(60, heartbeats=False)
    assert life.watts() == 200
    life.pass_s(3)
    assert life.watts() == 450


def test_i4_in_silence_a_gpu_is_not_changed_to_more_than_it_has_by_now(life: Life) -> None:
    pid = life.run(A)
    life.snapshot({A: 300, B: 250})
    life.pass_s(14, heartbeats=False)
    life.run(B)
    life.end(pid)
    life.board().limit_mw = 200_000
    life.pass_s(60, heartbeats=False)
    assert life.watts() == 200
    life.pass_s(3)
    assert life.watts() == 250


def test_a_new_snapshot_looks_only_at_the_gpus_that_it_bears_on(life: Life) -> None:
    life.run(A, 0)
    life.run(B, 1)
    life.snapshot({A: 300, B: 300})
    life.pass_s(1.5)
    looked: list[str] = []
    pids = life.device.pids

    def note(board: Board) -> set[int]:
        looked.append(board.uuid)
        return pids(board)

    life.device.pids = note  # type: ignore[method-assign]
    life.snapshot({A: 300, B: 250})
    assert (looked, life.watts(1)) == (["GPU-1"], 250)

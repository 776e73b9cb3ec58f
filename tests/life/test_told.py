"""What log and events tell of the enforcer's life: who, which GPU, which limit, what holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from enforcer.device import Board
from shared import messages as m
from tests.life.life import Life

A, B = "0a" * 16, "0b" * 16
CALLED = f"default/{A} ({A})"


def only(life: Life, event: str) -> dict[str, object]:
    (line,) = life.log.events(event)
    return line


def states(life: Life) -> list[object]:
    return [line["state"] for line in life.log.events("gpu_state")]


def with_a_pod(tmp_path: Path, watts: float = 350, **settings: str) -> Life:
    life = Life(tmp_path, **settings)  # type: ignore[arg-type]
    life.run(A, 1)
    life.snapshot({A: watts})
    return life


# ---- who and which ----


def test_a_line_and_its_event_name_the_pod_the_gpu_and_watts(tmp_path: Path) -> None:
    life = with_a_pod(tmp_path, 350.5)
    line = only(life, "limit_set")
    assert line["pods"] == [CALLED]
    assert (line["index"], line["uuid"], line["pci"]) == (1, "GPU-1", "00000000:02:00.0")
    assert (line["from_watts"], line["to_watts"]) == (700, 350.5)
    assert line["why"] == f"350.5 W: asked by pod {CALLED}"
    assert "dry_run" not in line
    (event,) = (each for each in life.server.events if isinstance(each, m.LimitSet))
    assert event.pods == [A]
    assert event.pod_names == [m.PodName(uid=A, namespace="default", name=A)]
    assert event.pci == "00000000:02:00.0"
    state = only(life, "gpu_state")
    assert (state["index"], state["uuid"], state["pci"]) == (1, "GPU-1", "00000000:02:00.0")
    assert (state["state"], state["limit_watts"], state["pods"]) == ("managed", 350.5, [CALLED])


@pytest.mark.parametrize("killed", [False, True], ids=["alive", "after-a-crash"])
def test_a_pod_that_has_gone_is_still_named(tmp_path: Path, killed: bool) -> None:
    life = with_a_pod(tmp_path)
    for pid in list(life.proc.owners):
        life.end(pid)
    if killed:
        life.kill()
    life.snapshot({B: 300})
    line = only(life, "limit_released")
    assert line["pods"] == [CALLED]
    assert (line["from_watts"], line["to_watts"]) == (350, 700)
    (event,) = (each for each in life.server.events if isinstance(each, m.LimitReleased))
    assert [(pod.name, pod.uid) for pod in event.pod_names] == [(A, A)]
    life.snapshot({B: 310})
    assert life.agent._roster.of([A]) == {}  # nothing more can be told of it


def test_a_release_that_was_refused_names_the_pod_too(tmp_path: Path) -> None:
    life = with_a_pod(tmp_path)
    life.board(1).faults["set"] = "UNKNOWN"
    life.snapshot({}, others=[A])
    assert only(life, "limit_failed")["pods"] == [CALLED]
    life.board(1).faults.clear()
    life.pass_s(5)
    assert only(life, "limit_released")["pods"] == [CALLED]


# ---- a write that was none, or failed ----


@pytest.mark.parametrize("after", [{}, {A: 710.0}], ids=["given-back", "raised-above-it"])
def test_nothing_is_said_to_be_set_where_nothing_was_written(
    tmp_path: Path, after: dict[str, float]
) -> None:
    life = with_a_pod(tmp_path, 700)
    life.snapshot(after, others=[] if after else [A])
    assert life.device.sets == []
    assert life.log.events("limit_set") == []
    assert not any(isinstance(event, m.LimitSet) for event in life.server.events)
    assert states(life) == (["managed"] if after else ["managed", "free"])


def test_a_change_that_was_mended_before_it_could_be_is_no_drift(tmp_path: Path) -> None:
    life = with_a_pod(tmp_path)
    reads = life.device.limit_mw

    def mended(board: Board) -> int:
        life.board(1).limit_mw = 350_000
        return reads(board)

    life.board(1).limit_mw = 500_000
    life.device.limit_mw = mended  # type: ignore[method-assign]
    life.pass_s(16)
    assert life.status().counters.drifts == 0
    assert life.log.events("limit_drifted") == []


def test_a_refused_write_is_a_failed_gpu_and_the_line_says_what_holds(tmp_path: Path) -> None:
    life = Life(tmp_path, gpus=2)
    life.board(1).faults["set"] = "NO_PERMISSION"
    life.run(A, 1)
    life.snapshot({A: 350})
    line = only(life, "limit_failed")
    assert line["level"] == "error"
    assert "NO_PERMISSION" in str(line["why"])
    assert line["holds"] == "its limit is 700 W meanwhile"
    assert line["next_try_s"] == 1
    assert states(life) == ["failed"]
    assert only(life, "gpu_state")["why"] == f"not done: 350 W: asked by pod {CALLED}"
    life.pass_s(100)
    assert states(life) == ["failed"]
    life.board(1).faults.clear()
    life.pass_s(40)
    assert states(life) == ["failed", "managed"]


def test_a_limit_that_does_not_hold_is_told_in_watts(tmp_path: Path) -> None:
    life = Life(tmp_path)
    life.board().ignores_sets = True
    life.run(A)
    life.snapshot({A: 350})
    assert only(life, "limit_failed")["why"] == (
        "set to 350 W without an error, yet it reads 700 W"
    )


# ---- drift, or a write that never stood ----


def refuse(life: Life) -> None:
    life.board(1).faults["set"] = "UNKNOWN"
    life.snapshot({A: 300})
    life.board(1).faults.clear()


def cut_short(life: Life) -> None:
    """Killed after the ledger was written and before the board was."""

    def killed(_uuid: str, _limit_mw: int) -> None:
        raise KeyboardInterrupt

    life.device.before_set = killed
    with pytest.raises(KeyboardInterrupt):
        life.snapshot({A: 300})
    life.device.before_set = lambda _uuid, _limit_mw: None


def somebody_else(life: Life) -> None:
    life.snapshot({A: 300})
    life.board(1).limit_mw = 500_000


MEANWHILE = {
    "refused": (refuse, False),
    "cut short": (cut_short, False),
    "changed": (somebody_else, True),
}


@pytest.mark.parametrize("first", [True, False], ids=["first-limit", "later-limit"])
@pytest.mark.parametrize("case", MEANWHILE)
def test_after_a_restart_only_what_somebody_else_changed_is_a_drift(
    tmp_path: Path, case: str, first: bool
) -> None:
    meanwhile, is_drift = MEANWHILE[case]
    life = Life(tmp_path)
    life.run(A, 1)
    if not first:
        life.snapshot({A: 350})
    meanwhile(life)
    life.kill()
    life.snapshot({A: 300})
    assert life.watts(1) == 300
    assert len(life.log.events("limit_drifted")) == life.status().counters.drifts == is_drift
    if not is_drift:
        said = str(life.log.events("limit_set")[-1]["why"])
        assert "nobody else changed it" in said
    life.board(1).limit_mw = 500_000  # and now somebody does
    life.pass_s(16)
    assert life.status().counters.drifts == 1 + is_drift


def test_without_notes_of_an_older_version_a_changed_limit_is_a_drift(tmp_path: Path) -> None:
    life = with_a_pod(tmp_path)
    life.ledger.close()
    (tmp_path / "notes.json").unlink()
    life.board(1).limit_mw = 500_000
    life.start()
    life.snapshot({A: 350})
    assert len(life.log.events("limit_drifted")) == 1
    assert only(life, "limit_drifted")["level"] == "warning"


def test_notes_that_are_no_notes_are_none(tmp_path: Path) -> None:
    life = with_a_pod(tmp_path)
    life.ledger.close()
    (tmp_path / "notes.json").write_text('{"stood": [1]}')
    life.start()
    assert life.ledger.notes is None
    assert life.snapshot({A: 350}) is not None


# ---- a GPU that is lost ----


def test_a_lost_gpu_is_told_with_its_last_index_and_the_pods_that_suffer(tmp_path: Path) -> None:
    life = with_a_pod(tmp_path)
    life.device.vanish("GPU-1")
    life.pass_s(3)
    line = only(life, "gpu_lost")
    assert line["level"] == "error"
    assert (line["index"], line["uuid"], line["pci"]) == (1, "GPU-1", "00000000:02:00.0")
    assert line["pods"] == [CALLED]
    assert (line["from_watts"], line["next_try_s"]) == (350, 0)
    assert "it was 350 W" in str(line["holds"])
    (event,) = (each for each in life.server.events if isinstance(each, m.GpuLost))
    assert (event.index, event.pods, event.pod_names[0].name) == (1, [A], A)
    assert states(life)[-1] == "lost"
    life.device.reappear("GPU-1")
    life.pass_s(60)
    assert only(life, "gpu_back")["pods"] == [CALLED]
    assert states(life)[-1] == "managed"


def test_pods_suffer_too_where_nothing_is_owned(tmp_path: Path) -> None:
    life = with_a_pod(tmp_path, dry_run="true")
    life.device.vanish("GPU-1")
    life.pass_s(3)
    line = only(life, "gpu_lost")
    assert (line["pods"], line["dry_run"]) == ([CALLED], True)


@pytest.mark.parametrize("dry_run", ["true", "false"])
def test_a_pod_that_left_the_gpu_does_not_suffer(tmp_path: Path, dry_run: str) -> None:
    life = with_a_pod(tmp_path, dry_run=dry_run)
    for pid in list(life.proc.owners):
        life.end(pid)
    life.snapshot({})
    life.pass_s(2)
    life.device.vanish("GPU-1")
    life.pass_s(3)
    assert only(life, "gpu_lost")["pods"] == []


def test_a_gpu_that_is_owned_and_never_seen_is_told_with_its_pods(tmp_path: Path) -> None:
    life = with_a_pod(tmp_path)
    life.device.vanish("GPU-1")
    life.kill()
    life.pass_s(1)
    assert only(life, "gpu_lost")["pods"] == [CALLED]


def test_while_nvml_is_refused_the_next_try_is_that_of_nvml(tmp_path: Path) -> None:
    life = with_a_pod(tmp_path)
    life.device.faults["open"] = "DRIVER_NOT_LOADED"
    life.device.vanish("GPU-1")
    life.pass_s(3)
    line = life.log.events("nvml")[-1]
    assert (line["level"], line["next_try_s"]) == ("error", 1)
    assert "limits stay as they are" in str(line["holds"])


@pytest.mark.parametrize("persistence", [True, None])
def test_a_board_that_was_reset_while_it_was_lost_was_changed_by_nobody(
    tmp_path: Path, persistence: bool | None
) -> None:
    life = with_a_pod(tmp_path)
    for _ in range(2):
        life.device.vanish("GPU-1")
        life.pass_s(3)
        life.board(1).limit_mw, life.board(1).persistence = 700_000, persistence
        life.device.reappear("GPU-1")
        life.pass_s(60)
        assert life.watts(1) == 350
    assert life.log.events("limit_drifted") == []
    assert "it was lost, and is back at its default" in str(life.log.events("limit_set")[-1]["why"])
    assert life.status().gpus[1].writes == {"acquire": 1, "adjust": 2}
    assert life.status().counters.drifts == 0
    life.board(1).limit_mw = 700_000  # now it is somebody
    life.pass_s(20)
    assert "somebody else had changed it" in str(only(life, "limit_drifted")["why"])


def test_a_board_that_comes_back_with_another_limit_was_changed(tmp_path: Path) -> None:
    life = with_a_pod(tmp_path)
    life.device.vanish("GPU-1")
    life.pass_s(3)
    life.board(1).limit_mw = 500_000
    life.device.reappear("GPU-1")
    life.pass_s(60)
    assert only(life, "limit_drifted")["from_watts"] == 500


# ---- held ----


def test_a_gpu_that_is_held_is_a_warning_with_the_drivers_error(tmp_path: Path) -> None:
    life = with_a_pod(tmp_path)
    life.board(1).faults["pids"] = "UNKNOWN"
    life.pass_s(3)
    line = life.log.events("gpu_state")[-1]
    assert (line["state"], line["level"]) == ("held", "warning")
    assert "pids: UNKNOWN" in str(line["why"])
    assert line["holds"] == "its limit is 350 W meanwhile; it is neither raised nor given back"
    assert line["pods"] == [CALLED]


def test_a_gpu_that_is_held_for_another_reason_is_told_anew(tmp_path: Path) -> None:
    life = with_a_pod(tmp_path)
    life.board(1).faults["pids"] = "UNKNOWN"
    life.pass_s(30)
    life.board(1).faults["pids"] = "NO_SENSE"
    life.pass_s(30)
    life.board(1).faults.clear()
    life.pass_s(3)
    whys = [str(line["why"]) for line in life.log.events("gpu_state")]
    assert states(life) == ["managed", "held", "held", "managed"]
    assert ["UNKNOWN" in whys[1], "NO_SENSE" in whys[2]] == [True, True]


def test_a_restart_is_no_warning(tmp_path: Path) -> None:
    life = with_a_pod(tmp_path)
    life.kill()
    life.pass_s(1, heartbeats=False)
    held = life.log.events("gpu_state")[-1]
    assert (held["state"], held["level"]) == ("held", "info")


# ---- dry run ----


def test_every_line_of_a_dry_run_says_so_and_each_limit_is_told_once(tmp_path: Path) -> None:
    life = with_a_pod(tmp_path, dry_run="true")
    life.pass_s(30)
    life.snapshot({A: 400})
    life.pass_s(30)
    life.snapshot({})
    assert life.device.sets == []
    assert all(line["dry_run"] is True for _, line in life.log.lines)
    told = [(line["state"], line["target_watts"]) for line in life.log.events("gpu_state")]
    assert told[:2] == [("managed", 350), ("managed", 400)]
    first = life.log.events("gpu_state")[0]
    assert "dry run, nothing is written" in str(first["why"])
    assert first["limit_watts"] == 700


# ---- the watcher ----


def test_a_watcher_that_falls_silent_and_comes_back_is_one_line_each(tmp_path: Path) -> None:
    life = with_a_pod(tmp_path)
    life.pass_s(9, heartbeats=False)
    assert life.log.events("watcher_silent") == []
    life.pass_s(100, heartbeats=False)
    line = only(life, "watcher_silent")
    assert line["level"] == "warning"
    assert "no power is raised or given back" in str(line["holds"])
    assert life.log.events("watcher_back") == []
    life.snapshot({A: 350})
    back = only(life, "watcher_back")
    assert 109 <= float(str(back["silent_s"])) < 111
    life.pass_s(60)
    assert len(life.log.events("watcher_silent")) == 1


def test_a_watcher_that_never_comes_is_told_and_what_the_lease_does(tmp_path: Path) -> None:
    life = Life(tmp_path, lease="release:30")
    life.pass_s(60)
    line = only(life, "watcher_silent")
    assert "since this start" in str(line["why"])
    assert "given back after 30 s" in str(line["holds"])


def test_a_watcher_without_a_list_is_told_apart(tmp_path: Path) -> None:
    life = Life(tmp_path)
    for _ in range(20):
        why = "pods are not listed yet"
        life.deliver(m.Unlisted(session="s", node="n", why=why, api_error="connection refused"))
        life.pass_s(2)
    line = only(life, "watcher_silent")
    told = "pods are not listed yet; the API: connection refused"
    assert line["why"] == f"it has no pods to tell since this start: {told}"


def test_a_slow_driver_is_no_silent_watcher(tmp_path: Path) -> None:
    life = with_a_pod(tmp_path)
    life.device.open_costs_s = 30.0
    life.device.vanish("GPU-1")
    life.pass_s(120)
    assert len(life.device.opens) > 1
    assert life.log.events("watcher_silent") == []

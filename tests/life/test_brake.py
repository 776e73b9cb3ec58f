"""The brake: a person on the node stops all writing, or has one GPU given back, by a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.life.node import LifeNode as EnforcerNode
from tests.life.node import pod_uid

A, B = pod_uid(1), pod_uid(2)
Change = Callable[[EnforcerNode, int], None]


def pause(node: EnforcerNode, why: str = "the breaker hums") -> Path:
    file = node.state_dir / "pause"
    file.write_text(f"{why}\n")
    return file


def release(node: EnforcerNode, *numbers: int) -> Path:
    file = node.state_dir / "release"
    file.write_text("".join(f"{node.gpus[k].uuid} it hangs\n" for k in numbers))
    return file


def another_wish(node: EnforcerNode, _pid: int) -> None:
    node.snapshot({A: 400})


def no_wish(node: EnforcerNode, _pid: int) -> None:
    node.snapshot({}, [A])


def gone(node: EnforcerNode, pid: int) -> None:
    node.end(pid)
    node.snapshot({})


def drift(node: EnforcerNode, _pid: int) -> None:
    node.gpus[0].limit_mw = 300_000
    node.lives_for(20)


def one_more_pod(node: EnforcerNode, _pid: int) -> None:
    node.run_pod(B, 1)
    node.snapshot({A: 300, B: 300})


def killed(node: EnforcerNode, _pid: int) -> None:
    node.kill()
    node.start()
    node.snapshot({A: 500})


@pytest.mark.parametrize(
    ("change", "state", "after_w"),
    [
        pytest.param(another_wish, "managed", (400, 700), id="another-wish"),
        pytest.param(no_wish, "held", (700, 700), id="no-wish"),
        pytest.param(gone, "held", (700, 700), id="pod-gone"),
        pytest.param(drift, "managed", (300, 700), id="drift"),
        pytest.param(one_more_pod, "managed", (300, 300), id="another-pod"),
        pytest.param(killed, "managed", (500, 700), id="killed"),
    ],
)
def test_while_it_is_paused_nothing_is_written_and_afterwards_all_that_was_due(
    change: Change, state: str, after_w: tuple[float, float]
) -> None:
    with EnforcerNode() as node:
        node.start()
        pid = node.run_pod(A)
        node.snapshot({A: 300})
        file = pause(node)
        node.lives_for(2)
        writes = node.writes(), node.writes(node.gpus[1])
        change(node, pid)
        node.looks()
        assert (node.writes(), node.writes(node.gpus[1])) == writes
        assert node.gpu().state == state
        assert node.status().enforcer.paused == "the breaker hums"
        file.unlink()
        node.wait_limit(after_w[0])
        node.wait_limit(after_w[1], 1)
        assert node.status().enforcer.paused is None


def test_what_a_pause_puts_off_is_said() -> None:
    with EnforcerNode() as node:
        node.start()
        node.run_pod(A)
        node.snapshot({A: 300})
        pause(node)
        node.snapshot({A: 400})
        node.looks()
        pod = node.pod(A)
        assert pod.state == "waiting"
        assert "paused (the breaker hums), nothing is written; would be: 400 W" in pod.reason
        (line,) = node.logs("brake")
        assert "paused (the breaker hums)" in line["why"]
        assert line["level"] == "warning"


def test_a_pause_outlasts_a_stop_and_the_next_start_writes_nothing() -> None:
    with EnforcerNode() as node:
        node.start()
        node.run_pod(A)
        node.snapshot({A: 300})
        pause(node).touch()
        assert node.stop() == 0  # before the loop could see it
        assert node.limit() == 300
        assert node.owned() == {node.gpus[0].uuid: 700_000}
        assert "nothing is given back" in node.logs("brake")[-1]["why"]
        node.start()
        node.snapshot({A: 500})
        node.looks()
        assert node.limit() == 300


def test_a_lease_that_runs_out_while_it_is_paused_gives_nothing_back() -> None:
    with EnforcerNode(lease="release:6") as node:
        node.start()
        node.run_pod(A)
        node.snapshot({A: 300})
        file = pause(node)
        node.lives_for(60)
        assert node.limit() == 300
        file.unlink()
        node.wait_limit(700)


def unreadable(node: EnforcerNode) -> None:
    node.gpus[0].fault("nvmlDeviceGetComputeRunningProcesses_v3", error=999)


def silent(node: EnforcerNode) -> None:
    node.lives_for(30)


def restarted(node: EnforcerNode) -> None:
    node.kill()
    node.start()


def paused(node: EnforcerNode) -> None:
    pause(node)


@pytest.mark.parametrize("held_by", [lambda _node: None, unreadable, silent, restarted, paused])
def test_one_gpu_is_given_back_at_once_and_left_alone_whatever_holds_it(
    held_by: Callable[[EnforcerNode], None],
) -> None:
    with EnforcerNode() as node:
        node.gpus[0].limit_mw = 650_000
        node.start()
        node.run_pod(A, 0, 1)
        node.snapshot({A: 300})
        held_by(node)
        file = release(node, 0)
        node.wait_limit(650)
        assert node.limit(1) == 300
        node.snapshot({A: 350})
        node.looks()
        assert node.limit() == 650
        assert node.owned().keys() == {node.gpus[1].uuid}
        node.gpus[0].clear_faults()
        node.looks()
        pod = node.pod(A)
        assert pod.state == "failed"
        assert "a person on the node keeps it free of limits: it hangs" in pod.reason
        (node.state_dir / "pause").unlink(missing_ok=True)
        file.unlink()
        node.wait_limit(350)


@pytest.mark.parametrize(
    "laid",
    [
        pytest.param(lambda path: path.mkdir(), id="folder"),
        pytest.param(lambda path: path.symlink_to("/dev/zero"), id="link"),
        pytest.param(lambda path: path.write_bytes(b""), id="empty"),
        pytest.param(lambda path: path.write_bytes(b"\xff\x00" * 40_000), id="bytes"),
    ],
)
def test_whatever_is_called_pause_pauses_and_whatever_is_called_release_harms_nobody(
    laid: Callable[[Path], object],
) -> None:
    with EnforcerNode() as node:
        node.start()
        node.run_pod(A)
        node.snapshot({A: 300})
        laid(node.state_dir / "release")
        node.looks()
        assert node.limit() == 300
        laid(node.state_dir / "pause")
        node.looks()
        node.snapshot({A: 400})
        node.looks()
        assert node.limit() == 300
        assert node.status().enforcer.paused is not None


def test_a_released_gpu_that_is_not_here_is_told_to_doctor_and_changes_nothing() -> None:
    with EnforcerNode() as node:
        node.start()
        node.run_pod(A)
        node.snapshot({A: 300})
        (node.state_dir / "release").write_text("0\n\nGPU-elsewhere\n")
        node.looks()
        assert node.limit() == 300
        assert node.status().enforcer.released == ["0", "GPU-elsewhere"]


def test_i10_a_pause_is_quiet() -> None:
    with EnforcerNode() as node:
        node.start()
        pid = node.run_pod(A)
        node.snapshot({A: 300})
        pause(node)
        node.end(pid)
        node.snapshot({})
        node.looks()
        lines = len(node.logs())
        for _ in range(5):
            node.snapshot({})
            node.looks()
        assert node.logs()[lines:] == []


def test_the_entry_of_a_board_that_is_gone_for_good_is_taken_out_by_hand_during_a_pause() -> None:
    with EnforcerNode() as node:
        node.start()
        node.run_pod(A, 0, 1)
        node.snapshot({A: 300})
        gone = node.gpus[1]
        gone.vanish()
        node.wait_state("lost", 1)
        file = pause(node)
        node.looks()
        ledger = node.state_dir / "ledger.json"
        book = json.loads(ledger.read_text())
        del book["gpus"][gone.uuid]
        ledger.write_text(json.dumps(book | {"crc32": None}))
        assert node.stop() == 0
        node.start()
        file.unlink()
        node.snapshot({A: 350})
        node.wait_limit(350)
        assert node.owned() == {node.gpus[0].uuid: 700_000}
        assert [gpu.uuid for gpu in node.status().gpus if gpu.managed] == [node.gpus[0].uuid]

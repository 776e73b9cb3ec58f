"""The brake's two files: when they are read, and what holds where they cannot be."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from enforcer.brake import Brake, Orders


@pytest.mark.parametrize(
    ("pause", "release", "orders"),
    [
        pytest.param(None, None, Orders(), id="nothing"),
        pytest.param("", None, Orders(""), id="no-reason"),
        pytest.param("  a\n b\t", None, Orders("a b"), id="one-line"),
        pytest.param("x" * 900, None, Orders("x" * 200), id="long"),
        pytest.param(
            None,
            "GPU-1\n\nGPU-2 it  hangs \n",
            Orders(None, {"GPU-1": "", "GPU-2": "it hangs"}),
            id="gpus",
        ),
    ],
)
def test_what_is_ordered(
    tmp_path: Path, pause: str | None, release: str | None, orders: Orders
) -> None:
    for name, text in (("pause", pause), ("release", release)):
        if text is not None:
            (tmp_path / name).write_text(text)
    assert Brake(tmp_path).look() == orders


def test_no_more_than_64_gpus_are_taken(tmp_path: Path) -> None:
    (tmp_path / "release").write_text("".join(f"GPU-{k}\n" for k in range(999)))
    assert len(Brake(tmp_path).look().released) == 64


def test_a_pipe_in_its_place_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pause")
    assert Brake(tmp_path).look().paused == ""


def test_a_file_that_cannot_be_looked_at_is_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pause").write_text("why")
    brake, never = Brake(tmp_path), Brake(tmp_path)
    assert brake.look().paused == "why"

    def fails(_path: Path) -> os.stat_result:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "lstat", fails)
    assert brake.look().paused == "why"
    assert never.look().paused is None


def test_a_file_that_is_there_and_cannot_be_read_counts_and_is_read_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pause").write_text("why")
    brake = Brake(tmp_path)

    def fails(*_args: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", fails)
        assert brake.look().paused == ""
    assert brake.look().paused == "why"

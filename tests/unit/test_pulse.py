"""The pulse: the time of the last turn in a file, and nothing in its place stops the loop."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from enforcer.pulse import Pulse


class Clock:
    """Seconds since the start, as a test sets them."""

    def __init__(self) -> None:
        self.now_s = 999.4

    def __call__(self) -> float:
        return self.now_s


def test_it_is_the_clock_that_proc_uptime_shows(tmp_path: Path) -> None:
    def uptime() -> int:
        return int(Path("/proc/uptime").read_text().partition(".")[0])

    before = uptime()
    Pulse(tmp_path).beat()
    assert before <= int((tmp_path / "pulse").read_text()) <= uptime()


def test_it_is_written_once_a_second_and_stays_as_long(tmp_path: Path) -> None:
    clock = Clock()
    pulse = Pulse(tmp_path, clock)
    seen = []
    for clock.now_s in (999.4, 1000.3, 1000.5, 86_400_000.0):
        pulse.beat()
        seen.append((tmp_path / "pulse").read_text())
    assert seen == ["       999\n", "       999\n", "      1000\n", "  86400000\n"]


def test_what_an_enforcer_left_that_has_ended_is_gone_before_the_first_turn(tmp_path: Path) -> None:
    Pulse(tmp_path).beat()
    Pulse(tmp_path)
    assert not (tmp_path / "pulse").exists()


def test_a_file_that_somebody_removed_comes_again(tmp_path: Path) -> None:
    clock = Clock()
    pulse = Pulse(tmp_path, clock)
    pulse.beat()
    (tmp_path / "pulse").unlink()
    clock.now_s += 1
    pulse.beat()
    assert (tmp_path / "pulse").read_text() == "      1000\n"


def a_link(place: Path) -> None:
    place.symlink_to(place.parent / "victim")


def a_hard_link(place: Path) -> None:
    place.hardlink_to(place.parent / "victim")


@pytest.mark.parametrize("lay", [a_link, a_hard_link])
def test_nothing_behind_a_link_is_written(tmp_path: Path, lay: Callable[[Path], None]) -> None:
    """Laid there before the directory was root's own, after an enforcer had removed the old one."""
    (tmp_path / "victim").write_text("untouched")
    pulse = Pulse(tmp_path)
    lay(tmp_path / "pulse")
    pulse.beat()
    assert (tmp_path / "victim").read_text() == "untouched"
    assert (tmp_path / "pulse").read_text().strip().isdigit()


def a_directory(place: Path) -> None:
    place.mkdir()


def a_pipe(place: Path) -> None:
    os.mkfifo(place)


@pytest.mark.parametrize("lay", [a_link, a_directory, a_pipe])
def test_what_is_in_its_way_later_neither_stops_the_loop_nor_is_followed(
    tmp_path: Path, lay: Callable[[Path], None]
) -> None:
    (tmp_path / "victim").write_text("untouched")
    clock = Clock()
    pulse = Pulse(tmp_path, clock)
    pulse.beat()
    (tmp_path / "pulse").unlink()
    lay(tmp_path / "pulse")
    clock.now_s += 1
    pulse.beat()
    assert (tmp_path / "victim").read_text() == "untouched"


def test_a_directory_that_is_not_there_stops_nothing(tmp_path: Path) -> None:
    Pulse(tmp_path / "gone").beat()


@pytest.fixture
def small_memory(tmp_path: Path) -> Iterator[Path]:
    """A file system in memory, as the manifest has, with room for a few pages."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system is not allowed here")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def fill(folder: Path) -> None:
    page = b"x" * 4096
    with contextlib.suppress(OSError), (folder / "filling").open("wb", buffering=0) as filling:
        while filling.write(page) == len(page):
            pass
    assert os.statvfs(folder).f_bfree == 0


def test_on_a_full_file_system_in_memory_it_goes_on(small_memory: Path) -> None:
    clock = Clock()
    pulse = Pulse(small_memory, clock)
    pulse.beat()
    fill(small_memory)
    clock.now_s += 1
    pulse.beat()
    assert (small_memory / "pulse").read_text() == "      1000\n"


def test_one_that_was_full_at_the_start_stops_nothing(small_memory: Path) -> None:
    fill(small_memory)
    Pulse(small_memory).beat()

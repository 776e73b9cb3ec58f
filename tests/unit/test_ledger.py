"""The ledger on real directories: nothing is lost, nothing is guessed, one owner."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from enforcer.ledger import Ledger, LedgerError, UnreadableError
from enforcer.policy import Owned
from tests.small_disk import fill, small_disk

BOOT, OTHER_BOOT = "11111111-aaaa", "22222222-bbbb"
FIRST = {
    "GPU-1": Owned(700_000, 300_000, frozenset({"pod-a", "pod-b"}), 1_700_000_000.25),
    "GPU-2": Owned(450_500, 200_000, frozenset({"pod-c"}), 1_700_000_001.0),
}
SECOND = {
    "GPU-1": Owned(700_000, 250_000, frozenset({"pod-a"}), 1_700_000_000.25),
    "GPU-3": Owned(72_000, 40_000, frozenset({"pod-d"}), 1_700_000_002.0),
}


def reopened(folder: Path, boot_id: str = BOOT) -> tuple[Mapping[str, Owned], list[str]]:
    """What a new enforcer on this folder adopts, and what it says."""
    ledger = Ledger(folder, boot_id)
    said = ledger.load()
    return ledger.entries, said


@pytest.fixture(autouse=True)
def _no_descriptor_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ledgers are held to the end of their process; these share one with all other tests."""
    made: list[Ledger] = []
    opened = Ledger.__init__

    def remember(self: Ledger, state_dir: Path, boot_id: str) -> None:
        opened(self, state_dir, boot_id)
        made.append(self)

    monkeypatch.setattr(Ledger, "__init__", remember)
    yield
    for ledger in made:
        with suppress(OSError):
            ledger.close()


def written(folder: Path, *generations: Mapping[str, Owned]) -> Ledger:
    ledger = Ledger(folder, BOOT)
    for entries in generations:
        ledger.store(entries)
    return ledger


def previous(ledger: Ledger) -> Path:
    (found,) = (path for path in ledger.path.parent.glob("*.json") if path != ledger.path)
    return found


def test_round_trip(tmp_path: Path) -> None:
    ledger = written(tmp_path, FIRST)
    assert ledger.entries == FIRST
    assert reopened(tmp_path) == (FIRST, [])


def test_nothing_there_is_an_empty_ledger_without_a_word(tmp_path: Path) -> None:
    assert reopened(tmp_path / "new" / "folder") == ({}, [])


def test_a_store_replaces_everything(tmp_path: Path) -> None:
    written(tmp_path, FIRST, SECOND)
    assert reopened(tmp_path) == (SECOND, [])


def test_each_write_leaves_the_generation_before_it(tmp_path: Path) -> None:
    ledger = written(tmp_path, FIRST)
    before = ledger.path.read_bytes()
    ledger.store(SECOND)
    assert previous(ledger).read_bytes() == before
    ledger.store({})
    assert json.loads(ledger.path.read_bytes())["gpus"] == {}
    assert set(json.loads(previous(ledger).read_bytes())["gpus"]) == set(SECOND)


def test_it_is_for_the_owner_only(tmp_path: Path) -> None:
    ledger = written(tmp_path / "state", FIRST)
    assert ledger.path.stat().st_mode & 0o077 == 0
    assert ledger.path.parent.stat().st_mode & 0o077 == 0


def test_truncated_at_every_byte_adopts_the_generation_before(tmp_path: Path) -> None:
    ledger = written(tmp_path, FIRST, SECOND)
    whole, before = ledger.path.read_bytes(), previous(ledger)
    kept = before.read_bytes()
    for length in range(len(whole)):
        for path in tmp_path.iterdir():
            path.unlink()
        ledger.path.write_bytes(whole[:length])
        before.write_bytes(kept)
        entries, said = reopened(tmp_path)
        if length == len(whole) - 1:  # only the last newline is missing
            assert (entries, said) == (SECOND, [])
            continue
        assert entries == FIRST, length
        assert any("damaged" in text for text in said)
        assert any("generation before" in text for text in said)


def test_truncated_at_every_byte_without_another_generation_starts_empty(tmp_path: Path) -> None:
    ledger = written(tmp_path, FIRST)
    whole = ledger.path.read_bytes()
    for length in range(len(whole) - 1):
        for path in tmp_path.iterdir():
            path.unlink()
        ledger.path.write_bytes(whole[:length])
        entries, said = reopened(tmp_path)
        assert entries == {}
        assert said


DAMAGE = {
    "garbage": b"\x00\xff\xfe garbage \x80",
    "empty": b"",
    "not-an-object": b"[]",
    "null": b"null",
    "no-version": json.dumps({"boot_id": BOOT, "gpus": {}}).encode(),
    "unknown-field": json.dumps({"version": 1, "boot_id": BOOT, "gpus": {}, "x": 1}).encode(),
    "deeply-nested": b"[" * 100_000,
    "two-documents": b'{"version":1,"boot_id":"11111111-aaaa","gpus":{}}{}',
    "larger-than-any-ledger": b" " * (5 << 20)
    + json.dumps({"version": 1, "boot_id": BOOT, "gpus": {}}).encode(),
}


def test_a_newer_format_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    """A downgrade must not lose the originals that the newer one knows."""
    text = json.dumps({"version": 2, "boot_id": BOOT, "gpus": {}, "new": 1}).encode()
    ledger = written(tmp_path, FIRST)
    ledger.path.write_bytes(text)
    with pytest.raises(LedgerError, match=r"format 2.*newer Power Agent"):
        reopened(tmp_path)
    assert ledger.path.read_bytes() == text


def with_entry(**changes: object) -> bytes:
    entry = {"original_mw": 700_000, "set_mw": 300_000, "pods": ["a"], "since": 1.0} | changes
    return json.dumps({"version": 1, "boot_id": BOOT, "gpus": {"GPU-1": entry}}).encode()


DAMAGE |= {
    "original-zero": with_entry(original_mw=0),
    "original-negative": with_entry(original_mw=-1),
    "original-null": with_entry(original_mw=None),
    "original-fraction": with_entry(original_mw=700_000.5),
    "original-text": with_entry(original_mw="700000"),
    "original-huge": with_entry(original_mw=10**12),
    "pods-text": with_entry(pods="a"),
    "since-text": with_entry(since="x"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_is_moved_aside_and_the_generation_before_adopted(
    tmp_path: Path, damage: bytes
) -> None:
    ledger = written(tmp_path, FIRST, SECOND)
    ledger.path.write_bytes(damage)
    entries, said = reopened(tmp_path)
    assert entries == FIRST
    (aside,) = (path for path in tmp_path.iterdir() if "damaged" in path.name)
    assert aside.read_bytes() == damage
    assert any(aside.name in text and str(ledger.path) in text for text in said)


def test_both_generations_damaged_start_empty_and_both_are_kept(tmp_path: Path) -> None:
    ledger = written(tmp_path, FIRST, SECOND)
    ledger.path.write_bytes(b"one")
    previous(ledger).write_bytes(b"other")
    entries, said = reopened(tmp_path)
    assert entries == {}
    assert len(said) == 3
    assert "which limits the GPUs had before is forgotten" in said[-1]
    kept = {path.read_bytes() for path in tmp_path.iterdir() if "damaged" in path.name}
    assert kept == {b"one", b"other"}


def test_after_damage_the_next_store_works_and_loses_nothing(tmp_path: Path) -> None:
    ledger = written(tmp_path, FIRST, SECOND)
    ledger.path.write_bytes(b"garbage")
    fresh = Ledger(tmp_path, BOOT)
    fresh.load()
    fresh.store({**fresh.entries, **SECOND})
    assert reopened(tmp_path) == ({**FIRST, **SECOND}, [])


def test_the_generation_before_is_adopted_where_the_file_is_missing(tmp_path: Path) -> None:
    ledger = written(tmp_path, FIRST, SECOND)
    ledger.path.unlink()
    entries, said = reopened(tmp_path)
    assert entries == FIRST
    assert said


def test_entries_of_another_boot_are_dropped_and_said(tmp_path: Path) -> None:
    written(tmp_path, FIRST)
    entries, said = reopened(tmp_path, OTHER_BOOT)
    assert entries == {}
    assert any("GPU-1" in text and "GPU-2" in text for text in said)


def test_the_generation_before_of_another_boot_is_dropped_too(tmp_path: Path) -> None:
    ledger = written(tmp_path, FIRST, SECOND)
    ledger.path.write_bytes(b"garbage")
    assert reopened(tmp_path, OTHER_BOOT)[0] == {}


def test_an_empty_ledger_of_another_boot_is_no_news(tmp_path: Path) -> None:
    written(tmp_path, {})
    assert reopened(tmp_path, OTHER_BOOT) == ({}, [])


# ---- things in its place ----


def test_a_symlink_in_its_place_is_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside.json"
    state = tmp_path / "state"
    ledger = written(state, SECOND)
    shutil.copy(ledger.path, outside)
    written(state, FIRST, SECOND)
    ledger.path.unlink()
    ledger.path.symlink_to(outside)
    entries, said = reopened(state)
    assert entries == FIRST
    assert said
    assert outside.exists()


def test_a_store_never_writes_through_a_symlink(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("precious")
    ledger = written(tmp_path / "state", FIRST)
    ledger.path.unlink()
    ledger.path.symlink_to(outside)
    ledger.store(SECOND)
    assert outside.read_text() == "precious"
    assert reopened(tmp_path / "state")[0] == SECOND


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_directory_in_its_place_is_moved_aside(tmp_path: Path) -> None:
    ledger = written(tmp_path, FIRST, SECOND)
    ledger.path.unlink()
    ledger.path.mkdir()
    (ledger.path / "kept").write_text("x")
    entries, said = reopened(tmp_path)
    assert entries == FIRST
    assert said
    assert list(tmp_path.glob("*damaged*/kept"))


def test_a_pipe_in_its_place_is_moved_aside_and_blocks_nothing(tmp_path: Path) -> None:
    ledger = written(tmp_path, FIRST, SECOND)
    ledger.path.unlink()
    os.mkfifo(ledger.path)
    entries, said = reopened(tmp_path)
    assert entries == FIRST
    assert "is damaged, moved to" in said[0]


# ---- what cannot be read is not damaged (I5) ----


@contextmanager
def no_descriptor_free() -> Iterator[None]:
    """Let each open fail with EMFILE."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_i5_a_whole_file_that_cannot_be_read_now_is_left_and_read_later(tmp_path: Path) -> None:
    written(tmp_path, FIRST, SECOND)
    before = sorted(path.name for path in tmp_path.iterdir())
    ledger = Ledger(tmp_path, BOOT)
    with no_descriptor_free(), pytest.raises(UnreadableError, match="cannot be read: Too many"):
        ledger.load()
    assert ledger.entries == {}
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert ledger.load() == []
    assert ledger.entries == SECOND


def test_i5_the_generation_before_is_no_stand_in_for_what_cannot_be_read(tmp_path: Path) -> None:
    """It may not know the newest GPU's original."""
    ledger = written(tmp_path, FIRST, SECOND)
    ledger.path.unlink()
    with socket.socket(socket.AF_UNIX) as obstacle:
        obstacle.bind(str(ledger.path))  # to open one is ENXIO
        with pytest.raises(UnreadableError, match=r"ledger\.json cannot be read"):
            reopened(tmp_path)
    assert ledger.path.exists()


def test_what_was_moved_aside_is_said_though_the_generation_before_cannot_be_read(
    tmp_path: Path,
) -> None:
    ledger = written(tmp_path, FIRST, SECOND)
    ledger.path.write_bytes(b"garbage")
    before = tmp_path / "ledger.previous.json"
    whole = before.read_bytes()
    before.unlink()
    with socket.socket(socket.AF_UNIX) as obstacle:
        obstacle.bind(str(before))
        with pytest.raises(UnreadableError, match=r"moved to ledger\.json\.damaged.* be read"):
            ledger.load()
    before.unlink()
    before.write_bytes(whole)
    assert ledger.load() == ["the generation before it is adopted"]
    assert ledger.entries == FIRST


def test_damage_that_cannot_be_moved_aside_is_an_error_and_loses_nothing(tmp_path: Path) -> None:
    ledger = written(tmp_path, FIRST, SECOND)
    ledger.path.write_bytes(b"garbage")
    for second in range(120):  # whenever it is tried, a folder has the name
        at = time.strftime("%Y%m%dT%H%M%S", time.localtime(time.time() + second))
        (tmp_path / f"ledger.json.damaged-{at}-{os.getpid()}").mkdir()
    with pytest.raises(
        UnreadableError, match=r"is damaged .* cannot be moved aside: Is a directory"
    ):
        ledger.load()
    assert ledger.path.read_bytes() == b"garbage"
    for folder in tmp_path.glob("*.damaged-*"):
        folder.rmdir()
    ledger.load()
    assert ledger.entries == FIRST


@pytest.mark.parametrize("obstacle", ["directory", "symlink"])
def test_an_obstacle_where_the_next_generation_is_written_loses_nothing(
    tmp_path: Path, obstacle: str
) -> None:
    """Every name that a store uses, found by letting a store fail half-way."""
    ledger = written(tmp_path, FIRST)
    next_name = tmp_path / "ledger.next"
    outside = tmp_path / "outside"
    outside.write_text("precious")
    if obstacle == "directory":
        next_name.mkdir()
    else:
        next_name.symlink_to(outside)
    with pytest.raises(LedgerError, match="cannot be written"):
        ledger.store(SECOND)
    assert outside.read_text() == "precious"
    assert ledger.entries == FIRST
    assert reopened(tmp_path) == (FIRST, [])


@pytest.mark.parametrize("kind", ["file", "symlink", "below-a-file", "dangling"])
def test_a_state_dir_that_is_no_directory_names_the_setting(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "state"
    if kind == "symlink":
        (tmp_path / "real").mkdir()
        place.symlink_to(tmp_path / "real")
    elif kind == "dangling":
        place.symlink_to(tmp_path / "nowhere")
    else:
        place.write_text("")
    wanted = place / "below" if kind == "below-a-file" else place
    with pytest.raises(LedgerError, match=r"POWER_AGENT_STATE_DIR=.*; name a directory") as caught:
        Ledger(wanted, BOOT)
    assert str(wanted) in str(caught.value)
    assert "\n" not in str(caught.value)


# ---- disks ----


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk") as disk:
        yield disk


@pytest.mark.root
def test_a_full_disk_is_an_error_and_loses_nothing(disk: Path) -> None:
    ledger = written(disk / "state", FIRST)
    ballast = fill(disk)
    for _ in range(3):
        with pytest.raises(LedgerError, match="No space left") as caught:
            ledger.store(SECOND)
        assert str(ledger.path) in str(caught.value)
        assert ledger.entries == FIRST
        assert reopened(disk / "state") == (FIRST, [])
    ballast.unlink()
    ledger.store(SECOND)
    assert reopened(disk / "state") == (SECOND, [])


@pytest.mark.root
def test_a_folder_that_can_no_longer_be_changed_is_an_error_and_loses_nothing(
    disk: Path,
) -> None:
    state = disk / "state"
    ledger = written(state, FIRST)
    frozen = subprocess.run(["chattr", "+i", str(state)], capture_output=True, check=False)
    if frozen.returncode != 0:
        pytest.skip("this file system knows no immutable folders")
    try:
        with pytest.raises(LedgerError, match="cannot be written"):
            ledger.store(SECOND)
        assert ledger.entries == FIRST
        assert reopened(state) == (FIRST, [])
    finally:
        subprocess.run(["chattr", "-i", str(state)], check=True)


@pytest.mark.root
def test_a_read_only_disk_at_start_names_the_setting(disk: Path, tmp_path: Path) -> None:
    written(tmp_path / "made-here", FIRST)  # its lock stays open and would keep the disk writable
    shutil.copytree(tmp_path / "made-here", disk / "state")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for state in (disk / "state", disk / "new"):
        with pytest.raises(LedgerError, match=r"POWER_AGENT_STATE_DIR=.*Read-only"):
            Ledger(state, BOOT)
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    assert reopened(disk / "state") == (FIRST, [])


LIMITED = """
import resource, sys
from pathlib import Path
from enforcer.ledger import Ledger, LedgerError, UnreadableError
from enforcer.policy import Owned
limit = int(sys.argv[2])
ledger = Ledger(Path(sys.argv[1]), "11111111-aaaa")
ledger.load()
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
entries = {f"GPU-{k}": Owned(1000, 1000, frozenset({"pod"})) for k in range(50)}
try:
    ledger.store(entries)
except LedgerError as error:
    assert len(ledger.entries) == 2, ledger.entries
    sys.exit(7)
"""


@pytest.mark.parametrize("limit", [0, 1, 100, 4096])
def test_a_write_that_is_cut_short_loses_nothing(tmp_path: Path, limit: int) -> None:
    written(tmp_path, FIRST)
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path), str(limit)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 7, done.stderr
    assert reopened(tmp_path) == (FIRST, [])


# ---- one owner ----


HOLDER = """
import sys
from pathlib import Path
from enforcer.ledger import Ledger
ledger = Ledger(Path(sys.argv[1]), "boot")
print(ledger.try_lock(), flush=True)
sys.stdin.read()
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_i6_one_owner_across_processes_until_it_is_killed(tmp_path: Path) -> None:
    with holder(tmp_path) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "True\n"
        mine = Ledger(tmp_path, BOOT)
        assert not mine.try_lock()
        assert not mine.try_lock()
        first.send_signal(signal.SIGKILL)
        first.wait()
        assert mine.try_lock()
        with holder(tmp_path) as second:
            assert second.stdout is not None
            assert second.stdout.readline() == "False\n"
            second.communicate("")


def test_i6_a_store_does_not_give_up_the_lock(tmp_path: Path) -> None:
    mine = Ledger(tmp_path, BOOT)
    assert mine.try_lock()
    mine.store(FIRST)
    assert not Ledger(tmp_path, BOOT).try_lock()


CRASHING = """
import sys
from pathlib import Path
from enforcer.ledger import Ledger
from enforcer.policy import Owned
ledger = Ledger(Path(sys.argv[1]), "11111111-aaaa")
ledger.load()
print("ready", flush=True)
number = 0
while True:
    number += 1
    ledger.store({"GPU-1": Owned(700_000, 100_000 + number, frozenset({"pod"}))})
"""


@pytest.mark.parametrize("delay_ms", [1, 3, 7, 12, 20])
def test_i9_killed_at_any_instant_of_a_store_the_original_stands(
    tmp_path: Path, delay_ms: int
) -> None:
    written(tmp_path, {"GPU-1": Owned(700_000, 100_000, frozenset({"pod"}))})
    with subprocess.Popen(
        [sys.executable, "-c", CRASHING, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        with suppress(subprocess.TimeoutExpired):
            writer.wait(delay_ms / 1000)
        writer.kill()
    entries, said = reopened(tmp_path)
    assert said == []
    assert entries["GPU-1"].original_mw == 700_000


def test_i2_a_new_original_is_on_disk_before_it_takes_the_old_ones_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written, fsynced, renamed, directory fsynced: the order, as no test can pull the plug."""
    done: list[str] = []
    fsync, rename = os.fsync, os.rename

    def noted_fsync(fd: int) -> None:
        done.append("fsync directory" if Path(f"/proc/self/fd/{fd}").is_dir() else "fsync file")
        fsync(fd)

    def noted_rename(old: str, new: str, *, src_dir_fd: int, dst_dir_fd: int) -> None:
        done.append("rename")
        rename(old, new, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)

    ledger = written(tmp_path, FIRST)
    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "rename", noted_rename)
    ledger.store(SECOND)
    assert done == ["fsync file", "rename", "fsync directory"]
    done.clear()
    ledger.store({uuid: replace(entry, set_mw=250_000) for uuid, entry in SECOND.items()})
    ledger.store({})
    assert done == ["rename", "rename"]  # the rest may be lost with what the hardware forgets too


def test_the_file_has_the_fields_that_version_1_0_0_takes_and_no_other(tmp_path: Path) -> None:
    """It refuses unknown fields as damage: a rollback must find its ledger."""
    ledger = Ledger(tmp_path, "boot")
    ledger.store({"GPU-0": Owned(700_000, 300_000, frozenset({"pod"}), 1.0, frozenset({"id"}))})
    book = json.loads((tmp_path / "ledger.json").read_text())
    assert book.keys() == {"version", "boot_id", "gpus", "crc32"}
    assert book["version"] == 1
    assert book["gpus"]["GPU-0"].keys() == {"original_mw", "set_mw", "pods", "since", "aliases"}

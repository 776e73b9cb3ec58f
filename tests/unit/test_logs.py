"""The log: one line a record whatever the values, and a reader who is gone stops nothing."""

import fcntl
import json
import os
import pty
import re
import select
import socket
import subprocess
import sys
import tty
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import pytest

from shared.logs import Level, Log
from tests.waiting import HANG_S

REPOSITORY = Path(__file__).parents[2]
EVIL = 'a\nb\r\x1b[31m"\\\u2028\x00\x7f\x85\x9b2J\u202e\udcff'


def test_a_json_line_has_its_four_fields_first_then_what_belongs_to_it(
    capfd: pytest.CaptureFixture[str],
) -> None:
    before = datetime.now(UTC)
    Log("enforcer", "info", "json").info("limit_set", gpu=3, pods=["a/b"], mw=None)
    line = capfd.readouterr().out
    assert line.endswith("}\n")
    record = json.loads(line)
    assert list(record) == ["ts", "level", "component", "event", "gpu", "pods", "mw"]
    assert record["ts"].endswith("Z")
    assert abs((datetime.fromisoformat(record["ts"]) - before).total_seconds()) < 30
    del record["ts"]
    assert record == {
        "level": "info",
        "component": "enforcer",
        "event": "limit_set",
        "gpu": 3,
        "pods": ["a/b"],
        "mw": None,
    }


@pytest.mark.parametrize("form", ["json", "text"])
def test_a_value_with_control_characters_stays_one_line(
    capfd: pytest.CaptureFixture[str], form: Literal["json", "text"]
) -> None:
    Log("watcher", "info", form).warning("odd", name=EVIL)
    line = capfd.readouterr().out
    assert re.fullmatch(r"[ -~]+\n", line)
    assert form == "text" or json.loads(line)["name"] == EVIL


def test_text_is_for_people(capfd: pytest.CaptureFixture[str]) -> None:
    log = Log("watcher", "info", "text")
    log.error("forbidden", status=403, why="no rule")
    log.info("started")
    first, second = capfd.readouterr().out.splitlines()
    assert first.partition(" ")[2] == 'ERROR   watcher: forbidden status=403 why="no rule"'
    assert second.partition(" ")[2] == "INFO    watcher: started"


@pytest.mark.parametrize(
    ("level", "shown"),
    [
        ("debug", ["debug", "info", "warning", "error"]),
        ("info", ["info", "warning", "error"]),
        ("warning", ["warning", "error"]),
        ("error", ["error"]),
    ],
)
def test_only_the_wanted_levels_are_written(
    capfd: pytest.CaptureFixture[str], level: Level, shown: list[str]
) -> None:
    log = Log("x", level, "json")
    log.debug("e")
    log.info("e")
    log.warning("e")
    log.error("e")
    lines = capfd.readouterr().out.splitlines()
    assert [json.loads(line)["level"] for line in lines] == shown


def test_a_closed_standard_output_stops_nothing() -> None:
    program = (
        "import sys; from shared.logs import Log; log = Log('x', 'info', 'json')\n"
        "sys.stdin.read()\n"  # until the reader of our output has gone
        "for n in range(1000): log.info('e', n=n)\n"
        "sys.stderr.write('still here')"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    process.stdout.close()
    _, errors = process.communicate(timeout=HANG_S)
    assert (process.returncode, errors) == (0, "still here")


def test_two_writers_on_one_pipe_never_mix_their_lines() -> None:
    program = (
        "import sys; from shared.logs import Log; log = Log(sys.argv[1], 'info', 'json')\n"
        "for n in range(50): log.info('e', n=n, filling='x' * 500)"  # a pipe has room for both
    )
    both = '"$0" -c "$1" a & "$0" -c "$1" b & wait'
    done = subprocess.run(
        ["sh", "-c", both, sys.executable, program],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=HANG_S,
        check=True,
    )
    records = [json.loads(line) for line in done.stdout.splitlines()]
    for name in ("a", "b"):
        assert [r["n"] for r in records if r["component"] == name] == list(range(50))


# ---------------------------------------------------------------------- a reader that stops

LINES = 3000  # more than any pipe, socket or terminal keeps
# Logs until told to go on, then once more; says on standard error how many lines it dropped.
LOGS_AND_WAITS = f"""\
import os, sys
if sys.argv[1:]:
    os.seteuid(int(sys.argv[1]))
from shared.logs import Log
log = Log('x', 'info', 'json')
for n in range({LINES}):
    log.info('e', n=n, filling='x' * 200)
sys.stderr.write(f'{{log.dropped}}\\n')
sys.stderr.flush()
sys.stdin.readline()
log.info('last')
"""


def a_pipe() -> tuple[int, int]:
    return os.pipe()


def a_socket() -> tuple[int, int]:
    ours, theirs = socket.socketpair()
    return ours.detach(), theirs.detach()


def a_terminal() -> tuple[int, int]:
    ours, theirs = pty.openpty()
    tty.setraw(theirs)
    return ours, theirs


class Undrained:
    """The program above, with a standard output that is read only when a test says so."""

    def __init__(self, ends: tuple[int, int], *arguments: str) -> None:
        self._reader, writer = ends
        self.flags = fcntl.fcntl(writer, fcntl.F_GETFL)
        self.process = subprocess.Popen(
            [sys.executable, "-c", LOGS_AND_WAITS, *arguments],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.flags_later = -1
        self._writer = writer

    def dropped(self) -> int:
        """Wait until it has logged everything; how many lines it says that it dropped."""
        assert self.process.stderr
        count = int(self.process.stderr.readline())
        self.flags_later = fcntl.fcntl(self._writer, fcntl.F_GETFL)
        os.close(self._writer)
        return count

    def lines(self) -> list[dict[str, object]]:
        """All that it wrote, and what it writes when it is told to go on."""
        assert self.process.stdin
        got = b""
        while select.select([self._reader], [], [], 0.2)[0]:
            got += os.read(self._reader, 65536)
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        while b'"last"' not in got or not got.endswith(b"\n"):
            assert select.select([self._reader], [], [], 60)[0], got[-300:]
            got += os.read(self._reader, 65536)
        os.close(self._reader)
        self.process.communicate()
        return [json.loads(line) for line in got.splitlines()]


@pytest.mark.parametrize("ends", [a_pipe, a_socket, a_terminal])
def test_where_nobody_reads_lines_are_dropped_and_the_next_says_how_many(
    ends: Callable[[], tuple[int, int]],
) -> None:
    program = Undrained(ends())
    dropped = program.dropped()
    assert 0 < dropped < LINES
    assert program.flags_later == program.flags, "the descriptor is others' too"
    *kept, said, last = program.lines()
    assert [line["n"] for line in kept] == list(range(LINES - dropped))
    assert (said["event"], said["level"], said["count"]) == (
        "log_lines_dropped",
        "warning",
        dropped,
    )
    assert last["event"] == "last"


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_pipe_that_may_not_be_opened_again_stops_nothing_either() -> None:
    """Another user made it, as supervisord does for the watcher."""
    program = Undrained(a_pipe(), "65532")
    dropped = program.dropped()
    assert 0 < dropped < LINES
    *kept, said, _ = program.lines()
    assert [line["n"] for line in kept] == list(range(LINES - dropped))
    assert said["count"] == dropped


@pytest.mark.parametrize("form", ["json", "text"])
def test_a_line_that_a_pipe_would_not_take_whole_is_cut_and_says_so(
    capfd: pytest.CaptureFixture[str], form: Literal["json", "text"]
) -> None:
    pods = [f"namespace-{n}/pod" for n in range(2000)]
    Log("x", "info", form).info("e", pods=pods, why=EVIL * 500, gpu=3)
    line = capfd.readouterr().out
    assert re.fullmatch(r"[ -~]+\n", line)
    assert len(line) <= select.PIPE_BUF
    if form == "json":
        record = json.loads(line)
        assert record["cut"] == ["pods", "why"]
        assert record["gpu"] == 3
        assert record["pods"].startswith('["namespace-0/pod","namespace-1/pod"')
        assert record["why"].startswith(EVIL)


def test_a_standard_output_that_was_closed_at_the_start_takes_nothing(tmp_path: Path) -> None:
    """Its number is the next file's that is opened."""
    program = (
        "import os, sys; from shared.logs import Log; file = os.open(sys.argv[1], 65)\n"
        "log = Log('x', 'info', 'json'); log.info('e'); sys.exit(log.dropped + 10 * file)"
    )
    done = subprocess.run(
        ["sh", "-c", '"$0" -c "$1" "$2" >&-', sys.executable, program, tmp_path / "file"],
        cwd=REPOSITORY,
        check=False,
    )
    assert done.returncode == 11
    assert (tmp_path / "file").read_bytes() == b""

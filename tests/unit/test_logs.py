"""The log: one line a record whatever the values, and a reader who is gone stops nothing."""

import json
import re
import subprocess
import sys
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
        "for n in range(500): log.info('e', n=n, filling='x' * 500)"
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
        assert [r["n"] for r in records if r["component"] == name] == list(range(500))

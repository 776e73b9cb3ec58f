"""Logs: one object a line on standard output, `ts level component event` and what belongs to it.

The program does not wait for their reader. A line that is not taken is dropped and counted, and the
next one that is taken comes after a line that says how many are missing.
"""

import json
import sys
import threading
from datetime import UTC, datetime
from typing import Literal

import msgspec

from shared.output import MOST_BYTES, Output

Level = Literal["debug", "info", "warning", "error"]
_RANK: dict[str, int] = {"debug": 0, "info": 1, "warning": 2, "error": 3}
# Characters that are left of each long value, tried one after the other until the line fits.
_LEFT = (1024, 256, 64, 16)
_LONGEST = MOST_BYTES - 256  # the line before it, that tells of missing ones, is shorter than that


class Log:
    """Writes the log of one component; values may be anything that JSON can hold."""

    def __init__(self, component: str, level: Level, form: Literal["json", "text"]) -> None:
        """Write to what is standard output now."""
        self._component = component
        self._least = _RANK[level]
        self._form = form
        # None where it was closed at the start: its number may belong to another file then.
        self._output = Output(sys.stdout.fileno() if sys.stdout else None)
        self._lock = threading.Lock()  # the watcher's threads share one log
        self._marks: dict[str, object] = {}
        self.dropped = 0  # lines that nobody will ever see
        self._unsaid = 0  # those of them that no line has reported yet

    def mark(self, **values: object) -> None:
        """Put these values into every line from now on."""
        self._marks = self._marks | values

    def debug(self, event: str, **values: object) -> None:
        """Log a detail that only a search for a fault needs."""
        self._write("debug", event, values | self._marks)

    def info(self, event: str, **values: object) -> None:
        """Log a change."""
        self._write("info", event, values | self._marks)

    def warning(self, event: str, **values: object) -> None:
        """Log something that is not as it should be but is being dealt with."""
        self._write("warning", event, values | self._marks)

    def error(self, event: str, **values: object) -> None:
        """Log something that needs a person."""
        self._write("error", event, values | self._marks)

    def _write(self, level: Level, event: str, values: dict[str, object]) -> None:
        if _RANK[level] < self._least:
            return
        line = self._fitting(level, event, values)
        with self._lock:
            if self._unsaid:  # in one write with the line, so that it never comes alone
                count: dict[str, object] = {"count": self._unsaid}
                line = self._line("warning", "log_lines_dropped", count) + line
            if self._output.write(line):
                self._unsaid = 0
            else:
                self.dropped += 1
                self._unsaid += 1

    def _fitting(self, level: Level, event: str, values: dict[str, object]) -> bytes:
        """Return the line; in one that would be too long the longest values are cut, and named."""
        line = self._line(level, event, values)
        for left in _LEFT:
            if len(line) <= _LONGEST:
                break
            long = {k: text for k, v in values.items() if len(text := _text(v)) > left}
            shorter = {k: f"{text[:left]}..." for k, text in long.items()}
            line = self._line(level, event, values | shorter | {"cut": list(long)})
        return line

    def _line(self, level: Level, event: str, values: dict[str, object]) -> bytes:
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        if self._form == "json":
            head = {"ts": now, "level": level, "component": self._component, "event": event}
            line = _encode(head | values)
        else:
            # repr-like JSON values: a control character in a pod's name stays one line.
            rest = " ".join(f"{k}={_encode(v)}" for k, v in values.items())
            line = f"{now} {level.upper():7} {self._component}: {event} {rest}".rstrip()
        return f"{line}\n".encode()


def _text(value: object) -> str:
    return value if isinstance(value, str) else _encode(value)


def _encode(value: object) -> str:
    """Return JSON in printable ASCII.

    Terminals obey other control characters than JSON escapes: U+009B begins a sequence as ESC [
    does, U+0085 a line, U+202E turns the rest around.
    """
    return json.dumps(msgspec.to_builtins(value), separators=(",", ":")).replace("\x7f", "\\u007f")

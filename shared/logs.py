"""Logs: one object a line on standard output, `ts level component event` and what belongs to it."""

import contextlib
import json
import os
import sys
from datetime import UTC, datetime
from typing import Literal

import msgspec

Level = Literal["debug", "info", "warning", "error"]
_RANK: dict[str, int] = {"debug": 0, "info": 1, "warning": 2, "error": 3}


class Log:
    """Writes the log of one component; values may be anything that JSON can hold."""

    def __init__(self, component: str, level: Level, form: Literal["json", "text"]) -> None:
        self._component = component
        self._least = _RANK[level]
        self._form = form

    def debug(self, event: str, **values: object) -> None:
        """Log a detail that only a search for a fault needs."""
        self._write("debug", event, values)

    def info(self, event: str, **values: object) -> None:
        """Log a change."""
        self._write("info", event, values)

    def warning(self, event: str, **values: object) -> None:
        """Log something that is not as it should be but is being dealt with."""
        self._write("warning", event, values)

    def error(self, event: str, **values: object) -> None:
        """Log something that needs a person."""
        self._write("error", event, values)

    def _write(self, level: Level, event: str, values: dict[str, object]) -> None:
        if _RANK[level] < self._least:
            return
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        if self._form == "json":
            head = {"ts": now, "level": level, "component": self._component, "event": event}
            line = _encode(head | values)
        else:
            # repr-like JSON values: a control character in a pod's name stays one line.
            rest = " ".join(f"{k}={_encode(v)}" for k, v in values.items())
            line = f"{now} {level.upper():7} {self._component}: {event} {rest}".rstrip()
        with contextlib.suppress(OSError):  # nobody reads: enforcing goes on
            # One write a line: lines never mix.
            os.write(sys.stdout.fileno(), f"{line}\n".encode())


def _encode(value: object) -> str:
    """Return JSON in printable ASCII.

    Terminals obey other control characters than JSON escapes: U+009B begins a sequence as ESC [
    does, U+0085 a line, U+202E turns the rest around.
    """
    return json.dumps(msgspec.to_builtins(value), separators=(",", ":")).replace("\x7f", "\\u007f")

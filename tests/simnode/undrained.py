"""A standard output that nobody reads: a full pipe, until somebody drains it."""

from __future__ import annotations

import contextlib
import json
import os
import select
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

_LONGEST_SILENCE_S = 30.0


class Undrained:
    """What a container's standard output is behind a runtime that hangs; use it with `with`."""

    def __init__(self) -> None:
        self._reader, self.writer = os.pipe()
        os.set_blocking(self.writer, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(self.writer, b"\n" * select.PIPE_BUF)
        os.set_blocking(self.writer, True)  # the program inherits the flag

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        os.close(self._reader)
        os.close(self.writer)

    def drain(self) -> None:
        """Read what lies there, which is what filled it, and nothing of the program's."""
        got = b""
        while select.select([self._reader], [], [], 0)[0]:
            got += os.read(self._reader, 65536)
        assert not got.strip(b"\n"), f"it was not full: {got[-200:]!r}"

    def lines(self, enough: Callable[[list[dict[str, Any]]], bool]) -> list[dict[str, Any]]:
        """What the program writes from now on, as soon as it is `enough`."""
        got = b""
        while True:
            ended, _, _ = got.rpartition(b"\n")
            lines = [json.loads(line) for line in ended.splitlines()]
            if enough(lines):
                return lines
            assert select.select([self._reader], [], [], _LONGEST_SILENCE_S)[0], lines
            got += os.read(self._reader, 65536)

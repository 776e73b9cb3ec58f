"""Waits for a condition with a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_for(
    condition: Callable[[], T],
    timeout_s: float,
    what: str,
    *,
    poll_s: float = 0.05,
    on_timeout: Callable[[], object] = str,
) -> T:
    """The first true value of the condition; AssertionError with the last value otherwise."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {timeout_s:g} s: {value!r}\n{on_timeout()}")
        time.sleep(poll_s)

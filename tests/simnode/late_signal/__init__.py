"""A signal in the last moment before a program waits, when it looks for none any more."""

from __future__ import annotations

import signal
from pathlib import Path

from tests.simnode import native

SOURCES = Path(__file__).parent
BUILD = SOURCES.parents[2] / "build" / "late-signal"
NAME = "liblatesignal.so"


def environment(number: signal.Signals, longer_than_s: float) -> dict[str, str]:
    """What a program is started with, so that it comes before its first wait of that length."""
    return {
        "LD_PRELOAD": str(native.build_library(SOURCES, NAME, BUILD) / NAME),
        "LATE_SIGNAL": str(int(number)),
        "LATE_SIGNAL_MS": str(round(longer_than_s * 1000)),
    }

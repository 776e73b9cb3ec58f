"""A wall clock that a test sets, for the programs that are started with its environment."""

from __future__ import annotations

import os
import shutil
import struct
from pathlib import Path

from tests.simnode import native

SOURCES = Path(__file__).parent
BUILD = SOURCES.parents[2] / "build" / "simulated-clock"
NAME = "libsimclock.so"


class WallClock:
    """CLOCK_REALTIME, off by as much as it is told to be; every other clock runs as ever.

    With `monotonic` CLOCK_MONOTONIC jumps too: time passes, and nobody has to wait for it.
    """

    def __init__(self, folder: Path, *, monotonic: bool = False) -> None:
        """Keep all in `folder`, which every user must be able to reach."""
        self._monotonic = monotonic
        self._offset = folder / "offset"
        self.set(0)
        self._library = shutil.copy(native.build_library(SOURCES, NAME, BUILD) / NAME, folder)
        for path in (self._offset, Path(self._library)):
            path.chmod(0o755)

    @property
    def environment(self) -> dict[str, str]:
        every = {"SIM_CLOCK_ALL": "1"} if self._monotonic else {}
        return {"LD_PRELOAD": str(self._library), "SIM_CLOCK": str(self._offset), **every}

    def set(self, offset_s: int) -> None:
        """Let the clock jump: programs that run see it at once."""
        held = os.open(self._offset, os.O_RDWR | os.O_CREAT)
        try:
            os.pwrite(held, struct.pack("=q", offset_s), 0)  # they have this very file mapped
        finally:
            os.close(held)

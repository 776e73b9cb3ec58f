"""Builds the simulated NVML, a shared library under the real one's name."""

from __future__ import annotations

from pathlib import Path

from tests.simnode import native

SOURCES = Path(__file__).parent
BUILD = SOURCES.parents[2] / "build" / "simulated-nvml"
SONAME = "libnvidia-ml.so.1"


def build_library(into: Path | None = None) -> Path:
    """Return the folder for LD_LIBRARY_PATH."""
    return native.build_library(SOURCES, SONAME, into or BUILD)

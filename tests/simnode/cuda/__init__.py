"""Builds the simulated CUDA driver library: a program that makes a context is listed by NVML."""

from __future__ import annotations

from pathlib import Path

from tests.simnode import native

SOURCES = Path(__file__).parent
BUILD = SOURCES.parents[2] / "build" / "simulated-cuda"
SONAME = "libcuda.so.1"


def build_library() -> Path:
    """Return the folder for LD_LIBRARY_PATH."""
    return native.build_library(SOURCES, SONAME, BUILD)

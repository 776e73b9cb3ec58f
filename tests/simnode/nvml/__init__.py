"""Builds the simulated NVML, a shared library under the real one's name."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

SOURCES = Path(__file__).parent
BUILD = SOURCES.parents[2] / "build" / "simulated-nvml"
SONAME = "libnvidia-ml.so.1"
FLAGS = (
    *("-std=c11", "-O2", "-g", "-Wall", "-Wextra", "-Werror"),
    *("-shared", "-fPIC", "-fvisibility=hidden", "-pthread", f"-Wl,-soname,{SONAME}"),
)


def _compilers() -> Iterator[list[str]]:
    for name in ("cc", "gcc", "clang"):
        if shutil.which(name):
            yield [name]
    yield [sys.executable, "-m", "ziglang", "cc"]


def _compile(library: Path) -> None:
    sources = sorted(str(path) for path in SOURCES.glob("*.c"))
    complaints = []
    for compiler in _compilers():
        command = [*compiler, *FLAGS, "-o", str(library), *sources]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return
        complaints.append(f"{' '.join(compiler)}: {done.stderr.strip()}")
    remedy = "install a C compiler, or `pip install ziglang`"
    raise RuntimeError("cannot build the simulated NVML; " + remedy + "\n" + "\n".join(complaints))


def build_library(into: Path | None = None) -> Path:
    """Return the folder for LD_LIBRARY_PATH; compiles only what it has not compiled before."""
    digest = hashlib.sha256("\0".join(FLAGS).encode())
    for source in sorted(SOURCES.glob("*.[ch]")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    cache = into or BUILD
    folder = cache / digest.hexdigest()[:16]
    if (folder / SONAME).exists():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".building-") as scratch:
        fresh = Path(scratch) / "library"
        fresh.mkdir()
        _compile(fresh / SONAME)
        for path, mode in ((fresh, 0o755), (fresh / SONAME, 0o755)):
            path.chmod(mode)  # other uids load it too, whatever the umask
        try:
            fresh.rename(folder)
        except OSError:
            if not (folder / SONAME).exists():  # else a concurrent build was faster
                raise
    return folder

"""Compiles the shared libraries that stand in for parts of a node."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

_FLAGS = (
    *("-std=c11", "-O2", "-g", "-Wall", "-Wextra", "-Werror"),
    *("-shared", "-fPIC", "-fvisibility=hidden", "-pthread"),
)


def _compilers() -> Iterator[list[str]]:
    for name in ("cc", "gcc", "clang"):
        if shutil.which(name):
            yield [name]
    yield [sys.executable, "-m", "ziglang", "cc"]


def _compile(sources: Path, library: Path) -> None:
    files = sorted(str(path) for path in sources.glob("*.c"))
    complaints = []
    for compiler in _compilers():
        command = [*compiler, *_FLAGS, f"-Wl,-soname,{library.name}", "-o", str(library), *files]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return
        complaints.append(f"{' '.join(compiler)}: {done.stderr.strip()}")
    remedy = "install a C compiler, or `pip install ziglang`"
    raise RuntimeError(f"cannot build {library.name}; {remedy}\n" + "\n".join(complaints))


def build_library(sources: Path, name: str, cache: Path) -> Path:
    """Return the folder that holds `name`; compiles only what it has not compiled before."""
    digest = hashlib.sha256("\0".join(_FLAGS).encode())
    for source in sorted(sources.glob("*.[ch]")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    folder = cache / digest.hexdigest()[:16]
    if (folder / name).exists():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".building-") as scratch:
        fresh = Path(scratch) / "library"
        fresh.mkdir()
        _compile(sources, fresh / name)
        for path, mode in ((fresh, 0o755), (fresh / name, 0o755)):
            path.chmod(mode)  # other uids load it too, whatever the umask
        try:
            fresh.rename(folder)
        except OSError:
            if not (folder / name).exists():  # else a concurrent build was faster
                raise
    return folder

"""A place from which another user can start the watcher, also where the checkout lies in a home.

root's home is 0700: neither the checkout nor its virtual environment can be read by the watcher's
user there. Then what the watcher needs is put into a folder of its own, laid out as the image is:
an environment `watcher/` beside supervisord.conf.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from dataclasses import dataclass
from pathlib import Path

from tests.simnode.guardian import Guardian

StrPath = str | os.PathLike[str]
ROOT = Path(__file__).resolve().parents[2]
WATCHER_UID = 65532
_LOOKS = """\
import sys
from importlib.util import find_spec
import msgspec, zmq
assert find_spec("kubernetes")
assert all(find_spec(name).origin.startswith(sys.argv[1]) for name in ("watcher", "shared"))
open(sys.argv[1] + "/supervisord.conf").close()
"""


class UnreachableError(Exception):
    """No place will do; the text names the remedy."""


@dataclass(frozen=True)
class Installation:
    """The folder of supervisord.conf, and the interpreter that has the watcher."""

    home: Path
    watcher_python: Path


def watcher_uid() -> int:
    """Who the watcher runs as: another user where this one may change to it."""
    return WATCHER_UID if os.geteuid() == 0 else os.geteuid()


def as_user(uid: int) -> dict[str, object]:
    """What subprocess needs to start a program as `uid`, in no group but its own."""
    return {} if uid == os.geteuid() else {"user": uid, "group": uid, "extra_groups": []}


def base_folder() -> Path:
    """The folder for temporary files, if everyone can reach it."""
    wanted = [Path(tempfile.gettempdir()), *map(Path, ("/tmp", "/var/tmp", "/dev/shm"))]
    for folder in wanted:
        if os.access(folder, os.W_OK) and _open_to_all(folder.resolve()):
            return folder.resolve()
    raise UnreachableError(f"none of {', '.join(map(str, wanted))} can be reached by every user")


def _open_to_all(folder: Path) -> bool:
    return all(each.stat().st_mode & 0o001 for each in (folder, *folder.parents))


@functools.cache
def installation() -> Installation:
    """The checkout itself where the watcher's user can read it, else what it needs of it."""
    here = Installation(ROOT, Path(sys.executable))
    if _works(here):
        return here
    copy = _copy()
    if not _works(copy):
        raise UnreachableError(
            f"the watcher runs as user {WATCHER_UID}, who can start neither "
            f"{here.watcher_python} nor a copy of it in {copy.home}: set up with a Python outside "
            "of any home (make setup PYTHON=/usr/bin/python3), and let TMPDIR name a file system "
            "that is not noexec"
        )
    return copy


def _works(tried: Installation) -> bool:
    """Whether the watcher's user can start this checkout's watcher there."""
    with contextlib.suppress(OSError):
        looked = subprocess.run(
            [tried.watcher_python, "-I", "-c", _LOOKS, tried.home],
            cwd="/",
            capture_output=True,
            check=False,
            **as_user(watcher_uid()),  # type: ignore[call-overload]
        )
        return bool(looked.returncode == 0)
    return False


def _copy() -> Installation:
    """Lives as long as this process; one serves all its nodes."""
    guardian = Guardian()
    home = base_folder() / f"power-agent-sim-copy-{os.getpid()}-{os.urandom(4).hex()}"
    guardian.path(home)
    atexit.register(guardian.close)
    before = os.umask(0o022)
    try:
        _fill(home)
    finally:
        os.umask(before)
    return Installation(home, home / "watcher" / "bin" / "python")


def _fill(home: Path) -> None:
    home.mkdir()
    _put(ROOT / "supervisord.conf", home / "supervisord.conf")
    packages = _make_environment(home)
    for folder, target in (
        (ROOT / "deploy" / "supervised", home / "deploy" / "supervised"),
        (ROOT / "shared", packages / "shared"),
        (ROOT / "watcher", packages / "watcher"),
    ):
        _put_folder(folder, target, "__pycache__")
    locked = (ROOT / "deploy" / "lock" / "watcher.txt").read_text()
    for name in re.findall(r"^([\w.-]+)==", locked, re.MULTILINE):
        _put_distribution(name, packages)


def _make_environment(home: Path) -> Path:
    """`watcher/bin/python` in the new home; the folder where its packages go."""
    base, library = _base_python()
    if _open_to_all(base.parent) and _open_to_all(library):
        venv.EnvBuilder(symlinks=True).create(home / "watcher")
        return home / "watcher" / "lib" / library.name / "site-packages"
    # Python itself lies in a home: it finds its library beside itself wherever it is put, but
    # not always the shared one that it is linked to.
    own = home / "python"
    _put_folder(library, own / "lib" / library.name, "site-packages", "test", "config-*")
    for shared in Path(sys.base_prefix, "lib").glob("libpython*"):
        _put(shared, own / "lib" / shared.name)
    python = own / "bin" / base.name
    python.parent.mkdir()
    _put(base, python)
    linked = {"LD_LIBRARY_PATH": str(own / "lib")}
    make = [str(python), "-I", "-m", "venv", "--without-pip", str(home / "watcher")]
    subprocess.run(make, env=linked, check=True)
    start = home / "watcher" / "bin" / "python"
    versioned = start.with_name(library.name)
    start.unlink()
    start.write_text(f'#!/bin/sh\nLD_LIBRARY_PATH={own}/lib exec {versioned} "$@"\n')
    start.chmod(0o755)
    return home / "watcher" / "lib" / library.name / "site-packages"


def _base_python() -> tuple[Path, Path]:
    """The interpreter behind this environment, and its library."""
    base = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    return Path(base), Path(os.__file__).resolve().parent


def _put_folder(source: Path, target: Path, *left_out: str) -> None:
    shutil.copytree(source, target, copy_function=_put, ignore=shutil.ignore_patterns(*left_out))
    for each in (target, *target.rglob("*/")):
        each.chmod(0o755)  # copytree takes the modes of the originals


def _put_distribution(name: str, packages: Path) -> None:
    try:
        files = importlib.metadata.files(name) or []
    except importlib.metadata.PackageNotFoundError:
        return  # locked for another platform
    for file in files:
        if ".." not in file.parts:
            target = packages / file
            target.parent.mkdir(parents=True, exist_ok=True)
            _put(file.locate(), target)


def _put(source: StrPath, target: StrPath) -> None:
    """The same file under another name if everyone may read it, else a copy that everyone may."""
    mode = Path(source).stat().st_mode
    if mode & 0o004:
        with contextlib.suppress(OSError):  # another file system
            os.link(source, target)
            return
    shutil.copyfile(source, target)
    Path(target).chmod(0o755 if mode & 0o100 else 0o644)

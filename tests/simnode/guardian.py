"""Removes what a simulated node leaves behind, also when that is killed.

This file is two things: `Guardian`, the node's end, and the program that it starts. The program
waits for the end of its standard input, which is the node's end whichever way it comes, ends
every process of the sessions it was told of, and removes what it was told to. It needs nothing
but the standard library, and ignores the signals of a terminal.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

_PATIENCE_S = 15.0


class Guardian:
    """Knows what must not outlive this process."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(Path(__file__).resolve())],
            cwd="/",
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )

    def session(self, leader: int) -> None:
        """Every process of this session, whose leader was started by this node."""
        self._tell("session", leader)

    def session_ended(self, leader: int) -> None:
        """Its number may soon be somebody else's."""
        self._tell("session_ended", leader)

    def cgroup(self, path: Path) -> None:
        """This cgroup with all below it, processes included. May not exist yet."""
        self._tell("cgroup", str(path))

    def path(self, path: Path) -> None:
        """This file or folder with all below it. May not exist yet."""
        self._tell("path", str(path))

    def _tell(self, kind: str, what: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([kind, what]).encode() + b"\n")
        self._process.stdin.flush()

    def close(self) -> None:
        """Returns when everything is gone; raises OSError if something could not be removed."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        if self._process.wait() != 0:
            raise OSError("the simulated node could not remove all it made, see above")


# ---------------------------------------------------------------------- the program


def members(sessions: Iterable[int], cgroups: Iterable[Path]) -> Iterator[int]:
    """The living processes of these sessions and cgroups."""
    wanted = {str(session).encode() for session in sessions}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                # After the name, which may hold anything: state ppid pgrp session (proc(5)).
                fields = (entry / "stat").read_bytes().rpartition(b")")[2].split()
                if fields[3] in wanted and fields[0] not in (b"Z", b"X"):
                    yield int(entry.name)
    for cgroup in cgroups:
        for folder in (cgroup, *_below(cgroup)):
            with contextlib.suppress(OSError):
                yield from map(int, (folder / "cgroup.procs").read_text().split())


def _below(cgroup: Path) -> list[Path]:
    """Deepest first."""
    return [Path(folder) for folder, _, _ in os.walk(cgroup, topdown=False)]


def _remove(cgroups: Iterable[Path], paths: Iterable[Path]) -> list[str]:
    """Tells what is still there."""
    left = []
    for cgroup in cgroups:
        for folder in _below(cgroup):
            with contextlib.suppress(OSError):
                folder.rmdir()
        left += [str(cgroup)] * cgroup.exists()
    for path in paths:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            shutil.rmtree(path)
        with contextlib.suppress(FileNotFoundError, IsADirectoryError, PermissionError):
            path.unlink()
        left += [str(path)] * path.exists()
    return left


def clean(sessions: set[int], cgroups: list[Path], paths: list[Path]) -> list[str]:
    """End and remove everything; tells what would not go."""
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        pids = list(members(sessions, cgroups))
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        left = [f"process {pid}" for pid in pids]
        if not pids:
            with contextlib.suppress(OSError):  # something still wrote into it: once more
                left = _remove(cgroups, paths)
                if not left:
                    return []
        if time.monotonic() > deadline:
            return left or [str(path) for path in paths if path.exists()]
        time.sleep(0.005)


def main() -> int:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    sessions: set[int] = set()
    cgroups: list[Path] = []
    paths: list[Path] = []
    for line in sys.stdin:
        kind, what = json.loads(line)
        if kind == "session":
            sessions.add(what)
        elif kind == "session_ended":
            sessions.discard(what)
        else:
            (cgroups if kind == "cgroup" else paths).append(Path(what))
    left = clean(sessions, cgroups, paths)
    if left:
        sys.stderr.write(f"simulated node: could not remove {', '.join(left)}\n")
    return bool(left)


if __name__ == "__main__":
    sys.exit(main())

"""The agent's own processes on this node, as proc shows them; needs root for what others run."""

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Running:
    """A process of the agent; what cannot be read of it is empty."""

    pid: int
    uid: int | None
    state: str  # one letter, as in proc_pid_stat(5): R, S, D (waits in the kernel), T (stopped)
    environment: Mapping[str, str]

    def setting(self, name: str, default: str) -> str:
        """Return a variable of its environment, or the default where it is not set."""
        return self.environment.get(name) or default


def running(proc: Path, program: str) -> list[Running]:
    """Return the processes of `enforcer` or `watcher`; none where they cannot be seen."""
    return [_of(folder) for folder in _folders(proc) if _is(folder, program)]


def _folders(proc: Path) -> Iterator[Path]:
    try:
        yield from sorted(
            (folder for folder in proc.iterdir() if folder.name.isdigit()),
            key=lambda folder: int(folder.name),
        )
    except OSError:
        return


def _is(folder: Path, program: str) -> bool:
    """Tell whether it is `python -m PROGRAM` or the console script `power-agent-PROGRAM`."""
    words = text(folder / "cmdline").split("\0")
    module = any(pair == ("-m", program) for pair in itertools.pairwise(words))
    script = f"power-agent-{program}"
    return module or any(word.rpartition("/")[2] == script for word in words[:2])


def _of(folder: Path) -> Running:
    status = text(folder / "status")
    uid = re.search(r"^Uid:\s*\d+\s+(\d+)", status, re.M)
    state = re.search(r"^State:\s*(\S)", status, re.M)
    return Running(
        pid=int(folder.name),
        uid=int(uid[1]) if uid else None,
        state=state[1] if state else "",
        environment=environment_of(folder),
    )


def environment_of(folder: Path) -> dict[str, str]:
    """Return the variables with which the process of this folder was started, if they are seen."""
    pairs = (entry.partition("=") for entry in text(folder / "environ").split("\0"))
    return {name: value for name, sign, value in pairs if sign}


def holder(proc: Path, lock: Path) -> int | None:
    """Return who holds a lock of flock(2) on a file, None where nobody does or it is not seen.

    A line of proc_locks(5) is `1: FLOCK  ADVISORY  WRITE 1234 fd:01:5678 0 EOF`. Where it waits,
    `->` stands before the kind. A device's number is not that of stat(2) on every file system, so
    the inode has to do.
    """
    try:
        inode = lock.stat().st_ino
    except OSError:
        return None
    for line in text(proc / "locks").splitlines():
        words = line.split()
        if len(words) > 5 and words[1] == "FLOCK" and words[5].rpartition(":")[2] == str(inode):
            return int(words[4])
    return None


def text(path: Path) -> str:
    """Return what a file of proc says, nothing where it cannot be read."""
    try:
        return path.read_text(errors="backslashreplace")
    except OSError:
        return ""

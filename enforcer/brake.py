"""The brake: what a person on the node has ordered by two files beside the ledger. It only reads.

| file      | while it is there                                                                |
|-----------|----------------------------------------------------------------------------------|
| `pause`   | no limit of this node is written, at a stop neither; its text says why           |
| `release` | each GPU whose UUID begins a line of it is given back and left alone; the rest   |
|           | of the line says why                                                             |

Only root of the node can write there. No message can give such an order, so a watcher cannot.
"""

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

PAUSE = "pause"
RELEASE = "release"
_MAX_BYTES = 8192
_MAX_LINES = 64
_WHY_CHARS = 200


@dataclass(frozen=True, slots=True)
class Orders:
    """What is ordered: why nothing may be written (None: it may), and why by UUID of a GPU."""

    paused: str | None = None
    released: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """Return what holds by them, in words."""
        said = []
        if self.paused is not None:
            said.append(f"{self.words}: no limit of this node is written, at a stop neither")
        if self.released:
            said.append(f"to be given back and left alone: {', '.join(self.released)}")
        return "; ".join(said) or "nothing is paused or kept free of limits any more"

    @property
    def words(self) -> str:
        """How a reason says that it is paused."""
        return f"paused ({self.paused})" if self.paused else "paused"


class Brake:
    """Looks at both files."""

    def __init__(self, state_dir: Path) -> None:
        """Prepare; nothing is read before `look`."""
        self._pause = _File(state_dir / PAUSE)
        self._release = _File(state_dir / RELEASE)

    def look(self) -> Orders:
        """Return what is ordered now; where that cannot be told, what was known last."""
        paused, release = self._pause.text(), self._release.text()
        return Orders(None if paused is None else _why(paused), _by_uuid(release or ""))


class _File:
    """One file, read again only when it has changed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp: tuple[int, int, int] | None = None
        self._text: str | None = None

    def text(self) -> str | None:
        """Return what it says, None where it is not there.

        What is there counts also where it has no text: a folder, a link, or a disk that fails.
        """
        try:
            found = os.lstat(self._path)
        except FileNotFoundError:
            self._stamp = self._text = None
            return None
        except OSError:
            return self._text
        stamp = (found.st_ino, found.st_mtime_ns, found.st_size)
        if stamp != self._stamp:
            self._read_anew(stamp, stat.S_ISREG(found.st_mode))
        return self._text

    def _read_anew(self, stamp: tuple[int, int, int], is_file: bool) -> None:
        try:
            self._text = self._content() if is_file else ""
            self._stamp = stamp
        except OSError:  # too many open files, a disk that fails: tried again at the next look
            self._text = self._text or ""

    def _content(self) -> str:
        descriptor = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            return file.read(_MAX_BYTES).decode(errors="replace")


def _why(text: str) -> str:
    return " ".join(text.split())[:_WHY_CHARS]


def _by_uuid(text: str) -> dict[str, str]:
    found = [line.split(maxsplit=1) for line in text.splitlines()[:_MAX_LINES] if line.strip()]
    return {words[0][:_WHY_CHARS]: _why(" ".join(words[1:])) for words in found}

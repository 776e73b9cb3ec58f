"""Text in the width of a terminal: lines that wrap, tables that fit; knows no message."""

import re
import shutil
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

Paint = Callable[[str, str], str]

# Where there is no terminal to ask, as in `kubectl exec` without -t.
WIDTH = 100
# Nothing readable comes of fewer columns.
_LEAST = 30
# How much of a name in the last column must fit into one line, before columns are left out.
_NAME = 36
_GAP = "  "
# A blank at which no line ends: textwrap breaks at those of ASCII alone.
STICKY = "\xa0"
_UNIT = re.compile(r"(?<=[0-9]) (?=(?:W|ms|s|min|h|d)\b)")

_COLOURS = {
    "managed": "32",
    "enforced": "32",
    "ok": "32",
    "clamped": "33",
    "conflict": "33",
    "waiting": "33",
    "invalid": "1;33",
    "warn": "33",
    "held": "1;33",
    "failed": "1;31",
    "lost": "1;31",
    "fail": "1;31",
}


def plain(text: str, _state: str) -> str:
    """Return `text` as it is."""
    return text


def coloured(text: str, state: str) -> str:
    """Return `text` in the colour of `state`, for terminals."""
    colour = _COLOURS.get(state)
    return f"\x1b[{colour}m{text}\x1b[0m" if colour else text


def terminal_width() -> int:
    """Return the columns of standard output's terminal; COLUMNS, where set, says otherwise."""
    return max(_LEAST, shutil.get_terminal_size((WIDTH, 24)).columns)


def wrapped(text: str, width: int, first: str = "", rest: str | None = None) -> list[str]:
    """Return `text` in lines that begin with `first`, then `rest` (as much blank space)."""
    rest = " " * len(first) if rest is None else rest
    width = max(width, len(rest) + 8)
    lines = textwrap.wrap(
        _in_pieces(_UNIT.sub(STICKY, text), max(8, width - max(len(first), len(rest)))),
        width,
        initial_indent=first,
        subsequent_indent=rest,
        break_on_hyphens=False,
    )
    return [line.replace(STICKY, " ") for line in lines] or [first.rstrip()]


def _in_pieces(text: str, room: int) -> str:
    """Return `text` with paths that are longer than a line divided behind a slash."""
    return " ".join(" ".join(_pieces(word, room)) for word in text.split(" "))


def _pieces(word: str, room: int) -> list[str]:
    """Return the parts of a word, each as long as fits, so that no two fit into one line."""
    parts = []
    while len(word) > room and (cut := word.rfind("/", 1, room) + 1):
        parts.append(word[:cut])
        word = word[cut:]
    return [*parts, word]


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table. Where it is narrow, the column with the lowest `keep` goes first."""

    heading: str
    right: bool = False
    keep: int | None = None  # None: it always stays


@dataclass(frozen=True, slots=True)
class Table:
    """A table that fits: the lines of each row (the heading is the first), and what was left out.

    The last column wraps below itself.
    """

    rows: list[list[str]]
    left_out: list[str]


def table(
    columns: Sequence[Column], rows: Sequence[Sequence[str]], state: int, paint: Paint, width: int
) -> Table:
    """Return `rows` aligned within `width`; the cells of column `state` are painted."""
    cells = [[column.heading for column in columns], *map(list, rows)]
    widths = [max(len(row[number]) for row in cells) for number in range(len(columns))]
    word = max(len(word) for row in cells for word in row[-1].split(" "))
    shown = _that_fit(columns, widths, min(word, _NAME), width)
    lines = []
    for row in cells:
        head = []
        for number in shown[:-1]:
            cell, wide = row[number], widths[number]
            padded = cell.rjust(wide) if columns[number].right else cell.ljust(wide)
            head.append(paint(padded, cell) if number == state else padded)
        before = sum(widths[number] + len(_GAP) for number in shown[:-1])
        first, *more = wrapped(row[-1], max(8, width - before)) if row[-1] else [""]
        lines.append([_GAP.join([*head, first]).rstrip(), *(" " * before + line for line in more)])
    left_out = [column.heading for number, column in enumerate(columns) if number not in shown]
    return Table(lines, left_out)


def _that_fit(columns: Sequence[Column], widths: list[int], last: int, width: int) -> list[int]:
    """Return the columns to show so that the last one has `last` characters."""
    shown = list(range(len(columns)))
    while True:
        before = sum(widths[number] + len(_GAP) for number in shown[:-1])
        may_go = [number for number in shown if columns[number].keep is not None]
        if before + last <= width or not may_go:
            return shown
        shown.remove(min(may_go, key=lambda number: columns[number].keep or 0))


def ranges(numbers: Iterable[int]) -> str:
    """Return whole numbers as people write many of them: 0-3,6."""
    text: list[list[int]] = []
    for number in sorted(set(numbers)):
        if text and number == text[-1][-1] + 1:
            text[-1] = [text[-1][0], number]
        else:
            text.append([number])
    return ",".join("-".join(map(str, each)) for each in text)

"""Figures: samples of one thing, what was promised of them, and how people and programs read both.

Pure. A percentile is a value that was measured (nearest rank), never one between two.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Statistic = Literal["p50", "p99", "max", "mean"]
STATISTICS: tuple[Statistic, ...] = get_args(Statistic)


def percentile(samples: Sequence[float], percent: float) -> float:
    """The least sample that so many percent of all do not exceed."""
    rank = max(1, math.ceil(len(samples) * percent / 100))
    return sorted(samples)[rank - 1]


@dataclass(frozen=True)
class Figure:
    """One row: `at_most` holds the bounds it is judged by, in its own unit."""

    what: str
    unit: str
    samples: Sequence[float]
    at_most: Mapping[Statistic, float] = field(default_factory=dict)

    def value(self, statistic: Statistic) -> float:
        match statistic:
            case "p50":
                return percentile(self.samples, 50)
            case "p99":
                return percentile(self.samples, 99)
            case "max":
                return max(self.samples)
            case "mean":
                return statistics.fmean(self.samples)

    def over(self) -> list[Statistic]:
        """The bounds that do not hold."""
        return [name for name, bound in self.at_most.items() if self.value(name) > bound]

    def as_json(self) -> dict[str, Any]:
        return {
            "what": self.what,
            "unit": self.unit,
            "trials": len(self.samples),
            **{name: round(self.value(name), 4) for name in STATISTICS},
            "at_most": dict(self.at_most),
            "over": self.over(),
        }


def table(figures: Sequence[Figure]) -> list[str]:
    """Aligned lines, the first of them the heading."""
    rows = [["what", "unit", "trials", *STATISTICS, "at most", ""]]
    for figure in figures:
        values = [_short(figure.value(name)) for name in STATISTICS]
        bounds = ", ".join(f"{name} {bound:g}" for name, bound in figure.at_most.items())
        verdict = "over" if figure.over() else "ok" if figure.at_most else ""
        rows.append([figure.what, figure.unit, str(len(figure.samples)), *values, bounds, verdict])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    texts = {0, 1, 7, 8}
    return [
        "  ".join(
            cell.ljust(width) if column in texts else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def verdict(figures: Sequence[Figure]) -> str:
    """One line that names what is over."""
    over = [
        f"{figure.what}: {name} {_short(figure.value(name))} {figure.unit}, "
        f"at most {figure.at_most[name]:g}"
        for figure in figures
        for name in figure.over()
    ]
    return f"over: {'; '.join(over)}" if over else "over: nothing"


def _short(value: float) -> str:
    """Three digits that count."""
    if value == 0:
        return "0"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"

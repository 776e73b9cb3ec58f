"""`python -m tests.bench [PART ...]`: measures, prints a table, names what is over.

Speed is never an assertion: the exit status is 0 unless something broke.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from tests.bench import machine
from tests.bench.figures import Figure, table, verdict
from tests.bench.parts import PARTS, SkippedError


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parts = "\n".join(f"  {name:12} {part.about}" for name, part in PARTS.items())
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench",
        description="Measures Power Agent on a simulated node, on two cores of this machine.",
        epilog=f"parts:\n{parts}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help="only these; all where none is")
    parser.add_argument("--quick", action="store_true", help="few trials: no percentiles to quote")
    parser.add_argument("--json", action="store_true", help="for programs")
    chosen = parser.parse_args(argv)
    if unknown := sorted(set(chosen.parts) - PARTS.keys()):
        parser.error(f"no part {', '.join(unknown)}; there are: {', '.join(PARTS)}")
    return chosen


def main(argv: Sequence[str] | None = None) -> int:
    chosen = _arguments(argv)
    machine.use_two_cores()
    load_before = os.getloadavg()[0]
    figures: list[Figure] = []
    skipped: dict[str, str] = {}
    for name in chosen.parts or PARTS:
        part = PARTS[name]
        trials = part.quick if chosen.quick else part.trials
        sys.stderr.write(f"{name}: {part.about}, {trials} trials\n")
        try:
            figures += part.measure(trials)
        except SkippedError as reason:
            skipped[name] = str(reason)
    facts = machine.facts() | {"load": machine.load(load_before)}
    if chosen.json:
        print(json.dumps(_as_json(facts, figures, skipped), indent=2))
    else:
        _print(facts, figures, skipped)
    return 0


def _as_json(
    facts: dict[str, str], figures: Sequence[Figure], skipped: dict[str, str]
) -> dict[str, Any]:
    rows = [figure.as_json() for figure in figures]
    return {"machine": facts, "figures": rows, "skipped": skipped}


def _print(facts: dict[str, str], figures: Sequence[Figure], skipped: dict[str, str]) -> None:
    print(*(f"{name}: {value}" for name, value in facts.items()), sep="\n", end="\n\n")
    print(*table(figures), sep="\n", end="\n\n")
    for name, reason in skipped.items():
        print(f"skipped {name}: {reason}")
    print(verdict(figures))


if __name__ == "__main__":
    sys.exit(main())

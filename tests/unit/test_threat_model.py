"""docs/threat-model.md names a test for each of its claims, and each of them exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs/threat-model.md").read_text()


def evidence() -> dict[str, list[str]]:
    """Each row of each table with a column `shown by`, and the names in that column."""
    found: dict[str, list[str]] = {}
    for table in re.findall(r"(?:^\|.*\n)+", TEXT, re.MULTILINE):
        head, _, *rows = table.splitlines()
        if head.endswith("| shown by |"):
            found |= {row: re.findall(r"`([^`]+)`", row.rsplit("|", 2)[1]) for row in rows}
    return found


def functions() -> set[str]:
    return {
        node.name
        for path in (ROOT / "tests").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    }


def test_each_claim_names_its_evidence() -> None:
    rows = evidence()
    assert len(rows) > 40
    assert [row for row, names in rows.items() if not names] == []


def test_what_it_names_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    known = functions() | {f"make {target}" for target in targets}
    named = {name for names in evidence().values() for name in names}
    assert named - known == set()

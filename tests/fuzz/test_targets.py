"""Each target for a short while: its corpus, changes of it, and any bytes."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from enforcer.ledger import Ledger
from tests.fuzz.mutation import mutated
from tests.fuzz.targets import BOOT, LIST, TARGETS, seeds, step_through

# `make fuzz` plays at length; here it is shown that each target still runs and finds the crude.
EXAMPLES = {"ledger": 100}  # files for each


@pytest.mark.parametrize("target", TARGETS)
def test_the_corpus(target: str) -> None:
    found = seeds(target)
    assert len(found) >= 3
    for seed in found:
        TARGETS[target](seed)


@pytest.mark.parametrize("target", TARGETS)
def test_changes_of_the_corpus(target: str) -> None:
    corpus = seeds(target)

    @settings(max_examples=EXAMPLES.get(target, 400), deadline=None, database=None)
    @given(st.integers(0, 2**64))
    def changed(seed: int) -> None:
        TARGETS[target](mutated(random.Random(seed), corpus))

    changed()


@pytest.mark.parametrize("target", TARGETS)
def test_any_bytes(target: str) -> None:
    @settings(max_examples=100, deadline=None, database=None)
    @given(st.binary(max_size=300))
    @example(b"")
    def anything(data: bytes) -> None:
        TARGETS[target](data)

    anything()


LONG_VERSION = b'{"type":"BOOKMARK","object":{"metadata":{"resourceVersion":"%s"}}}' % (b"9" * 5000)
DEEP = b'{"type":"ADDED","object":{"x":%s}}' % (b"[" * 5000)


@pytest.mark.parametrize("line", [LONG_VERSION, DEEP], ids=["long-version", "deep"])
def test_what_an_api_server_may_answer_is_an_api_error(line: bytes) -> None:
    """Only the top of the thread catches it, as an internal error, and lists for each."""
    step_through([LIST], [line + b"\n"], lambda _pods, _at: None)


def test_a_damaged_ledger_that_is_nested_is_moved_aside(tmp_path: Path) -> None:
    nested = b'{"version": 1, "boot_id": "%s", "gpus": {}, "x": %s}' % (BOOT.encode(), b"[" * 5000)
    (tmp_path / "ledger.json").write_bytes(nested)
    ledger = Ledger(tmp_path, BOOT)
    try:
        assert ledger.load()
    finally:
        ledger.close()

"""What the tests of whole processes share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.simnode.node import FAST, SimNode

MakeNode = Callable[..., SimNode]


@pytest.fixture
def make_node() -> Iterator[MakeNode]:
    """Makes nodes on the embedded API that end with the test."""
    with ExitStack() as stack:

        def make(*, settings: dict[str, str] | None = None, **options: object) -> SimNode:
            chosen = {"real_api": False, "settings": FAST | (settings or {}), **options}
            return stack.enter_context(SimNode(**chosen))  # type: ignore[arg-type]

        yield make


@pytest.fixture
def node(make_node: MakeNode) -> SimNode:
    """Two GPUs, both programs running."""
    return make_node()

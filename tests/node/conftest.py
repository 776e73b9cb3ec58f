"""What the tests of whole processes share."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.simnode.node import SimNode

# Processes are looked for ten times a second, so that a test need not wait a second for each.
FAST = {"POWER_AGENT_SCAN_SECONDS": "0.1", "POWER_AGENT_RECONCILE_SECONDS": "0.5"}

MakeNode = Callable[..., SimNode]


@pytest.fixture
def make_node() -> Iterator[MakeNode]:
    """Makes nodes on the embedded API that end with the test."""
    nodes: list[SimNode] = []

    def make(*, settings: dict[str, str] | None = None, **options: object) -> SimNode:
        chosen = {"real_api": False, "settings": FAST | (settings or {}), **options}
        node = SimNode(**chosen)  # type: ignore[arg-type]
        nodes.append(node.__enter__())
        return node

    yield make
    for node in nodes:
        node.close()


@pytest.fixture
def node(make_node: MakeNode) -> SimNode:
    """Two GPUs, both programs running."""
    return make_node()

"""What the tests of whole processes share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from tests.simnode.kubeapi import KubeApi
from tests.simnode.node import FAST, SimNode

MakeNode = Callable[..., SimNode]


def _embedded(settings: dict[str, str] | None = None, **options: Any) -> SimNode:  # noqa: ANN401
    return SimNode(**{"real_api": False, "settings": FAST | (settings or {}), **options})


@pytest.fixture
def make_node() -> Iterator[MakeNode]:
    """Makes nodes on the embedded API that end with the test."""
    with ExitStack() as stack:

        def make(**options: Any) -> SimNode:  # noqa: ANN401
            return stack.enter_context(_embedded(**options))

        yield make


class Lent:
    """One node after another: whoever cannot put it back as it was takes it out of use."""

    def __init__(self) -> None:
        self._node: SimNode | None = None

    def node(self) -> SimNode:
        if self._node is None:
            self._node = _embedded().__enter__()
        return self._node

    def back(self) -> None:
        node = self.node()
        try:
            as_at_the_start(node)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._node is not None:
            self._node.close()
            self._node = None


def as_at_the_start(node: SimNode) -> None:
    """Nothing is left of a test but the counters; fails where the agent gives a GPU not back."""
    assert isinstance(node.api, KubeApi)
    node.api.come_back()
    node.api.clear_faults()
    node.workers.end_all()
    node.api.remove_pods()
    node.pods.clear()
    node.gpus.clear_faults()
    for program in ("enforcer", "watcher"):
        if not node.programs[program].alive():
            node.programs[program].start()
    node.wait_for_link()
    node.wait_for(lambda: _nothing_left(node), "every GPU given back")
    for gpu in node.gpus:
        gpu.limit_mw = gpu.default_mw
    node.gpus.forget_sets()
    node.api.reset_counts()


def _nothing_left(node: SimNode) -> bool:
    status = node.status()
    return not status.pods and not any(gpu.managed or gpu.processes for gpu in status.gpus)


@pytest.fixture(scope="module")
def lent() -> Iterator[Lent]:
    lent = Lent()
    yield lent
    lent.close()


@pytest.fixture
def node(lent: Lent) -> Iterator[SimNode]:
    """Two GPUs, both programs running; the same ones for all tests of a file."""
    yield lent.node()
    lent.back()

"""A container that has lost its devices, under the real process, whose clock jumps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.node.enforcer_harness import EnforcerNode, pod_uid
from tests.simnode.clock import WallClock
from tests.waiting import ended, until

A = pod_uid(1)
UNKNOWN = 999


@pytest.fixture
def clock(tmp_path: Path) -> WallClock:
    return WallClock(tmp_path, monotonic=True)


@pytest.fixture
def node(clock: WallClock) -> Iterator[EnforcerNode]:
    with EnforcerNode() as made:
        made.settings |= clock.environment
        yield made.start()


def lose_devices(node: EnforcerNode) -> None:
    """Refuse every init from now on, and let the one that is open be given up for a lost GPU."""
    node.gpus.fault("nvmlInit", error=UNKNOWN)
    node.gpus[1].vanish()
    until(lambda: node.status().enforcer.nvml == "failing", "NVML is refused")


def test_it_ends_with_status_1_and_says_why_and_the_next_one_adopts(
    node: EnforcerNode, clock: WallClock
) -> None:
    node.run_pod(A)
    node.snapshot({A: 300})
    lose_devices(node)
    assert node.process is not None
    clock.set(170)
    node.looks()
    assert node.process.poll() is None, "it may be a driver that is exchanged"
    clock.set(400)
    assert ended(node.process) == 1
    (line,) = node.errors().splitlines()
    assert "systemctl daemon-reload" in line
    assert "nvmlInit" in line
    assert [said["level"] for said in node.logs("ended")] == ["error"]
    assert node.owned() == {node.gpus[0].uuid: 700_000}
    assert node.limit() == 300
    node.gpus.clear_faults()  # the new container has its devices
    node.start()
    node.snapshot({A: 310})
    node.wait_limit(310)


def test_a_stop_meanwhile_is_an_ordinary_one(node: EnforcerNode) -> None:
    lose_devices(node)
    assert node.stop() == 0

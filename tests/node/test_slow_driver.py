"""A driver that takes long to open, as where persistence mode is off, under the whole process."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.node.enforcer_harness import REPOSITORY, EnforcerNode
from tests.waiting import HANG_S, until


def powerctl(node: EnforcerNode, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "shared.powerctl", *arguments, "--socket", str(node.run_dir)],
        cwd=REPOSITORY,
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
        timeout=HANG_S,
    )


def wait_closed(node: EnforcerNode) -> None:
    """Wait until nothing on the node has NVML open: the enforcer lets go after five seconds."""
    until(lambda: not node.gpus.open_by(), "NVML is let go")


@pytest.mark.parametrize("what", ["status", "doctor", "explain"])
def test_a_question_on_an_idle_node_waits_for_the_driver_and_says_so(what: str) -> None:
    with EnforcerNode() as node:
        node.start()
        wait_closed(node)
        node.gpus.fault("nvmlInit", delay_ms=3500)
        done = powerctl(node, what, "--json", *(["0"] if what == "explain" else []))
        assert done.returncode in (0, 1), done.stderr
        assert node.gpus[0].uuid in done.stdout or what == "doctor"
        assert json.loads(done.stdout)
        assert "it may be opening NVML" in done.stderr


def test_a_question_with_a_time_of_its_own_waits_no_longer() -> None:
    with EnforcerNode() as node:
        node.start()
        wait_closed(node)
        node.gpus.fault("nvmlInit", delay_ms=3500)
        done = powerctl(node, "status", "--timeout", "1")
        assert done.returncode == 3
        assert "gave no answer within 1 s" in done.stderr

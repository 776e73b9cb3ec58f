"""Persistence mode off, under the whole process: slow to open, and limits are forgotten."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.node.enforcer_harness import REPOSITORY, EnforcerNode, pod_uid
from tests.waiting import HANG_S, until

A = pod_uid(1)


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


def test_a_killed_enforcers_forgotten_limit_comes_back_and_the_doctor_says_what_it_costs() -> None:
    with EnforcerNode() as node:
        node.gpus[0].persistence = False
        node.start()
        worker = node.run_pod(A)
        node.snapshot({A: 300})
        assert node.limit() == 300
        node.end(worker)
        node.kill()
        node.start()
        node.snapshot({A: 300})
        node.wait_limit(300)
        assert node.status().counters.drifts == 0
        assert node.gpu().writes == {"adjust": 1}
        assert "persistence mode is off" in node.logs("limit_set")[-1]["why"]
        assert node.owned() == {node.gpus[0].uuid: 700_000}
        checks = json.loads(powerctl(node, "doctor", "--json").stdout)["checks"]
        (check,) = (check for check in checks if check["name"] == "persistence mode")
        assert (check["result"], check["seen"]) == ("warn", "off on GPU 0")
        assert "a limit is forgotten" in check["remedy"]
        assert "nvidia-smi -pm 1" in check["remedy"]

"""The alerts of nights in which no board breaks, with a real Prometheus: who else is there."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.prometheus.server import SCRAPE_S, Prometheus, hurried
from tests.prometheus.test_night import FILES, Night, began, said
from tests.simnode.node import FAST, SimNode
from tests.simnode.reachable import as_user
from tests.waiting import until

MISMATCH = 18  # NVML_ERROR_LIB_RM_VERSION_MISMATCH
NOBODY = 40_123
# Two minutes are a second: the longest wait of a rule is half an hour.
SHORTER = 120
KNOCKS = """
import socket, sys, time
while True:
    with socket.socket(socket.AF_UNIX) as knocking:
        knocking.connect(sys.argv[1])
        knocking.recv(1)
    time.sleep(0.1)
"""


@pytest.fixture
def night(programs: Path, tmp_path: Path) -> Iterator[Night]:
    rules = hurried((FILES / "rules.yaml").read_text(), SHORTER)
    with (
        SimNode(gpus=2, real_api=False, api={"bookmark_interval_s": 1.0}, settings=FAST) as node,
        Prometheus(programs, tmp_path, node.metrics_port, rules) as prometheus,
    ):
        yield Night(node, prometheus)


def somebody_else_writes(night: Night, gpu: int) -> None:
    board = night.node.gpus[gpu]
    for _ in range(8):
        board.limit_mw = board.max_mw
        night.node.wait_for_limit(gpu, 350)


def restart_the_enforcer(night: Night) -> None:
    night.node.kill_enforcer()
    night.node.start_enforcer()
    started = night.node.wait_for_link().enforcer.started_ts or 0.0
    query = f"power_agent_start_time_seconds{{component='enforcer'}} > {started - 0.5}"
    until(lambda: night.prometheus.query(query), "a scrape of the new one", poll_s=SCRAPE_S / 5)


def test_who_else_is_there(night: Night) -> None:
    node = night.node
    for number, name in enumerate(("throttled", "rewritten")):
        night.pods[name] = node.add_pod(name, limit=350, gpus=[number])
        node.wait_for_limit(number, 350)
    assert night.firing() == set()

    night.pods["idle"] = node.add_pod("idle", limit=350)
    node.gpus[0].enforced_cap_mw = node.gpus[0].min_mw
    somebody_else_writes(night, 1)
    # It ends by itself, a quarter of an hour after the last time.
    alerts = night.wait_for("AnotherWriter")
    assert node.gpus[1].uuid in said(alerts["PowerAgentAnotherWriter"])
    alerts = night.wait_for("AnotherLimiter", "PodWaits")
    assert node.gpus[0].uuid in said(alerts["PowerAgentAnotherLimiter"])
    assert "default/idle has been found on node-a" in said(alerts["PowerAgentPodWaits"])
    assert night.firing() <= {"AnotherWriter", "AnotherLimiter", "PodWaits"}

    node.gpus[0].enforced_cap_mw = None
    node.add_worker(night.pods["idle"], [1])
    night.wait_without("AnotherWriter", "AnotherLimiter", "PodWaits")


def test_a_paused_node_whose_programs_come_and_go(night: Night) -> None:
    node = night.node
    pause = node.state_dir / "pause"
    pause.write_text("the breaker is looked at\n")
    paused = night.wait_for("Paused")["PowerAgentPaused"]
    node.gpus.driver_fails(MISMATCH)
    for _ in range(3):
        restart_the_enforcer(night)
    night.wait_for("EnforcerRestarts", "NvmlFails")
    node.kill_watcher()
    night.wait_for("Down")
    node.start_watcher()
    alerts = night.wait_for("Paused", "NvmlFails")
    assert began(alerts["PowerAgentPaused"]) == began(paused), "it had ended for a while"

    pause.unlink()
    node.gpus.driver_present()
    night.wait_without("Down", "EnforcerRestarts", "NvmlFails", "Paused")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: else all users are one")
def test_a_user_without_permission_knocks(night: Night) -> None:
    node = night.node
    command = [node.installation.watcher_python, "-I", "-c", KNOCKS, node.run_dir / "control.sock"]
    with subprocess.Popen(command, **as_user(NOBODY)) as knocking:  # type: ignore[call-overload]
        try:
            alerts = night.wait_for("MessagesDenied")
        finally:
            knocking.kill()
    assert "node-a" in said(alerts["PowerAgentMessagesDenied"])
    night.wait_without("MessagesDenied")

"""A node whose processors are all taken: the agent has little, and that must be enough."""

from __future__ import annotations

import time

import pytest

from tests.cluster.agent import NAMESPACE, Agent
from tests.cluster.cluster import worker
from tests.cluster.conftest import MakeWorker, Place
from tests.cluster.simulator import Gpus
from tests.waiting import stays

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

# Twice as many processes as processors, as the data loaders of a training job are.
BURN = """
import multiprocessing
def burn():
    while True:
        pass
for _ in range(2 * multiprocessing.cpu_count()):
    multiprocessing.Process(target=burn).start()
"""
# A liveness probe of the enforcer's needs three failures, one every 20 s.
WATCHED_S = 90.0


def test_no_probe_ends_an_agent_that_is_merely_slow(
    place: Place, agent: Agent, gpus: Gpus, make_worker: MakeWorker
) -> None:
    node = place.cluster.items("nodes", "-l", "nvidia.com/gpu.present=true")[0]
    share = int(node["status"]["allocatable"]["cpu"]) * 800
    busy = worker("busy", [], place.image, command=["python3", "-c", BURN])
    busy["spec"]["containers"][0]["resources"] = {"requests": {"cpu": f"{share}m"}}
    place.cluster.apply(busy)
    place.cluster.kubectl("wait", "pod/busy", "--for=condition=Ready", "--timeout=60s")
    try:
        began = time.monotonic()
        place.cluster.kubectl("delete", "pod", "-n", NAMESPACE, agent.pod_name, timeout_s=200)
        agent.wait_rolled_out(300)
        agent.wait_ready(timeout_s=300)
        print(f"ready after {time.monotonic() - began:.0f} s on a busy node")
        make_worker("beside", 0, watts="300")
        gpus.wait_limit(0, 300_000, timeout_s=60)
        # The time of three probes.
        stays(lambda: restarts(agent) == (0, 0), WATCHED_S, poll_s=5)
        assert restarts(agent) == (0, 0)
    finally:
        place.cluster.kubectl("delete", "pod", "busy", "--grace-period=1")


def restarts(agent: Agent) -> tuple[int, int]:
    return agent.restarts("watcher"), agent.restarts("enforcer")

"""What an administrator does: reads logs, asks powerctl, sees containers die and come back."""

from __future__ import annotations

import json
import time

import pytest

from tests.cluster.agent import NAMESPACE, Agent
from tests.cluster.cluster import Cluster
from tests.cluster.conftest import MakeWorker
from tests.cluster.simulator import Gpus
from tests.simnode.exposition import read
from tests.waiting import until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


def test_the_manifest_is_ready_within_seconds_and_both_containers_are_ready(agent: Agent) -> None:
    pod = agent.pod()
    assert {c["name"]: c["ready"] for c in pod["status"]["containerStatuses"]} == {
        "watcher": True,
        "enforcer": True,
    }
    assert pod["status"]["qosClass"] == "Burstable"


def test_a_second_apply_of_the_same_manifest_changes_nothing(agent: Agent) -> None:
    before = agent.pod()["metadata"]["uid"]
    said = agent.cluster.kubectl("apply", "-f", "-", stdin=agent.kustomize())
    assert {line.split()[-1] for line in said.splitlines()} == {"unchanged"}
    assert agent.pod()["metadata"]["uid"] == before


def test_the_logs_of_both_containers_are_json_and_tell_the_decision(
    agent: Agent, gpus: Gpus, make_worker: MakeWorker
) -> None:
    make_worker("logged", 0, watts="300")
    gpus.wait_limit(0, 300_000)
    for container in ("watcher", "enforcer"):
        lines = [json.loads(line) for line in agent.log(container).splitlines()]
        assert lines
        assert {line["component"] for line in lines} == {container}
        assert all({"ts", "level", "event"} <= line.keys() for line in lines)
    decided = [json.loads(line) for line in agent.log("enforcer").splitlines()]
    uuid = gpus.uuid(0)
    assert any(line["event"] == "limit_set" and line["uuid"] == uuid for line in decided)


def test_powerctl_answers_in_the_pod_without_naming_a_container(
    agent: Agent, cluster: Cluster, gpus: Gpus, make_worker: MakeWorker
) -> None:
    make_worker("shown", 0, watts="300")
    gpus.wait_limit(0, 300_000)
    pod = ("exec", "-n", NAMESPACE, agent.pod_name, "--", "powerctl")
    table = cluster.kubectl(*pod, "status")
    assert "default/shown" in table
    assert "300 W" in table
    assert "default/shown" in cluster.kubectl(*pod, "explain", "default/shown")
    assert cluster.run(*pod, "ping").returncode == 0
    status = agent.status()
    assert status["watcher"]["connected"]
    assert status["enforcer"]["node"] == agent.pod()["spec"]["nodeName"]
    assert status["gpus"][0]["target_mw"] == 300_000


def test_powerctl_doctor_finds_nothing_wrong(
    agent: Agent, gpus: Gpus, make_worker: MakeWorker
) -> None:
    make_worker("examined", 0, watts="300")
    gpus.wait_limit(0, 300_000)
    done = agent.exec("enforcer", "powerctl", "doctor")
    assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()


def test_the_readiness_page_says_ok_and_metrics_show_the_pod(
    agent: Agent, gpus: Gpus, make_worker: MakeWorker
) -> None:
    make_worker("measured", 0, watts="300")
    gpus.wait_limit(0, 300_000)
    address = agent.pod()["status"]["podIP"]
    assert gpus.http(f"http://{address}:9100/readyz")[0] == 200

    def shown() -> bool:
        families = read(gpus.http(f"http://{address}:9100/metrics")[1])
        effective = families["power_agent_pod_effective_limit_watts"]
        return effective.some(namespace="default", pod="measured") == [300.0]

    until(shown, "the metric")


@pytest.mark.parametrize("container", ["watcher", "enforcer"])
def test_a_killed_container_comes_back_and_no_limit_moved(
    container: str, agent: Agent, cluster: Cluster, gpus: Gpus, make_worker: MakeWorker
) -> None:
    make_worker("surviving", 0, watts="300")
    gpus.wait_limit(0, 300_000)
    before = len(gpus.sets(0))
    restarts = agent.restarts(container)
    gpus.kill_program(container)
    until(lambda: agent.restarts(container) == restarts + 1, "the container started again")
    agent.wait_ready()
    until(lambda: agent.status()["watcher"]["connected"], "the watcher linked")
    assert len(gpus.sets(0)) == before
    make_worker("after", 1, watts="400")  # it enforces again
    gpus.wait_limit(1, 400_000)
    cluster.kubectl("delete", "pod", "surviving")
    gpus.wait_limit(0, 700_000)


def test_a_pod_deleted_while_the_enforcer_is_dead_is_given_back_by_the_next_one(
    agent: Agent, cluster: Cluster, gpus: Gpus, make_worker: MakeWorker
) -> None:
    make_worker("orphaned", 0, watts="300")
    gpus.wait_limit(0, 300_000)
    gpus.kill_program("enforcer")
    cluster.kubectl("delete", "pod", "orphaned", "--grace-period=1")
    gpus.wait_limit(0, 700_000, timeout_s=60)
    agent.wait_ready()


def test_the_probes_restart_an_enforcer_that_hangs_and_no_limit_moves(
    agent: Agent, gpus: Gpus, make_worker: MakeWorker
) -> None:
    make_worker("patient", 0, watts="300")
    gpus.wait_limit(0, 300_000)
    before = len(gpus.sets(0))
    restarts = agent.restarts("enforcer")
    began = time.monotonic()
    gpus.signal_program("enforcer", "STOP")
    until(
        lambda: not agent.container_status("watcher")["ready"],
        "the pod to be not ready: it does not enforce",
    )
    # Three probes of 20 seconds fail, then a stopped process has the pod's grace period to end.
    until(lambda: agent.restarts("enforcer") == restarts + 1, "the probes to act", deadline_s=150)
    took_s = time.monotonic() - began
    agent.wait_ready()
    assert len(gpus.sets(0)) == before
    assert took_s < 125
    make_worker("later", 1, watts="400")
    gpus.wait_limit(1, 400_000)

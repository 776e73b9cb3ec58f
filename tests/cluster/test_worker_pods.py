"""What a user of the cluster does: annotates worker pods, changes his mind, deletes them."""

from __future__ import annotations

import pytest

from tests.cluster.agent import Agent, annotate
from tests.cluster.cluster import Cluster, wait_gone
from tests.cluster.conftest import MakeWorker
from tests.cluster.simulator import Gpus
from tests.waiting import until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


def pod_state(agent: Agent, name: str) -> str | None:
    """What powerctl says of a pod of the default namespace."""
    found = [pod["state"] for pod in agent.status()["pods"] if pod["name"] == name]
    return found[0] if found else None


def test_a_pod_created_with_the_annotation_is_limited(
    agent: Agent, gpus: Gpus, make_worker: MakeWorker
) -> None:
    make_worker("created", 0, watts="300")
    gpus.wait_limit(0, 300_000)
    assert gpus.limits_mw()[1:] == [700_000] * 3
    until(lambda: pod_state(agent, "created") == "enforced", "the pod enforced")


def test_annotating_changing_and_removing_is_followed_without_a_restart(
    agent: Agent, cluster: Cluster, gpus: Gpus, make_worker: MakeWorker
) -> None:
    make_worker("changing", 0, 1)
    for watts, expected_mw in (("350", 350_000), ("420.5", 420_500), ("250", 250_000)):
        annotate(cluster, "changing", watts)
        for index in (0, 1):
            gpus.wait_limit(index, expected_mw)
    annotate(cluster, "changing", None)
    for index in (0, 1):
        gpus.wait_limit(index, 700_000)
    assert [agent.restarts(container) for container in ("watcher", "enforcer")] == [0, 0]


def test_a_deleted_pod_gives_its_gpu_back(
    agent: Agent, cluster: Cluster, gpus: Gpus, make_worker: MakeWorker
) -> None:
    make_worker("deleted", 2, watts="300")
    gpus.wait_limit(2, 300_000)
    cluster.kubectl("delete", "pod", "deleted")
    gpus.wait_limit(2, 700_000)
    assert pod_state(agent, "deleted") is None


def test_a_pod_without_the_annotation_is_left_alone(
    agent: Agent, gpus: Gpus, make_worker: MakeWorker
) -> None:
    before = len(gpus.sets(3))
    make_worker("plain", 3)
    make_worker("beside", 0, watts="300")
    gpus.wait_limit(0, 300_000)
    assert len(gpus.sets(3)) == before
    assert pod_state(agent, "plain") is None


def test_the_lowest_of_two_pods_on_one_gpu_holds_until_it_goes(
    agent: Agent, cluster: Cluster, gpus: Gpus, make_worker: MakeWorker
) -> None:
    make_worker("higher", 0, watts="500")
    gpus.wait_limit(0, 500_000)
    make_worker("lower", 0, watts="400")
    gpus.wait_limit(0, 400_000)
    until(lambda: pod_state(agent, "higher") == "conflict", "the conflict told")
    cluster.kubectl("delete", "pod", "lower")
    gpus.wait_limit(0, 500_000)


def test_a_request_out_of_bounds_is_clamped_and_nonsense_changes_nothing(
    agent: Agent, cluster: Cluster, gpus: Gpus, make_worker: MakeWorker
) -> None:
    make_worker("odd", 0, watts="50")
    gpus.wait_limit(0, 200_000)
    until(lambda: pod_state(agent, "odd") == "clamped", "the pod clamped")
    annotate(cluster, "odd", "350W")
    until(lambda: pod_state(agent, "odd") == "invalid", "the pod invalid")
    assert gpus.limit_mw(0) == 200_000


@pytest.mark.usefixtures("agent")
def test_a_worker_that_crashes_keeps_its_limit_while_its_container_restarts(
    cluster: Cluster, gpus: Gpus, make_worker: MakeWorker
) -> None:
    make_worker("crashing", 0, watts="300", command=["/bin/sleep", "100000"])
    gpus.wait_limit(0, 300_000)
    before = len(gpus.sets(0))
    uid = cluster.get("pod", "crashing")["metadata"]["uid"]
    gpus.kill(uid)

    def restarted() -> bool:
        status = cluster.get("pod", "crashing")["status"]["containerStatuses"][0]
        return (status["restartCount"], status["ready"]) == (1, True)

    until(restarted, "the container started again")
    assert gpus.limit_mw(0) == 300_000
    assert len(gpus.sets(0)) == before


@pytest.mark.usefixtures("agent")
def test_a_pod_deleted_by_force_holds_its_limit_until_its_processes_end(
    cluster: Cluster, gpus: Gpus, make_worker: MakeWorker
) -> None:
    make_worker("forced", 0, watts="300", command=["/bin/sleep", "100000"])
    gpus.wait_limit(0, 300_000)
    cluster.kubectl("delete", "pod", "forced", "--force", "--grace-period=0")
    wait_gone(cluster, "pod", "forced")
    gpus.wait_limit(0, 700_000, timeout_s=20)


def test_a_limit_that_somebody_else_changed_is_written_again(
    agent: Agent, gpus: Gpus, make_worker: MakeWorker
) -> None:
    make_worker("drifting", 0, watts="300")
    gpus.wait_limit(0, 300_000)
    gpus.change_mw(0, 650_000)
    gpus.wait_limit(0, 300_000, timeout_s=25)
    assert agent.status()["counters"]["drifts"] == 1

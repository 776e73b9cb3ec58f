"""A rolling update to another tag, every write to a GPU seen, and the way out."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.cluster.agent import LEDGER, NAMESPACE, Agent
from tests.cluster.cluster import Cluster
from tests.cluster.conftest import MakeWorker, Place
from tests.cluster.simulator import Gpus
from tests.waiting import until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

MakeAgent = Callable[[str], Agent]


def roll(place: Place, agent: Agent) -> None:
    """To the next tag; returns when the new pod enforces."""
    before = agent.pod()["metadata"]["uid"]
    following = Agent(place.cluster, place.next_image, env=agent.env)
    change = {"metadata": {"name": "power-agent", "namespace": NAMESPACE}}
    restarted = change | {
        "apiVersion": "apps/v1",
        "kind": "DaemonSet",
        # On a cluster that has only one tag the update is one of this annotation alone.
        "spec": {"template": {"metadata": {"annotations": {"updated-from": before}}}},
    }
    following.deploy(restarted)
    assert agent.pod()["metadata"]["uid"] != before
    agent.wait_ready()
    until(lambda: agent.status()["watcher"]["connected"], "the new watcher linked")


@pytest.fixture
def agent_on_exit(place: Place) -> MakeAgent:
    def make(on_exit: str) -> Agent:
        agent = Agent(place.cluster, place.image, env={"POWER_AGENT_ON_EXIT": on_exit})
        agent.deploy()
        agent.wait_ready()
        return agent

    return make


def test_a_rolling_update_with_hold_writes_no_limit_at_all(
    place: Place, gpus: Gpus, agent_on_exit: MakeAgent, make_worker: MakeWorker
) -> None:
    agent = agent_on_exit("hold")
    make_worker("held", 0, 1, watts="300")
    for index in (0, 1):
        gpus.wait_limit(index, 300_000)
    before = [len(gpus.sets(index)) for index in range(gpus.count)]
    roll(place, agent)
    until(lambda: agent.status()["gpus"][0]["managed"], "the new one to own what was held")
    assert [len(gpus.sets(index)) for index in range(gpus.count)] == before
    assert gpus.limits_mw()[:2] == [300_000, 300_000]


def test_a_rolling_update_with_restore_gives_back_and_limits_again_once(
    place: Place, gpus: Gpus, agent_on_exit: MakeAgent, make_worker: MakeWorker
) -> None:
    agent = agent_on_exit("restore")
    make_worker("restored", 0, watts="300")
    gpus.wait_limit(0, 300_000)
    before = len(gpus.sets(0))
    untouched = [len(gpus.sets(index)) for index in range(1, gpus.count)]
    roll(place, agent)
    until(lambda: len(gpus.sets(0)) == before + 2, "limited again")
    given_back, limited = gpus.sets(0)[before:]
    assert (given_back.requested_mw, limited.requested_mw) == (700_000, 300_000)
    assert given_back.pid != limited.pid
    gap_s = (limited.monotonic_ns - given_back.monotonic_ns) / 1e9
    print(f"between giving back and limiting again: {gap_s:.1f} s")
    assert gap_s < 30
    assert [len(gpus.sets(index)) for index in range(1, gpus.count)] == untouched


def test_a_pod_that_goes_during_the_update_is_given_back_by_the_new_agent(
    cluster: Cluster, gpus: Gpus, agent_on_exit: MakeAgent, make_worker: MakeWorker
) -> None:
    agent = agent_on_exit("hold")
    make_worker("leaving", 0, watts="300")
    gpus.wait_limit(0, 300_000)
    cluster.kubectl("delete", "pod", "-n", NAMESPACE, agent.pod_name, "--wait=false")
    cluster.kubectl("delete", "pod", "leaving")
    gpus.wait_limit(0, 700_000, timeout_s=60)


def test_uninstalling_gives_every_gpu_back_and_leaves_nothing_running(
    place: Place, agent: Agent, cluster: Cluster, gpus: Gpus, make_worker: MakeWorker
) -> None:
    make_worker("remaining", 0, 1, watts="300")
    make_worker("other", 2, watts="400")
    for index, limit_mw in ((0, 300_000), (1, 300_000), (2, 400_000)):
        gpus.wait_limit(index, limit_mw)
    agent.delete()
    assert gpus.limits_mw() == [700_000] * gpus.count
    for kind in ("clusterrole", "clusterrolebinding"):
        assert cluster.gone(kind, "power-agent")
    assert cluster.gone("namespace", NAMESPACE)
    assert gpus.programs("enforcer") == gpus.programs("watcher") == []
    if place.node is not None:
        assert '"gpus":{}' in place.node.box.path(LEDGER).read_text().replace(" ", "")

"""The overlays, each installed as its head says: `kubectl apply -k deploy/overlays/...`."""

from __future__ import annotations

import json

import pytest

from tests.cluster.agent import ANNOTATION, NAMESPACE, Agent, annotate, pod_patch
from tests.cluster.cluster import Cluster, Object, worker
from tests.cluster.conftest import Install, MakeWorker, Place
from tests.cluster.node import PRIVATE_CGROUPS_RUNTIME
from tests.cluster.simulator import Gpus
from tests.cluster.test_privileges import status_field
from tests.waiting import HANG_S, until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


def check_it_enforces(gpus: Gpus, cluster: Cluster, make_worker: MakeWorker) -> None:
    make_worker("limited", 0, watts="300")
    gpus.wait_limit(0, 300_000)
    annotate(cluster, "limited", "350")
    gpus.wait_limit(0, 350_000)
    cluster.kubectl("delete", "pod", "limited")
    gpus.wait_limit(0, 700_000)


# ---------------------------------------------------------------------- reduced-privileges


def test_reduced_privileges_enforces_without_privileged(
    install: Install, gpus: Gpus, cluster: Cluster, make_worker: MakeWorker
) -> None:
    agent = install("reduced-privileges")
    enforcer = next(c for c in agent.pod()["spec"]["containers"] if c["name"] == "enforcer")
    assert enforcer["securityContext"]["privileged"] is False
    assert status_field(gpus, "enforcer", "CapEff") == f"{1 << 21:016x}"
    assert status_field(gpus, "enforcer", "Seccomp") == "2"
    check_it_enforces(gpus, cluster, make_worker)


def test_reduced_privileges_in_a_private_cgroup_namespace_joins_the_hosts(
    place: Place, install: Install, gpus: Gpus, cluster: Cluster, make_worker: MakeWorker
) -> None:
    """Where it stays in its own, every path is relative and a pod could pass for another."""
    agent = install("reduced-privileges", *_private_cgroups(place))
    (pid,) = gpus.programs("enforcer")
    hosts = gpus.shell("readlink /proc/1/ns/cgroup")
    # The watcher is still where the runtime put it; an exec into the enforcer follows the enforcer.
    assert agent.exec("watcher", "readlink", "/proc/self/ns/cgroup").stdout.decode() != hosts
    assert gpus.shell(f"readlink /proc/{pid}/ns/cgroup") == hosts
    assert status_field(gpus, "enforcer", "CapEff") == f"{1 << 21:016x}"
    check_it_enforces(gpus, cluster, make_worker)


def test_an_enforcer_that_cannot_join_the_hosts_cgroup_namespace_says_what_it_lacks(
    place: Place, install: Install, gpus: Gpus, make_worker: MakeWorker
) -> None:
    if place.node is None:
        pytest.skip("it has to be a private one, and this cluster was given")
    security = {"capabilities": {"drop": ["ALL"], "add": ["SYS_ADMIN"]}}
    lacking = pod_patch({"containers": [{"name": "enforcer", "securityContext": security}]})
    before = len(gpus.sets(0))
    agent = install("reduced-privileges", *_private_cgroups(place), lacking, ready=False)
    make_worker("unseen", 0, watts="300")
    until(lambda: agent.restarts("enforcer") >= 1, "the enforcer to give up")
    state = agent.container_status("enforcer")["lastState"]["terminated"]
    assert state["exitCode"] == 2
    assert "CAP_SYS_PTRACE" in agent.log("enforcer", "--previous")
    assert len(gpus.sets(0)) == before


def test_without_host_pid_the_enforcer_says_so_and_touches_nothing(
    install: Install, gpus: Gpus, make_worker: MakeWorker
) -> None:
    before = len(gpus.sets(0))
    agent = install("../power_agent", pod_patch({"hostPID": False}), ready=False)
    make_worker("unseen", 0, watts="300")
    until(lambda: agent.restarts("enforcer") >= 1, "the enforcer to give up")
    assert agent.container_status("enforcer")["lastState"]["terminated"]["exitCode"] == 2
    assert "hostPID: true" in agent.log("enforcer", "--previous")
    assert len(gpus.sets(0)) == before


def _private_cgroups(place: Place) -> list[Object]:
    """The patch that gives unprivileged containers their own, where the runtime does not."""
    if place.node is None:
        return []  # the node's own runtime does it, if it has cgroups of version 2
    name = PRIVATE_CGROUPS_RUNTIME
    place.cluster.apply(
        {
            "apiVersion": "node.k8s.io/v1",
            "kind": "RuntimeClass",
            "metadata": {"name": name},
            "handler": name,
        }
    )
    return [pod_patch({"runtimeClassName": name})]


# ---------------------------------------------------------------------- supervised


@pytest.fixture
def supervised(install: Install) -> Agent:
    return install("supervised", container="power-agent")


def test_supervised_enforces_and_tells_both_programs_in_one_log(
    supervised: Agent, gpus: Gpus, cluster: Cluster, make_worker: MakeWorker
) -> None:
    check_it_enforces(gpus, cluster, make_worker)
    lines = [json.loads(line) for line in supervised.log("power-agent").splitlines()
             if line.startswith("{")]  # fmt: skip
    assert {"watcher", "enforcer"} <= {line["component"] for line in lines}
    assert any(line["event"] == "token_readable" for line in lines)
    assert status_field(gpus, "enforcer", "CapEff") == f"{1 << 21:016x}"
    assert status_field(gpus, "watcher", "Uid").split() == ["65532"] * 4


@pytest.mark.parametrize("program", ["enforcer", "watcher"])
def test_supervised_starts_a_killed_program_again_in_the_same_container(
    program: str, supervised: Agent, gpus: Gpus, make_worker: MakeWorker
) -> None:
    make_worker("patient", 0, watts="300")
    gpus.wait_limit(0, 300_000)
    before = len(gpus.sets(0))
    killed = gpus.programs(program)
    gpus.kill_program(program)
    until(lambda: gpus.programs(program) not in ([], killed), "the program again")
    make_worker("later", 1, watts="400")
    gpus.wait_limit(1, 400_000)
    assert len(gpus.sets(0)) == before
    assert supervised.restarts("power-agent") == 0


def test_supervised_kills_an_enforcer_that_hangs_and_no_limit_moves(
    supervised: Agent, gpus: Gpus, make_worker: MakeWorker
) -> None:
    make_worker("patient", 0, watts="300")
    gpus.wait_limit(0, 300_000)
    before = len(gpus.sets(0))
    hung = gpus.programs("enforcer")
    gpus.signal_program("enforcer", "STOP")
    # The watchdog itself bears a minute without an answer: UNANSWERED pings, one every 5 s.
    until(
        lambda: gpus.programs("enforcer") not in ([], hung),
        "another enforcer",
        deadline_s=3 * HANG_S,
    )
    make_worker("later", 1, watts="400")
    gpus.wait_limit(1, 400_000)
    assert len(gpus.sets(0)) == before
    assert supervised.restarts("power-agent") == 0


# ---------------------------------------------------------------------- namespaced, dry run


def test_namespaced_limits_pods_of_its_namespace_and_no_others(
    install: Install, place: Place, gpus: Gpus, make_worker: MakeWorker
) -> None:
    agent = install("namespaced")
    cluster = place.cluster
    for kind in ("clusterrole", "clusterrolebinding"):
        assert cluster.gone(kind, "power-agent")
    account = f"--as=system:serviceaccount:{NAMESPACE}:power-agent"
    may = ("auth", "can-i", "list", "pods", account)
    assert cluster.run(*may, "-n", "default").stdout.strip() == b"yes"
    assert cluster.run(*may, "-n", NAMESPACE).stdout.strip() == b"no"
    elsewhere = worker("elsewhere", [1], place.image, annotations={ANNOTATION: "300"})
    elsewhere["metadata"]["namespace"] = "other"
    cluster.apply(
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "other"}}, elsewhere
    )
    try:
        cluster.kubectl(
            "wait", "-n", "other", "pod/elsewhere", "--for=condition=Ready", "--timeout=60s"
        )
        before = len(gpus.sets(1))
        make_worker("here", 0, watts="300")
        gpus.wait_limit(0, 300_000)
        assert len(gpus.sets(1)) == before
        assert [pod["name"] for pod in agent.status()["pods"]] == ["here"]
    finally:
        cluster.kubectl("delete", "namespace", "other")


def test_dry_run_decides_and_writes_nothing(
    install: Install, gpus: Gpus, make_worker: MakeWorker
) -> None:
    agent = install("dry-run")
    before = [len(gpus.sets(index)) for index in range(gpus.count)]
    make_worker("tried", 0, watts="300")

    def told() -> bool:
        return "would be" in agent.status()["gpus"][0]["reason"]

    until(told, "what it would do")
    assert [len(gpus.sets(index)) for index in range(gpus.count)] == before

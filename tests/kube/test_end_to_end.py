"""The whole agent on a real API server: its manifest's token, real RBAC, real outages.

The hardware and the kubelet are simulated; what is asserted is what the hardware says, and what
the API server itself wrote down of the watcher's requests.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.kube.agent_node import ACCOUNT, NAMESPACE, Audit, KubeNode
from tests.kube.conftest import MakeNode
from tests.simnode import exposition
from tests.simnode.controlplane import ControlPlane
from tests.simnode.controlplane_rest import Object
from tests.simnode.node import ANNOTATION, CONFIG_HASH, MANIFEST, Pod
from watcher.events import RULE

pytestmark = pytest.mark.kube

FOUND = 700  # an H100's factory default, in watts
RBAC = "/apis/rbac.authorization.k8s.io/v1"


def metric(node: KubeNode, name: str, **labels: str) -> float | None:
    """A sample of the watcher's /metrics, None where there is none."""
    return exposition.value(node.page("/metrics")[1], name, **labels)


def logged(node: KubeNode, event: str) -> list[str]:
    return [line.get("message", "") for line in node.log_lines() if line["event"] == event]


def wait_for_watch(node: KubeNode, audit: Audit) -> None:
    node.wait_for(lambda: audit.is_watching(node.name), "an open watch")


def is_held(node: KubeNode) -> bool:
    return [gpu.state for gpu in node.status().gpus if gpu.managed] == ["held"]


def pids_seen(node: KubeNode) -> set[int]:
    return {process.pid for gpu in node.status().gpus for process in gpu.processes}


def assert_one_list_per_start_and_410(node: KubeNode, audit: Audit) -> None:
    """A server that starts anew knows no version from before, if anything was written since."""
    expired = metric(node, "power_agent_watch_restarts_total", reason="expired")
    assert expired is not None
    lists = audit.count("list", node.name)
    assert lists == metric(node, "power_agent_list_requests_total") == 1 + expired
    assert lists <= 2


# ---------------------------------------------------------------------- the way of one limit


def test_kubectl_annotates_changes_removes_and_deletes(node: KubeNode, audit: Audit) -> None:
    node.gpus[0].limit_mw = 650_000  # somebody's choice, which is not the factory's
    node.add_pod("trainer", gpus=[0])
    node.kubectl("annotate", "pod", "trainer", f"{ANNOTATION}=350")
    node.wait_for_limit(0, 350)
    columns = r'{range .items[*]}{.metadata.name}{"\t"}'
    columns += r'{.metadata.annotations.dynamo\.nvidia\.com/gpu-power-limit}{"\n"}{end}'
    assert "trainer\t350\n" in node.kubectl("get", "pods", "-o", f"jsonpath={columns}")
    node.kubectl("annotate", "pod", "trainer", f"{ANNOTATION}=420.5", "--overwrite")
    node.wait_for_limit(0, 420.5)
    node.kubectl("annotate", "pod", "trainer", f"{ANNOTATION}-")
    node.wait_for_limit(0, 650)
    node.kubectl("annotate", "pod", "trainer", f"{ANNOTATION}=300")
    node.wait_for_limit(0, 300)
    node.kubectl("delete", "pod", "trainer")
    node.wait_for_limit(0, 650)
    assert node.gpus[1].sets() == []

    asked = audit.requests(node.user, node.name)
    assert [entry["verb"] for entry in asked] == ["list", "watch"]
    assert {entry["user"]["username"] for entry in audit.entries()} >= {node.user}
    status = Path(f"/proc/{node.pid('watcher')}/status").read_text()
    assert re.search(rf"^Uid:(\s+{node.watcher_uid}){{4}}$", status, re.MULTILINE)


def test_a_finished_pod_gives_back_when_its_processes_are_gone(
    node: KubeNode, audit: Audit
) -> None:
    pod = node.add_pod("job", limit=350, gpus=[0])
    node.wait_for_limit(0, 350)
    node.api.set_phase("default", "job", "Succeeded")
    node.wait_for(lambda: is_held(node), "held")
    node.stays(lambda: node.limit_mw(0) == 350_000, 0.3)
    node.end_workers(pod)
    node.wait_for_limit(0, FOUND)
    assert node.api.get_pod("default", "job") is not None
    assert audit.count("list", node.name) == 1  # the watch said that it left the selector


def test_forced_deletion_holds_until_the_processes_end(node: KubeNode) -> None:
    pod = node.add_pod("trainer", limit=350, gpus=[0])
    node.wait_for_limit(0, 350)
    node.kubectl("delete", "pod", "trainer", "--force", "--grace-period=0")
    node.wait_for(lambda: is_held(node), "held")
    node.stays(lambda: node.limit_mw(0) == 350_000, 0.3)
    node.end_workers(pod)
    node.wait_for_limit(0, FOUND)


def test_a_static_pod_is_known_by_its_mirror_and_no_other_is(node: KubeNode) -> None:
    """A thief has only the annotation."""
    victim, mirror = secrets.token_hex(16), secrets.token_hex(16)
    stolen = {ANNOTATION: "250", CONFIG_HASH: victim}
    add_mirror(node, mirror)
    node.api.create_pod("thief", node=node.name, annotations=stolen)
    node.workers.of_pod(victim, [node.gpus[1]])
    node.workers.of_pod(mirror, [node.gpus[0]])
    node.wait_for_limit(0, 350)
    node.wait_for(lambda: len(node.status().pods) == 2, "both pods")
    node.stays(lambda: node.limit_mw(1) == FOUND * 1000, 0.5)


def add_mirror(node: KubeNode, id_: str) -> None:
    """The mirror of a static pod as a kubelet makes it, owned by the Node."""
    with node.cluster.rest_client() as rest:
        uid = rest.json("GET", f"/api/v1/nodes/{node.name}")["metadata"]["uid"]
    owner = {"kind": "Node", "name": node.name, "uid": uid, "controller": True}
    of_kubelet = {CONFIG_HASH: id_, "kubernetes.io/config.mirror": id_}
    marks = {ANNOTATION: "350", "kubernetes.io/config.source": "file"} | of_kubelet
    node.api.create_pod(f"static-{node.name}", node=node.name, annotations=marks, owner=owner)


# ---------------------------------------------------------------------- the API server fails


def test_an_outage_holds_and_is_caught_up_with(node: KubeNode, audit: Audit) -> None:
    pod = node.add_pod("trainer", limit=350, gpus=[0])
    node.wait_for_limit(0, 350)
    writes = len(node.gpus.sets())
    with node.api_outage():
        worker = node.restart_worker(pod, [0])
        node.wait_for(lambda: worker.pid in pids_seen(node), "the new process seen")
        node.wait_for(lambda: logged(node, "kubernetes_failing"), "a word about the outage")
        node.stays(lambda: node.limit_mw(0) == 350_000, 0.5)
    assert len(node.gpus.sets()) == writes
    node.annotate(pod, 300)
    node.wait_for_limit(0, 300)
    wait_for_watch(node, audit)
    assert_one_list_per_start_and_410(node, audit)


def test_compaction_while_cut_off_costs_one_list_and_loses_nothing(
    make_node: MakeNode, audit: Audit
) -> None:
    """410 on a real server: what happened meanwhile can be told by nobody but a list."""
    node = make_node(gpus=3, wire=True)
    changed = node.add_pod("changed", limit=350, gpus=[0])
    deleted = node.add_pod("deleted", limit=400, gpus=[1])
    node.add_pod("kept", limit=450, gpus=[2])
    for gpu, watts in enumerate((350, 400, 450)):
        node.wait_for_limit(gpu, watts)
    with node.wire.cut():
        node.annotate(changed, 300)
        node.end_workers(deleted)
        node.delete_pod(deleted, grace=False)
        with node.api_outage():
            node.cluster.compact()
        assert node.limits_mw() == [350_000, 400_000, 450_000]
    node.wait_for_limit(0, 300)
    node.wait_for_limit(1, FOUND)
    node.annotate(changed, 310)
    node.wait_for_limit(0, 310)
    assert node.limit_mw(2) == 450_000
    assert len(node.gpus[2].sets()) == 1
    wait_for_watch(node, audit)
    assert_one_list_per_start_and_410(node, audit)
    assert audit.count("list", node.name) == 2


def test_a_broken_connection_costs_no_list(make_node: MakeNode, audit: Audit) -> None:
    node = make_node(wire=True)
    pod = node.add_pod("trainer", limit=350, gpus=[0])
    node.wait_for_limit(0, 350)
    with node.wire.cut():
        node.annotate(pod, 300)
        node.annotate(pod, 320)
        node.stays(lambda: node.limit_mw(0) == 350_000, 0.3)
    node.wait_for_limit(0, 320)
    assert audit.count("list", node.name) == 1


# ---------------------------------------------------------------------- credentials


def revoke_token(node: KubeNode) -> None:
    """An account of the same name takes the old one's place, so every token until now is void."""
    node.kubectl("delete", "serviceaccount", ACCOUNT, "--namespace", NAMESPACE)
    node.kubectl("apply", "-f", str(MANIFEST))


def forget_tokens(node: KubeNode) -> None:
    """For ten seconds a server believes what it has once believed, unless it starts anew."""
    with node.wire.cut(), node.api_outage():
        pass


def test_a_revoked_token_holds_and_a_new_one_in_the_file_recovers(
    make_node: MakeNode, audit: Audit
) -> None:
    """401: the file is read again, without a restart of the watcher."""
    node = make_node(wire=True)
    pod = node.add_pod("trainer", limit=350, gpus=[0])
    node.wait_for_limit(0, 350)
    watcher = node.pid("watcher")
    revoke_token(node)
    forget_tokens(node)
    node.annotate(pod, 300)
    refused = re.compile("status 401")
    node.wait_for(
        lambda: any(map(refused.search, logged(node, "kubernetes_failing"))), "a 401 logged"
    )
    node.stays(lambda: node.limit_mw(0) == 350_000, 0.3)
    node.renew_token()
    node.wait_for_limit(0, 300)
    wait_for_watch(node, audit)
    assert node.pid("watcher") == watcher


@pytest.fixture
def restored_rules(node_with_wire: KubeNode) -> Iterator[None]:
    """The manifest's rules are back after the test."""
    yield
    node_with_wire.kubectl("apply", "-f", str(MANIFEST))


@pytest.fixture
def node_with_wire(make_node: MakeNode) -> KubeNode:
    return make_node(wire=True)


@pytest.mark.usefixtures("restored_rules")
def test_a_missing_rule_is_named_and_limits_hold_until_it_is_back(
    node_with_wire: KubeNode, audit: Audit
) -> None:
    """403: what the log says to add is added, word for word."""
    node = node_with_wire
    pod = node.add_pod("trainer", limit=350, gpus=[0])
    node.wait_for_limit(0, 350)
    set_rules(node, "clusterroles/power-agent", [])
    # The authorizer learns of it through a watch of its own, so perhaps not at once.
    node.wait_for(lambda: drop_and_look(node), "a 403 logged")
    node.annotate(pod, 300)
    node.stays(lambda: node.limit_mw(0) == 350_000, 0.5)
    (text,) = [text for text in logged(node, "kubernetes_failing") if "403" in text]
    assert f"system:serviceaccount:{NAMESPACE}:{ACCOUNT}" in text
    set_rules(node, "clusterroles/power-agent", pasted(text, "ClusterRole"))
    node.wait_for_limit(0, 300)
    node.wait_for(lambda: logged(node, "kubernetes_answers"), "a word that it is over")
    assert audit.count("list", node.name) == 1


def drop_and_look(node: KubeNode) -> bool:
    if any("403" in text for text in logged(node, "kubernetes_failing")):
        return True
    node.wire.drop()
    time.sleep(0.2)  # so that this does not break the connection that is to be refused
    return False


def set_rules(node: KubeNode, role: str, rules: Any) -> None:  # noqa: ANN401
    with node.cluster.rest_client() as rest:
        rest.patch(f"{RBAC}/{role}", {"rules": rules})


def pasted(text: str, role: str) -> Any:  # noqa: ANN401
    """The rule of a log line, as an administrator takes it over."""
    found = re.search(rf"add to the rules of the watcher's {role}: (- .*)$", text)
    assert found, text
    return yaml.safe_load(found[1])


def test_a_role_is_enough_for_one_namespace(
    cluster: ControlPlane, make_node: MakeNode, audit: Audit
) -> None:
    """WATCH_NAMESPACE, with a service account that may read nothing else."""
    team = "team-a"
    cluster.create_namespace(team)
    cluster.kubectl("create", "serviceaccount", "reader", "--namespace", team)
    node = make_node(start=False, account=(team, "reader"), settings={"WATCH_NAMESPACE": team})
    node.add_pod("elsewhere", limit=300, gpus=[1])
    node.add_pod("trainer", limit=350, gpus=[0], namespace=team)
    node.start_enforcer()
    node.start_watcher()
    node.wait_for(lambda: logged(node, "kubernetes_failing"), "a 403 logged")
    (text,) = logged(node, "kubernetes_failing")
    role = {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "Role",
        "metadata": {"name": "power-agent"},
        "rules": pasted(text, f"Role in namespace {team}"),
    }
    node.kubectl("apply", "--namespace", team, "-f", "-", stdin=json.dumps(role))
    node.kubectl(
        "create", "rolebinding", "power-agent", "--namespace", team,
        "--role=power-agent", f"--serviceaccount={team}:reader",
    )  # fmt: skip
    node.wait_for_limit(0, 350)
    node.stays(lambda: node.limit_mw(1) == FOUND * 1000, 0.5)
    paths = {entry["requestURI"].partition("?")[0] for entry in audit.requests(node.user)}
    assert paths == {f"/api/v1/namespaces/{team}/pods"}


# ---------------------------------------------------------------------- quiet, and modest


def test_steady_state_is_one_open_watch_and_nothing_else(make_node: MakeNode, audit: Audit) -> None:
    """I10: by the server's own counts, and by its record of what the watcher asked for."""
    node = make_node(kubelet=False)
    node.add_pod("trainer", limit=350, gpus=[0])
    node.add_pod("other", gpus=[1])
    node.wait_for_limit(0, 350)
    wait_for_watch(node, audit)
    counted = node.cluster.request_counts()
    before = len(audit.entries()), len(node.gpus.sets()), len(node.log_lines())
    snapshots = node.status().counters.snapshots

    def now() -> tuple[int, int, int]:
        return len(audit.entries()), len(node.gpus.sets()), len(node.log_lines())

    node.stays(lambda: now() == before, 5)
    assert audit.is_watching(node.name)
    assert [each for each in node.cluster.request_counts() - counted if each[1] == "pods"] == []
    assert node.status().counters.snapshots >= snapshots + 2  # the heart beats


def test_nothing_of_a_pod_but_its_metadata_reaches_the_watcher(make_node: MakeNode) -> None:
    """Every byte that came over the wire, of list and watch."""
    node = make_node(wire=True, start=False)
    secretive(node, "listed", {ANNOTATION: "350"})
    node.start()
    secretive(node, "watched", {ANNOTATION: "300"})
    node.wait_for(lambda: len(node.status().pods) == 2, "both pods")
    node.kubectl("annotate", "pod", "watched", f"{ANNOTATION}=310", "--overwrite")
    node.wait_for(lambda: b'limit":"310"' in node.wire.received, "the change")
    received = bytes(node.wire.received)
    for expected in (b"PartialObjectMetadataList", b'"listed"', b'"watched"'):
        assert expected in received
    for forbidden in (b"top-secret", b'"spec":', b'"status":', b"none.invalid"):
        assert forbidden not in received
    heads = bytes(node.wire.sent).split(b"\r\n\r\n")[:-1]
    assert len(heads) == 2
    assert all(b"as=PartialObjectMetadata" in head for head in heads)


def secretive(node: KubeNode, name: str, annotations: dict[str, str]) -> None:
    container = {
        "name": "main",
        "image": "none.invalid/none",
        "env": [{"name": "PASSWORD", "value": "top-secret"}],
    }
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "annotations": annotations},
        "spec": {"nodeName": node.name, "containers": [container]},
    }
    node.kubectl("create", "-f", "-", stdin=json.dumps(pod))


# ---------------------------------------------------------------------- events


@pytest.fixture
def events_rule_removed(cluster: ControlPlane) -> Iterator[None]:
    """What the test grants in addition is gone after it."""
    yield
    with cluster.rest_client() as rest:
        for kind in ("clusterroles", "clusterrolebindings"):
            rest.json("DELETE", f"{RBAC}/{kind}/power-agent-events")


@pytest.mark.usefixtures("events_rule_removed")
def test_events_are_written_once_the_extra_rule_is_there(make_node: MakeNode) -> None:
    node = make_node(settings={"POWER_AGENT_EVENTS": "true"})
    pod = node.add_pod("trainer", limit=350, gpus=[0])
    node.wait_for_limit(0, 350)
    node.wait_for(lambda: logged(node, "event_not_written"), "the missing rule")
    grant_events(node, logged(node, "event_not_written")[0])
    node.annotate(pod, 90)
    node.wait_for_limit(0, 200)
    node.wait_for(lambda: "PowerLimitClamped" in reasons(node, pod), "an event")
    node.annotate(pod, "350W")
    node.wait_for(lambda: "InvalidPowerLimit" in reasons(node, pod), "another")
    assert set(reasons(node, pod).values()) == {"Warning"}
    told = node.kubectl("describe", "pod", "trainer")
    assert re.search(r"Warning +InvalidPowerLimit .* power-agent +.*350W", told), told


@pytest.mark.usefixtures("events_rule_removed")
def test_events_of_a_static_pod_are_shown_by_describe(make_node: MakeNode) -> None:
    node = make_node(settings={"POWER_AGENT_EVENTS": "true"})
    grant_events(node, f"add to the watcher's rules: {RULE}")
    id_ = secrets.token_hex(16)
    add_mirror(node, id_)
    node.workers.of_pod(id_, [node.gpus[0]])
    node.wait_for_limit(0, 350)
    told = "describe", "pod", f"static-{node.name}"
    node.wait_for(lambda: "PowerLimitApplied" in node.kubectl(*told), "the event")


def grant_events(node: KubeNode, text: str) -> None:
    """The rule of the log line, in a role of its own."""
    found = re.search(r"add to the watcher's rules: (- .*)$", text)
    assert found, text
    name = "power-agent-events"
    role = {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRole",
        "metadata": {"name": name},
        "rules": yaml.safe_load(found[1]),
    }
    node.kubectl("create", "-f", "-", stdin=json.dumps(role))
    node.kubectl(
        "create", "clusterrolebinding", name, f"--clusterrole={name}",
        f"--serviceaccount={NAMESPACE}:{ACCOUNT}",
    )  # fmt: skip
    # The authorizer learns of it through a watch of its own.
    who = f"--as={node.user}"
    node.wait_for(
        lambda: node.cluster.kubectl("auth", "can-i", "create", "events", who, check=False)
        .stdout.startswith("yes"),
        "the rule in force",
    )  # fmt: skip


def reasons(node: KubeNode, pod: Pod) -> dict[str, str]:
    """Reason and type of each event on the pod, and on no other of its name."""
    with node.cluster.rest_client() as rest:
        path = f"/api/v1/events?fieldSelector=involvedObject.uid={pod.uid}"
        events: list[Object] = rest.json("GET", path)["items"] or []
    return {event["reason"]: event["type"] for event in events}

"""The manifest on a real API server: accepted as written, kept as written, and a token that may
read pods and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from tests.kube.agent_node import ACCOUNT, NAMESPACE
from tests.simnode.controlplane import ControlPlane
from tests.simnode.controlplane_rest import Object, RestClient
from tests.simnode.node import MANIFEST

pytestmark = pytest.mark.kube

PATHS = {
    "Namespace": f"/api/v1/namespaces/{NAMESPACE}",
    "ServiceAccount": f"/api/v1/namespaces/{NAMESPACE}/serviceaccounts/power-agent",
    "ClusterRole": "/apis/rbac.authorization.k8s.io/v1/clusterroles/power-agent",
    "ClusterRoleBinding": "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings/power-agent",
    "DaemonSet": f"/apis/apps/v1/namespaces/{NAMESPACE}/daemonsets/power-agent",
}
SERVER_SIDE = ("--server-side",)


def documents() -> dict[str, Object]:
    return {entry["kind"]: entry for entry in yaml.safe_load_all(MANIFEST.read_text()) if entry}


def template() -> Object:
    spec: Object = documents()["DaemonSet"]["spec"]["template"]
    return spec


def apply(kube: ControlPlane, *flags: str) -> None:
    """With the strictest validation; a warning counts as a failure."""
    done = kube.kubectl("apply", "--validate=strict", *flags, "-f", str(MANIFEST))
    assert done.stderr == ""


@pytest.fixture(scope="module")
def rest(cluster: ControlPlane) -> Iterator[RestClient]:
    """The administrator."""
    with cluster.rest_client() as client:
        yield client


def stored(rest: RestClient) -> dict[str, Object]:
    return {kind: rest.json("GET", path) for kind, path in PATHS.items()}


# ---------------------------------------------------------------------- applying it


@pytest.mark.parametrize("flags", [(), SERVER_SIDE], ids=["client-side", "server-side"])
def test_a_second_apply_changes_nothing(
    cluster: ControlPlane, rest: RestClient, flags: tuple[str, ...]
) -> None:
    apply(cluster, *flags)
    before = stored(rest)
    apply(cluster, *flags, "--dry-run=server")
    apply(cluster, *flags)
    assert stored(rest) == before  # resource versions too


def test_a_field_that_does_not_exist_is_refused(cluster: ControlPlane) -> None:
    """So the validation that the manifest passes does look."""
    wrong = MANIFEST.read_text().replace("hostPID:", "hostPid:")
    done = cluster.kubectl(
        "apply", "--server-side", "--dry-run=server", "--validate=strict", "-f", "-",
        stdin=wrong, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "hostPid" in done.stderr


@pytest.mark.parametrize("kind", PATHS)
def test_what_is_stored_is_what_the_file_says(rest: RestClient, kind: str) -> None:
    lost = list(differences(documents()[kind], stored(rest)[kind]))
    assert lost == []


def test_server_defaults_undo_no_security_context(rest: RestClient) -> None:
    """Every field that the server adds lies outside of what guards the host."""
    spec = stored(rest)["DaemonSet"]["spec"]["template"]["spec"]
    added = sorted(additions(template()["spec"], spec))
    assert added, "a real server adds something"
    for word in ("securitycontext", "host", "privile", "capabilit", "automount", "readonly"):
        assert [path for path in added if word in path.lower()] == []


def differences(wanted: Any, has: Any, path: str = "") -> Iterator[str]:  # noqa: ANN401
    """Where `has` lacks or changes what `wanted` says."""
    if isinstance(wanted, dict) and isinstance(has, dict):
        for key, value in wanted.items():
            yield from differences(value, has.get(key), f"{path}.{key}")
    elif isinstance(wanted, list) and isinstance(has, list) and len(wanted) == len(has):
        for number, (one, other) in enumerate(zip(wanted, has, strict=True)):
            yield from differences(one, other, f"{path}[{number}]")
    elif wanted != has:
        yield f"{path}: {wanted!r} became {has!r}"


def additions(wanted: Any, has: Any, path: str = "") -> Iterator[str]:  # noqa: ANN401
    """Where `has` says more than `wanted`."""
    if isinstance(wanted, dict) and isinstance(has, dict):
        for key, value in has.items():
            if key not in wanted:
                yield f"{path}.{key}"
            yield from additions(wanted.get(key), value, f"{path}.{key}")
    elif isinstance(wanted, list) and isinstance(has, list):
        for number, (one, other) in enumerate(zip(wanted, has, strict=True)):
            yield from additions(one, other, f"{path}[{number}]")


# ---------------------------------------------------------------------- its pods


def create_pod(rest: RestClient, namespace: str, spec: Object) -> tuple[int, str]:
    """As a controller would create it from the template, but stored nowhere."""
    metadata = template()["metadata"] | {"name": "trial"}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}
    return rest.raw("POST", f"/api/v1/namespaces/{namespace}/pods?dryRun=All", pod)


@pytest.fixture
def runtime_class(rest: RestClient) -> Iterator[None]:
    """The one that the GPU operator makes."""
    path = "/apis/node.k8s.io/v1/runtimeclasses"
    body = {
        "apiVersion": "node.k8s.io/v1",
        "kind": "RuntimeClass",
        "metadata": {"name": "nvidia"},
        "handler": "nvidia",
    }
    rest.json("POST", path, body)
    yield
    rest.json("DELETE", f"{path}/nvidia")


@pytest.fixture
def restricted(rest: RestClient) -> Iterator[str]:
    """A namespace that admits only what needs no privilege at all."""
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    name = "restricted"
    body = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}
    rest.json("POST", "/api/v1/namespaces", body)
    yield name
    rest.json("DELETE", f"/api/v1/namespaces/{name}")


@pytest.mark.usefixtures("runtime_class")
def test_its_pods_are_admitted_in_its_namespace(rest: RestClient) -> None:
    """Past pod security, priority and runtime class."""
    status, text = create_pod(rest, NAMESPACE, template()["spec"])
    assert status == 201, text


def test_a_missing_runtime_class_is_named(rest: RestClient) -> None:
    """The one thing of the manifest that a cluster may lack, and a comment in it says so."""
    status, text = create_pod(rest, NAMESPACE, template()["spec"])
    assert status == 403
    assert 'RuntimeClass \\"nvidia\\" not found' in text


@pytest.mark.usefixtures("runtime_class")
def test_only_the_enforcers_part_needs_privilege(rest: RestClient, restricted: str) -> None:
    spec = template()["spec"]
    status, text = create_pod(rest, restricted, spec)
    assert status == 403
    assert "violates PodSecurity" in text
    assert 'container \\"watcher\\"' not in text

    alone = spec | {
        "containers": [each for each in spec["containers"] if each["name"] == "watcher"],
        "volumes": [each for each in spec["volumes"] if each["name"] not in ("state", "kubelet")],
        "hostPID": False,
        "priorityClassName": "",
    }
    status, text = create_pod(rest, restricted, alone)
    assert status == 201, text


# ---------------------------------------------------------------------- what the token may


@pytest.fixture(scope="module")
def token_owner(cluster: ControlPlane) -> Iterator[RestClient]:
    """Whoever has the watcher's token."""
    with cluster.rest_client(cluster.service_account_token(NAMESPACE, ACCOUNT)) as owner:
        yield owner


@pytest.fixture(scope="module")
def anybody(cluster: ControlPlane) -> Iterator[RestClient]:
    """A service account that nothing was granted."""
    cluster.kubectl("create", "serviceaccount", "anybody", "--namespace=default")
    with cluster.rest_client(cluster.service_account_token("default", "anybody")) as who:
        yield who


def rules(who: RestClient, namespace: str) -> set[tuple[str, ...]]:
    """Everything the server lets somebody do in a namespace, one by one."""
    answer = who.json(
        "POST",
        "/apis/authorization.k8s.io/v1/selfsubjectrulesreviews",
        {"spec": {"namespace": namespace}},
    )["status"]
    assert not answer.get("incomplete")
    resources = {
        (group, resource, verb, *rule.get("resourceNames", ()))
        for rule in answer["resourceRules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    urls = {
        (url, verb)
        for rule in answer["nonResourceRules"]
        for url in rule["nonResourceURLs"]
        for verb in rule["verbs"]
    }
    return resources | urls


@pytest.mark.parametrize("namespace", ["default", "kube-system", NAMESPACE])
def test_the_token_adds_reading_pods_to_what_anybody_may(
    token_owner: RestClient, anybody: RestClient, namespace: str
) -> None:
    granted = rules(token_owner, namespace) - rules(anybody, namespace)
    assert granted == {("", "pods", verb) for verb in ("get", "list", "watch")}


def may(who: RestClient, verb: str, group: str, resource: str, namespace: str) -> bool:
    name, _, subresource = resource.partition("/")
    attributes = {
        "verb": verb,
        "group": group,
        "resource": name,
        "subresource": subresource,
        "namespace": namespace,
    }
    answer = who.json(
        "POST",
        "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews",
        {"spec": {"resourceAttributes": attributes}},
    )
    allowed: bool = answer["status"]["allowed"]
    return allowed


def test_of_all_resources_and_verbs_the_token_may_read_pods(
    rest: RestClient, token_owner: RestClient, anybody: RestClient
) -> None:
    """In all namespaces; asked one by one for whatever this server serves, subresources too."""
    verbs = ("get", "list", "watch", "create", "update", "patch", "delete", "deletecollection")
    asked = [(verb, group, each) for group, each in resources(rest) for verb in verbs]
    asked += [("impersonate", "", "users"), ("impersonate", "", "serviceaccounts")]
    asked += [("bind", RBAC, "clusterroles"), ("escalate", RBAC, "clusterroles")]
    assert len(asked) > 500
    assert {("create", "", "serviceaccounts/token"), ("get", "", "secrets")} < set(asked)
    allowed = {each for each in asked if may(token_owner, *each, "")}
    everybodys = {each for each in allowed if may(anybody, *each, "")}
    assert allowed - everybodys == {(verb, "", "pods") for verb in ("get", "list", "watch")}
    assert not {group for _, group, _ in everybodys} & {"", "apps", RBAC}


RBAC = "rbac.authorization.k8s.io"


def resources(rest: RestClient) -> set[tuple[str, str]]:
    """(group, resource or resource/subresource) of all that this server serves."""
    groups = [
        (group["name"], f"/apis/{version['groupVersion']}")
        for group in rest.json("GET", "/apis")["groups"]
        for version in group["versions"]
    ]
    return {
        (group, each["name"])
        for group, path in [("", "/api/v1"), *groups]
        for each in rest.json("GET", path)["resources"]
    }


REFUSED = [
    ("GET", "/api/v1/secrets"),
    ("GET", "/api/v1/configmaps"),
    ("GET", "/api/v1/nodes"),
    ("GET", "/api/v1/nodes/n/proxy/pods"),
    ("GET", "/api/v1/namespaces"),
    ("GET", "/api/v1/events"),
    ("POST", "/api/v1/namespaces/default/events"),
    ("GET", "/api/v1/namespaces/default/pods/victim/log"),
    ("GET", "/api/v1/namespaces/default/pods/victim/exec?command=id&stdout=true"),
    ("POST", "/api/v1/namespaces/default/pods/victim/exec?command=id&stdout=true"),
    ("POST", "/api/v1/namespaces/default/pods/victim/eviction"),
    ("POST", "/api/v1/namespaces/default/pods"),
    ("PATCH", "/api/v1/namespaces/default/pods/victim"),
    ("PATCH", "/api/v1/namespaces/default/pods/victim/status"),
    ("DELETE", "/api/v1/namespaces/default/pods/victim"),
    ("DELETE", "/api/v1/namespaces/default/pods"),
    ("POST", f"/api/v1/namespaces/{NAMESPACE}/serviceaccounts/{ACCOUNT}/token"),
    ("GET", PATHS["DaemonSet"]),
    ("PATCH", PATHS["ClusterRole"]),
    ("GET", "/metrics"),
]


def test_real_requests_are_refused_and_leave_no_trace(
    cluster: ControlPlane, token_owner: RestClient
) -> None:
    victim = cluster.create_pod("victim", node="refused")
    body = {"metadata": {"annotations": {"dynamo.nvidia.com/gpu-power-limit": "100"}}}
    for method, path in REFUSED:
        headers = {"Content-Type": "application/merge-patch+json"} if method == "PATCH" else {}
        sent = body if method in ("POST", "PATCH") else None
        status, text = token_owner.raw(method, path, sent, **headers)
        assert status == 403, f"{method} {path}: {text}"
    assert cluster.get_pod("default", "victim") == victim


def test_the_token_reads_pods_of_every_namespace(
    cluster: ControlPlane, token_owner: RestClient
) -> None:
    for namespace in ("reads-a", "reads-b"):
        cluster.create_pod("reads", node="reads", namespace=namespace)
        pod = token_owner.json("GET", f"/api/v1/namespaces/{namespace}/pods/reads")
        assert pod["metadata"]["namespace"] == namespace
    path = "/api/v1/pods?fieldSelector=spec.nodeName%3Dreads"
    assert len(token_owner.json("GET", path)["items"]) == 2
    events = token_owner.watch(f"{path}&watch=true&timeoutSeconds=1")
    told = {event["object"]["metadata"].get("namespace") for event in events}
    assert told >= {"reads-a", "reads-b"}


def test_the_token_cannot_act_as_somebody_else(token_owner: RestClient) -> None:
    headers = {"Impersonate-User": "admin", "Impersonate-Group": "system:masters"}
    assert token_owner.raw("GET", "/api/v1/secrets", None, **headers)[0] == 403

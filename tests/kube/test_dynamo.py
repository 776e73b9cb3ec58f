"""Under Dynamo, on a real API server: with the writers of deploy/policies-dynamo annotated workers
come up by every way that Dynamo, LeaderWorkerSet and Grove make them, and nobody else sets a limit.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.kube.chart import DEPLOY
from tests.kube.test_admission import CONTAINERS, SOON
from tests.simnode.controlplane import ControlPlane
from tests.simnode.controlplane_rest import MERGE_PATCH, Object, RestClient
from tests.simnode.node import ANNOTATION
from tests.waiting import until

pytestmark = pytest.mark.kube

WORKERS = "inference"
# As the charts of the three name them by default.
DYNAMO = ("dynamo-system", "dynamo-platform-dynamo-operator-controller-manager")
LWS = ("lws-system", "lws-controller-manager")
GROVE = ("dynamo-system", "grove-operator")
PLANNER = (WORKERS, "planner-serviceaccount")
AUTHOR = (WORKERS, "author")
ACCOUNTS = (DYNAMO, LWS, GROVE, PLANNER, AUTHOR)
PERSON = {"Impersonate-User": "ada", "Impersonate-Group": "power-operators"}
KINDS = {
    "DynamoGraphDeployment": ("nvidia.com", ("v1beta1", "v1alpha1")),
    "DynamoComponentDeployment": ("nvidia.com", ("v1beta1", "v1alpha1")),
    "LeaderWorkerSet": ("leaderworkerset.x-k8s.io", ("v1",)),
    "DisaggregatedSet": ("disaggregatedset.x-k8s.io", ("v1",)),
    "PodCliqueSet": ("grove.io", ("v1alpha1",)),
    "PodClique": ("grove.io", ("v1alpha1",)),
    "Deployment": ("apps", ("v1",)),
    "ReplicaSet": ("apps", ("v1",)),
    "StatefulSet": ("apps", ("v1",)),
    "Job": ("batch", ("v1",)),
    "Pod": ("", ("v1",)),
}
OWN = ("apps", "batch", "")  # the server's own


def metadata(limit: str | None) -> Object:
    annotations = {} if limit is None else {ANNOTATION: limit}
    return {"labels": {"app": "worker"}, "annotations": annotations}


def template(limit: str | None, restart: str = "Always") -> Object:
    spec = {"containers": CONTAINERS, "restartPolicy": restart}
    return {"metadata": metadata(limit), "spec": spec}


def spec(way: str, limit: str | None) -> Object:
    """What the spec of an object says, with the limit in the place that the way names."""
    leader_worker = {
        "leaderTemplate": template(limit if way == "a leader" else None),
        "workerTemplate": template(limit if way != "a leader" else None),
    }
    component = {"name": "decode", "replicas": 1, "podTemplate": template(limit)}
    controller = {"selector": {"matchLabels": {"app": "worker"}}, "template": template(limit)}
    shapes: dict[str, Object] = {
        "a graph's component": {"components": [{"name": "frontend"}, component]},
        "a graph": {"annotations": metadata(limit)["annotations"], "components": []},
        "a graph's service": {"services": {"decode": {"extraPodMetadata": metadata(limit)}}},
        "a service's annotations": {"services": {"decode": metadata(limit)}},
        "a component": {"podTemplate": template(limit)},
        "an older component": {"extraPodMetadata": metadata(limit)},
        "a leader": {"leaderWorkerTemplate": leader_worker},
        "a worker": {"leaderWorkerTemplate": leader_worker},
        "a role": {"roles": [{"name": "a", "spec": {"leaderWorkerTemplate": leader_worker}}]},
        "a clique": {"template": {"cliques": [{"name": "decode", **metadata(limit)}]}},
        "one clique": {"roleName": "decode", "podSpec": {"containers": CONTAINERS}},
        "a deployment": controller,
        "a set": controller | {"serviceName": "worker"},
        "a job": {"template": template(limit, "Never")},
        "a pod": {"containers": CONTAINERS},
    }
    return shapes[way]


def made(way: str, kind: str, limit: str | None) -> Object:
    """One object; PodCliques and Pods carry the annotation themselves."""
    itself = limit if kind in ("PodClique", "Pod") else None
    return {
        "kind": kind,
        "metadata": {"name": "worker"} | metadata(itself),
        "spec": spec(way, limit),
    }


def url(kind: str, version: str = "") -> str:
    group, versions = KINDS[kind]
    root = f"apis/{group}" if group else "api"
    return f"/{root}/{version or versions[0]}/namespaces/{WORKERS}/{kind.lower()}s"


# Who makes what, from the graph that a person writes to the pods. A leader's pod is made by the
# server's own controller from the StatefulSet of LeaderWorkerSet.
CHAIN = [
    ("person", "DynamoGraphDeployment", "a graph's component"),
    ("person", "DynamoGraphDeployment", "a graph"),
    ("person", "DynamoGraphDeployment v1alpha1", "a graph's service"),
    ("person", "DynamoGraphDeployment v1alpha1", "a service's annotations"),
    ("person", "Pod", "a pod"),
    (DYNAMO, "DynamoGraphDeployment", "a graph's component"),
    (DYNAMO, "DynamoComponentDeployment", "a component"),
    (DYNAMO, "DynamoComponentDeployment v1alpha1", "an older component"),
    (DYNAMO, "Deployment", "a deployment"),
    (DYNAMO, "Job", "a job"),
    (DYNAMO, "LeaderWorkerSet", "a leader"),
    (DYNAMO, "LeaderWorkerSet", "a worker"),
    (DYNAMO, "DisaggregatedSet", "a role"),
    (DYNAMO, "PodCliqueSet", "a clique"),
    (LWS, "LeaderWorkerSet", "a worker"),
    (LWS, "StatefulSet", "a set"),
    (GROVE, "PodClique", "one clique"),
    (GROVE, "Pod", "a pod"),
    ("deployment-controller", "ReplicaSet", "a deployment"),
    ("replicaset-controller", "Pod", "a pod"),
    ("statefulset-controller", "Pod", "a pod"),
    ("job-controller", "Pod", "a pod"),
]


def definition(kind: str) -> Object:
    """As much of each operator's types as it takes to be asked for them."""
    group, versions = KINDS[kind]
    anything = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": f"{kind.lower()}s.{group}",
            # Names that end in k8s.io belong to Kubernetes, which wants this said.
            "annotations": {"api-approved.kubernetes.io": "unapproved, for a test"},
        },
        "spec": {
            "group": group,
            "scope": "Namespaced",
            "names": {"kind": kind, "plural": f"{kind.lower()}s"},
            "versions": [
                {
                    "name": version,
                    "served": True,
                    "storage": version == versions[0],
                    "schema": {"openAPIV3Schema": anything},
                }
                for version in versions
            ],
        },
    }


def text(objects: list[Object]) -> str:
    return "\n---\n".join(json.dumps(each) for each in objects)


def people() -> Object:
    """All may write everything here; who may write limits is the policies' business."""
    rbac = "rbac.authorization.k8s.io"
    controllers = {who for who, _, _ in CHAIN if isinstance(who, str)} - {"person"}
    accounts = (*ACCOUNTS, *(("kube-system", each) for each in controllers))
    return {
        "apiVersion": f"{rbac}/v1",
        "kind": "RoleBinding",
        "metadata": {"name": "people", "namespace": WORKERS},
        "roleRef": {"apiGroup": rbac, "kind": "ClusterRole", "name": "cluster-admin"},
        "subjects": [
            {"kind": "Group", "name": "power-operators", "apiGroup": rbac},
            *({"kind": "ServiceAccount", "namespace": ns, "name": name} for ns, name in accounts),
        ],
    }


@pytest.fixture(scope="module")
def clients(cluster: ControlPlane) -> Iterator[dict[tuple[str, str], RestClient]]:
    """A connection with a real token for each account, where the policies are in force."""
    definitions = [definition(kind) for kind, (group, _) in KINDS.items() if group not in OWN]
    for namespace in {namespace for namespace, _ in ACCOUNTS}:
        cluster.create_namespace(namespace)
    accounts: list[Object] = [
        {
            "apiVersion": "v1",
            "kind": "ServiceAccount",
            "metadata": {"namespace": namespace, "name": name},
        }
        for namespace, name in ACCOUNTS
    ]
    everything = text([*definitions, *accounts, people()])
    cluster.kubectl("apply", "-f", "-", stdin=everything)
    cluster.kubectl(
        "wait", "--for=condition=Established", "--timeout=30s", "-f", "-", stdin=text(definitions)
    )
    folder = str(DEPLOY / "policies-dynamo")
    cluster.kubectl("apply", "--validate=strict", "-k", folder)
    tokens = {each: cluster.service_account_token(*each) for each in ACCOUNTS}
    made_clients = {each: cluster.rest_client(token) for each, token in tokens.items()}
    author = made_clients[AUTHOR]
    until(lambda: create(author, "Pod", "a pod")[0] == 403, SOON)
    until(lambda: create(author, "LeaderWorkerSet", "a worker")[0] == 403, SOON)
    yield made_clients
    cluster.kubectl("delete", "-k", folder)
    until(lambda: create(author, "Pod", "a pod")[0] == 201, SOON)
    for each in made_clients.values():
        each.close()
    cluster.kubectl("delete", "--wait=false", "-f", "-", stdin=everything)


def create(
    rest: RestClient, what: str, way: str, limit: str | None = "350", **headers: str
) -> tuple[int, str]:
    """As if it were made; nothing is stored. A kind may name a version after a blank."""
    kind, _, version = what.partition(" ")
    body = made(way, kind, limit)
    group = KINDS[kind][0]
    body["apiVersion"] = "/".join(filter(None, (group, version or KINDS[kind][1][0])))
    return rest.raw("POST", f"{url(kind, version)}?dryRun=All", body, **headers)


@pytest.fixture
def admin(cluster: ControlPlane) -> Iterator[RestClient]:
    with cluster.rest_client() as rest:
        yield rest


@pytest.mark.parametrize(("who", "what", "way"), CHAIN, ids=str)
def test_annotated_workers_come_up_and_nobody_else_makes_them(
    clients: dict[tuple[str, str], RestClient],
    admin: RestClient,
    who: str | tuple[str, str],
    what: str,
    way: str,
) -> None:
    if isinstance(who, tuple):
        assert create(clients[who], what, way)[0] == 201
    elif who == "person":
        assert create(admin, what, way, **PERSON)[0] == 201
    else:
        account = f"system:serviceaccount:kube-system:{who}"
        assert create(admin, what, way, **{"Impersonate-User": account})[0] == 201
    for other in (AUTHOR, PLANNER):
        status, answer = create(clients[other], what, way)
        assert status == 403
        assert f"{other[1]} may not set, change or remove power limits" in answer
        assert create(clients[other], what, way, None)[0] == 201


GRAPH_CHANGES: dict[str, tuple[Object, int]] = {
    "scaled, as the planner does": ({"components": [
        {"name": "decode", "replicas": 7, "podTemplate": template("350")}]}, 200),
    "another component": ({"components": [
        {"name": "new"}, {"name": "decode", "podTemplate": template("350")}]}, 200),
    "another limit": ({"components": [{"name": "decode", "podTemplate": template("360")}]}, 403),
    "no limit": ({"components": [{"name": "decode", "podTemplate": template(None)}]}, 403),
    "the component gone": ({"components": []}, 403),
    "one for the whole graph": ({"annotations": {ANNOTATION: "350"}}, 403),
}  # fmt: skip


def test_a_graphs_limit_stays_as_the_person_wrote_it(
    clients: dict[tuple[str, str], RestClient], admin: RestClient
) -> None:
    path = url("DynamoGraphDeployment")
    body = made("a graph's component", "DynamoGraphDeployment", "350")
    body["apiVersion"] = "nvidia.com/v1beta1"
    assert admin.raw("POST", path, body, **PERSON)[0] == 201
    try:
        for case, (change, status) in GRAPH_CHANGES.items():
            answer = clients[PLANNER].raw(
                "PATCH",
                f"{path}/worker?dryRun=All",
                {"spec": change},
                **{"Content-Type": MERGE_PATCH},
            )
            assert answer[0] == status, (case, answer)
    finally:
        admin.json("DELETE", f"{path}/worker")


@pytest.mark.parametrize(
    "odd",
    [{}, {"services": {"a": None}}, {"podTemplate": {"metadata": None}},
     {"template": {"cliques": [{"name": "a", "annotations": None}]}}],
    ids=str,
)  # fmt: skip
def test_objects_of_other_shapes_are_left_alone(
    clients: dict[tuple[str, str], RestClient], odd: Object
) -> None:
    """The policy knows the shapes of today. What it does not know must not stop a cluster."""
    body = {
        "apiVersion": "nvidia.com/v1beta1",
        "kind": "DynamoGraphDeployment",
        "metadata": {"name": "odd"},
        "spec": odd,
    }
    path = f"{url('DynamoGraphDeployment')}?dryRun=All"
    assert clients[AUTHOR].raw("POST", path, body)[0] == 201

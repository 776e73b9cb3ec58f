"""The admission policies on a real API server: which limits may be written, where, by whom."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from shared.units import parse_watts
from tests.kube.chart import DEPLOY, render
from tests.simnode.controlplane import ControlPlane
from tests.simnode.controlplane_rest import MERGE_PATCH, Object, RestClient
from tests.simnode.node import ANNOTATION
from tests.waiting import until

pytestmark = pytest.mark.kube

NAMESPACE = "guarded"
PARAMETERS = "/api/v1/namespaces/dynamo-system/configmaps/power-agent-policy"
PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"
PLANNER = f"system:serviceaccount:{NAMESPACE}:planner"
SOON = "what was put takes effect"  # the server has it in its own cache within moments
CONTAINERS = [{"name": "main", "image": "none.invalid/none"}]


@pytest.fixture(scope="module")
def rest(cluster: ControlPlane) -> Iterator[RestClient]:
    """The administrator, of a cluster that has the policies as they are shipped."""
    cluster.create_namespace(NAMESPACE)
    folder = str(DEPLOY / "policies")
    cluster.kubectl("apply", "--validate=strict", "-k", folder)
    with cluster.rest_client() as client:
        until(lambda: create(client, "350W")[0] == 422, SOON)
        yield client
        cluster.kubectl("delete", "-k", folder)
        # The other tests of this server write what they like.
        until(lambda: create(client, "350W")[0] == 201, SOON)


@pytest.fixture
def parameters(rest: RestClient) -> Iterator[Callable[..., None]]:
    """Sets the parameters; they are empty again afterwards."""

    def put(**data: str) -> None:
        empty = {"minWatts": "", "maxWatts": "", "writers": "", "writerGroups": ""}
        rest.patch(PARAMETERS, {"data": empty | data})

    yield put
    put()
    until(lambda: create(rest, "1")[0] == create(rest, "99999")[0] == 201, SOON)


def pod(limit: str | None, name: str = "trial") -> Object:
    annotations = {} if limit is None else {ANNOTATION: limit}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "annotations": annotations},
        "spec": {"containers": CONTAINERS},
    }


def create(rest: RestClient, limit: str | None, **headers: str) -> tuple[int, str]:
    """As if a pod were created; nothing is stored."""
    return rest.raw("POST", f"{PODS}?dryRun=All", pod(limit), **headers)


def patch(rest: RestClient, path: str, change: Object, **headers: str) -> tuple[int, str]:
    return rest.raw("PATCH", path, change, **{"Content-Type": MERGE_PATCH}, **headers)


def annotate(rest: RestClient, path: str, limit: str | None, **headers: str) -> tuple[int, str]:
    change = {"metadata": {"annotations": {ANNOTATION: limit}}}
    return patch(rest, f"{path}?dryRun=All", change, **headers)


@pytest.fixture
def stored(rest: RestClient) -> Iterator[Callable[[str | None], str]]:
    """Creates pods; returns their paths."""
    paths: list[str] = []

    def make(limit: str | None) -> str:
        name = f"stored-{len(paths)}"
        rest.json("POST", PODS, pod(limit, name))
        paths.append(f"{PODS}/{name}")
        return paths[-1]

    yield make
    for path in paths:
        rest.json("DELETE", path, {"gracePeriodSeconds": 0})


# ---------------------------------------------------------------------- what is a limit

TEXTS = [
    "350", "350.5", "48.75", "0.001", "350.125", " 350", "350\t", " \t350 ", "100000",
    "100000.000", "007", "000001", "", " ", "0", "0.0", "000", "350W", "350 W", "-1",
    "+350", "1e3", "0x10", "1_000", "1,5", ".5", "5.", "350.1234", "244.99999999999997",
    "306.25000000000006", "350.5000", "0.0004", "100000.001", "100001", "1000000", "NaN",
    "Inf", "inf", "null", "true", "３５０", "٣٥٠", "350\n", "350\r\n", "\x0b350\x0c", "35\n0",
    "++350", "+ 350", "+", "350\x85", "\xa0350", "3 5 0", "9" * 500, "'", "\\",
    "350;reboot", "0.00099999999999999999999", "100000.00099999999999999999", "100000.0009",
    "350." + "0" * 5000, "+0.0019", "-350", "\t+350.5 \n", "350\x1c", "350\u2003", "+.5", "+5.",
]  # fmt: skip


def usable(text: str) -> bool:
    """As the agent itself decides."""
    try:
        parse_watts(text)
    except ValueError:
        return False
    return True


def test_the_policy_takes_what_the_agent_takes_and_refuses_the_rest(rest: RestClient) -> None:
    """One grammar: what is written is never found unusable afterwards, and the reverse."""
    answers = {text: create(rest, text) for text in TEXTS}
    assert {text: status == 201 for text, (status, _) in answers.items()} == {
        text: usable(text) for text in TEXTS
    }
    for status, answer in answers.values():
        if status != 201:
            assert status == 422
            assert "write decimal watts such as 350 or 350.5" in json.loads(answer)["message"]


@pytest.mark.parametrize(
    ("text", "meant"),
    [("70000", "70"), ("10500.5\n", "10.5005"), ("10000", "10"), ("9999.999", None)],
)
@pytest.mark.usefixtures("rest")
def test_milliwatts_by_mistake_are_taken_with_a_warning(
    cluster: ControlPlane, text: str, meant: str | None
) -> None:
    """The policy knows no board, so it refuses nothing of this kind; the agent does."""

    def warned() -> str:
        manifest = json.dumps(pod(text))
        arguments = ["create", "-n", NAMESPACE, "--dry-run=server", "-f", "-"]
        return cluster.kubectl(*arguments, stdin=manifest).stderr

    if meant is None:
        assert "milliwatts" not in warned()
    else:
        until(lambda: f"not milliwatts: did you mean {meant}?" in warned(), SOON)


def test_milliwatts_above_what_may_be_asked_are_refused_with_what_was_meant(
    rest: RestClient,
) -> None:
    for text, meant in (("350000", "350"), ("306250.0000001", "306.25")):
        status, answer = create(rest, text)
        assert status == 422
        assert f"not milliwatts: did you mean {meant}?" in json.loads(answer)["message"]


def test_what_was_refused_is_shown_but_not_all_of_it(rest: RestClient) -> None:
    message = json.loads(create(rest, "x" * 5000)[1])["message"]
    assert f"'{'x' * 64}...'" in message
    assert "x" * 65 not in message


def test_pods_without_a_limit_are_none_of_its_business(rest: RestClient) -> None:
    assert create(rest, None)[0] == 201


def test_bounds_hold_and_the_edges_are_inside(
    rest: RestClient, parameters: Callable[..., None]
) -> None:
    parameters(minWatts="100", maxWatts="700.5")
    until(lambda: create(rest, "99")[0] == 422 == create(rest, "701")[0], SOON)
    for text in ("100", "100.0", "350", "700.5"):
        assert create(rest, text)[0] == 201, text
    for text, words in (
        ("99.999", "99.999 W is below the 100 W"),
        ("700.501", "700.501 W is above the 700.5 W"),
        ("lots", "decimal watts"),
    ):
        status, answer = create(rest, text)
        assert status == 422
        assert words in json.loads(answer)["message"]


def test_nonsense_in_the_parameters_stops_new_limits_and_nothing_else(
    rest: RestClient, parameters: Callable[..., None], stored: Callable[[str | None], str]
) -> None:
    path = stored("350")
    parameters(minWatts="low")
    until(lambda: create(rest, "350")[0] != 201, SOON)
    assert create(rest, None)[0] == 201
    assert patch(rest, path, {"metadata": {"labels": {"a": "b"}}})[0] == 200


def test_without_parameters_the_cluster_goes_on(rest: RestClient) -> None:
    """A policy whose ConfigMap is gone asks for nothing: it must not stop every pod there is."""
    before = rest.json("GET", PARAMETERS)
    rest.json("DELETE", PARAMETERS)
    try:
        until(lambda: create(rest, "350W")[0] == 201, SOON)
        assert create(rest, None)[0] == 201
    finally:
        del before["metadata"]["resourceVersion"], before["metadata"]["uid"]
        rest.json("POST", PARAMETERS.rpartition("/")[0], before)
        until(lambda: create(rest, "350W")[0] == 422, SOON)


# ---------------------------------------------------------------------- every way to write one


def test_changing_a_limit_is_looked_at_like_setting_one(
    rest: RestClient, stored: Callable[[str | None], str]
) -> None:
    for path in (stored("350"), stored(None)):
        assert annotate(rest, path, "400")[0] == 200
        assert annotate(rest, path, "400W")[0] == 422
        assert annotate(rest, path, None)[0] == 200


@pytest.mark.parametrize("subresource", ["", "/status", "/resize", "/ephemeralcontainers"])
def test_no_subresource_of_a_pod_lets_a_bad_limit_in(
    rest: RestClient, stored: Callable[[str | None], str], subresource: str
) -> None:
    """Refused, or the server itself keeps the annotation as it was."""
    path = stored("350")
    change = {"metadata": {"annotations": {ANNOTATION: "400W"}}}
    patch(rest, path + subresource, change)
    assert rest.json("GET", path)["metadata"]["annotations"][ANNOTATION] == "350"


@pytest.mark.parametrize("way", ["pods/{name}/binding", "bindings"])
def test_a_binding_brings_no_bad_limit(
    rest: RestClient, stored: Callable[[str | None], str], way: str
) -> None:
    """Its annotations become the pod's."""
    path = stored(None)
    name = path.rpartition("/")[2]

    def bind(limit: str) -> int:
        binding = {
            "apiVersion": "v1",
            "kind": "Binding",
            "metadata": {"name": name, "annotations": {ANNOTATION: limit}},
            "target": {"kind": "Node", "name": "guarded-node"},
        }
        where = f"/api/v1/namespaces/{NAMESPACE}/{way.format(name=name)}"
        return rest.raw("POST", where, binding)[0]

    assert bind("400W") == 422
    assert rest.json("GET", path)["spec"].get("nodeName") is None
    assert bind("400") == 201
    assert rest.json("GET", path)["metadata"]["annotations"][ANNOTATION] == "400"


def pod_template(limit: str | None) -> Object:
    annotations = {} if limit is None else {ANNOTATION: limit}
    return {
        "metadata": {"labels": {"app": "trial"}, "annotations": annotations},
        "spec": {"containers": CONTAINERS, "restartPolicy": "Always"},
    }


def workload(kind: str, limit: str | None) -> Object:
    template = pod_template(limit)
    spec: Object = {"selector": {"matchLabels": {"app": "trial"}}, "template": template}
    if kind in ("Job", "CronJob"):
        template["spec"]["restartPolicy"] = "Never"
        spec = {"template": template}
    if kind == "CronJob":
        spec = {"schedule": "0 0 * * *", "jobTemplate": {"spec": spec}}
    if kind == "StatefulSet":
        spec["serviceName"] = "trial"
    if kind == "ReplicationController":
        spec = {"selector": {"app": "trial"}, "template": template}
    return {"kind": kind, "metadata": {"name": "trial"}, "spec": spec}


WORKLOADS = {
    "Deployment": "/apis/apps/v1/namespaces/{}/deployments",
    "ReplicaSet": "/apis/apps/v1/namespaces/{}/replicasets",
    "StatefulSet": "/apis/apps/v1/namespaces/{}/statefulsets",
    "DaemonSet": "/apis/apps/v1/namespaces/{}/daemonsets",
    "ReplicationController": "/api/v1/namespaces/{}/replicationcontrollers",
    "Job": "/apis/batch/v1/namespaces/{}/jobs",
    "CronJob": "/apis/batch/v1/namespaces/{}/cronjobs",
}


@pytest.mark.parametrize("kind", WORKLOADS)
def test_what_makes_pods_is_told_before_it_makes_them(rest: RestClient, kind: str) -> None:
    path = WORKLOADS[kind].format(NAMESPACE) + "?dryRun=All"
    assert rest.raw("POST", path, workload(kind, None))[0] == 201
    assert rest.raw("POST", path, workload(kind, "350"))[0] == 201
    status, answer = rest.raw("POST", path, workload(kind, "350W"))
    assert status == 422
    assert "write decimal watts" in json.loads(answer)["message"]


@pytest.mark.parametrize("kind", ["Deployment", "CronJob"])
def test_a_template_with_an_old_bad_limit_can_still_be_scaled_and_mended(
    rest: RestClient, parameters: Callable[..., None], kind: str
) -> None:
    """What was there before is left alone until somebody changes it."""
    path = WORKLOADS[kind].format(NAMESPACE)
    rest.json("POST", path, workload(kind, "350"))
    try:
        parameters(maxWatts="300")
        until(lambda: create(rest, "350")[0] == 422, SOON)
        one = f"{path}/trial"
        assert patch(rest, one, {"metadata": {"labels": {"a": "b"}}})[0] == 200
        for limit, status in (("351", 422), ("299", 200)):
            change = pod_template(limit)["metadata"]
            spec: Object = {"template": {"metadata": change}}
            if kind == "CronJob":
                spec = {"jobTemplate": {"spec": spec}}
            assert patch(rest, f"{one}?dryRun=All", {"spec": spec})[0] == status
    finally:
        rest.json("DELETE", f"{path}/trial")


# ---------------------------------------------------------------------- by whom


@pytest.fixture(scope="module")
def people(cluster: ControlPlane) -> dict[str, dict[str, str]]:
    """Who may write pods here, as RBAC has it; the policy is asked after that."""
    cluster.create_namespace(NAMESPACE)
    names = {
        "planner": {"Impersonate-User": PLANNER},
        "author": {"Impersonate-User": "author"},
        "operator": {"Impersonate-User": "operator", "Impersonate-Group": "power-operators"},
        "replicaset-controller": {
            "Impersonate-User": "system:serviceaccount:kube-system:replicaset-controller"
        },
        "impostor": {
            "Impersonate-User": f"system:serviceaccount:{NAMESPACE}:replicaset-controller"
        },
    }
    users = [
        {"kind": "User", "name": each["Impersonate-User"], "apiGroup": "rbac.authorization.k8s.io"}
        for each in names.values()
    ]
    binding = {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "RoleBinding",
        "metadata": {"name": "people", "namespace": NAMESPACE},
        "roleRef": {
            "apiGroup": "rbac.authorization.k8s.io",
            "kind": "ClusterRole",
            "name": "cluster-admin",
        },
        "subjects": users,
    }
    cluster.kubectl("apply", "-f", "-", stdin=json.dumps(binding))
    return names


@pytest.fixture
def named_writers(
    rest: RestClient, parameters: Callable[..., None], people: dict[str, dict[str, str]]
) -> None:
    """Only the planner and a group."""
    # As people write lists: blanks, an empty line.
    parameters(writers=f"  {PLANNER} \n\nanother\n", writerGroups="power-operators\n")
    until(lambda: create(rest, "350", **people["author"])[0] == 403, SOON)


MAY = {
    "planner": True,
    "author": False,
    "operator": True,
    "replicaset-controller": True,
    "impostor": False,
}


@pytest.mark.usefixtures("named_writers")
@pytest.mark.parametrize("who", MAY)
def test_only_named_writers_set_change_and_remove(
    rest: RestClient,
    people: dict[str, dict[str, str]],
    stored: Callable[[str | None], str],
    who: str,
) -> None:
    headers = people[who]
    allowed = (201, 200) if MAY[who] else (403, 403)
    path = _stored_by_planner(rest, people)
    try:
        assert create(rest, "350", **headers)[0] == allowed[0]
        assert annotate(rest, path, "360", **headers)[0] == allowed[1]
        assert annotate(rest, path, None, **headers)[0] == allowed[1]
        bare = stored(None)
        assert annotate(rest, bare, "350", **headers)[0] == allowed[1]
        # What leaves the limit alone is nobody's business.
        assert create(rest, None, **headers)[0] == 201
        assert annotate(rest, path, "350", **headers)[0] == 200
        change = {"metadata": {"labels": {"a": "b"}}}
        assert patch(rest, f"{path}?dryRun=All", change, **headers)[0] == 200
    finally:
        rest.json("DELETE", path, {"gracePeriodSeconds": 0}, **headers)


def _stored_by_planner(rest: RestClient, people: dict[str, dict[str, str]]) -> str:
    rest.json("POST", PODS, pod("350", "planned"), **people["planner"])
    return f"{PODS}/planned"


@pytest.mark.usefixtures("named_writers")
def test_the_way_around_through_a_template_is_closed(
    rest: RestClient, people: dict[str, dict[str, str]]
) -> None:
    for kind, path in WORKLOADS.items():
        where = path.format(NAMESPACE) + "?dryRun=All"
        body = workload(kind, "350")
        status, answer = rest.raw("POST", where, body, **people["author"])
        assert status == 403
        assert "author may not set, change or remove power limits" in answer
        assert rest.raw("POST", where, body, **people["planner"])[0] == 201
        assert rest.raw("POST", where, workload(kind, None), **people["author"])[0] == 201


@pytest.mark.usefixtures("named_writers")
def test_the_way_around_through_status_and_binding_is_closed(
    rest: RestClient, people: dict[str, dict[str, str]], stored: Callable[[str | None], str]
) -> None:
    path = stored(None)
    name = path.rpartition("/")[2]
    author = people["author"]
    change = {"metadata": {"annotations": {ANNOTATION: "350"}}}
    assert patch(rest, f"{path}/status", change, **author)[0] == 403
    binding = {
        "metadata": {"name": name} | change["metadata"],
        "target": {"kind": "Node", "name": "guarded-node"},
    }
    assert rest.raw("POST", f"{path}/binding", binding, **author)[0] == 403
    assert ANNOTATION not in rest.json("GET", path)["metadata"].get("annotations", {})


def test_without_names_everybody_who_may_write_pods_may_write_limits(
    rest: RestClient, people: dict[str, dict[str, str]]
) -> None:
    assert create(rest, "350", **people["author"])[0] == 201


# ---------------------------------------------------------------------- the chart's


def test_the_chart_brings_its_own_key_and_bounds(cluster: ControlPlane, rest: RestClient) -> None:
    """Beside the plain ones, as another release would have it."""
    values = {
        "settings": {"annotation": "example.com/limit", "minWatts": 100},
        "admission": {"enabled": True},
    }
    chosen: list[Any] = [
        each
        for each in render(values, release="other", namespace=NAMESPACE)
        if each["kind"].startswith("ValidatingAdmission") or each["kind"] == "ConfigMap"
    ]
    text = "\n---\n".join(json.dumps(each) for each in chosen)
    cluster.kubectl("apply", "--validate=strict", "-f", "-", stdin=text)

    def answer(limit: str) -> int:
        body = pod(None)
        body["metadata"]["annotations"]["example.com/limit"] = limit
        return rest.raw("POST", f"{PODS}?dryRun=All", body)[0]

    try:
        until(lambda: answer("99") == 422, SOON)
        assert answer("100") == 201
    finally:
        cluster.kubectl("delete", "-f", "-", stdin=text)

"""The chart on platforms that refuse pods: real API servers refuse them in the words that
docs/operations.md names, and admit them with the remedy that stands there.

One server is as strict as platforms are. GKE: a system priority class takes a quota. Talos:
namespaces enforce `baseline`. OpenShift: its constraints are played by a policy that asks the real
authorizer for the verb `use`. Which fields a constraint admits is not played, since the server has
no such type.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import yaml

from tests.kube import assets
from tests.kube.chart import CHART, ROOT, render, template
from tests.simnode.controlplane import ControlPlane
from tests.simnode.controlplane_rest import Object, RestClient
from tests.waiting import until

pytestmark = pytest.mark.kube

PLATFORMS = sorted(path.stem.removeprefix("values-") for path in CHART.glob("values-*.yaml"))
OPERATIONS = " ".join((ROOT / "docs/operations.md").read_text().split())
ADMISSION = {
    "apiVersion": "apiserver.config.k8s.io/v1",
    "kind": "AdmissionConfiguration",
    "plugins": [
        {
            "name": "ResourceQuota",
            "configuration": {
                "apiVersion": "apiserver.config.k8s.io/v1",
                "kind": "ResourceQuotaConfiguration",
                "limitedResources": [
                    {
                        "resource": "pods",
                        "matchScopes": [
                            {
                                "scopeName": "PriorityClass",
                                "operator": "In",
                                "values": ["system-node-critical", "system-cluster-critical"],
                            }
                        ],
                    }
                ],
            },
        },
        {
            "name": "PodSecurity",
            "configuration": {
                "apiVersion": "pod-security.admission.config.k8s.io/v1",
                "kind": "PodSecurityConfiguration",
                "defaults": {"enforce": "baseline", "enforce-version": "latest"},
            },
        },
    ],
}
CONSTRAINT = """
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingAdmissionPolicy
metadata: {name: constraints}
spec:
  matchConstraints:
    resourceRules:
      - {apiGroups: [""], apiVersions: [v1], operations: [CREATE], resources: [pods]}
  variables:
    - name: wanted
      expression: >-
        has(object.metadata.annotations)
        && "openshift.io/required-scc" in object.metadata.annotations
        ? object.metadata.annotations["openshift.io/required-scc"] : "privileged"
  validations:
    - reason: Forbidden
      message: unable to validate against any security context constraint
      expression: >-
        authorizer.serviceAccount(namespaceObject.metadata.name, object.spec.serviceAccountName)
        .group("security.openshift.io").resource("securitycontextconstraints")
        .namespace(namespaceObject.metadata.name).name(variables.wanted).check("use").allowed()
---
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingAdmissionPolicyBinding
metadata: {name: constraints}
spec:
  policyName: constraints
  validationActions: [Deny]
  matchResources:
    namespaceSelector: {matchLabels: {platform: openshift}}
"""
RUNTIME_CLASSES = "/apis/node.k8s.io/v1/runtimeclasses"
RUNTIME_CLASS = {
    "apiVersion": "node.k8s.io/v1",
    "kind": "RuntimeClass",
    "metadata": {"name": "nvidia"},
    "handler": "nvidia",
}


@pytest.fixture(scope="module")
def strict(
    controlplane: ControlPlane,  # noqa: ARG001 - skips where there is no server
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[ControlPlane]:
    """Another server, as strict as platforms are."""
    file = tmp_path_factory.mktemp("strict") / "admission.json"
    file.write_text(json.dumps(ADMISSION))
    flags = [f"--admission-control-config-file={file}"]
    with ControlPlane(assets.from_environment(), extra_flags=flags) as kube:
        yield kube


@pytest.fixture(scope="module")
def strict_rest(strict: ControlPlane) -> Iterator[RestClient]:
    """Its administrator."""
    with strict.rest_client() as client:
        yield client


def namespace(kube: ControlPlane, name: str, **labels: str) -> str:
    """Made with these labels, or labelled."""
    kube.create_namespace(name)
    if labels:
        text = [f"{key}={value}" for key, value in labels.items()]
        kube.kubectl("label", "--overwrite", "namespace", name, *text)
    return name


PRIVILEGED = {"pod-security.kubernetes.io/enforce": "privileged"}


def apply_chart(kube: ControlPlane, where: str, values: Object) -> Object:
    """The pod template of what was applied."""
    objects = render(values, "--no-hooks", namespace=where)
    text = "\n---\n".join(json.dumps(each) for each in objects)
    kube.kubectl("apply", "--validate=strict", "--namespace", where, "-f", "-", stdin=text)
    return template(objects)


def try_pod(rest: RestClient, where: str, pod: Object) -> tuple[int, str]:
    """As the DaemonSet's controller would make it, but stored nowhere."""
    body = {"apiVersion": "v1", "kind": "Pod", "spec": pod["spec"]}
    body["metadata"] = pod["metadata"] | {"name": "trial"}
    status, text = rest.raw("POST", f"/api/v1/namespaces/{where}/pods?dryRun=All", body)
    return status, json.loads(text).get("message", "")


def told(message: str, words: str) -> bool:
    """The server's words, which the manual has too."""
    assert words in OPERATIONS
    return words in message


# ---------------------------------------------------------------------- every platform's values


@pytest.fixture(scope="module")
def rest(cluster: ControlPlane) -> Iterator[RestClient]:
    """The administrator of the usual server."""
    with cluster.rest_client() as client:
        yield client


def with_runtime_class(rest: RestClient, where: str, pod: Object) -> tuple[int, str]:
    """The same pod in a cluster that has the class."""
    rest.json("POST", RUNTIME_CLASSES, RUNTIME_CLASS)
    try:
        return try_pod(rest, where, pod)
    finally:
        rest.json("DELETE", f"{RUNTIME_CLASSES}/nvidia")


@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_platforms_pods_are_admitted(
    cluster: ControlPlane, rest: RestClient, platform: str
) -> None:
    values = yaml.safe_load((CHART / f"values-{platform}.yaml").read_text())
    # Policies hold for all of the cluster, which other files' tests share; test_dynamo.py has them.
    values.pop("admission", None)
    where = namespace(cluster, f"platform-{platform}", **PRIVILEGED)
    pod = apply_chart(cluster, where, values | {"rbac": {"create": False}})
    status, message = try_pod(rest, where, pod)
    if pod["spec"].get("runtimeClassName"):
        assert status == 403
        assert told(message, 'RuntimeClass "nvidia" not found')
        status, message = with_runtime_class(rest, where, pod)
    assert status == 201, message


# ---------------------------------------------------------------------- what refuses pods


def test_a_system_class_takes_a_quota(strict: ControlPlane, strict_rest: RestClient) -> None:
    values = yaml.safe_load((CHART / "values-gke.yaml").read_text())
    where = namespace(strict, "gke", **PRIVILEGED)
    pod = apply_chart(strict, where, values | {"resourceQuota": {"enabled": False}})
    status, message = try_pod(strict_rest, where, pod)
    assert status != 201  # 500, of all things
    assert told(message, "insufficient quota to match these scopes")
    apply_chart(strict, where, values)
    quota = f"/api/v1/namespaces/{where}/resourcequotas/power-agent"
    hard = strict_rest.json("GET", quota)["spec"]["hard"]
    # No controller counts here; this is what it writes first.
    strict_rest.patch(f"{quota}/status", {"status": {"hard": hard, "used": {"pods": "0"}}})
    until(
        lambda: try_pod(strict_rest, where, pod)[0] == 201,
        "admitted by the quota",
        explain=lambda: try_pod(strict_rest, where, pod),
    )


def test_namespaces_that_enforce_baseline_must_be_labelled(
    strict: ControlPlane, strict_rest: RestClient
) -> None:
    values = yaml.safe_load((CHART / "values-talos.yaml").read_text())
    where = namespace(strict, "talos")
    pod = apply_chart(strict, where, values | {"priorityClassName": "", "runtimeClassName": ""})
    status, message = try_pod(strict_rest, where, pod)
    assert status == 403
    assert told(message, 'violates PodSecurity "baseline:latest"')
    namespace(strict, "talos", **PRIVILEGED)
    status, message = try_pod(strict_rest, where, pod)
    assert status == 201, message


@pytest.fixture
def constrained(strict: ControlPlane, strict_rest: RestClient) -> Iterator[str]:
    """A namespace in which a pod's account must be allowed the use of a constraint."""
    where = namespace(strict, "openshift", platform="openshift", **PRIVILEGED)
    strict.kubectl("apply", "-f", "-", stdin=CONSTRAINT)
    spec = {"containers": [{"name": "a", "image": "a"}], "serviceAccountName": "nobody"}
    pod: Object = {"metadata": {}, "spec": spec}
    until(lambda: try_pod(strict_rest, where, pod)[0] == 403, "the policy is in force")
    yield where
    strict.kubectl("delete", "-f", "-", stdin=CONSTRAINT)


def test_openshift_makes_pods_of_an_account_that_may_use_a_constraint(
    strict: ControlPlane, strict_rest: RestClient, constrained: str
) -> None:
    """Also with one of the cluster's own, and an account of one's own."""
    plain = {"priorityClassName": "", "runtimeClassName": ""}
    pod = apply_chart(strict, constrained, plain)
    status, message = try_pod(strict_rest, constrained, pod)
    assert status == 403
    assert told(message, "unable to validate against any security context constraint")
    values = yaml.safe_load((CHART / "values-openshift.yaml").read_text())
    for more in (
        {},
        {
            "openshift": {"enabled": True, "securityContextConstraint": "gpu-agents"},
            "serviceAccount": {"create": False, "name": "own"},
        },
    ):
        pod = apply_chart(strict, constrained, values | plain | more)
        status, message = try_pod(strict_rest, constrained, pod)
        assert status == 201, message


def test_the_constraint_of_the_overlay_may_be_used_by_the_agent_alone(
    strict: ControlPlane, strict_rest: RestClient
) -> None:
    strict.kubectl("apply", "-k", str(ROOT / "deploy/overlays/openshift"))

    def may_use(account: str, constraint: str) -> bool:
        attributes = {
            "verb": "use", "group": "security.openshift.io", "namespace": "dynamo-system",
            "resource": "securitycontextconstraints", "name": constraint,
        }  # fmt: skip
        user = f"system:serviceaccount:dynamo-system:{account}"
        review = strict_rest.json(
            "POST",
            "/apis/authorization.k8s.io/v1/subjectaccessreviews",
            {"spec": {"user": user, "resourceAttributes": attributes}},
        )
        allowed: bool = review["status"]["allowed"]
        return allowed

    until(lambda: may_use("power-agent", "privileged"), "the Role is known")
    assert not may_use("power-agent", "anyuid")
    assert not may_use("default", "privileged")

"""The plain manifest gives each container what it needs and nothing more, field by field."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from shared import __version__
from shared.sockets import PULSE_OLDEST_S

ROOT = Path(__file__).resolve().parents[2]
MANIFEST = ROOT / "deploy/power_agent/daemonset.yaml"
IMAGE = f"dynamo/power-agent:v{__version__}"
UNPRIVILEGED = 65532

Object = dict[str, Any]


@pytest.fixture(scope="module")
def objects() -> dict[str, Object]:
    """Return the manifest's objects by kind."""
    documents = [entry for entry in yaml.safe_load_all(MANIFEST.read_text()) if entry]
    found = {entry["kind"]: entry for entry in documents}
    assert len(found) == len(documents), "a kind twice"
    return found


@pytest.fixture(scope="module")
def pod(objects: dict[str, Object]) -> Object:
    """Return the pod's spec."""
    spec: Object = objects["DaemonSet"]["spec"]["template"]["spec"]
    return spec


@pytest.fixture(scope="module")
def containers(pod: Object) -> dict[str, Object]:
    """Return the containers by name."""
    return {container["name"]: container for container in pod["containers"]}


def environment(container: Object) -> dict[str, Any]:
    """Return a container's variables, literal or by reference."""
    return {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in container["env"]}


def mounts(container: Object) -> dict[str, Object]:
    """Return a container's mounts by volume."""
    return {mount["name"]: mount for mount in container["volumeMounts"]}


def test_exactly_these_objects(objects: dict[str, Object]) -> None:
    """Names are a contract; all namespaced ones lie in the one namespace."""
    assert set(objects) == {
        "Namespace", "ServiceAccount", "ClusterRole", "ClusterRoleBinding", "DaemonSet",
    }  # fmt: skip
    assert objects["Namespace"]["metadata"]["name"] == "dynamo-system"
    for kind in ("ServiceAccount", "ClusterRole", "ClusterRoleBinding", "DaemonSet"):
        assert objects[kind]["metadata"]["name"] == "power-agent"
    for kind in ("ServiceAccount", "DaemonSet"):
        assert objects[kind]["metadata"]["namespace"] == "dynamo-system"


def test_the_namespace_admits_what_the_enforcer_needs(objects: dict[str, Object]) -> None:
    """Pod security admission would refuse hostPID and privileged otherwise."""
    labels = objects["Namespace"]["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "privileged"


def test_the_role_reads_pods_and_nothing_else(objects: dict[str, Object]) -> None:
    """I7: what a taken-over watcher may do at the API."""
    assert objects["ClusterRole"]["rules"] == [
        {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]}
    ]


def test_the_role_is_bound_to_the_service_account(objects: dict[str, Object]) -> None:
    """And to nobody else."""
    binding = objects["ClusterRoleBinding"]
    assert binding["roleRef"]["kind"] == "ClusterRole"
    assert binding["roleRef"]["name"] == "power-agent"
    assert binding["subjects"] == [
        {"kind": "ServiceAccount", "name": "power-agent", "namespace": "dynamo-system"}
    ]


def test_selector_label_and_update_strategy(objects: dict[str, Object]) -> None:
    """`kubectl logs -l app=power-agent` finds it; one node at a time is updated."""
    spec = objects["DaemonSet"]["spec"]
    assert spec["selector"]["matchLabels"] == {"app": "power-agent"}
    assert spec["template"]["metadata"]["labels"]["app"] == "power-agent"
    assert spec["updateStrategy"] == {
        "type": "RollingUpdate",
        "rollingUpdate": {"maxUnavailable": 1},
    }


def test_two_containers_of_one_pinned_image(containers: dict[str, Object]) -> None:
    """The image's tag is the product's version."""
    assert set(containers) == {"watcher", "enforcer"}
    for name, container in containers.items():
        assert container["image"] == IMAGE
        assert container["command"] == [
            f"/opt/power-agent/{name}/bin/python", "-I", "-m", name,
        ]  # fmt: skip


def test_the_pod_sees_the_hosts_processes_and_no_token(pod: Object) -> None:
    """Without hostPID NVML silently lists nobody; the token goes by a volume of its own."""
    assert pod["hostPID"] is True
    assert pod["automountServiceAccountToken"] is False
    assert pod["serviceAccountName"] == "power-agent"
    assert not pod.get("hostNetwork")
    assert not pod.get("hostIPC")
    assert pod["enableServiceLinks"] is False


def test_the_service_account_hands_out_no_token_by_itself(objects: dict[str, Object]) -> None:
    """A pod that forgets to say no gets none either."""
    assert objects["ServiceAccount"]["automountServiceAccountToken"] is False


def test_the_pod_lands_on_gpu_nodes_and_stays(pod: Object) -> None:
    """GPU label, GPU taint, and no eviction under pressure."""
    assert pod["nodeSelector"] == {"nvidia.com/gpu.present": "true"}
    assert {"key": "nvidia.com/gpu", "operator": "Exists"} in pod["tolerations"]
    assert pod["priorityClassName"] == "system-node-critical"
    assert pod["runtimeClassName"] == "nvidia"


def test_the_watcher_has_no_privilege(containers: dict[str, Object]) -> None:
    """Everything that a container can be denied."""
    assert containers["watcher"]["securityContext"] == {
        "runAsNonRoot": True,
        "runAsUser": UNPRIVILEGED,
        "runAsGroup": UNPRIVILEGED,
        "privileged": False,
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def test_the_watcher_gets_no_gpu_and_knows_its_node(containers: dict[str, Object]) -> None:
    """`void`: the NVIDIA runtime must hand it no device."""
    assert environment(containers["watcher"]) == {
        "NODE_NAME": {"fieldRef": {"apiVersion": "v1", "fieldPath": "spec.nodeName"}},
        "NVIDIA_VISIBLE_DEVICES": "void",
    }


def test_the_enforcer_may_set_limits_and_write_only_its_two_folders(
    containers: dict[str, Object],
) -> None:
    """Privileged is the form that works everywhere; its root file system stays read-only."""
    enforcer = containers["enforcer"]
    assert enforcer["securityContext"] == {
        "runAsUser": 0,
        "runAsGroup": 0,
        "privileged": True,
        "readOnlyRootFilesystem": True,
    }
    assert environment(enforcer)["NVIDIA_VISIBLE_DEVICES"] == "all"
    assert set(mounts(enforcer)) == {"run", "state", "kubelet"}
    # No more of the kubelet's root: pods' secrets lie there.
    assert mounts(enforcer)["kubelet"] == {
        "name": "kubelet",
        "mountPath": "/var/lib/kubelet/device-plugins",
        "readOnly": True,
    }
    assert not enforcer.get("ports")


def test_the_token_reaches_the_watcher_alone(pod: Object, containers: dict[str, Object]) -> None:
    """And its unprivileged user can read it, which takes fsGroup."""
    sources = {
        next(iter(source)): source
        for volume in pod["volumes"]
        if volume["name"] == "token"
        for source in volume["projected"]["sources"]
    }
    assert set(sources) == {"serviceAccountToken", "configMap", "downwardAPI"}
    assert sources["serviceAccountToken"]["serviceAccountToken"]["path"] == "token"
    mount = mounts(containers["watcher"])["token"]
    assert mount["mountPath"] == "/var/run/secrets/kubernetes.io/serviceaccount"
    assert mount["readOnly"] is True
    assert "token" not in mounts(containers["enforcer"])
    assert pod["securityContext"]["fsGroup"] == UNPRIVILEGED


def test_the_ledger_outlives_the_pod_and_only_the_enforcer_sees_it(
    pod: Object, containers: dict[str, Object]
) -> None:
    """I2: no crash loses an original limit, also not the pod's end."""
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes["state"]["hostPath"] == {
        "path": "/var/lib/power-agent",
        "type": "DirectoryOrCreate",
    }
    assert mounts(containers["enforcer"])["state"]["mountPath"] == "/var/lib/power-agent"
    assert "state" not in mounts(containers["watcher"])


def test_the_socket_lies_in_memory_and_the_watcher_cannot_replace_it(
    pod: Object, containers: dict[str, Object]
) -> None:
    """An emptyDir comes as 0777: the watcher's mount is read-only from the first moment."""
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes["run"]["emptyDir"]["medium"] == "Memory"
    for name in ("watcher", "enforcer"):
        assert mounts(containers[name])["run"]["mountPath"] == "/run/power-agent"
    assert mounts(containers["watcher"])["run"]["readOnly"] is True
    assert not mounts(containers["enforcer"])["run"].get("readOnly")


def test_probes_ask_the_programs_themselves(containers: dict[str, Object]) -> None:
    """The watcher by http, the enforcer (no port) by its pulse and, where that is old, powerctl."""
    watcher, enforcer = containers["watcher"], containers["enforcer"]
    assert watcher["ports"] == [{"name": "metrics", "containerPort": 9100, "protocol": "TCP"}]
    assert watcher["livenessProbe"]["httpGet"] == {"path": "/healthz", "port": "metrics"}
    assert watcher["startupProbe"]["httpGet"] == {"path": "/healthz", "port": "metrics"}
    assert watcher["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": "metrics"}
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        *command, wait_s = enforcer[probe]["exec"]["command"]
        assert command == ["probe"]
        # Python has to start first, which takes long where all processors are taken.
        assert enforcer[probe]["timeoutSeconds"] >= int(wait_s) + 2


def test_the_liveness_probe_has_patience_with_a_driver_that_takes_half_a_minute_to_open(
    containers: dict[str, Object],
) -> None:
    """Where persistence mode is off nvmlInit takes up to 30 s and the loop stands still for it."""
    liveness = containers["enforcer"]["livenessProbe"]
    period_s, failures = liveness["periodSeconds"], liveness["failureThreshold"]
    assert period_s * (failures - 1) > 30
    found = re.search(r"^oldest_s=(\d+)", (ROOT / "deploy/probe").read_text(), re.MULTILINE)
    assert found
    assert int(found[1]) == PULSE_OLDEST_S
    # And one that hangs for good is ended within a minute and a quarter.
    assert int(found[1]) + period_s * failures + liveness["timeoutSeconds"] <= 75


def test_both_have_memory_limits_and_no_cpu_limit(containers: dict[str, Object]) -> None:
    """A throttled enforcer would be late; memory bounds a hostile client."""
    for container in containers.values():
        assert set(container["resources"]["requests"]) == {"cpu", "memory"}
        assert set(container["resources"]["limits"]) == {"memory"}


FILES = sorted(path for path in (ROOT / "deploy").rglob("*.yaml") if "helm" not in path.parts)


def images(value: Any) -> list[tuple[str, str | None]]:  # noqa: ANN401
    """Every image in an object, with the policy beside it."""
    if isinstance(value, list):
        return [found for each in value for found in images(each)]
    if not isinstance(value, dict):
        return []
    own = [(value["image"], value.get("imagePullPolicy"))] if "image" in value else []
    return own + [found for each in value.values() for found in images(each)]


def test_no_node_pulls_an_image_from_an_account_that_is_not_ours() -> None:
    """A name without a registry is docker.io's. Such an image has to be built or loaded there."""
    found = [
        (path.name, *each)
        for path in FILES
        for document in yaml.safe_load_all(path.read_text())
        for each in images(document)
    ]
    assert {path for path, _, _ in found} == {"daemonset.yaml", "patch.yaml", "job.yaml"}
    assert {(image, policy) for _, image, policy in found} == {(IMAGE, "Never")}


def test_the_image_that_is_built_is_the_one_that_runs() -> None:
    for file in ("README.md", "Dockerfile", "docs/deployment.md"):
        assert f"docker build -t {IMAGE} ." in (ROOT / file).read_text(), file

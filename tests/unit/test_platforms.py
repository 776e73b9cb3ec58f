"""The chart on each platform: its example values say what that platform needs, the table in
docs/deployment.md lists them all, and what cannot work is refused.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from tests.kube.chart import (
    CHART,
    NAMESPACE,
    ROOT,
    Object,
    RefusedError,
    containers,
    helm,
    literals,
    named,
    render,
    template,
)

TEXT = (ROOT / "docs/deployment.md").read_text()
PLATFORMS = sorted(path.stem.removeprefix("values-") for path in CHART.glob("values-*.yaml"))
# Kubernetes forbids to name one that the cluster does not have.
WITHOUT_RUNTIME_CLASS = {"aks", "bottlerocket", "eks", "gke", "gpu-operator-nri"}
SPC = {"type": "spc_t", "level": "s0"}
CDI_KEY = "nvidia.cdi.k8s.io/container"
MANAGEMENT = "management.nvidia.com/gpu=all"


def of_platform(name: str, **more: Any) -> list[Object]:  # noqa: ANN401
    """As `helm install -f values-NAME.yaml --set …` makes it."""
    values: Object = yaml.safe_load((CHART / f"values-{name}.yaml").read_text())
    return render(values | more)


def volumes(objects: list[Object]) -> dict[str, Object]:
    return {each["name"]: each for each in template(objects)["spec"]["volumes"]}


def labels_of_nodes(objects: list[Object]) -> set[str]:
    """The labels by one of which nodes are chosen."""
    spec = template(objects)["spec"]
    wanted = spec.get("affinity", {}).get("nodeAffinity", {})
    required = wanted.get("requiredDuringSchedulingIgnoredDuringExecution", {})
    terms = required.get("nodeSelectorTerms", [])
    return set(spec.get("nodeSelector", {})) | {
        each["key"] for term in terms for each in term["matchExpressions"]
    }


def test_each_platforms_values_stand_in_the_table() -> None:
    assert set(re.findall(r"`values-([a-z0-9-]+)\.yaml`", TEXT)) == set(PLATFORMS)


@pytest.mark.parametrize("name", PLATFORMS)
def test_a_runtime_class_is_named_only_where_there_is_one(name: str) -> None:
    named_one = template(of_platform(name))["spec"].get("runtimeClassName")
    assert named_one == (None if name in WITHOUT_RUNTIME_CLASS else "nvidia")


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("gke", {"cloud.google.com/gke-accelerator"}),
        ("aks", {"kubernetes.azure.com/accelerator"}),
        *(
            (name, {
                "nvidia.com/gpu.present",
                "karpenter.k8s.aws/instance-gpu-manufacturer",
                "eks.amazonaws.com/instance-gpu-manufacturer",
            })
            for name in ("eks", "bottlerocket")
        ),
        ("talos", {"nvidia.com/gpu.present"}),
    ],
)  # fmt: skip
def test_nodes_are_chosen_by_labels_that_the_platform_gives(name: str, labels: set[str]) -> None:
    assert labels_of_nodes(of_platform(name)) == labels


@pytest.mark.parametrize("name", PLATFORMS)
def test_the_usual_taint_is_tolerated_everywhere(name: str) -> None:
    found = template(of_platform(name))["spec"]["tolerations"]
    assert {"key": "nvidia.com/gpu", "operator": "Exists"} in found


def test_aks_has_another_taint_too() -> None:
    taint = {"key": "sku", "operator": "Equal", "value": "gpu"}
    assert taint in template(of_platform("aks"))["spec"]["tolerations"]


@pytest.mark.parametrize(("supervised", "container"), [(False, "enforcer"), (True, "power-agent")])
def test_gke_brings_the_library_from_the_node(supervised: bool, container: str) -> None:
    made = of_platform("gke", supervised=supervised)
    root = containers(made)[container]
    assert literals(root)["LD_LIBRARY_PATH"] == "/usr/local/nvidia/lib64"
    assert volumes(made)["driver"]["hostPath"]["path"] == "/home/kubernetes/bin/nvidia"
    mounted = {each["name"]: each["mountPath"] for each in root["volumeMounts"]}
    assert mounted["driver"] == "/usr/local/nvidia"


def test_gke_gets_its_quota_before_the_pods() -> None:
    quota = named(of_platform("gke"))["ResourceQuota", "power-agent"]["spec"]
    (scope,) = quota["scopeSelector"]["matchExpressions"]
    wanted = template(of_platform("gke"))["spec"]["priorityClassName"]
    assert (scope["scopeName"], scope["values"]) == ("PriorityClass", [wanted])
    assert int(quota["hard"]["pods"]) >= 5000


@pytest.mark.parametrize(("supervised", "container"), [(False, "enforcer"), (True, "power-agent")])
def test_the_nri_plugin_is_asked_for_the_container_that_is_root(
    supervised: bool, container: str
) -> None:
    made = of_platform("gpu-operator-nri", supervised=supervised)
    annotations = template(made)["metadata"]["annotations"]
    asked = {key: value for key, value in annotations.items() if key.startswith(CDI_KEY)}
    assert asked == {f"{CDI_KEY}.{container}": MANAGEMENT}
    assert literals(containers(made)[container])["NVIDIA_VISIBLE_DEVICES"] == "void"


def test_with_cdi_the_runtime_is_asked_by_a_full_name() -> None:
    made = of_platform("gpu-operator-cdi")
    assert literals(containers(made)["enforcer"])["NVIDIA_VISIBLE_DEVICES"] == MANAGEMENT


@pytest.mark.parametrize("name", ["rke2", "bottlerocket"])
@pytest.mark.parametrize("privileges", ["all", "minimal"])
def test_with_selinux_both_containers_may_reach_each_other(name: str, privileges: str) -> None:
    found = containers(of_platform(name, privileges=privileges))
    assert {key: each["securityContext"]["seLinuxOptions"] for key, each in found.items()} == {
        "watcher": SPC,
        "enforcer": SPC,
    }


def test_with_selinux_the_one_container_of_supervised_looks_at_pid_1() -> None:
    found = containers(of_platform("rke2", supervised=True, privileges="minimal"))
    assert found["power-agent"]["securityContext"]["seLinuxOptions"] == SPC


def test_without_selinux_no_label_is_named() -> None:
    for name in set(PLATFORMS) - {"rke2", "bottlerocket"}:
        for each in containers(of_platform(name)).values():
            assert "seLinuxOptions" not in each["securityContext"], name


@pytest.mark.parametrize("constraint", ["privileged", "gpu-agents"])
def test_openshifts_constraint_is_used_and_asked_for(constraint: str) -> None:
    """One of the cluster's own has no ClusterRole, so the chart brings a Role."""
    made = of_platform(
        "openshift",
        openshift={"enabled": True, "securityContextConstraint": constraint},
        serviceAccount={"name": "own"},
    )
    objects = named(made)
    (rule,) = objects["Role", "power-agent-scc"]["rules"]
    assert (rule["verbs"], rule["resourceNames"]) == (["use"], [constraint])
    binding = objects["RoleBinding", "power-agent-scc"]
    assert binding["roleRef"]["name"] == "power-agent-scc"
    assert binding["subjects"] == [
        {"kind": "ServiceAccount", "name": "own", "namespace": NAMESPACE}
    ]
    asked = template(made)["metadata"]["annotations"]["openshift.io/required-scc"]
    assert asked == constraint


def test_who_makes_the_rbac_objects_makes_openshifts_too() -> None:
    made = of_platform("openshift", rbac={"create": False})
    assert not {each["kind"] for each in made} & {"Role", "RoleBinding", "ClusterRole"}


@pytest.mark.parametrize(
    ("name", "root"),
    [("k0s", "/var/lib/k0s/kubelet"), ("microk8s", "/var/snap/microk8s/common/var/lib/kubelet")],
)
def test_another_kubelets_root_is_mounted_and_named(name: str, root: str) -> None:
    made = of_platform(name)
    assert literals(containers(made)["enforcer"])["POWER_AGENT_KUBELET_DIR"] == root
    assert volumes(made)["kubelet"]["hostPath"]["path"] == f"{root}/device-plugins"


REFUSED: dict[str, tuple[Object, str]] = {
    "a name that is none of CDI": ({"driver": {"cdiDevice": "all"}}, "/driver/cdiDevice"),
    "devices that nobody resolves": (
        {"driver": {"visibleDevices": "gpu=all"}}, "/driver/visibleDevices",
    ),
    "a library from nowhere": ({"driver": {"libraryPath": "/lib"}}, "set driver.hostPath"),
    "a folder in which nobody looks": ({"driver": {"hostPath": "/lib"}}, "set driver.libraryPath"),
    "a library without device files": (
        {"driver": {"hostPath": "/lib", "libraryPath": "/lib"}, "privileges": "minimal"},
        "set privileges=all",
    ),
    "a quota for no class": (
        {"resourceQuota": {"enabled": True}, "priorityClassName": ""}, "name a class",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused(case: str) -> None:
    values, words = REFUSED[case]
    with pytest.raises(RefusedError, match=re.escape(words)):
        render(values)


@pytest.mark.parametrize("name", PLATFORMS)
def test_the_notes_name_no_label_that_is_not_asked_for(name: str) -> None:
    text = helm(
        *("install", "power-agent", str(CHART), "--namespace", NAMESPACE, "--dry-run=client"),
        *("-f", str(CHART / f"values-{name}.yaml")),
    ).partition("NOTES:")[2]
    told = set(re.findall(r"-L (\S+)", text))
    assert told == set(template(of_platform(name))["spec"].get("nodeSelector", {}))
    assert "kubectl describe ds -n dynamo-system power-agent" in text
    assert "without distinction" not in text
    assert ("openshift.enabled=true" in text) == (name != "openshift")
    assert ("resourceQuota.enabled=true" in text) == (name != "gke")

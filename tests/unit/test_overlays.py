"""The overlays change what their names say and nothing else; they combine where they can."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.kube.chart import DEPLOY, Object, containers, kustomize, literals, named, template

OVERLAYS = sorted(each.name for each in (DEPLOY / "overlays").iterdir())


def overlay(name: str) -> list[Object]:
    return kustomize(DEPLOY / "overlays" / name)


@pytest.fixture(scope="module")
def base() -> list[Object]:
    return kustomize(DEPLOY / "power_agent")


def changed(before: Any, after: Any, path: str = "") -> dict[str, Any]:  # noqa: ANN401
    """Path -> new value (None: gone) wherever two objects differ; what has a name goes by it."""
    if isinstance(before, dict) and isinstance(after, dict):
        found: dict[str, Any] = {}
        for key in before.keys() | after.keys():
            found |= changed(before.get(key), after.get(key), f"{path}.{key}")
        return found
    if by_name(before) and by_name(after):
        return changed(by_name(before), by_name(after), path)
    return {} if before == after else {path: after}


def by_name(value: Any) -> dict[str, Any]:  # noqa: ANN401
    if isinstance(value, list) and all(isinstance(each, dict) and "name" in each for each in value):
        return {each["name"]: each for each in value}
    return {}


def changes(base: list[Object], name: str) -> dict[str, Any]:
    one, other = named(base), named(overlay(name))
    assert one.keys() == other.keys()
    return changed(
        {"/".join(key): each for key, each in one.items()},
        {"/".join(key): each for key, each in other.items()},
    )


CONTAINER = ".DaemonSet/power-agent.spec.template.spec.containers"


def test_these_are_all_and_each_has_its_component() -> None:
    assert OVERLAYS == [
        "dra",
        "dry-run",
        "monitoring",
        "namespaced",
        "openshift",
        "reduced-privileges",
        "selinux",
        "supervised",
    ]
    assert sorted(each.name for each in (DEPLOY / "components").iterdir()) == OVERLAYS


def test_reduced_privileges_changes_the_security_context_alone(base: list[Object]) -> None:
    context = f"{CONTAINER}.enforcer.securityContext"
    assert changes(base, "reduced-privileges") == {
        f"{context}.privileged": False,
        f"{context}.allowPrivilegeEscalation": False,
        f"{context}.capabilities": {"drop": ["ALL"], "add": ["SYS_ADMIN", "SYS_PTRACE"]},
        f"{context}.appArmorProfile": {"type": "Unconfined"},
    }


def test_dry_run_adds_one_variable(base: list[Object]) -> None:
    assert changes(base, "dry-run") == {
        f"{CONTAINER}.enforcer.env.POWER_AGENT_DRY_RUN": {
            "name": "POWER_AGENT_DRY_RUN",
            "value": "true",
        }
    }


def test_dra_shows_the_kubelets_root_to_the_enforcer_alone(base: list[Object]) -> None:
    root = "/var/lib/kubelet"
    volume = ".DaemonSet/power-agent.spec.template.spec.volumes.kubelet.hostPath"
    mount = f"{CONTAINER}.enforcer.volumeMounts.kubelet"
    # Without the propagation a volume that the kubelet unmounts would stay mounted in the enforcer.
    assert changes(base, "dra") == {
        f"{volume}.path": root,
        f"{volume}.type": "Directory",
        f"{mount}.mountPath": root,
        f"{mount}.mountPropagation": "HostToContainer",
    }
    enforcer = containers(overlay("dra"))["enforcer"]
    assert literals(enforcer)["POWER_AGENT_KUBELET_DIR"] == root
    (mounted,) = [each for each in enforcer["volumeMounts"] if each["name"] == "kubelet"]
    assert mounted["readOnly"] is True


def test_namespaced_has_a_role_instead_of_the_cluster_role() -> None:
    objects = named(overlay("namespaced"))
    assert {kind for kind, _ in objects} == {
        "Namespace", "ServiceAccount", "Role", "RoleBinding", "DaemonSet",
    }  # fmt: skip
    role, binding = objects["Role", "power-agent"], objects["RoleBinding", "power-agent"]
    assert role["rules"] == [
        {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]}
    ]
    assert binding["roleRef"]["kind"] == "Role"
    assert binding["subjects"] == [
        {"kind": "ServiceAccount", "name": "power-agent", "namespace": "dynamo-system"}
    ]


@pytest.fixture
def deploy(tmp_path: Path) -> Path:
    """A copy, to change."""
    return Path(shutil.copytree(DEPLOY, tmp_path / "deploy", ignore=shutil.ignore_patterns("helm")))


def test_the_namespace_is_named_in_one_place(deploy: Path) -> None:
    """Whoever changes the Role's need change nothing else."""
    file = deploy / "components/namespaced/role.yaml"
    file.write_text(file.read_text().replace("namespace: default", "namespace: workers", 1))
    objects = kustomize(deploy / "overlays/namespaced")
    assert named(objects)["RoleBinding", "power-agent"]["metadata"]["namespace"] == "workers"
    assert literals(containers(objects)["watcher"])["WATCH_NAMESPACE"] == "workers"


def test_supervised_is_one_container_with_what_both_had(base: list[Object]) -> None:
    (name, one), *more = containers(overlay("supervised")).items()
    assert (name, more) == ("power-agent", [])
    both = containers(base)
    assert one["command"] == ["supervisord", "-c", "/opt/power-agent/supervisord.conf"]
    assert one["image"] == both["watcher"]["image"]
    assert one["securityContext"] == both["enforcer"]["securityContext"]
    assert one["ports"] == both["watcher"]["ports"]
    assert literals(one) == literals(both["enforcer"])
    assert {each["name"] for each in one["env"]} >= {"NODE_NAME", "NVIDIA_VISIBLE_DEVICES"}
    mounts = {each["name"]: each for each in both["watcher"]["volumeMounts"]}
    mounts |= {each["name"]: each for each in both["enforcer"]["volumeMounts"]}
    assert {each["name"]: each for each in one["volumeMounts"]} == mounts


def test_supervised_leaves_the_pod_itself_as_it_was(base: list[Object]) -> None:
    before, after = template(base)["spec"], template(overlay("supervised"))["spec"]
    assert {k: v for k, v in before.items() if k != "containers"} == {
        k: v for k, v in after.items() if k != "containers"
    }


def test_monitoring_only_adds(base: list[Object]) -> None:
    before, after = named(base), named(overlay("monitoring"))
    assert before.items() <= after.items()
    assert after.keys() - before.keys() == {
        ("PodMonitor", "power-agent"),
        ("PrometheusRule", "power-agent"),
        ("ConfigMap", "power-agent-dashboard"),
    }


def test_components_combine(deploy: Path) -> None:
    parts = ["reduced-privileges", "namespaced", "dry-run", "monitoring", "dra"]
    own = deploy / "overlays/own"
    own.mkdir()
    kustomization = {
        "resources": ["../../power_agent"],
        "components": [f"../../components/{each}" for each in parts],
        "images": [{"name": "dynamo/power-agent", "newTag": "v1.0.1"}],
    }
    (own / "kustomization.yaml").write_text(json.dumps(kustomization))
    objects = kustomize(own)
    found = containers(objects)
    assert {each["image"] for each in found.values()} == {"dynamo/power-agent:v1.0.1"}
    assert found["enforcer"]["securityContext"]["privileged"] is False
    assert literals(found["enforcer"])["POWER_AGENT_DRY_RUN"] == "true"
    assert literals(found["watcher"])["WATCH_NAMESPACE"] == "default"
    assert {"Role", "PodMonitor"} <= {kind for kind, _ in named(objects)}
    mounted = {each["name"]: each["mountPath"] for each in found["enforcer"]["volumeMounts"]}
    assert mounted["kubelet"] == "/var/lib/kubelet"

"""docs/deployment.md names files, values and overlays that are there and work."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.kube.chart import (
    CHART,
    DEPLOY,
    NAMESPACE,
    ROOT,
    containers,
    documents,
    kustomize,
    literals,
    named,
    render,
    template,
)

TEXT = (ROOT / "docs/deployment.md").read_text()
OPERATIONS = (ROOT / "docs/operations.md").read_text()
OPERATIONS_EXAMPLES = re.findall(r"^```yaml\n(.*?)^```", OPERATIONS, re.MULTILINE | re.DOTALL)
EXAMPLES = re.findall(r"^```yaml\n# (\S+)\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def test_every_path_exists() -> None:
    paths = set(re.findall(r"\bdeploy/[\w./-]*\w", TEXT)) - {file for file, _ in EXAMPLES}
    assert len(paths) > 5
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


def test_every_link_leads_somewhere() -> None:
    headings = {
        re.sub(r"[^\w -]", "", line).strip().lower().replace(" ", "-")
        for line in re.findall(r"^#+ (.*)$", TEXT, re.MULTILINE)
    }
    for target in re.findall(r"\]\(([^)]+)\)", TEXT):
        file, _, anchor = target.partition("#")
        if file:
            assert (ROOT / "docs" / file).resolve().exists(), target
        else:
            assert anchor in headings, target


def test_every_overlay_is_described() -> None:
    told = set(re.findall(r"^\| `([a-z-]+)` \|", TEXT, re.MULTILINE))
    assert {each.name for each in (DEPLOY / "overlays").iterdir()} <= told


def test_what_one_overlay_leaves_behind_for_another_is_described() -> None:
    """`kubectl apply -k` deletes nothing."""
    has = {
        each.name: {(kind.lower(), name) for kind, name in named(kustomize(each))}
        for each in (DEPLOY / "power_agent", *(DEPLOY / "overlays").iterdir())
    }
    constraint = {("role", "power-agent-scc"), ("rolebinding", "power-agent-scc")}
    assert has["openshift"] - has["power_agent"] == constraint
    assert "`kubectl delete role,rolebinding power-agent-scc -n dynamo-system`" in TEXT
    left = {
        (old, new): found
        for old in has
        for new in has
        if (found := has[old] - has[new] - constraint) and "monitoring" not in (old, new)
    }
    told = re.findall(r"\| `kubectl delete (\S+) power-agent( -n NAMESPACE)?`", TEXT)
    to_namespaced, from_namespaced = (
        {(kind, "power-agent") for kind in kinds.split(",")} for kinds, _ in told
    )
    assert [scope for _, scope in told] == ["", " -n NAMESPACE"]
    for (old, new), found in left.items():
        assert found == (to_namespaced if new == "namespaced" else from_namespaced)
        assert "namespaced" in (old, new)
    assert has["monitoring"] - has["power_agent"] == {
        (kind.lower(), name) for kind, name in named(kustomize(DEPLOY / "monitoring"))
    }


def test_every_value_is_one() -> None:
    values: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())
    groups = "|".join(values)
    # Not `openshift.io/…`, which is no value.
    for name in re.findall(rf"(?<![\w.])((?:{groups})\.[\w.]*\w)(?![\w/])", TEXT):
        if name.endswith((".yaml", ".json")):
            continue
        found: Any = values
        for key in name.split("."):
            assert key in found, name
            found = found[key]


def example(kind: str) -> dict[str, Any]:
    """The one object of this kind that the text shows."""
    blocks = re.findall(r"^```yaml\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    (found,) = [each for block in blocks if (each := yaml.safe_load(block)).get("kind") == kind]
    one: dict[str, Any] = found
    return one


def test_the_quota_for_gke_is_for_the_class_of_the_manifest() -> None:
    quota = example("ResourceQuota")
    (scope,) = quota["spec"]["scopeSelector"]["matchExpressions"]
    pod = template(documents((DEPLOY / "power_agent/daemonset.yaml").read_text()))["spec"]
    assert quota["metadata"]["namespace"] == NAMESPACE
    assert (scope["scopeName"], scope["values"]) == ("PriorityClass", [pod["priorityClassName"]])


def test_the_constraint_for_openshift_admits_what_the_reduced_form_asks_for() -> None:
    """No more and no less, as far as its fields name it. No server here knows the type."""
    constraint = example("SecurityContextConstraints")
    spec = template(kustomize(DEPLOY / "overlays/reduced-privileges"))["spec"]
    contexts = [each["securityContext"] for each in spec["containers"]]
    added = {cap for each in contexts for cap in each["capabilities"].get("add", [])}
    assert set(constraint["allowedCapabilities"]) == added
    assert constraint["allowHostPID"] is spec["hostPID"]
    assert constraint["allowPrivilegedContainer"] is any(each["privileged"] for each in contexts)
    assert constraint["readOnlyRootFilesystem"] is all(
        each["readOnlyRootFilesystem"] for each in contexts
    )
    kinds = {kind for each in spec["volumes"] for kind in each if kind != "name"}
    assert set(constraint["volumes"]) == kinds
    (group,) = constraint["fsGroup"]["ranges"]
    assert group["min"] == group["max"] == spec["securityContext"]["fsGroup"]
    assert constraint["runAsUser"]["type"] == "RunAsAny"  # 0 and another one
    assert {each["runAsUser"] for each in contexts} == {0, 65532}
    assert constraint["seccompProfiles"] == ["runtime/default"]
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}


def test_the_rule_for_events_is_the_charts() -> None:
    block, _ = OPERATIONS_EXAMPLES
    rules = named(render({"settings": {"events": True}}))["ClusterRole", "power-agent"]["rules"]
    assert rules[1:] == yaml.safe_load(block)


def test_a_worker_that_waits_asks_the_agent_of_its_own_node() -> None:
    _, block = OPERATIONS_EXAMPLES
    service, worker = yaml.safe_load_all(block)
    spec = service["spec"]
    (port,) = spec["ports"]
    manifest = documents((DEPLOY / "power_agent/daemonset.yaml").read_text())
    assert spec["selector"].items() <= template(manifest)["metadata"]["labels"].items()
    assert spec["internalTrafficPolicy"] == "Local"
    served = {p["name"] for c in containers(manifest).values() for p in c.get("ports", ())}
    assert port["targetPort"] in served
    (init,) = worker["initContainers"]
    name, namespace = (service["metadata"][key] for key in ("name", "namespace"))
    assert f"http://{name}.{namespace}:{port['port']}/readyz" in init["command"][-1]


def test_the_lines_to_change_are_marked() -> None:
    """A mark stands in the comment right above its line."""
    marked = set()
    lines = (DEPLOY / "power_agent/daemonset.yaml").read_text().splitlines()
    for number, line in enumerate(lines):
        if line.lstrip().startswith("# change:"):
            following = (each.strip() for each in lines[number:])
            marked.add(next(each for each in following if not each.startswith("#")).split(":")[0])
    assert marked == {
        "image", "imagePullPolicy", "nodeSelector", "priorityClassName", "runtimeClassName",
        "tolerations",
    }  # fmt: skip


def test_the_writers_under_dynamo_are_those_of_the_policies() -> None:
    """As `system:serviceaccount:NAMESPACE:NAME` there, as name and namespace in the table."""
    data = named(kustomize(DEPLOY / "policies-dynamo"))["ConfigMap", "power-agent-policy"]["data"]
    accounts = {tuple(line.split(":")[2:]) for line in data["writers"].split()}
    told = re.findall(r"^\| .* \| `([a-z-]+)` in `([a-z-]+)` \|", TEXT, re.MULTILINE)
    assert {(namespace, name) for name, namespace in told} == accounts
    assert f"the group `{data['writerGroups']}`" in TEXT


def test_beside_dynamo_all_but_the_namespace_is_removed() -> None:
    short = {"ds": "DaemonSet", "sa": "ServiceAccount", "clusterrole": "ClusterRole",
             "clusterrolebinding": "ClusterRoleBinding"}  # fmt: skip
    section = TEXT.partition("\n## Under Dynamo\n")[2].partition("\n## ")[0]
    removed = re.findall(r"^ +kubectl delete (\S+) power-agent", section, re.MULTILINE)
    kinds = {short[each] for line in removed for each in line.split(",")}
    assert kinds == {kind for kind, _ in named(kustomize(DEPLOY / "power_agent"))} - {"Namespace"}


@pytest.fixture
def deploy(tmp_path: Path) -> Path:
    """A copy, to add to."""
    return Path(shutil.copytree(DEPLOY, tmp_path / "deploy", ignore=shutil.ignore_patterns("helm")))


def test_one_line_gives_the_agent_a_namespace_of_its_own(deploy: Path) -> None:
    own = deploy / "overlays/own"
    own.mkdir()
    (line,) = re.findall(r"`(namespace: [a-z-]+)`", TEXT)
    (own / "kustomization.yaml").write_text(f"resources: [../../power_agent]\n{line}\n")
    made = named(kustomize(own))
    name = line.partition(": ")[2]
    assert {each["metadata"].get("namespace", name) for each in made.values()} == {name}
    assert ("Namespace", name) in made
    (subject,) = made["ClusterRoleBinding", "power-agent"]["subjects"]
    assert subject["namespace"] == name


def test_the_overlays_of_the_examples_build(deploy: Path) -> None:
    assert len(EXAMPLES) == 2
    made = []
    for file, text in EXAMPLES:
        path = deploy.parent / file
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        made.append(kustomize(path.parent))
    bare, combined = made
    assert "runtimeClassName" not in template(bare)["spec"]
    mounted = {each["name"] for each in containers(bare)["enforcer"]["volumeMounts"]}
    assert mounted == {"run", "state", "kubelet", "driver"}
    enforcer = containers(combined)["enforcer"]
    assert enforcer["image"] == "images.example.com/dynamo/power-agent:v1.0.0"
    policies = {each["imagePullPolicy"] for each in containers(combined).values()}
    assert policies == {"IfNotPresent"}  # it is that registry's, and ours
    assert enforcer["securityContext"]["privileged"] is False
    assert literals(enforcer)["POWER_AGENT_ON_EXIT"] == "hold"

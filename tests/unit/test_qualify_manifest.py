"""deploy/qualify's Job has what the agent's own manifest has, on one GPU, and its scripts."""

from __future__ import annotations

import ast
import sys

import pytest

from shared.settings import DEFAULT_RUN_DIR
from tests.kube.chart import DEPLOY, Object, containers, kustomize, literals, named, template

SCRIPTS = DEPLOY / "qualify"


@pytest.fixture(scope="module")
def objects() -> dict[str, Object]:
    """By kind: the Job and its scripts."""
    return {kind: each for (kind, _), each in named(kustomize(SCRIPTS)).items()}


@pytest.fixture(scope="module")
def pod(objects: dict[str, Object]) -> Object:
    spec: Object = objects["Job"]["spec"]["template"]["spec"]
    return spec


@pytest.fixture(scope="module")
def container(pod: Object) -> Object:
    (one,) = pod["containers"]
    found: Object = one
    return found


def test_it_is_a_job_and_its_scripts_in_one_namespace(objects: dict[str, Object]) -> None:
    assert objects.keys() == {"Job", "ConfigMap"}
    assert len({each["metadata"]["namespace"] for each in objects.values()}) == 1


def test_every_script_that_it_imports_comes_with_it(objects: dict[str, Object]) -> None:
    """All else is in the image: the enforcer's environment, and the standard library."""
    files = objects["ConfigMap"]["data"]
    own = {path.stem for path in SCRIPTS.glob("*.py")}
    imported = {
        name.partition(".")[0]
        for text in files.values()
        for node in ast.walk(ast.parse(text))
        for name in (
            [each.name for each in node.names] if isinstance(node, ast.Import)
            else [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        )
    }  # fmt: skip
    assert {f"{name}.py" for name in imported & own} <= files.keys()
    image = {"enforcer", "shared", "msgspec", "pynvml", "zmq"}
    assert imported - own - image <= sys.stdlib_module_names


def test_the_pod_mounts_the_scripts_that_it_runs(pod: Object, container: Object) -> None:
    volumes = {each["name"]: each for each in pod["volumes"]}
    mounts = {each["mountPath"]: volumes[each["name"]] for each in container["volumeMounts"]}
    assert container["command"][-1] == "/qualify/qualify.py"
    assert "configMap" in mounts["/qualify"]
    assert "emptyDir" in mounts[DEFAULT_RUN_DIR]  # the image's TMPDIR


def test_image_runtime_and_state_are_the_agents(pod: Object, container: Object) -> None:
    agent = kustomize(DEPLOY / "power_agent")
    enforcer, spec = containers(agent)["enforcer"], template(agent)["spec"]
    assert container["image"] == enforcer["image"]
    assert container["command"][0] == enforcer["command"][0]
    assert pod["hostPID"] is spec["hostPID"] is True
    assert pod["runtimeClassName"] == spec["runtimeClassName"]
    # One lock, so that an agent waits.
    state = [each for each in spec["volumes"] if each["name"] == "state"]
    assert [each for each in pod["volumes"] if each["name"] == "state"] == state


def test_it_reaches_its_own_gpu_alone(pod: Object, container: Object) -> None:
    """A privileged container reaches every GPU, and so does one that names them itself."""
    agent = containers(kustomize(DEPLOY / "overlays/reduced-privileges"))["enforcer"]
    context = container["securityContext"]
    for part in ("privileged", "capabilities", "appArmorProfile"):
        assert context[part] == agent["securityContext"][part]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert "NVIDIA_VISIBLE_DEVICES" not in literals(container)
    assert "compute" in literals(container)["NVIDIA_DRIVER_CAPABILITIES"]
    assert pod["automountServiceAccountToken"] is False


def test_it_runs_once_and_has_time_to_give_back(objects: dict[str, Object], pod: Object) -> None:
    assert objects["Job"]["spec"]["backoffLimit"] == 0
    assert pod["restartPolicy"] == "Never"
    assert pod["terminationGracePeriodSeconds"] >= 60

"""What the tests of the deployment render: the chart by the real helm, overlays by kubectl."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.kube import assets, go_command, helm_assets
from tests.waiting import HANG_S

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "helm" / "power-agent"
NAMESPACE, RELEASE = "dynamo-system", "power-agent"

Object = dict[str, Any]


class RefusedError(Exception):
    """Helm's own words."""


def helm_binary() -> Path:
    """The real helm; the test is skipped where there is none, or fails where there must be."""
    try:
        binary = helm_assets.find()
    except go_command.AssetsError as error:
        pytest.fail(str(error), pytrace=False)
    if binary is None:
        reason = "no helm: python -m tests.kube.helm_assets builds it (needs Go)"
        if os.environ.get("POWER_AGENT_REQUIRE_HELM") == "1":
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)
    return binary


def helm(*arguments: str, stdin: str = "", kubeconfig: str | Path = os.devnull) -> str:
    """What helm prints; it knows no cluster unless one is given."""
    binary = helm_binary()
    with tempfile.TemporaryDirectory(prefix="power-agent-helm-") as home:
        own = {f"HELM_{each}_HOME": home for each in ("CACHE", "CONFIG", "DATA")}
        done = subprocess.run(
            [binary, *arguments],
            env=os.environ | own | {"KUBECONFIG": str(kubeconfig)},
            input=stdin,
            capture_output=True,
            text=True,
            timeout=HANG_S,
            check=False,
        )
    if done.returncode != 0:
        raise RefusedError(done.stderr)
    return done.stdout


@functools.cache
def _templated(stdin: str, *arguments: str) -> str:
    """One start of helm for what many tests look at."""
    return helm("template", *arguments, stdin=stdin)


def render(
    values: Object | None = None,
    *flags: str,
    release: str = RELEASE,
    namespace: str = NAMESPACE,
) -> list[Object]:
    """The chart's objects, or RefusedError."""
    given = json.dumps(values or {})
    where = (release, str(CHART), "--namespace", namespace)
    return documents(_templated(given, *where, "--values", "-", *flags))


def kustomize(folder: Path) -> list[Object]:
    """What `kubectl apply -k` would apply; the test is skipped where there is no kubectl."""
    # What a test has made itself may still change.
    made = _kustomized if folder.is_relative_to(DEPLOY) else _kustomized.__wrapped__
    return documents(made(folder))


@functools.cache
def _kustomized(folder: Path) -> str:
    found = assets.find(["kubectl"])
    binary = found / "kubectl" if found else shutil.which("kubectl")
    if binary is None:
        pytest.skip("no kubectl, which has kustomize: python -m tests.kube.assets builds it")
    done = subprocess.run(
        [binary, "kustomize", folder], capture_output=True, text=True, timeout=HANG_S, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def documents(text: str) -> list[Object]:
    """The objects of a file with several; libyaml reads them ten times as fast."""
    return [each for each in yaml.load_all(text, yaml.CSafeLoader) if each]


def named(objects: list[Object]) -> dict[tuple[str, str], Object]:
    """By kind and name."""
    found = {(each["kind"], each["metadata"]["name"]): each for each in objects}
    assert len(found) == len(objects), "a name twice"
    return found


def without_helm_labels(value: Any) -> Any:  # noqa: ANN401
    """The labels by which Helm knows its own make no difference; nor does the order of names."""
    if isinstance(value, dict):
        return {
            key: without_helm_labels(each)
            for key, each in value.items()
            if not key.startswith(("app.kubernetes.io/", "helm.sh/"))
        }
    if isinstance(value, list):
        if all(isinstance(each, dict) and "name" in each for each in value):
            value = sorted(value, key=lambda each: str(each["name"]))
        return [without_helm_labels(each) for each in value]
    return value


def template(objects: list[Object]) -> Object:
    """The pod template of the DaemonSet."""
    (found,) = [each for each in objects if each["kind"] == "DaemonSet"]
    pod: Object = found["spec"]["template"]
    return pod


def containers(objects: list[Object]) -> dict[str, Object]:
    """The DaemonSet's containers by name."""
    return {each["name"]: each for each in template(objects)["spec"]["containers"]}


def literals(container: Object) -> dict[str, str]:
    """A container's variables that stand there as they are."""
    return {each["name"]: each["value"] for each in container["env"] if "value" in each}


def strings(value: Any) -> Iterator[str]:  # noqa: ANN401
    """Every text in an object, keys too."""
    if isinstance(value, dict):
        for key, each in value.items():
            yield from (key, *strings(each))
    elif isinstance(value, list):
        for each in value:
            yield from strings(each)
    elif isinstance(value, str):
        yield value

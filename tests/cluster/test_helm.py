"""The chart by the real helm: installed, changed by an upgrade, and uninstalled."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster.agent import NAME, NAMESPACE, ROOT, Agent, simulated_nvml
from tests.cluster.conftest import MakeWorker, Place
from tests.cluster.simulator import Gpus
from tests.kube import helm_assets
from tests.waiting import until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

CHART = ROOT / "deploy/helm/power-agent"

Helm = Callable[..., str]


@pytest.fixture
def helm(place: Place, tmp_path: Path) -> Iterator[Helm]:
    """Runs helm against the cluster; whatever was installed before and after is removed."""
    binary = helm_assets.find()
    if binary is None:
        pytest.skip("no helm: python -m tests.kube.helm_assets builds it (needs Go)")
    own = {f"HELM_{each}_HOME": str(tmp_path) for each in ("CACHE", "CONFIG", "DATA")}

    def run(*arguments: str) -> str:
        command = [str(binary), *arguments, "--namespace", NAMESPACE]
        if place.node is not None:
            command = place.node.box.in_network(command)
        done = subprocess.run(
            command,
            env=os.environ | own | {"KUBECONFIG": str(place.cluster.kubeconfig)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    Agent(place.cluster, place.image).delete()
    yield run
    run("uninstall", NAME, "--ignore-not-found", "--wait")
    place.cluster.kubectl("delete", "namespace", NAMESPACE, "--ignore-not-found")


def test_a_release_enforces_follows_its_upgrade_and_gives_back_when_uninstalled(
    place: Place, helm: Helm, gpus: Gpus, make_worker: MakeWorker
) -> None:
    repository, _, tag = place.image.rpartition(":")
    image = (f"--set=image.repository={repository}", f"--set=image.tag={tag}")
    agent = Agent(place.cluster, place.image)
    helm("install", NAME, str(CHART), "--create-namespace", *image)
    patch = json.dumps(simulated_nvml())
    place.cluster.kubectl("patch", "daemonset", NAME, "-n", NAMESPACE, "--patch", patch)
    agent.wait_rolled_out()
    agent.wait_ready()
    make_worker("released", 0, watts="500")
    gpus.wait_limit(0, 500_000)

    helm("upgrade", NAME, str(CHART), *image, "--set=settings.maxWatts=400")
    place.cluster.kubectl("patch", "daemonset", NAME, "-n", NAMESPACE, "--patch", patch)
    agent.wait_rolled_out()
    gpus.wait_limit(0, 400_000, timeout_s=60)
    until(lambda: agent.status()["watcher"]["connected"], "the new watcher linked")
    assert agent.status()["pods"][0]["state"] == "clamped"

    helm("uninstall", NAME, "--wait")
    gpus.wait_limit(0, 700_000, timeout_s=40)
    until(lambda: gpus.programs("enforcer") + gpus.programs("watcher") == [], "the end")
    assert not place.cluster.items(
        "daemonsets,serviceaccounts", "-n", NAMESPACE, "-l", "app=power-agent"
    )
    assert place.cluster.gone("clusterrole", NAME)

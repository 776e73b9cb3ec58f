"""Static pods: the kubelet's own, which the API only mirrors under another uid."""

from __future__ import annotations

import json
import uuid

import pytest

from tests.cluster.agent import ANNOTATION, Agent
from tests.cluster.cluster import worker
from tests.cluster.conftest import Place
from tests.cluster.simulator import Gpus
from tests.waiting import until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


@pytest.mark.parametrize("uid", [None, str(uuid.uuid4())], ids=["hashed-id", "uid-in-the-manifest"])
def test_a_static_pod_is_limited_by_its_manifests_annotation(
    uid: str | None, place: Place, static_pods: str, agent: Agent, gpus: Gpus
) -> None:
    pod = worker("static", [0], place.image, annotations={ANNOTATION: "300"})
    pod["metadata"]["namespace"] = "default"
    if uid is not None:
        pod["metadata"]["uid"] = uid
    mirrored = f"static-{agent.pod()['spec']['nodeName']}"
    file = f"{static_pods}/static.json"
    gpus.write_on_node(file, json.dumps(pod))
    try:
        gpus.wait_limit(0, 300_000, timeout_s=40)
        mirror = place.cluster.get("pod", mirrored)["metadata"]
        kubelets_own = mirror["annotations"]["kubernetes.io/config.hash"]
        assert mirror["uid"] != kubelets_own
        assert gpus.processes_of(kubelets_own)
        states = {entry["name"]: entry["state"] for entry in agent.status()["pods"]}
        assert states == {mirrored: "enforced"}
    finally:
        gpus.remove_on_node(file)
    gpus.wait_limit(0, 700_000, timeout_s=40)


def test_an_ordinary_pod_cannot_pass_for_a_static_one(
    place: Place, agent: Agent, gpus: Gpus
) -> None:
    """It carries another pod's id as its config.hash, and an annotation of its own."""
    victim, impostor = worker("victim", [1], place.image), worker("impostor", [], place.image)
    place.cluster.apply(victim)
    place.cluster.kubectl("wait", "pod/victim", "--for=condition=Ready", "--timeout=60s")
    uid = place.cluster.get("pod", "victim")["metadata"]["uid"]
    impostor["metadata"]["annotations"] = {ANNOTATION: "250", "kubernetes.io/config.hash": uid}
    before = len(gpus.sets(1))
    try:
        place.cluster.apply(impostor)
        until(
            lambda: [p["name"] for p in agent.status()["pods"]] == ["impostor"],
            "the impostor to be known",
        )
        assert [p["state"] for p in agent.status()["pods"]] == ["waiting"]
        assert len(gpus.sets(1)) == before
    finally:
        place.cluster.kubectl("delete", "pod", "victim", "impostor", "--ignore-not-found")

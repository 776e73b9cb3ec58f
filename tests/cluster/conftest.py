"""Lends the tests of this folder one cluster, the administrator's or one of their own."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cluster import box, images, parts, simulator
from tests.cluster.agent import ANNOTATION, ROOT, RUNTIME_CLASS, Agent
from tests.cluster.cluster import Cluster, KubectlError, Object, wait_for_pod, wait_gone, worker
from tests.cluster.node import PAUSE_IMAGE, STATIC_PODS, Node
from tests.cluster.simulator import Gpus
from tests.kube import assets
from tests.waiting import SLOWNESS, until

# On a cluster that was given: an image that its nodes have or can pull.
IMAGE_VARIABLE = "POWER_AGENT_TEST_IMAGE"
# On a cluster that was given: where its node's kubelet looks for static pods.
STATIC_PODS_VARIABLE = "POWER_AGENT_TEST_STATIC_PODS"
GPU_LABEL = "nvidia.com/gpu.present"
_KUBECONFIG = os.environ.get("KUBECONFIG", "")  # before any test looks away from it


@dataclass(frozen=True)
class Place:
    """Where the tests of this session run."""

    cluster: Cluster
    gpus: Gpus
    image: str
    next_image: str
    # None on a cluster that was given: what needs the node's files is then skipped.
    node: Node | None
    # The kubelet's folder for them on the node, where it is known.
    static_pods: str | None


@pytest.fixture(scope="session")
def place() -> Iterator[Place]:
    """The cluster of KUBECONFIG if there is one, else a node in namespaces of this machine."""
    with contextlib.ExitStack() as undo:
        try:
            found = _given(undo) if _KUBECONFIG else _own(undo)
        except parts.LackingError as error:
            if os.environ.get("POWER_AGENT_REQUIRE_CLUSTER") == "1":
                pytest.fail(f"no cluster: {error}", pytrace=False)
            pytest.skip(f"no cluster: {error}")
        yield found


def _own(undo: contextlib.ExitStack) -> Place:
    box.require()
    parts.provide(parts.IMAGE, parts.NODE)
    binaries, plugins = parts.node_binaries(), parts.cni_plugins()
    assert plugins is not None
    with images.builder() as build:
        agent = images.archive(build, images.build_image(build))
        pause = images.archive(build, images.make_pause(build, PAUSE_IMAGE))
    node = undo.enter_context(Node(binaries, plugins))
    for archive in (pause, agent):
        node.import_image(archive)
    node.wait_until_ready()
    following = f"{images.IMAGE}-next"
    node.tag_image(images.IMAGE, following)
    cluster = Cluster(node.kubectl_command, node.kubeconfig, node.box.log_tails)
    cluster.apply(RUNTIME_CLASS)
    gpus = simulator.install(cluster, images.IMAGE, local=node.simulated_gpus)
    return Place(cluster, gpus, images.IMAGE, following, node, STATIC_PODS)


def _given(undo: contextlib.ExitStack) -> Place:
    """Everything through kubectl, and everything taken away again."""
    binaries = assets.find(["kubectl"])
    kubectl = shutil.which("kubectl") or (binaries and str(binaries / "kubectl"))
    if not kubectl:
        raise parts.LackingError("KUBECONFIG is set, but there is no kubectl")
    cluster = Cluster(lambda *arguments: [kubectl, *arguments], Path(_KUBECONFIG))
    image = os.environ.get(IMAGE_VARIABLE, images.IMAGE)
    agent = Agent(cluster, image)
    if agent.is_installed():
        raise parts.LackingError("KUBECONFIG: the agent runs there already; it is left alone")
    undo.callback(agent.delete)
    if not cluster.items("nodes", "-l", f"{GPU_LABEL}=true"):
        node = cluster.items("nodes")[0]["metadata"]["name"]
        cluster.kubectl("label", "node", node, f"{GPU_LABEL}=true")
        undo.callback(cluster.run, "label", "node", node, f"{GPU_LABEL}-")
    if len(cluster.items("nodes", "-l", f"{GPU_LABEL}=true")) != 1:
        raise parts.LackingError(f"KUBECONFIG: more than one node has the label {GPU_LABEL}=true")
    if not cluster.kubectl("get", "runtimeclass", "nvidia", "--ignore-not-found"):
        cluster.apply(RUNTIME_CLASS)
        undo.callback(cluster.run, "delete", "runtimeclass", "nvidia")
    undo.callback(simulator.uninstall, cluster)
    static_pods = os.environ.get(STATIC_PODS_VARIABLE)
    return Place(cluster, simulator.install(cluster, image), image, image, None, static_pods)


@pytest.fixture
def cluster(place: Place) -> Cluster:
    return place.cluster


@pytest.fixture
def gpus(place: Place) -> Gpus:
    return place.gpus


@pytest.fixture
def static_pods(place: Place) -> str:
    """The folder on the node whose manifests the kubelet starts by itself."""
    if place.static_pods is None:
        pytest.skip(f"on a given cluster it takes {STATIC_PODS_VARIABLE}, a folder of the node")
    return place.static_pods


@pytest.fixture
def agent(place: Place) -> Agent:
    """As `kubectl apply -f deploy/power_agent/daemonset.yaml` leaves it, whatever was before."""
    installed = Agent(place.cluster, place.image)
    installed.deploy()
    installed.wait_ready()
    return installed


Install = Callable[..., Agent]


@pytest.fixture
def install(place: Place) -> Iterator[Install]:
    """An overlay in place of whatever was there; removed at the end, for it may bring more."""
    installed: list[Agent] = []

    def make(name: str, *patches: Object, container: str = "enforcer", ready: bool = True) -> Agent:
        Agent(place.cluster, place.image).delete()
        source = ROOT / "deploy/overlays" / name
        agent = Agent(place.cluster, place.image, source=source, container=container)
        installed.append(agent)
        agent.deploy(*patches, wait=ready)
        if ready:
            agent.wait_ready()
        else:
            until(agent.pods, "a pod of the agent")
        return agent

    yield make
    for agent in installed:
        agent.delete()


MakeWorker = Callable[..., str]


@pytest.fixture
def make_worker(place: Place) -> Iterator[MakeWorker]:
    """Makes worker pods, and sees at the end that every GPU is as it was found."""
    names: list[str] = []

    def make(name: str, *on: int, watts: str | None = None, **options: object) -> str:
        annotations: Mapping[str, str] = {} if watts is None else {ANNOTATION: watts}
        pod = worker(name, on, place.image, annotations=annotations, **options)  # type: ignore[arg-type]
        names.append(name)
        place.cluster.apply(pod)
        wait_for_pod(place.cluster, name)
        return name

    yield make
    for name in names:
        place.cluster.kubectl("delete", "pod", name, "--ignore-not-found", "--wait=false")
    for name in names:
        wait_gone(place.cluster, "pod", name)
    for index in range(place.gpus.count):
        place.gpus.wait_limit(index, place.gpus.default_mw(index))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A slow machine has more time for a whole test, too."""
    for item in items:
        mark = item.get_closest_marker("timeout")
        if mark is not None and item.get_closest_marker("cluster"):
            item.add_marker(pytest.mark.timeout(mark.args[0] * SLOWNESS), append=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failed test shows what the cluster and the agent said."""
    report = yield
    place = getattr(item, "funcargs", {}).get("place")
    if report.failed and isinstance(place, Place):
        with contextlib.suppress(KubectlError, OSError):
            report.sections.append(("agent", Agent(place.cluster, place.image).described()))
            report.sections.append(("node", place.cluster.logs()))
    return report

"""Lends every test of this folder one real control plane, or says why there is none."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack

import pytest

from tests.kube import assets, go_command
from tests.kube.agent_node import Audit, KubeNode
from tests.simnode.controlplane import ControlPlane
from tests.simnode.node import FAST, MANIFEST

MakeNode = Callable[..., KubeNode]


@pytest.fixture(scope="package")
def audit(tmp_path_factory: pytest.TempPathFactory) -> Audit:
    """What service accounts ask of the control plane."""
    return Audit(tmp_path_factory.mktemp("audit"))


@pytest.fixture(scope="package")
def controlplane(audit: Audit) -> Iterator[ControlPlane]:
    """Started once, ended with the last test of the folder: an idle one takes a tenth of a core.

    Tests keep apart by using node and pod names of their own.
    """
    try:
        folder = assets.from_environment()
    except go_command.AssetsError as error:
        reason = f"no real API server: {error}"
        if os.environ.get("POWER_AGENT_REQUIRE_KUBE") == "1":
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)
    with ControlPlane(folder, extra_flags=audit.flags()) as kube:
        yield kube


@pytest.fixture(scope="package")
def cluster(controlplane: ControlPlane) -> ControlPlane:
    """One in which the manifest is applied, as the README says; who changes it mends it."""
    controlplane.kubectl("apply", "-f", str(MANIFEST))
    return controlplane


@pytest.fixture
def make_node(cluster: ControlPlane, request: pytest.FixtureRequest) -> Iterator[MakeNode]:
    """Makes nodes of the cluster, named after the test."""
    with ExitStack() as stack:

        def make(*, settings: dict[str, str] | None = None, **options: object) -> KubeNode:
            name = re.sub("[^a-z0-9]+", "-", request.node.name.removeprefix("test_")).strip("-")
            chosen = {"name": name[:60].strip("-"), "settings": FAST | (settings or {}), **options}
            return stack.enter_context(KubeNode(cluster, **chosen))  # type: ignore[arg-type]

        yield make


@pytest.fixture
def node(make_node: MakeNode) -> KubeNode:
    """Two GPUs, both programs running."""
    return make_node()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failed test shows what the servers said."""
    report = yield
    kube = getattr(item, "funcargs", {}).get("controlplane")
    if report.failed and isinstance(kube, ControlPlane):
        report.sections.append(("control plane", kube.log_tails()))
    return report

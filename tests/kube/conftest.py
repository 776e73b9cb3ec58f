"""Lends every test of this folder one real control plane, or says why there is none."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator

import pytest

from tests.kube import assets
from tests.simnode.controlplane import ControlPlane


@pytest.fixture(scope="session")
def controlplane() -> Iterator[ControlPlane]:
    """Started once; tests keep apart by using node and pod names of their own."""
    try:
        folder = assets.from_environment()
    except assets.AssetsError as error:
        reason = f"no real API server: {error}"
        if os.environ.get("POWER_AGENT_REQUIRE_KUBE") == "1":
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)
    with ControlPlane(folder) as kube:
        yield kube


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

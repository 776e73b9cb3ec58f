"""A night with a real Prometheus beside the whole agent: faults, alerts, repairs, the dashboard."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.prometheus.server import SCRAPE_S, Prometheus, hurried
from tests.simnode.kubeapi import KubeApi
from tests.simnode.node import FAST, Pod, SimNode
from tests.simnode.reachable import ROOT
from tests.waiting import until

SET, LIST = "nvmlDeviceSetPowerManagementLimit", "nvmlDeviceGetComputeRunningProcesses"
NO_PERMISSION, UNKNOWN = 4, 999
FILES = ROOT / "deploy/helm/power-agent/files"
# What has nothing to show while no pod asks for anything, or while nothing was ever refused.
OF_PODS = "power_agent_(pod_|gpu_target|gpu_limit_watts|gpu_enforced|.*_bucket)"


@pytest.fixture
def node() -> Iterator[SimNode]:
    """Four GPUs; the API server says often that nothing changed."""
    quick = {"bookmark_interval_s": 1.0}
    with SimNode(gpus=4, real_api=False, api=quick, settings=FAST) as node:
        yield node


@pytest.fixture
def prometheus(node: SimNode, programs: Path, tmp_path: Path) -> Iterator[Prometheus]:
    rules = hurried((FILES / "rules.yaml").read_text())
    with Prometheus(programs, tmp_path, node.metrics_port, rules) as server:
        yield server


def embedded(node: SimNode) -> KubeApi:
    assert isinstance(node.api, KubeApi)
    return node.api


class Night:
    """The node and its Prometheus, and the pods whose GPUs will fail."""

    def __init__(self, node: SimNode, prometheus: Prometheus) -> None:
        self.node, self.prometheus = node, prometheus
        self.pods: dict[str, Pod] = {}

    def begin(self) -> None:
        for number, name in enumerate(("refused", "lost", "held")):
            self.pods[name] = self.node.add_pod(name, limit=350, gpus=[number])
            self.node.wait_for_limit(number, 350)

    def break_all(self) -> None:
        node = self.node
        node.gpus[0].fault(SET, error=NO_PERMISSION)
        node.annotate(self.pods["refused"], 300)
        node.gpus[1].vanish()
        node.gpus[2].fault(LIST, error=UNKNOWN)
        self.pods["wrong"] = node.add_pod("wrong", limit="350W", gpus=[3])
        node.wait_for_state(self.pods["refused"], "failed")
        node.wait_for_state(self.pods["wrong"], "invalid")
        embedded(node).freeze()

    def repair_all(self) -> None:
        node = self.node
        embedded(node).thaw()
        node.gpus.clear_faults()
        node.gpus[1].reappear()
        node.annotate(self.pods["wrong"], 350)

    def firing(self) -> set[str]:
        return {name.removeprefix("PowerAgent") for name in self.prometheus.alerts()}

    def wait_for(self, *names: str) -> dict[str, list[dict[str, Any]]]:
        until(
            lambda: self.firing() >= set(names),
            f"alerts {names}",
            poll_s=SCRAPE_S / 2,
            explain=self.explain,
        )
        return self.prometheus.alerts()

    def wait_without(self, *names: str) -> None:
        until(
            lambda: not self.firing() & set(names),
            f"an end of {names}",
            poll_s=SCRAPE_S / 2,
            explain=self.explain,
        )

    def explain(self) -> str:
        return f"{self.prometheus.alerts()}\n{self.node.page('/metrics')[1]}\n{self.node.explain()}"

    def hang_and_restart_the_enforcer(self) -> None:
        os.kill(self.node.pid("enforcer"), signal.SIGSTOP)
        self.wait_for("EnforcerDown")
        self.node.kill_enforcer()
        self.node.start_enforcer()
        self.wait_without("EnforcerDown")

    def restart_the_watcher(self) -> None:
        self.node.kill_watcher()
        until(
            lambda: self.prometheus.query("power_agent:silent"), "a scrape of the dead", poll_s=0.1
        )
        self.node.start_watcher()


def panels() -> list[tuple[str, str]]:
    """(title, query) of each query of the dashboard, as Grafana asks it."""
    board = json.loads((FILES / "dashboard.json").read_text())
    return [
        (
            panel["title"],
            target["expr"].replace("$node", "node-a").replace("$__rate_interval", "5s"),
        )
        for panel in board["panels"]
        for target in panel.get("targets", ())
    ]


def said(alerts: list[dict[str, Any]]) -> str:
    return "\n".join(alert["annotations"]["summary"] for alert in alerts)


MAIN = (
    "LimitNotApplied",
    "WriteFails",
    "GpuLost",
    "GpuHeld",
    "LimitUnusable",
    "ApiSilent",
)


def check_panels(prometheus: Prometheus, *, idle: bool = False) -> None:
    """Every query has data, save those that need a pod where none asks."""
    for title, query in panels():
        if not (idle and re.search(OF_PODS, query)):
            found = partial(prometheus.query, query)
            until(found, f"data of {title!r}: {query}", deadline_s=10, poll_s=0.1)


def check_names(night: Night, alerts: dict[str, list[dict[str, Any]]]) -> None:
    gpus = night.node.gpus
    for name, number in {"WriteFails": 0, "GpuLost": 1, "GpuHeld": 2}.items():
        text = said(alerts[f"PowerAgent{name}"])
        pci = (gpus[number].folder / "pci").read_text().strip()
        assert gpus[number].uuid in text, text
        assert pci in text, text
        others = {gpu.uuid for gpu in gpus} - {gpus[number].uuid}
        assert not [uuid for uuid in others if uuid in text], text
    assert "default/refused on node-a" in said(alerts["PowerAgentLimitNotApplied"])
    assert "NO_PERMISSION" in said(alerts["PowerAgentWriteFails"])
    assert "default/wrong" in said(alerts["PowerAgentLimitUnusable"])


def test_a_night(node: SimNode, prometheus: Prometheus, programs: Path) -> None:
    night = Night(node, prometheus)
    page = node.page("/metrics")[1]
    command = [str(programs / "promtool"), "check", "metrics"]
    checked = subprocess.run(command, input=page, capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")
    check_panels(prometheus, idle=True)
    night.begin()
    check_panels(prometheus)
    assert night.firing() == set()

    night.break_all()
    night.wait_for("LimitNotApplied", "WriteFails", "GpuLost", "LimitUnusable", "ApiSilent")
    night.hang_and_restart_the_enforcer()
    alerts = night.wait_for(*MAIN)
    check_names(night, alerts)
    check_panels(prometheus)
    night.restart_the_watcher()
    until(lambda: not prometheus.query("power_agent:silent"), "series again", explain=night.explain)
    after = night.wait_for(*MAIN)
    for name in MAIN:
        key = f"PowerAgent{name}"
        assert began(after[key]) == began(alerts[key]), f"{name} had ended for a while"

    night.repair_all()
    night.wait_without(*MAIN, "EnforcerDown", "SnapshotOld", "NvmlFails", "WatchFails")


def began(alerts: list[dict[str, Any]]) -> set[tuple[str, str]]:
    return {(str(alert["labels"]), alert["activeAt"]) for alert in alerts}

"""Alerts and dashboard ask for metrics that the watcher serves, by labels that they have."""

from __future__ import annotations

import json
import re
from typing import Any

import yaml

from shared import messages as m
from tests.kube.chart import DEPLOY, strings
from tests.simnode.exposition import read
from watcher import metrics

MONITORING = DEPLOY / "monitoring"
RUNBOOKS = DEPLOY.parent / "docs/runbooks.md"
UUID = "GPU-0"
# What the scrape itself adds (PodMonitor), and what PromQL does.
SCRAPED = {"node", "job", "instance", "pod", "namespace", "container", "le"}
OF_KUBE_STATE_METRICS = {
    "annotation_dynamo_nvidia_com_gpu_power_limit",
    "phase",
    "resource",
}


def everything_served() -> dict[str, set[str]]:
    """Every series name of a full metrics page, with its labels."""
    gpu = m.Gpu(
        index=0, uuid=UUID, name="H100", limit_mw=1, enforced_mw=1, default_mw=1, min_mw=1,
        max_mw=1, power_mw=1, managed=True, original_mw=1, target_mw=1, wanted_mw=1, pods=["p"],
        state="managed", reason="", writes={"drift": 1}, write_failures={"unknown": 1},
    )  # fmt: skip
    pod = m.Pod(
        uid="p", namespace="n", name="w", requested_mw=1, effective_mw=1, gpus=[UUID],
        state="enforced", reason="", raw="350",
    )  # fmt: skip
    report = m.Report(
        session="s", revision=1, nvml="ok", nvml_message="", gpus=[gpu], pods=[pod],
        counters=m.Counters(), enforcer=m.EnforcerStatus(
            version="", pid=1, started_ts=1.0, dry_run=False, min_mw=None, max_mw=None,
            conflict="lowest", cgroup_roots=[], ledger="",
        ),
    )  # fmt: skip
    link = metrics.Link(True, 0.0, report, 0.0)
    sources = metrics.Sources(metrics.Counts(), lambda: link, lambda: 0, lambda: 0, 1.0)
    page = metrics.page(metrics.registry(sources))
    served: dict[str, set[str]] = {}
    for name, family in read(page).items():
        suffixes = ("_bucket", "_sum", "_count") if family.kind == "histogram" else ("",)
        for suffix in suffixes:
            served[name + suffix] = family.label_names
    return served


def rules() -> list[dict[str, Any]]:
    """Alerts, and the series that they have in common."""
    spec = yaml.safe_load((MONITORING / "prometheusrule.yaml").read_text())["spec"]
    return [rule for group in spec["groups"] for rule in group["rules"]]


def alerts() -> list[dict[str, Any]]:
    return [rule for rule in rules() if "alert" in rule]


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((MONITORING / "dashboard.json").read_text())
    return found


def expressions() -> list[str]:
    panels = [
        target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", ())
    ]
    return [rule["expr"] for rule in rules()] + panels


def labels_asked(expression: str) -> set[str]:
    """Those in matchers and in `by`, `on`, `group_left`."""
    matchers = re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", expression)
    grouped = re.findall(r"\b(?:by|on|without|group_left)\s*\(([^)]*)\)", expression)
    return {*matchers, *(each.strip() for group in grouped for each in group.split(","))} - {""}


def test_metrics_and_labels_exist() -> None:
    served = everything_served()
    for expression in expressions():
        names = re.findall(r"power_agent_\w+", expression)
        assert set(names) <= served.keys(), expression
        known = SCRAPED.union(*(served[name] for name in names))
        if "kube_" in expression:
            known |= OF_KUBE_STATE_METRICS
        if "ALERTS" in expression:
            known |= {"alertname", "alertstate"}
        assert labels_asked(expression) <= known, expression


def test_every_metric_is_looked_at() -> None:
    """A metric that nobody looks at is none."""
    asked = set(re.findall(r"power_agent_\w+", " ".join(expressions())))
    assert everything_served().keys() - asked == {
        "power_agent_gpu_min_limit_watts",
        "power_agent_limit_lead_seconds_sum",  # which is not served: it may be negative
    }


def test_alerts_say_what_happened_and_what_to_do() -> None:
    names = [rule["alert"] for rule in alerts()]
    assert len(set(names)) == len(names)
    for rule in alerts():
        assert rule["labels"]["severity"] in ("info", "warning", "critical")
        assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}


def test_each_alert_has_its_section_in_the_runbooks() -> None:
    """GitHub makes the anchor of a heading by lowering its letters."""
    headings = re.findall(r"^#+ (PowerAgent\w+)$", RUNBOOKS.read_text(), re.MULTILINE)
    assert sorted(headings) == sorted(rule["alert"] for rule in alerts())
    for rule in alerts():
        assert rule["annotations"]["runbook_url"] == f"docs/runbooks.md#{rule['alert'].lower()}"


def test_alerts_are_named_by_what_survives_a_restart() -> None:
    """The address of a target, the agent's pod and a GPU's index change while the fault stays."""
    recorded = {rule["record"]: rule["expr"] for rule in rules() if "record" in rule}
    for rule in rules():
        expression = recorded.get(rule["expr"], rule["expr"])
        grouped = re.findall(r"\bby \(([^)]*)\)", expression)
        kept = {name.strip() for group in grouped for name in group.split(",")}
        assert kept <= {"node", "namespace", "pod", "UUID"}, rule
        text = " ".join(rule.get("annotations", {}).values())
        assert set(re.findall(r"\$labels\.(\w+)", text)) <= kept, rule


def test_the_dashboard_asks_the_data_source_that_is_chosen() -> None:
    board = dashboard()
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    assert {each["name"] for each in board["templating"]["list"]} == {"datasource", "node"}
    for panel in board["panels"]:
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == "${datasource}"
            assert panel["targets"]


def test_a_gpu_that_pods_share_is_counted_once() -> None:
    """Each of its pods has a series with the GPU's one limit."""
    for expression in expressions():
        for found in re.finditer(r"power_agent_pod_effective_limit_watts", expression):
            before = expression[: found.start()]
            assert "sum(" not in before or "max by (node, UUID) (" in before, expression
    text = (DEPLOY.parent / "docs/operations.md").read_text()
    assert "sum(max by (node, UUID) (power_agent_pod_effective_limit_watts))" in text


def test_panels_do_not_overlap() -> None:
    cells: set[tuple[int, int]] = set()
    for panel in dashboard()["panels"]:
        at = panel["gridPos"]
        own = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert at["x"] + at["w"] <= 24
        assert not own & cells, panel["title"]
        cells |= own


def test_the_monitor_finds_the_pods_and_their_port() -> None:
    monitor = yaml.safe_load((MONITORING / "podmonitor.yaml").read_text())
    manifest = list(yaml.safe_load_all((DEPLOY / "power_agent/daemonset.yaml").read_text()))
    (daemonset,) = [each for each in manifest if each["kind"] == "DaemonSet"]
    labels = daemonset["spec"]["template"]["metadata"]["labels"]
    assert monitor["metadata"]["namespace"] == daemonset["metadata"]["namespace"]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= labels.items()
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert endpoint["port"] in strings(daemonset["spec"]["template"]["spec"]["containers"])
    # Without it Prometheus would rename the limited pods' own labels to exported_pod.
    assert endpoint["honorLabels"] is True

"""What Prometheus is told of two nodes over an hour, as `promtool test rules` takes it.

It knows no rule.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

SAMPLES_A_MINUTE = 2
MINUTES = 60

UUID = "GPU-7a"
PCI = "00000000:3B:00.0"

# A value for each scrape; None: no sample, and Prometheus has marked the series as ended.
Values = list[float | None]
Labels = dict[str, str]
Window = tuple[float, float]

AT_NODE: Labels = {"node": "n1"}
AT_GPU = AT_NODE | {"UUID": UUID}
AT_POD = AT_NODE | {"namespace": "team", "pod": "worker"}


def over(*parts: tuple[float | None, float]) -> Values:
    """Each value for so many minutes, the last to the end: `over((1, 10), (None, 5), (0, 0))`."""
    values: Values = []
    for value, minutes in parts:
        values += [value] * round(minutes * SAMPLES_A_MINUTE)
    return values + [parts[-1][0]] * (MINUTES * SAMPLES_A_MINUTE - len(values))


def samples(start: float, end: float) -> range:
    """The numbers of the scrapes from one minute to another."""
    return range(round(start * SAMPLES_A_MINUTE), round(end * SAMPLES_A_MINUTE))


def counted(*at_minutes: float, begins: float | None = 0) -> Values:
    """A counter that rises by one at each of these minutes."""
    values = over((begins, 0))
    for minute in at_minutes:
        first = round(minute * SAMPLES_A_MINUTE)
        values[first:] = [(value or 0) + 1 for value in values[first:]]
    return values


def spread(start: float, minutes: float, every: float) -> list[float]:
    """Minutes at which something happens again and again."""
    return [start + every * number for number in range(round(minutes / every))]


def series(name: str, node: str = "n1", **labels: str) -> str:
    """A series of that node, by its whole name."""
    all_labels = labels | {"node": node, "instance": f"{node}:9100"}
    return f"{name}{{{','.join(f'{key}={value!r}' for key, value in all_labels.items())}}}"


def of_gpu(name: str, node: str = "n1", index: str = "0", **labels: str) -> str:
    return series(name, node, gpu=index, UUID=UUID, **labels)


def of_pod(name: str, node: str = "n1", **labels: str) -> str:
    return series(name, node, namespace="team", pod="worker", **labels)


def up(node: str = "n1") -> str:
    job = {"job": "dynamo-system/power-agent", "namespace": "dynamo-system", "pod": "power-agent-x"}
    return series("up", node, **job)


def healthy(node: str) -> dict[str, Values]:
    """A node with one GPU, and one pod that has what it asked for."""
    levels = {
        up(node): 1,
        series("power_agent_enforcer_up", node): 1,
        series("power_agent_snapshot_age_seconds", node): 1,
        series("power_agent_report_age_seconds", node): 1,
        series("power_agent_api_age_seconds", node): 20,
        series("power_agent_start_time_seconds", node, component="enforcer"): -9000,
        series("power_agent_start_time_seconds", node, component="watcher"): -9000,
        series("power_agent_nvml_state", node, state="ok"): 1,
        of_gpu("power_agent_gpu_info", node, pci_bus_id=PCI): 1,
        of_gpu("power_agent_gpu_state", node, state="managed"): 1,
        of_gpu("power_agent_gpu_managed", node): 1,
        of_gpu("power_agent_gpu_limit_watts", node): 300,
        of_gpu("power_agent_gpu_enforced_limit_watts", node): 300,
        of_gpu("power_agent_limit_writes_total", node, reason="drift"): 0,
        of_pod("power_agent_pod_state", node, state="enforced"): 1,
        of_pod("power_agent_pod_effective_limit_watts", node, gpu="0", UUID=UUID): 300,
        series("power_agent_watch_restarts_total", node, reason="failed"): 0,
        series("power_agent_denied_messages_total", node, reason="denied"): 0,
        series("power_agent_refused_connections_total", node): 0,
    }
    return {name: over((level, 0)) for name, level in levels.items()}


def gpu_is(state: str, *windows: Window) -> dict[str, Values]:
    """The states of the GPU: `state` from one minute to another, else managed."""
    name = "power_agent_gpu_state"
    return _either(of_gpu(name, state=state), of_gpu(name, state="managed"), windows)


def pod_is(state: str, *windows: Window) -> dict[str, Values]:
    """The states of the pod: `state` from one minute to another, else enforced."""
    name = "power_agent_pod_state"
    return _either(of_pod(name, state=state), of_pod(name, state="enforced"), windows)


def _either(within: str, without: str, windows: tuple[Window, ...]) -> dict[str, Values]:
    told = {within: over((None, 0)), without: over((1, 0))}
    for start, end in windows:
        for at in samples(start, end):
            told[within][at], told[without][at] = 1, None
    return told


@dataclass(frozen=True)
class Case:
    """A fault of node n1, and which alerts fire at which minute.

    `told` replaces or adds series of the healthy node. In an `away` window it cannot be scraped and
    has no series at all; from `gone_at` on it is no target any more. `says`: labels and summary of
    an alert at the first of these minutes at which it fires.
    """

    name: str
    told: dict[str, Values]
    firing: dict[float, set[str]]
    says: dict[str, tuple[Labels, str]] = field(default_factory=dict)
    away: tuple[Window, ...] = ()
    gone_at: float | None = None
    agent: bool = True


def promtool(case: Case, severities: dict[str, str]) -> dict[str, Any]:
    """That case as one of the tests of `promtool test rules`."""
    told = (healthy("n1") if case.agent else {}) | case.told
    inputs = {name: _cut(name, values, case) for name, values in told.items()} | healthy("n2")
    return {
        "interval": f"{60 // SAMPLES_A_MINUTE}s",
        "input_series": [{"series": k, "values": _written(v)} for k, v in inputs.items()],
        "promql_expr_test": [_all_firing(at, names) for at, names in case.firing.items()],
        "alert_rule_test": [
            _one(case, name, labels | {"severity": severities[name]}, summary)
            for name, (labels, summary) in case.says.items()
        ],
    }


def _cut(name: str, values: Values, case: Case) -> Values:
    """Without what is not scraped."""
    values = list(values)
    for start, end in case.away:
        for at in samples(start, end):
            values[at] = 0.0 if name == up() else None
    if case.gone_at is not None:
        values[samples(case.gone_at, MINUTES)[0] :] = [None]
    return values


def _written(values: Values) -> str:
    words = []
    before: float | None = None
    for value in values:
        ended = "_" if before is None else "stale"
        words.append(ended if value is None else f"{value:g}")
        before = value
    return " ".join(words)


def _all_firing(minute: float, names: set[str]) -> dict[str, Any]:
    return {
        "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
        "eval_time": _time(minute),
        "exp_samples": [
            {"labels": f'{{alertname="PowerAgent{name}"}}', "value": 1} for name in sorted(names)
        ],
    }


def _one(case: Case, name: str, labels: Labels, summary: str) -> dict[str, Any]:
    return {
        "eval_time": _time(min(minute for minute, names in case.firing.items() if name in names)),
        "alertname": f"PowerAgent{name}",
        "exp_alerts": [{"exp_labels": labels, "exp_annotations": {"summary": summary}}],
    }


def _time(minute: float) -> str:
    return f"{round(minute * 60)}s"

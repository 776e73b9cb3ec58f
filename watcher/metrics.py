"""The metrics page: what the watcher counts and what the enforcer last reported, as text."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from shared import __version__, messages
from shared.units import format_watts

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_EVENTS = ("ADDED", "MODIFIED", "DELETED", "BOOKMARK", "ERROR")
_RESTARTS = ("closed", "expired", "failed")
_WRITES = ("acquire", "adjust", "drift", "release")

Labels = Mapping[str, str]
Sample = tuple[Labels, str]


class Histogram:
    """Counts durations in fixed buckets."""

    def __init__(self) -> None:
        """Begin empty."""
        self._counts = [0] * (len(_BUCKETS_S) + 1)
        self._sum_s = 0.0

    def observe(self, duration_s: float) -> None:
        """Count one duration."""
        self._counts[sum(duration_s > bound for bound in _BUCKETS_S)] += 1
        self._sum_s += duration_s

    def lines(self, name: str) -> list[str]:
        """Return the samples, cumulative as the format wants them."""
        total, lines = 0, []
        for bound, count in zip((*map(repr, _BUCKETS_S), "+Inf"), tuple(self._counts), strict=True):
            total += count
            lines.append(f'{name}_bucket{{le="{bound}"}} {total}')
        return [*lines, f"{name}_sum {self._sum_s!r}", f"{name}_count {total}"]


def _zeros(*names: str) -> Counter[str]:
    # There from the start: a counter that appears with its first increment has none to a rate().
    return Counter(dict.fromkeys(names, 0))


@dataclass(slots=True)
class Counts:
    """What the watcher itself counts; each number has one thread that raises it."""

    watch_events: Counter[str] = field(default_factory=lambda: _zeros(*_EVENTS))
    watch_restarts: Counter[str] = field(default_factory=lambda: _zeros(*_RESTARTS))
    list_requests: int = 0
    latency: Histogram = field(default_factory=Histogram)


@dataclass(frozen=True, slots=True)
class Link:
    """The enforcer as the watcher sees it: `current` is a report that still holds."""

    up: bool
    snapshot_age_s: float
    report: messages.Report | None
    current: bool


def page(counts: Counts, link: Link) -> str:
    """Return the whole page."""
    lines: list[str] = []
    report = link.report
    if report is not None and link.current:
        lines += _gpu_gauges(report.gpus)
        lines += _pod_gauges(report)
    if report is not None:  # totals stay true while the enforcer is away
        lines += _enforcer_counters(report)
    name = "power_agent_enforcement_latency_seconds"
    lines += _head(name, "histogram", "From the watch event to the limit read back")
    lines += counts.latency.lines(name)
    lines += _own(counts, link)
    return "\n".join(lines) + "\n"


def _gpu_gauges(gpus: list[messages.Gpu]) -> list[str]:
    fields = {
        "limit_watts": ("limit_mw", "Configured power limit"),
        "enforced_limit_watts": ("enforced_mw", "Limit that holds, the lowest of all limiters"),
        "default_limit_watts": ("default_mw", "Factory default limit"),
        "min_limit_watts": ("min_mw", "Lowest limit the hardware takes"),
        "max_limit_watts": ("max_mw", "Highest limit the hardware takes"),
        "power_watts": ("power_mw", "Power drawn"),
    }
    lines: list[str] = []
    for suffix, (attribute, text) in fields.items():
        known = [gpu for gpu in gpus if getattr(gpu, attribute) is not None]
        samples = [(_gpu(gpu), format_watts(getattr(gpu, attribute))) for gpu in known]
        lines += _metric(f"power_agent_gpu_{suffix}", "gauge", text, samples)
    managed = [(_gpu(gpu), str(int(gpu.managed))) for gpu in gpus]
    text = "Whether the agent holds this GPU's limit"
    return lines + _metric("power_agent_gpu_managed", "gauge", text, managed)


def _pod_gauges(report: messages.Report) -> list[str]:
    pods = [(_pod(pod), pod) for pod in report.pods]
    requested = [
        (labels, format_watts(pod.requested_mw))
        for labels, pod in pods
        if pod.requested_mw is not None
    ]
    states: list[Sample] = [({**labels, "state": pod.state}, "1") for labels, pod in pods]
    return [
        *_metric(
            "power_agent_pod_requested_limit_watts", "gauge", "What the pod asks for", requested
        ),
        *_metric(
            "power_agent_pod_effective_limit_watts", "gauge", "What the pod has", _effective(report)
        ),
        *_metric("power_agent_pod_state", "gauge", "The state that each pod is in", states),
    ]


def _effective(report: messages.Report) -> list[Sample]:
    """Return what holds on each GPU of each pod: the pod's own figure is the lowest of them."""
    known = {gpu.uuid: (_gpu(gpu), gpu.limit_mw) for gpu in report.gpus}
    samples: list[Sample] = []
    for pod in report.pods:
        for uuid in pod.gpus:
            labels, limit_mw = known.get(uuid, ({"gpu": "", "UUID": uuid}, pod.effective_mw))
            if limit_mw is not None:
                samples.append(({**_pod(pod), **labels}, format_watts(limit_mw)))
    return samples


def _enforcer_counters(report: messages.Report) -> list[str]:
    writes = [
        ({**_gpu(gpu), "reason": reason}, str(gpu.writes.get(reason, 0)))
        for gpu in report.gpus
        for reason in dict.fromkeys((*_WRITES, *gpu.writes))
    ]
    failures: list[Sample] = [
        ({**_gpu(gpu), "error": error}, str(count))
        for gpu in report.gpus
        for error, count in gpu.write_failures.items()
    ]
    counters = report.counters
    denied: list[Sample] = [
        ({"reason": reason}, str(getattr(counters, reason)))
        for reason in ("denied", "malformed", "stale")
    ]
    failed = "power_agent_limit_write_failures_total"
    return [
        *_metric("power_agent_limit_writes_total", "counter", "Limits written", writes),
        *_metric(failed, "counter", "Limits that could not be written", failures),
        *_metric("power_agent_denied_messages_total", "counter", "Messages refused", denied),
    ]


def _own(counts: Counts, link: Link) -> list[str]:
    events: list[Sample] = [({"type": k}, str(n)) for k, n in tuple(counts.watch_events.items())]
    restarts: list[Sample] = [
        ({"reason": k}, str(n)) for k, n in tuple(counts.watch_restarts.items())
    ]
    version = {"version": __version__}
    return [
        *_metric("power_agent_watch_events_total", "counter", "Events of the pod watch", events),
        *_metric(
            "power_agent_watch_restarts_total",
            "counter",
            "Watches opened again, lists asked for again",
            restarts,
        ),
        *_metric(
            "power_agent_list_requests_total",
            "counter",
            "Lists asked of the API server",
            [({}, str(counts.list_requests))],
        ),
        *_metric(
            "power_agent_enforcer_up",
            "gauge",
            "Whether the enforcer answers",
            [({}, str(int(link.up)))],
        ),
        *_metric(
            "power_agent_snapshot_age_seconds",
            "gauge",
            "Since the enforcer last took a snapshot",
            [({}, f"{link.snapshot_age_s:.3f}")],
        ),
        *_metric("power_agent_build_info", "gauge", "The running version", [(version, "1")]),
    ]


def _metric(name: str, kind: str, text: str, samples: Iterable[Sample]) -> list[str]:
    # By labels: two pods of one name, the old one still ending, would make the page invalid.
    found = {_labels(labels): value for labels, value in samples}
    lines = [f"{name}{labels} {value}" for labels, value in found.items()]
    return [*_head(name, kind, text), *lines]


def _head(name: str, kind: str, text: str) -> list[str]:
    return [f"# HELP {name} {text}.", f"# TYPE {name} {kind}"]


def _labels(labels: Labels) -> str:
    inside = ",".join(f'{key}="{_escaped(value)}"' for key, value in labels.items())
    return f"{{{inside}}}" if inside else ""


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _gpu(gpu: messages.Gpu) -> dict[str, str]:
    """Return the labels as dcgm-exporter writes them."""
    return {"gpu": "" if gpu.index is None else str(gpu.index), "UUID": gpu.uuid}


def _pod(pod: messages.Pod) -> dict[str, str]:
    return {"namespace": pod.namespace, "pod": pod.name}

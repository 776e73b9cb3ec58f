"""The metrics page: what the watcher counts and what the enforcer last reported, for Prometheus.

It knows nothing of HTTP and asks nobody: the numbers are handed in.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from prometheus_client import (
    CONTENT_TYPE_PLAIN_0_0_4,
    CollectorRegistry,
    Histogram,
    Metric,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from shared import __version__, messages

# The text format that every Prometheus reads; our names need nothing newer.
CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_LATE_S = (-30.0, -10.0, -5.0, -2.5, -1.0, -0.5, -0.25, -0.1, 0.0)
_LEADS_S = (*_LATE_S, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_EVENTS = ("ADDED", "MODIFIED", "DELETED", "BOOKMARK", "ERROR")
_RESTARTS = ("closed", "expired", "failed")
_WRITES = ("acquire", "adjust", "drift", "release")
# The names of the labels are those that dcgm-exporter uses.
_GPU = ("gpu", "UUID")
_POD = ("namespace", "pod")

# The values of the labels, and the value of the sample.
Sample = tuple[tuple[str, ...], float]
Family = TypeVar("Family", CounterMetricFamily, GaugeMetricFamily)

# Without this the library adds a series `..._created` to each histogram, which is not in the
# contract (https://prometheus.github.io/client_python/instrumenting/#disabling-_created-metrics).
disable_created_metrics()  # type: ignore[no-untyped-call]


def _zeros(*names: str) -> Counter[str]:
    # There from the start: a counter that appears with its first increment has none to a rate().
    return Counter(dict.fromkeys(names, 0))


def _latency() -> Histogram:
    return Histogram(
        "power_agent_enforcement_latency_seconds",
        "From the watch event to the limit read back.",
        buckets=_BUCKETS_S,
        registry=None,
    )


def _lead() -> Histogram:
    # With negative buckets there is no sum (OpenMetrics, histogram), which would be no counter.
    return Histogram(
        "power_agent_limit_lead_seconds",
        "By how much a new pod's limit stood before its first process on a GPU; negative: after.",
        buckets=_LEADS_S,
        registry=None,
    )


@dataclass(slots=True)
class Counts:
    """What the watcher itself counts.

    Each number that is not the library's own has one thread that raises it, the reflector's.
    """

    watch_events: Counter[str] = field(default_factory=lambda: _zeros(*_EVENTS))
    watch_restarts: Counter[str] = field(default_factory=lambda: _zeros(*_RESTARTS))
    list_requests: int = 0
    latency: Histogram = field(default_factory=_latency)
    lead: Histogram = field(default_factory=_lead)


@dataclass(frozen=True, slots=True)
class Link:
    """The enforcer as the watcher sees it, and its last report, however old that is.

    Ages are counted from the watcher's start where there was no answer yet.
    """

    up: bool
    snapshot_age_s: float
    report: messages.Report | None
    report_age_s: float


@dataclass(frozen=True, slots=True)
class Sources:
    """Where the numbers of a page come from, each asked when one is made.

    `dropped` tells how many log lines of the watcher nobody took. `api_age_s` is how long ago the
    API server last said something, or since the watcher's start where it never did.
    """

    counts: Counts
    link: Callable[[], Link]
    api_age_s: Callable[[], float]
    dropped: Callable[[], int]
    started_ts: float


def registry(sources: Sources) -> CollectorRegistry:
    """Return a registry with all our metrics, and with none of the interpreter or the process."""
    made = CollectorRegistry()
    made.register(sources.counts.latency)
    made.register(sources.counts.lead)
    made.register(_Agent(sources))
    return made


def page(registered: CollectorRegistry) -> str:
    """Return the whole page."""
    return generate_latest(registered).decode()


class _Agent(Collector):
    """Makes the metrics anew for each page, from what is known at that moment."""

    def __init__(self, sources: Sources) -> None:
        self._sources = sources

    def collect(self) -> Iterator[Metric]:
        link = self._sources.link()
        report = link.report
        # The last that is known stays while the enforcer is away, and its age says how old it is.
        # A series that went away would end an alert, though nothing was repaired.
        if report is not None:
            yield from _gpu_gauges(report.gpus)
            yield from _gpu_labels(report.gpus)
            yield from _node_most(report.gpus)
            yield from _pod_gauges(report)
            yield from _enforcer_counters(report)
            yield from _enforcer_gauges(report)
        yield from _watch_counters(self._sources.counts)
        yield _dropped_lines(self._sources.dropped(), report)
        yield from _link_gauges(link)
        yield GaugeMetricFamily(
            "power_agent_api_age_seconds",
            "Since the API server last said something: a list, an event, a bookmark.",
            value=round(self._sources.api_age_s(), 3),
        )
        yield _started(self._sources.started_ts, report)


_GPU_WATTS: tuple[tuple[str, str, Callable[[messages.Gpu], int | None]], ...] = (
    ("power_agent_gpu_limit_watts", "Configured power limit.", lambda gpu: gpu.limit_mw),
    (
        "power_agent_gpu_enforced_limit_watts",
        "Limit that holds, the lowest of all limiters.",
        lambda gpu: gpu.enforced_mw,
    ),
    (
        "power_agent_gpu_default_limit_watts",
        "Factory default limit.",
        lambda gpu: gpu.default_mw,
    ),
    (
        "power_agent_gpu_min_limit_watts",
        "Lowest limit the hardware takes.",
        lambda gpu: gpu.min_mw,
    ),
    (
        "power_agent_gpu_max_limit_watts",
        "Highest limit the hardware takes.",
        lambda gpu: gpu.max_mw,
    ),
    ("power_agent_gpu_power_watts", "Power drawn.", lambda gpu: gpu.power_mw),
    (
        "power_agent_gpu_target_limit_watts",
        "Limit that the agent wants there; in a dry run what it would set.",
        lambda gpu: gpu.wanted_mw,
    ),
)


def _gpu_gauges(gpus: list[messages.Gpu]) -> Iterator[Metric]:
    for name, text, of in _GPU_WATTS:
        figures = [(gpu, of(gpu)) for gpu in gpus]
        known = [(_gpu(gpu), _watts(mw)) for gpu, mw in figures if mw is not None]
        yield _filled(GaugeMetricFamily(name, text, labels=_GPU), known)
    yield _filled(
        GaugeMetricFamily(
            "power_agent_gpu_managed", "Whether the agent holds this GPU's limit.", labels=_GPU
        ),
        # The ledger has a limit before it is written. One that was refused is not held.
        [(_gpu(gpu), gpu.managed and gpu.state != "failed") for gpu in gpus],
    )


def _gpu_labels(gpus: list[messages.Gpu]) -> Iterator[Metric]:
    yield _filled(
        GaugeMetricFamily(
            "power_agent_gpu_state", "The state that each GPU is in.", labels=(*_GPU, "state")
        ),
        [((*_gpu(gpu), gpu.state), 1) for gpu in gpus],
    )
    # dcgm-exporter's name; not its `modelName`, to which promtool objects.
    yield _filled(
        GaugeMetricFamily(
            "power_agent_gpu_info",
            "What each GPU is.",
            labels=(*_GPU, "pci_bus_id", "model"),
        ),
        [((*_gpu(gpu), gpu.pci or "", gpu.name or ""), 1) for gpu in gpus],
    )


def _node_most(gpus: list[messages.Gpu]) -> Iterator[Metric]:
    """Tell the most that the node's GPUs may draw; nothing where that is not known of each.

    One whose limit cannot be read counts with the highest that its hardware takes.
    """
    most = [gpu.max_mw if gpu.enforced_mw is None else gpu.enforced_mw for gpu in gpus]
    known = [mw for mw in most if mw is not None]
    if known and len(known) == len(most):
        yield GaugeMetricFamily(
            "power_agent_node_most_watts",
            "The most that all GPUs of the node may draw, managed or not.",
            value=_watts(sum(known)),
        )


def _pod_gauges(report: messages.Report) -> Iterator[Metric]:
    yield _filled(
        GaugeMetricFamily(
            "power_agent_pod_requested_limit_watts", "What the pod asks for.", labels=_POD
        ),
        [
            (_pod(pod), _watts(pod.requested_mw))
            for pod in report.pods
            if pod.requested_mw is not None
        ],
    )
    yield _filled(
        GaugeMetricFamily(
            "power_agent_pod_effective_limit_watts", "What the pod has.", labels=_POD + _GPU
        ),
        _effective(report),
    )
    yield _filled(
        GaugeMetricFamily(
            "power_agent_pod_state", "The state that each pod is in.", labels=(*_POD, "state")
        ),
        [((*_pod(pod), pod.state), 1) for pod in report.pods],
    )


def _effective(report: messages.Report) -> list[Sample]:
    """Return what holds on each GPU of each pod: the pod's own figure is the lowest of them."""
    known = {gpu.uuid: (_gpu(gpu), gpu.limit_mw) for gpu in report.gpus}
    samples: list[Sample] = []
    for pod in report.pods:
        for uuid in pod.gpus:
            labels, limit_mw = known.get(uuid, (("", uuid), pod.effective_mw))
            if limit_mw is not None:
                samples.append(((*_pod(pod), *labels), _watts(limit_mw)))
    return samples


def _enforcer_counters(report: messages.Report) -> Iterator[Metric]:
    yield _filled(
        CounterMetricFamily(
            "power_agent_limit_writes_total", "Limits written.", labels=(*_GPU, "reason")
        ),
        [
            ((*_gpu(gpu), reason), gpu.writes.get(reason, 0))
            for gpu in report.gpus
            for reason in dict.fromkeys((*_WRITES, *gpu.writes))
        ],
    )
    yield _filled(
        CounterMetricFamily(
            "power_agent_limit_write_failures_total",
            "Limits that could not be written.",
            labels=(*_GPU, "error"),
        ),
        [
            ((*_gpu(gpu), error), count)
            for gpu in report.gpus
            for error, count in gpu.write_failures.items()
        ],
    )
    yield from _refusals(report.counters)


def _refusals(counters: messages.Counters) -> Iterator[Metric]:
    yield _filled(
        CounterMetricFamily(
            "power_agent_denied_messages_total", "Messages refused.", labels=("reason",)
        ),
        [
            (("denied",), counters.denied),
            (("malformed",), counters.malformed),
            (("stale",), counters.stale),
        ],
    )
    yield CounterMetricFamily(
        "power_agent_refused_connections_total",
        "Connections closed before a message was read.",
        counters.refused_connections,
    )


def _enforcer_gauges(report: messages.Report) -> Iterator[Metric]:
    yield _filled(
        GaugeMetricFamily("power_agent_nvml_state", "How NVML does.", labels=("state",)),
        [((report.nvml,), 1)],
    )
    if report.enforcer is not None:
        yield GaugeMetricFamily(
            "power_agent_dry_run",
            "Whether limits are decided on and not written.",
            value=report.enforcer.dry_run,
        )
        yield GaugeMetricFamily(
            "power_agent_paused",
            "Whether a person on the node has stopped all writing.",
            value=report.enforcer.paused is not None,
        )


def _started(watcher_ts: float, report: messages.Report | None) -> Metric:
    enforcer = None if report is None else report.enforcer
    samples: list[Sample] = [(("watcher",), watcher_ts)]
    if enforcer is not None and enforcer.started_ts is not None:
        samples.append((("enforcer",), enforcer.started_ts))
    family = GaugeMetricFamily(
        "power_agent_start_time_seconds",
        "When each program started, as Unix time.",
        labels=("component",),
    )
    return _filled(family, samples)


def _watch_counters(counts: Counts) -> Iterator[Metric]:
    # A tuple is made in one step, so the reflector's thread cannot change a dictionary meanwhile.
    events = tuple(counts.watch_events.items())
    restarts = tuple(counts.watch_restarts.items())
    yield _filled(
        CounterMetricFamily(
            "power_agent_watch_events_total", "Events of the pod watch.", labels=("type",)
        ),
        [((kind,), count) for kind, count in events],
    )
    yield _filled(
        CounterMetricFamily(
            "power_agent_watch_restarts_total",
            "Watches opened again, lists asked for again.",
            labels=("reason",),
        ),
        [((reason,), count) for reason, count in restarts],
    )
    yield CounterMetricFamily(
        "power_agent_list_requests_total", "Lists asked of the API server.", counts.list_requests
    )


def _dropped_lines(own: int, report: messages.Report | None) -> Metric:
    samples: list[Sample] = [(("watcher",), own)]
    if report is not None:
        samples.append((("enforcer",), report.counters.dropped_log_lines))
    family = CounterMetricFamily(
        "power_agent_dropped_log_lines_total",
        "Log lines that nobody took.",
        labels=("component",),
    )
    return _filled(family, samples)


def _link_gauges(link: Link) -> Iterator[Metric]:
    yield GaugeMetricFamily(
        "power_agent_enforcer_up", "Whether the enforcer answers.", value=link.up
    )
    yield GaugeMetricFamily(
        "power_agent_snapshot_age_seconds",
        "Since the enforcer last took a snapshot.",
        value=round(link.snapshot_age_s, 3),
    )
    yield GaugeMetricFamily(
        "power_agent_report_age_seconds",
        "Since the enforcer's last answer, on which all series of GPUs and pods rest.",
        value=round(link.report_age_s, 3),
    )
    yield _filled(
        GaugeMetricFamily("power_agent_build_info", "The running version.", labels=("version",)),
        [((__version__,), 1)],
    )


def _filled(family: Family, samples: Iterable[Sample]) -> Family:
    # By labels: two pods of one name, the old one still ending, would make the page invalid.
    for labels, value in dict(samples).items():
        family.add_metric(labels, value)
    return family


def _watts(milliwatts: int) -> float:
    return milliwatts / 1000


def _gpu(gpu: messages.Gpu) -> tuple[str, str]:
    return ("" if gpu.index is None else str(gpu.index), gpu.uuid)


def _pod(pod: messages.Pod) -> tuple[str, str]:
    return (pod.namespace, pod.name)

"""Each alert fires for its fault alone, names it, stays while its source is away, and ends."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.prometheus.cases import (
    AT_GPU,
    AT_NODE,
    AT_POD,
    MINUTES,
    PCI,
    SAMPLES_A_MINUTE,
    UUID,
    Case,
    Values,
    Window,
    counted,
    gpu_is,
    of_gpu,
    over,
    pod_is,
    promtool,
    samples,
    series,
    spread,
)
from tests.simnode.reachable import ROOT

RULES = ROOT / "deploy/helm/power-agent/files/rules.yaml"
GPU = f"GPU {UUID} at {PCI} of n1"


def node_is(name: str, *parts: tuple[float | None, float], **labels: str) -> dict[str, Values]:
    """One series of the node over time."""
    return {series(f"power_agent_{name}", **labels): over(*parts)}


def enforcer_away(start: float, end: float) -> dict[str, Values]:
    """It hangs: it does not answer, and what it said last grows old."""
    ages = over((1, start), (61, end - start), (1, 0))
    return node_is("enforcer_up", (1, start), (0, end - start), (1, 0)) | {
        series("power_agent_snapshot_age_seconds"): ages,
        series("power_agent_report_age_seconds"): list(ages),
    }


def ages(name: str, start: float, end: float, anew: float | None = None) -> dict[str, Values]:
    """Something grows old by a second each second, from `anew` on once more; then it is young."""
    values = over((1, 0))
    begins = start
    for at in samples(start, end):
        minute = at / SAMPLES_A_MINUTE
        begins = minute if minute == anew else begins
        values[at] = 60 * (minute - begins)
    return {series(f"power_agent_{name}_age_seconds"): values}


def started(component: str, *at_minutes: float) -> dict[str, Values]:
    name = series("power_agent_start_time_seconds", component=component)
    values = over((-9000, 0))
    for minute in at_minutes:
        for at in samples(minute, MINUTES):
            values[at] = minute * 60
    return {name: values}


def failures(*at_minutes: float) -> dict[str, Values]:
    """Writes that were refused: there is no series before the first."""
    name = of_gpu("power_agent_limit_write_failures_total", error="NVML_ERROR_UNKNOWN")
    return {name: since(at_minutes[0], counted(*at_minutes))}


def pod_states(failed: tuple[Window, ...], untold: Window | None) -> dict[str, Values]:
    """As `pod_is("failed", …)`, and no series at all while nobody tells of pods."""
    told = pod_is("failed", *failed)
    for values in told.values():
        for at in samples(*untold) if untold else ():
            values[at] = None
    return told


def since(minute: float, values: Values) -> Values:
    first = samples(minute, MINUTES)[0]
    return [None if at < first else value for at, value in enumerate(values)]


def until(minute: float, values: Values) -> Values:
    first = samples(minute, MINUTES)[0]
    return [value if at < first else None for at, value in enumerate(values)]


def kube(pod: str = "worker", node: str = "n1", *, runs: float = 1) -> dict[str, Values]:
    """What kube-state-metrics says of one annotated pod on a GPU node."""
    of = f'namespace="team",pod="{pod}"'
    levels = {
        f'kube_pod_info{{{of},node="{node}"}}': 1,
        f'kube_pod_annotations{{{of},annotation_dynamo_nvidia_com_gpu_power_limit="350"}}': 1,
        f'kube_pod_status_phase{{{of},phase="Running"}}': 1,
        f'kube_pod_container_status_running{{{of},container="main"}}': runs,
        f'kube_node_status_allocatable{{node="{node}",resource="nvidia_com_gpu"}}': 8,
    }
    return {name: over((level, 0)) for name, level in levels.items()}


NOTHING: dict[float, set[str]] = {minute: set() for minute in (3, 7, 11, 16, 21, 31, 45)}
FAILED, REFUSED = {"LimitNotApplied"}, {"LimitNotApplied", "WriteFails"}
WORKER = "The power limit of team/worker on n1 does not hold"

CASES = [
    Case("all is well", {}, NOTHING),
    Case("all is well and kube-state-metrics is there", kube(), NOTHING),
    Case(
        "the watcher is away",
        {},
        {14: set(), 16: {"Down"}, 25: {"Down"}, 33: set()},
        {"Down": (AT_NODE, "Power Agent on n1 cannot be scraped")},
        away=((10, 30),),
    ),
    Case(
        "the watcher comes and goes",
        {},
        {17: set(), 25: {"Down"}, 30: {"Down"}, 45: set()},
        away=tuple((10 + 5 * n, 14.5 + 5 * n) for n in range(5)),
    ),
    Case(
        "the enforcer hangs",
        enforcer_away(10, 20),
        {11: set(), 13: {"EnforcerDown"}, 18: {"EnforcerDown"}, 20.5: set(), 30: set()},
        {"EnforcerDown": (AT_NODE, "The enforcer on n1 does not answer")},
    ),
    Case(
        "the enforcer hangs and the watcher restarts",
        enforcer_away(10, 20),
        {13: {"EnforcerDown"}, 15.5: {"EnforcerDown"}, 19: {"EnforcerDown"}, 20.5: set()},
        away=((15, 16),),
    ),
    Case(
        "the enforcer was restarted twice",
        started("enforcer", 10, 15),
        NOTHING,
    ),
    Case(
        "the enforcer ends again and again",
        started("enforcer", 10, 12, 15, 20, 25, 30)
        | node_is(
            "enforcer_up",
            *[(1, 10), *[(0, 1), (1, 1), (0, 2), (1, 1)], *[(0, 4), (1, 1)] * 3, (1, 0)],
        ),
        {
            11: set(),
            16: {"EnforcerRestarts"},
            22: {"EnforcerRestarts"},
            29: {"EnforcerRestarts"},
            42: set(),
            50: set(),
        },
        {"EnforcerRestarts": (AT_NODE, "The enforcer on n1 has started 3 times within 20 minutes")},
    ),
    Case(
        "the enforcer refuses snapshots",
        ages("snapshot", 10, 20) | ages("report", 10, 20),
        {12: set(), 14: {"SnapshotOld"}, 19: {"SnapshotOld"}, 20.5: set()},
        {"SnapshotOld": (AT_NODE, "The enforcer on n1 took no snapshot for 4m 0s")},
    ),
    Case(
        "the enforcer refuses its watcher",
        ages("snapshot", 10, 20)
        | ages("report", 10, 20)
        | {
            series("power_agent_denied_messages_total", reason="denied"): counted(
                *spread(10, 10, 0.25)
            )
        },
        {11.5: set(), 14: {"SnapshotOld"}, 19: {"SnapshotOld"}},
    ),
    Case(
        "one API server restarts",
        ages("api", 10, 11)
        | {
            series("power_agent_watch_restarts_total", reason="failed"): counted(
                *spread(10, 0.75, 0.09)
            )
        },
        NOTHING,
    ),
    Case(
        "the API server is away",
        ages("api", 10, 40)
        | {
            series("power_agent_watch_restarts_total", reason="failed"): counted(
                *spread(10, 30, 0.5)
            )
        },
        {14: set(), 16: {"ApiSilent"}, 39: {"ApiSilent"}, 40.5: set(), 45: set(), 50: set()},
        {"ApiSilent": (AT_NODE, "The API server tells the watcher on n1 nothing")},
    ),
    Case(
        "the API server is away and the watcher restarts",
        started("watcher", 20) | ages("api", 10, 40, anew=20),
        {16: {"ApiSilent"}, 20.5: {"ApiSilent"}, 23: {"ApiSilent"}, 39: {"ApiSilent"}, 40.5: set()},
        away=((20, 20.5),),
    ),
    Case(
        "the API server is away when the watcher starts",
        ages("api", 10, 40) | ages("snapshot", 10, 40),
        {13.5: set(), 16: {"ApiSilent"}, 30: {"ApiSilent"}, 40.5: set()},
    ),
    Case(
        "watches fail and the list gets through",
        {
            series("power_agent_watch_restarts_total", reason="failed"): counted(
                *spread(10, 30, 0.5)
            )
        },
        {15: set(), 23: {"WatchFails"}, 39: {"WatchFails"}, 46: set()},
        {"WatchFails": (AT_NODE, "Watches of the watcher on n1 fail again and again")},
    ),
    Case(
        "a limit is refused",
        failures(*spread(10, 20, 0.5)) | gpu_is("failed", (10, 30)) | pod_is("failed", (10, 30)),
        {9: set(), 11: {"WriteFails"}, 13: REFUSED, 29: REFUSED, 30.5: set(), 35: set()},
        {
            "LimitNotApplied": (AT_POD, f"{WORKER}, GPU {UUID} at {PCI}"),
            "WriteFails": (AT_GPU, f"{GPU} refuses limits (NVML_ERROR_UNKNOWN)"),
        },
    ),
    Case(
        "a limit is refused and the source comes and goes",
        failures(*spread(10, 20, 0.5)) | gpu_is("failed", (10, 45)) | pod_is("failed", (10, 45)),
        dict.fromkeys((13, 14.5, 19, 23, 29, 40, 44), REFUSED) | {45.5: set()},
        away=((14, 15), (18, 21), (28, 30)),
    ),
    Case(
        "a limit is refused and the enforcer hangs",
        failures(*spread(10, 5, 0.5))
        | gpu_is("failed", (10, 45))
        | pod_is("failed", (10, 45))
        | enforcer_away(15, 40),
        {14: REFUSED, 20: REFUSED | {"EnforcerDown"}, 39: REFUSED | {"EnforcerDown"}, 45.5: set()},
    ),
    Case(
        "it was mended before the source went away",
        pod_is("failed", (10, 15)),
        {13: FAILED, 15.5: set(), 17: set(), 20: set(), 24: set()},
        away=((16, 20),),
    ),
    Case(
        "it was mended while the source was away",
        pod_is("failed", (10, 19)),
        {13: FAILED, 19.5: FAILED, 20.5: set()},
        away=((16, 20),),
    ),
    Case(
        "a write was refused once",
        failures(10) | gpu_is("failed", (10, 10.25)),
        {11: set(), 13: set(), 20: set()},
    ),
    Case(
        "an annotation that is no limit",
        pod_is("invalid", (10, 30)),
        {14: set(), 16: {"LimitUnusable"}, 22: {"LimitUnusable"}, 30.5: set()},
        {
            "LimitUnusable": (
                AT_POD,
                "The power limit that team/worker asks for cannot be used",
            )
        },
        away=((20, 24),),
    ),
    Case(
        "a process list cannot be read",
        gpu_is("held", (10, 40)),
        {19: set(), 21: {"GpuHeld"}, 26: {"GpuHeld"}, 39: {"GpuHeld"}, 40.5: set()},
        {"GpuHeld": (AT_GPU, f"{GPU} is held as it is")},
        away=((25, 29),),
    ),
    Case(
        "a GPU is held since the enforcer refuses snapshots",
        gpu_is("held", (11.5, 45)) | ages("snapshot", 10, 45) | ages("report", 10, 45),
        {14: {"SnapshotOld"}, 40: {"SnapshotOld"}},
    ),
    Case(
        "a GPU falls off the bus and the others move up",
        gpu_is("lost", (10, 40))
        | {
            of_gpu("power_agent_gpu_state", state="lost"): over((None, 0)),
            of_gpu("power_agent_gpu_state", index="", state="lost"): over(
                (None, 10), (1, 30), (None, 0)
            ),
            of_gpu("power_agent_gpu_info", pci_bus_id=PCI): over((1, 10), (None, 30), (1, 0)),
        },
        {11: set(), 13: {"GpuLost"}, 21: {"GpuLost"}, 39: {"GpuLost"}, 40.5: set()},
        {"GpuLost": (AT_GPU, f"{GPU} is lost")},
        away=((20, 24),),
    ),
    Case(
        "a held GPU moves to another index",
        gpu_is("held", (10, 18))
        | {of_gpu("power_agent_gpu_state", state="managed"): over((1, 10), (None, 30), (1, 0))}
        | {
            of_gpu("power_agent_gpu_state", index="3", state="held"): over(
                (None, 18), (1, 22), (None, 0)
            )
        }
        | {of_gpu("power_agent_gpu_info", index="3", pci_bus_id=PCI): over((None, 18), (1, 0))},
        {19: set(), 21: {"GpuHeld"}, 39: {"GpuHeld"}, 40.5: set()},
        {"GpuHeld": (AT_GPU, f"{GPU} is held as it is")},
    ),
    Case(
        "NVML fails",
        gpu_is("lost", (10, 40))
        | node_is("nvml_state", (1, 10), (None, 30), (1, 0), state="ok")
        | node_is("nvml_state", (None, 10), (1, 30), (None, 0), state="failing"),
        {14: set(), 16: {"NvmlFails"}, 22: {"NvmlFails"}, 39: {"NvmlFails"}, 40.5: set()},
        {"NvmlFails": (AT_NODE, "NVML on n1 cannot be used")},
        away=((20, 24),),
    ),
    Case(
        "a person forgets a pause",
        node_is("paused", (0, 5), (1, 50), (0, 0)),
        {34: set(), 36: {"Paused"}, 54: {"Paused"}, 55.5: set()},
        {"Paused": (AT_NODE, "Power Agent on n1 is paused")},
        away=((42, 46),),
    ),
    Case(
        "another program writes limits",
        {of_gpu("power_agent_limit_writes_total", reason="drift"): counted(*spread(10, 20, 0.5))},
        {11: set(), 15: {"AnotherWriter"}, 29: {"AnotherWriter"}, 46: set()},
        {"AnotherWriter": (AT_GPU, f"Something else keeps changing the limit of {GPU}")},
    ),
    Case(
        "a GPU that another program writes to moves to another index",
        {
            of_gpu("power_agent_limit_writes_total", reason="drift"): until(
                15, counted(10, 11, 12, 13)
            ),
            of_gpu("power_agent_limit_writes_total", index="3", reason="drift"): since(
                15, counted(16, 17, 18, 19)
            ),
        },
        {13: set(), 21: {"AnotherWriter"}},
        {"AnotherWriter": (AT_GPU, f"Something else keeps changing the limit of {GPU}")},
    ),
    Case(
        "it gets too hot",
        {of_gpu("power_agent_gpu_enforced_limit_watts"): over((300, 10), (250, 30), (300, 0))},
        {24: set(), 26: {"AnotherLimiter"}, 39: {"AnotherLimiter"}, 40.5: set()},
        {"AnotherLimiter": (AT_GPU, f"{GPU} is held below its limit by another limiter")},
        away=((20, 22),),
    ),
    *(
        Case(
            f"somebody without permission: {name}",
            {told: counted(10, 10.5)},
            {13: {"MessagesDenied"}, 17: set(), 30: set()},
            {
                "MessagesDenied": (
                    AT_NODE,
                    "Somebody without permission talked to the enforcer on n1",
                )
            },
        )
        for name, told in {
            "messages": series("power_agent_denied_messages_total", reason="denied"),
            "connections": series("power_agent_refused_connections_total"),
        }.items()
    ),
    Case(
        "a pod waits",
        pod_is("waiting", (5, 45)),
        {34: set(), 36: {"PodWaits"}, 44: {"PodWaits"}, 45.5: set()},
        {"PodWaits": (AT_POD, "No GPU of team/worker has been found on n1")},
        away=((20, 24),),
    ),
    Case(
        "a pod waits whose container runs",
        pod_is("waiting", (5, 45)) | kube(),
        {34: set(), 36: {"PodWaits"}, 45.5: set()},
    ),
    Case("a pod waits for its image", pod_is("waiting", (5, 45)) | kube(runs=0), NOTHING),
    Case(
        "no agent on a GPU node",
        kube("other", "n1"),
        {9: set(), 11: {"NodeWithoutAgent"}, 40: {"NodeWithoutAgent"}},
        {
            "NodeWithoutAgent": (
                AT_NODE,
                "Pods on n1 ask for a power limit, and no Power Agent runs there",
            )
        },
        agent=False,
    ),
    Case(
        "no agent on a node without GPUs",
        {name: values for name, values in kube("other").items() if "allocatable" not in name},
        NOTHING,
        agent=False,
    ),
    Case(
        "both programs restart while the API is away: no pod is told of",
        started("watcher", 15)
        | started("enforcer", 15)
        | ages("snapshot", 15, 25)
        | ages("api", 15, 25)
        | pod_states(failed=((10, 15), (25, 30)), untold=(15, 25)),
        {14: FAILED, 16: FAILED, 19: FAILED, 24: FAILED | {"ApiSilent"}, 28: FAILED, 31: set()},
    ),
    Case(
        "both programs restart while the API is away, and the pod has gone meanwhile",
        started("watcher", 15)
        | started("enforcer", 15)
        | ages("snapshot", 15, 18)
        | ages("api", 15, 18)
        | pod_states(failed=((10, 15),), untold=(15, 60)),
        {14: FAILED, 17: FAILED, 19: set(), 30: set()},
    ),
    Case(
        "the watcher restarts while the API is away, and the enforcer mends the limit",
        started("watcher", 15)
        | ages("snapshot", 15, 25)
        | ages("api", 15, 18)
        | pod_states(failed=((10, 17),), untold=None),
        {14: FAILED, 16: FAILED, 18: set(), 19: set()},
    ),
    Case(
        "the node is taken away",
        pod_is("failed", (10, 20)),
        {13: FAILED, 25: FAILED, 36: set()},
        gone_at=20,
    ),
]


@pytest.fixture(scope="module")
def short_rules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rules with their summaries alone: promtool compares all that an alert says."""
    spec = rules()
    for rule in spec["groups"][0]["rules"]:
        if "alert" in rule:
            rule["annotations"] = {"summary": rule["annotations"]["summary"]}
    path = tmp_path_factory.mktemp("rules") / "rules.yaml"
    path.write_text(yaml.safe_dump(spec, width=10_000))
    return path


def rules() -> dict[str, Any]:
    spec: dict[str, Any] = yaml.safe_load(RULES.read_text())
    return spec


def run(program: Path, *arguments: str | Path, page: str = "") -> str:
    done = subprocess.run(
        [program, *arguments], input=page, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_promtool_takes_the_rules(programs: Path) -> None:
    assert "SUCCESS" in run(programs / "promtool", "check", "rules", RULES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_alerts_of(case: Case, programs: Path, short_rules: Path, tmp_path: Path) -> None:
    severities = {
        rule["alert"].removeprefix("PowerAgent"): rule["labels"]["severity"]
        for rule in rules()["groups"][0]["rules"]
        if "alert" in rule
    }
    test = {
        "rule_files": [str(short_rules)],
        "evaluation_interval": f"{60 // SAMPLES_A_MINUTE}s",
        "tests": [promtool(case, severities)],
    }
    (tmp_path / "test.yaml").write_text(yaml.safe_dump(test, width=10_000))
    run(programs / "promtool", "test", "rules", tmp_path / "test.yaml")


def test_each_alert_has_a_case() -> None:
    fired = {name for case in CASES for names in case.firing.values() for name in names}
    named = {name for case in CASES for name in case.says}
    alerts = {
        rule["alert"].removeprefix("PowerAgent")
        for rule in rules()["groups"][0]["rules"]
        if "alert" in rule
    }
    assert fired == named == alerts

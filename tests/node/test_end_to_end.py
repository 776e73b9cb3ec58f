"""The whole agent on a simulated node: real processes, sockets, users and cgroups.

What is asserted is what the hardware says, read past the agent.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import subprocess
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from shared.messages import RAW_CHARS
from shared.powerctl import reply_checks
from shared.powerctl.ask import UnreachableError
from shared.powerctl.explain import explain
from tests.node.conftest import MakeNode
from tests.simnode.clock import WallClock
from tests.simnode.exposition import Family, read, value
from tests.simnode.kubeapi import KubeApi
from tests.simnode.node import ANNOTATION, CONFIG_HASH, SimNode
from tests.simnode.programs import children_of, descriptors_of
from tests.simnode.reachable import as_user, base_folder
from tests.simnode.undrained import Undrained

FOUND = 700  # an H100's factory default, in watts


def embedded(node: SimNode) -> KubeApi:
    assert isinstance(node.api, KubeApi)
    return node.api


def metrics(node: SimNode) -> dict[str, Family]:
    return read(node.page("/metrics")[1])


# ---------------------------------------------------------------------- the way of one limit


def test_an_annotation_becomes_a_limit_and_is_given_back(node: SimNode) -> None:
    node.gpus[0].limit_mw = 650_000  # somebody's choice, which is not the factory's
    pod = node.add_pod("trainer", limit=350, gpus=[0])
    node.wait_for_limit(0, 350)
    node.annotate(pod, 420.5)
    node.wait_for_limit(0, 420.5)
    node.annotate(pod, None)
    node.wait_for_limit(0, 650)
    assert node.gpus[1].sets() == []


def test_a_pods_limit_holds_on_each_of_its_gpus(node: SimNode) -> None:
    node.add_pod("trainer", limit=350, gpus=[0, 1])
    node.wait_for_limit(0, 350)
    node.wait_for_limit(1, 350)


def test_the_metrics_show_on_each_gpu_of_a_pod_what_holds_there(node: SimNode) -> None:
    node.add_pod("first", limit=400, gpus=[0, 1])
    node.add_pod("second", limit=300, gpus=[1])
    name = "power_agent_pod_effective_limit_watts"
    expected = {
        ("first", node.gpus[0].uuid): 400.0,
        ("first", node.gpus[1].uuid): 300.0,
        ("second", node.gpus[1].uuid): 300.0,
    }

    def shown() -> dict[tuple[str, str], float]:
        family = metrics(node).get(name)
        samples = family.samples if family is not None else {}
        found = [(dict(labels), watts) for (_, labels), watts in samples.items()]
        return {(labels["pod"], labels["UUID"]): watts for labels, watts in found}

    node.wait_for(lambda: shown() == expected, "the limits of both GPUs")


def test_graceful_deletion_gives_back(node: SimNode) -> None:
    pod = node.add_pod("trainer", limit=350, gpus=[0])
    node.wait_for_limit(0, 350)
    node.delete_pod(pod)
    node.wait_for_limit(0, FOUND)
    assert node.api.get_pod("default", "trainer") is None


def test_forced_deletion_holds_until_the_processes_end(node: SimNode) -> None:
    pod = node.add_pod("trainer", limit=350, gpus=[0])
    node.wait_for_limit(0, 350)
    node.delete_pod(pod, grace=False)
    node.wait_for(
        lambda: [gpu.state for gpu in node.status().gpus if gpu.managed] == ["held"], "held"
    )
    node.stays(lambda: node.limit_mw(0) == 350_000, 0.5)
    node.end_workers(pod)
    node.wait_for_limit(0, FOUND)


def test_a_finished_pod_gives_back(node: SimNode) -> None:
    pod = node.add_pod("job", limit=350, gpus=[0])
    node.wait_for_limit(0, 350)
    node.end_workers(pod)
    node.api.set_phase("default", "job", "Succeeded")
    node.wait_for_limit(0, FOUND)


def test_a_worker_that_comes_after_its_annotation_gets_the_limit(make_node: MakeNode) -> None:
    node = make_node(settings={"POWER_AGENT_SCAN_SECONDS": "3600"})
    pod = node.add_pod("trainer", limit=350)
    node.wait_for_state(pod, "waiting")
    node.add_worker(pod, [0])
    node.wait_for_limit(0, 350)  # it is looked for far more often than every hour


def test_a_worker_that_hops_takes_its_limit_along(node: SimNode) -> None:
    pod = node.add_pod("trainer", limit=350, gpus=[0])
    node.wait_for_limit(0, 350)
    pod.workers[0].hop(node.gpus[1])
    node.wait_for_limit(1, 350)
    node.workers.of_host([node.gpus[0]])
    node.wait_for_limit(0, FOUND)  # another's now
    assert node.limit_mw(1) == 350_000


def test_the_lowest_of_two_pods_limits_holds(node: SimNode) -> None:
    node.add_pod("first", limit=400, gpus=[0])
    node.wait_for_limit(0, 400)
    second = node.add_pod("second", limit=300, gpus=[0])
    node.wait_for_limit(0, 300)
    node.delete_pod(second)
    node.wait_for_limit(0, 400)


def test_a_request_outside_the_bounds_is_clamped_and_says_so(node: SimNode) -> None:
    pod = node.add_pod("trainer", limit=90, gpus=[0])
    node.wait_for_limit(0, 200)
    node.wait_for_state(pod, "clamped")


def test_drift_is_mended(node: SimNode) -> None:
    node.add_pod("trainer", limit=350, gpus=[0])
    node.wait_for_limit(0, 350)
    drifts = node.status().counters.drifts
    node.gpus[0].limit_mw = 700_000
    node.wait_for_limit(0, 350)
    assert node.status().counters.drifts == drifts + 1


def test_sigterm_gives_every_gpu_back(node: SimNode) -> None:
    node.add_pod("trainer", limit=350, gpus=[0, 1])
    node.wait_for_limit(0, 350)
    node.wait_for_limit(1, 350)
    assert node.stop() == {"enforcer": 0, "watcher": 0}
    assert node.limits_mw() == [FOUND * 1000] * 2


# ---------------------------------------------------------------------- whose pods


def test_static_pod_is_known_by_its_config_hash(node: SimNode) -> None:
    node.add_pod("static", limit=350, gpus=[0], static=True)
    node.wait_for_limit(0, 350)


def test_config_hash_on_an_ordinary_pod_is_not_believed(node: SimNode) -> None:
    victim = secrets.token_hex(16)
    node.workers.of_pod(victim, [node.gpus[0]])
    thief = {ANNOTATION: "250", CONFIG_HASH: victim}
    node.api.create_pod("thief", node=node.name, annotations=thief)
    node.wait_for(lambda: node.status().pods, "the pod")
    node.stays(lambda: node.limit_mw(0) == FOUND * 1000, 0.5)


def test_pod_of_another_node_is_ignored(node: SimNode) -> None:
    other = node.api.create_pod("far", node="node-b", annotations={ANNOTATION: "300"})
    node.workers.of_pod(other["metadata"]["uid"], [node.gpus[1]])
    node.add_pod("near", limit=350, gpus=[0])
    node.wait_for_limit(0, 350)
    assert [pod.name for pod in node.status().pods] == ["near"]
    node.stays(lambda: node.limit_mw(1) == FOUND * 1000, 0.5)


# ---------------------------------------------------------------------- large and odd


def test_a_thousand_pods(make_node: MakeNode) -> None:
    node = make_node(start=False)
    for number in range(1000):
        node.api.create_pod(f"pod-{number}", node=node.name, annotations={ANNOTATION: "400"})
    node.start()
    pod = node.add_pod("trainer", limit=350, gpus=[0])
    node.wait_for_limit(0, 350)
    assert len(node.status().pods) == 1001
    node.annotate(pod, 300)
    node.wait_for_limit(0, 300)


def test_annotation_of_64_kib_harms_nobody(node: SimNode) -> None:
    huge = node.add_pod("huge", limit="9" * 65536, gpus=[0])
    node.add_pod("trainer", limit=350, gpus=[1])
    node.wait_for_limit(1, 350)
    node.wait_for_state(huge, "invalid")
    told = next(pod for pod in node.status().pods if pod.name == "huge")
    assert len(told.raw) == RAW_CHARS
    assert node.gpus[0].sets() == []


def test_unusable_values_keep_the_limit_and_are_said_once(node: SimNode) -> None:
    """What is unusable: tests/unit/test_units.py."""
    pod = node.add_pod("trainer", limit=350, gpus=[0])
    node.wait_for_limit(0, 350)
    values = ["350W", "３５０", ""]
    for raw in values:
        node.annotate(pod, raw)
        node.wait_for(
            lambda v=raw: [(p.raw, p.state) for p in node.status().pods] == [(v, "invalid")],  # type: ignore[misc]
            f"{raw!r} heard",
        )
    node.stays(lambda: node.limit_mw(0) == 350_000, 0.3)
    warnings = [line for line in node.log_lines() if line["event"] == "annotation_unusable"]
    assert [line["value"] for line in warnings if line["pod"] == "trainer"] == values


# ---------------------------------------------------------------------- crashes


def test_an_enforcer_that_was_killed_knows_what_it_found(node: SimNode) -> None:
    node.gpus[0].limit_mw = 650_000
    pod = node.add_pod("trainer", limit=350, gpus=[0])
    node.wait_for_limit(0, 350)
    node.kill_enforcer()
    node.delete_pod(pod)
    assert node.limit_mw(0) == 350_000
    node.start_enforcer()
    node.wait_for_limit(0, 650)


def test_an_enforcer_without_a_snapshot_does_not_claim_that_a_pod_is_gone(node: SimNode) -> None:
    """I12: the reason it gives for holding is that it has heard nothing yet."""
    node.add_pod("trainer", limit=350, gpus=[0])
    node.wait_for_limit(0, 350)
    node.kill_watcher()
    node.kill_enforcer()
    node.start_enforcer()

    def held() -> str | None:
        with contextlib.suppress(UnreachableError):
            return next((g.reason for g in node.status().gpus if g.state == "held"), None)
        return None

    assert "gone" not in node.wait_for(held, "held")


def test_a_killed_watcher_releases_nothing(node: SimNode) -> None:
    """I4, I5: a watcher that is silent, or has just begun, is no reason to raise a limit.

    Not even where the worker is restarting, so that no process speaks for the pod.
    """
    pod = node.add_pod("trainer", limit=350, gpus=[0])
    node.wait_for_limit(0, 350)
    node.kill_watcher()
    node.end_workers(pod)
    with node.api_outage():
        node.start_watcher()
        node.stays(lambda: node.limit_mw(0) == 350_000, 1.0)
    node.add_worker(pod, [0])
    node.annotate(pod, 300)
    node.wait_for_limit(0, 300)


def test_supervisord_brings_all_back(make_node: MakeNode) -> None:
    node = make_node(supervised=True)
    pod = node.add_pod("trainer", limit=350, gpus=[0])
    node.wait_for_limit(0, 350)
    killed = [node.kill_enforcer(), node.kill_watcher()]
    node.annotate(pod, 300)
    node.wait_for_limit(0, 300)
    assert node.pid("enforcer") not in killed
    assert node.pid("watcher") not in killed
    assert node.stop() == {"supervisord": 0}
    assert node.limit_mw(0) == FOUND * 1000


# ---------------------------------------------------------------------- the API fails


def test_api_down_at_start(make_node: MakeNode) -> None:
    node = make_node(start=False)
    pod = node.add_pod("trainer", limit=350, gpus=[0])
    with node.api_outage():
        node.start_enforcer()
        node.start_watcher()
        reason = re.compile("pods: not listed yet: .*refused")
        node.wait_for(lambda: reason.search(node.page("/readyz")[1]), "the reason")
        assert node.page("/healthz")[0] == 200
        assert node.gpus[0].sets() == []
    node.wait_for_limit(0, 350)
    node.wait_for_state(pod, "enforced")


def test_api_outage_keeps_limits_also_of_a_worker_that_restarts(node: SimNode) -> None:
    pod = node.add_pod("trainer", limit=350, gpus=[0])
    node.wait_for_limit(0, 350)
    before = len(node.gpus.sets())
    with node.api_outage():
        worker = node.restart_worker(pod, [0])
        node.wait_for(lambda: worker.pid in _pids_seen(node), "the new process seen")
        node.stays(lambda: node.limit_mw(0) == 350_000, 0.5)
    assert len(node.gpus.sets()) == before
    node.annotate(pod, 300)
    node.wait_for_limit(0, 300)
    assert embedded(node).count("list") == 0  # it went on where it was


def _pids_seen(node: SimNode) -> set[int]:
    return {process.pid for gpu in node.status().gpus for process in gpu.processes}


# ---------------------------------------------------------------------- quiet, and seen


def test_steady_state_writes_lists_and_logs_nothing(make_node: MakeNode) -> None:
    """I10, over many scans, several heartbeats and readings back."""
    node = make_node()  # one that says nothing any more of an outage before
    trainer = node.add_pod("trainer", limit=350, gpus=[0])
    node.add_pod("other", gpus=[1])
    node.wait_for_state(trainer, "enforced")  # its log line comes before that answer
    node.wait_for(lambda: embedded(node).open_watches == 1, "the watch")
    before = len(node.gpus.sets()), embedded(node).count(), len(node.log_lines())
    snapshots = node.status().counters.snapshots
    node.stays(
        lambda: before == (len(node.gpus.sets()), embedded(node).count(), len(node.log_lines())),
        4.5,
    )
    assert node.status().counters.snapshots >= snapshots + 2  # the heart beats


YEAR_S = 365 * 86_400


@pytest.fixture
def wall_clock() -> Iterator[WallClock]:
    with tempfile.TemporaryDirectory(prefix="power-agent-clock-", dir=base_folder()) as folder:
        Path(folder).chmod(0o755)
        yield WallClock(Path(folder))


def test_jumps_of_the_wall_clock_change_nothing(make_node: MakeNode, wall_clock: WallClock) -> None:
    """Into the next decade, before 1970, by an hour: no list, no release, no end of the lease."""
    node = make_node(settings={"POWER_AGENT_LEASE": "release:30", **wall_clock.environment})
    pod = node.add_pod("trainer", limit=350, gpus=[0])
    node.wait_for_state(pod, "enforced")
    lists = embedded(node).count("list")
    for years, watts in ((10, 340), (-60, 330), (0, 320)):
        wall_clock.set(years * YEAR_S)
        node.stays(lambda: node.status().watcher.connected, 0.5)
        node.annotate(pod, watts)
        node.wait_for_limit(0, watts)
        newcomer = node.add_pod(f"newcomer-{watts}", limit=watts, gpus=[1])
        node.wait_for_limit(1, watts)
        node.delete_pod(newcomer)
        node.wait_for_limit(1, FOUND)
    wall_clock.set(3600)
    node.kill_enforcer()
    node.start_enforcer()
    node.wait_for_state(pod, "enforced")
    assert node.page("/readyz")[0] == 200
    assert embedded(node).count("list") == lists
    assert FOUND * 1000 not in [each.requested_mw for each in node.gpus[0].sets()]
    years_said = {entry["ts"][:4] for entry in node.log_lines()}
    this_year = datetime.now(UTC).year
    assert {str(this_year + 10), str(this_year - 60)} & years_said, "the clock was not the agent's"


def test_where_nobody_drains_their_output_both_go_on_and_say_later_what_is_missing(
    make_node: MakeNode,
) -> None:
    """The watcher may not open root's pipe again, so it goes another way there."""
    node = make_node(start=False)
    with Undrained() as enforcers, Undrained() as watchers:
        outputs = {"enforcer": enforcers, "watcher": watchers}
        for program, output in outputs.items():
            node.programs[program].output = output.writer
        node.start()
        pod = node.add_pod("trainer", limit=350, gpus=[0])
        node.wait_for_limit(0, 350)
        node.status()  # it answers when it has said, or dropped, what there is to say of that
        for output in outputs.values():
            output.drain()
        node.annotate(pod, 300)
        node.wait_for_limit(0, 300)
        (said, *_) = enforcers.lines(bool)
        assert (said["event"], said["count"] > 0) == ("log_lines_dropped", True)
        node.kill_enforcer()  # which the watcher says
        (said, *_) = watchers.lines(bool)
        assert (said["event"], said["count"] > 0) == ("log_lines_dropped", True)


NAMES = {
    "power_agent_gpu_limit_watts": "gauge",
    "power_agent_gpu_enforced_limit_watts": "gauge",
    "power_agent_gpu_default_limit_watts": "gauge",
    "power_agent_gpu_min_limit_watts": "gauge",
    "power_agent_gpu_max_limit_watts": "gauge",
    "power_agent_gpu_power_watts": "gauge",
    "power_agent_gpu_managed": "gauge",
    "power_agent_pod_requested_limit_watts": "gauge",
    "power_agent_pod_effective_limit_watts": "gauge",
    "power_agent_pod_state": "gauge",
    "power_agent_limit_writes_total": "counter",
    "power_agent_limit_write_failures_total": "counter",
    "power_agent_enforcement_latency_seconds": "histogram",
    "power_agent_watch_events_total": "counter",
    "power_agent_watch_restarts_total": "counter",
    "power_agent_list_requests_total": "counter",
    "power_agent_enforcer_up": "gauge",
    "power_agent_snapshot_age_seconds": "gauge",
    "power_agent_denied_messages_total": "counter",
    "power_agent_build_info": "gauge",
    "power_agent_gpu_target_limit_watts": "gauge",
    "power_agent_gpu_state": "gauge",
    "power_agent_gpu_info": "gauge",
    "power_agent_node_most_watts": "gauge",
    "power_agent_nvml_state": "gauge",
    "power_agent_dry_run": "gauge",
    "power_agent_start_time_seconds": "gauge",
    "power_agent_refused_connections_total": "counter",
    "power_agent_report_age_seconds": "gauge",
    "power_agent_api_age_seconds": "gauge",
}


def test_metrics_are_prometheus_text_with_all_names(node: SimNode) -> None:
    pod = node.add_pod("trainer", limit=350, gpus=[0])
    node.wait_for_limit(0, 350)
    node.gpus[0].fault("nvmlDeviceSetPowerManagementLimit", error=999, count=1)
    node.annotate(pod, 300)
    node.wait_for_limit(0, 300)
    gpu = {"gpu": "0", "UUID": node.gpus[0].uuid}

    def current() -> bool:
        limits = metrics(node).get("power_agent_gpu_limit_watts")
        return limits is not None and limits.one(**gpu) == 300

    node.wait_for(current, "the metrics of the limit")
    found = metrics(node)
    assert {name: found[name].kind for name in NAMES} == NAMES
    effective = found["power_agent_pod_effective_limit_watts"]
    assert effective.one(namespace="default", pod="trainer", **gpu) == 300
    assert found["power_agent_gpu_managed"].one(**gpu) == 1
    board = dict(next(iter(found["power_agent_gpu_info"].samples))[1])
    assert re.fullmatch("[0-9A-F]{8}:[0-9A-F]{2}:[0-9A-F]{2}[.][0-7]", board["pci_bus_id"])


def test_a_node_whose_api_is_down_at_its_start_shows_what_its_gpus_hold(node: SimNode) -> None:
    """Whoever sums watts must never read "no load" from a node that holds load."""
    pod = node.add_pod("trainer", limit=350, gpus=[0])
    node.wait_for_state(pod, "enforced")
    gpu = {"gpu": "0", "UUID": node.gpus[0].uuid}

    def held() -> bool:
        status, text = node.page("/metrics")
        return status == 200 and value(text, "power_agent_gpu_limit_watts", **gpu) == 350

    with node.api_outage():
        node.kill_enforcer()
        node.kill_watcher()
        node.start_enforcer()
        node.start_watcher()
        node.wait_for(held, "the limit that holds")
        watcher = node.status().watcher
        assert watcher.unlisted.startswith("the API server gave no list of pods yet")
        assert (watcher.connected, watcher.api_age_s) == (False, None)
        most = metrics(node)["power_agent_node_most_watts"].one()
        assert most == 350 + 700 * (len(node.gpus) - 1)


def test_the_latency_counts_limits_that_were_written_at_once_and_nothing_else(
    node: SimNode,
) -> None:
    def counted() -> float:
        latency = metrics(node)["power_agent_enforcement_latency_seconds"]
        return latency.samples["power_agent_enforcement_latency_seconds_count", ()]

    def states() -> dict[str, str]:
        family = metrics(node).get("power_agent_pod_state")
        found = [dict(labels) for _, labels in family.samples] if family else []
        return {labels["pod"]: labels["state"] for labels in found}

    before = counted()
    first, second = (node.add_pod(f"trainer-{k}", gpus=[k]) for k in (0, 1))
    for count, pod in enumerate((first, second), 1):
        node.annotate(pod, 350)
        node.wait_for(lambda n=count: counted() == before + n, "a measured limit")  # type: ignore[misc]
    node.add_pod("without-gpu", limit=200)
    node.wait_for(lambda: states().get("without-gpu") == "waiting", "a pod without a GPU")
    node.annotate(first, None)
    node.wait_for(lambda: "trainer-0" not in states(), "the removal")
    failures = "power_agent_limit_write_failures_total"
    refused = sum(metrics(node)[failures].some())
    node.gpus[1].fault("nvmlDeviceSetPowerManagementLimit", error=999, count=1)
    node.annotate(second, 300)
    node.wait_for(lambda: sum(metrics(node)[failures].some()) == refused + 1, "the refusal")
    node.wait_for(lambda: states().get("trainer-1") == "enforced", "the second try")
    assert counted() == before + 2


def test_ready_is_red_while_the_enforcer_is_away(node: SimNode) -> None:
    node.wait_for(lambda: node.page("/readyz") == (200, "ok\n"), "green")
    node.kill_enforcer()
    node.wait_for(lambda: node.page("/readyz")[0] == 503, "red")
    assert "enforcer" in node.page("/readyz")[1]
    assert node.page("/healthz")[0] == 200  # restarting the watcher would help nobody
    node.start_enforcer()
    node.wait_for(lambda: node.page("/readyz") == (200, "ok\n"), "green again")


def test_ready_is_red_while_nvml_is_missing(make_node: MakeNode) -> None:
    node = make_node(start=False)
    node.gpus.driver_missing()
    node.start()
    pod = node.add_pod("trainer", limit=350, gpus=[0])
    node.wait_for(lambda: node.page("/readyz")[1].startswith("nvml"), "red for NVML")
    assert node.page("/readyz")[0] == 503
    node.gpus.driver_present()
    node.wait_for_limit(0, 350)
    node.wait_for_state(pod, "enforced")
    node.wait_for(lambda: node.page("/readyz")[0] == 200, "green")


def test_a_driver_whose_lists_are_wrong_is_named_wherever_one_looks(make_node: MakeNode) -> None:
    node = make_node(start=False)
    node.gpus.driver_present("535.86.10")
    node.start()
    node.wait_for(lambda: node.page("/readyz") == (200, "ok\n"), "green while nobody waits")
    node.add_pod("trainer", limit=350, gpus=[0])
    node.wait_for(lambda: node.page("/readyz")[0] == 503, "red")
    status = node.status()
    found = explain(status, "default/trainer")
    assert found is not None
    said = {
        "readyz": node.page("/readyz")[1],
        "explain": " ".join(" ".join(found.text).split()),
        "doctor": reply_checks.process_lists(status).seen,
    }
    for text in said.values():
        assert "GPU 0" in text
        assert "driver 535.86.10" in text
        assert "update the driver to 535.98 or later" in text
    assert node.gpus.sets() == []
    node.gpus.driver_present("535.98")
    node.kill_enforcer()
    node.start_enforcer()
    node.wait_for_limit(0, 350)
    node.wait_for(lambda: node.page("/readyz")[0] == 200, "green again")


# ---------------------------------------------------------------------- privileges

_TRIES = """\
import os, pathlib, sys
run, state = map(pathlib.Path, sys.argv[1:])
def attempt(what, action):
    try:
        action()
    except OSError as error:
        print(what, "refused")
    else:
        print(what, "DONE")
attempt("ledger", lambda: (state / "ledger.json").read_bytes())
attempt("state", lambda: os.listdir(state))
attempt("brake", lambda: (state / "pause").touch())
attempt("create", lambda: (run / "other.sock").touch())
attempt("replace", lambda: os.rename(run / "control.sock", run / "old.sock"))
attempt("remove", lambda: (run / "control.sock").unlink())
"""


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: the watcher is another user there only")
def test_the_watchers_user_reaches_neither_ledger_nor_socket_directory(node: SimNode) -> None:
    node.add_pod("trainer", limit=350, gpus=[0])
    node.wait_for_limit(0, 350)
    status = (node.place.proc_root / str(node.pid("watcher")) / "status").read_text()
    assert re.search(rf"^Uid:(\s+{node.watcher_uid}){{4}}$", status, re.MULTILINE)
    assert re.search(r"^Groups:\s*$", status, re.MULTILINE)
    assert re.search(r"^CapEff:\s+0+$", status, re.MULTILINE)
    tried = subprocess.run(
        [node.installation.watcher_python, "-I", "-c", _TRIES, node.run_dir, node.state_dir],
        capture_output=True,
        text=True,
        check=True,
        **as_user(node.watcher_uid),  # type: ignore[call-overload]
    )
    what = ("ledger", "state", "brake", "create", "replace", "remove")
    assert tried.stdout.splitlines() == [f"{each} refused" for each in what]


def test_the_enforcer_opens_no_tcp_port_and_starts_no_process(node: SimNode) -> None:
    """I7."""
    node.add_pod("trainer", limit=350, gpus=[0])
    node.wait_for_limit(0, 350)
    proc = Path("/proc") / str(node.pid("enforcer"))
    sockets = set(descriptors_of(node.pid("enforcer")).values())
    assert any(name.startswith("socket:") for name in sockets)
    for table in ("tcp", "tcp6", "udp", "udp6"):
        for line in (proc / "net" / table).read_text().splitlines()[1:]:
            assert f"socket:[{line.split()[9]}]" not in sockets
    seen = (proc / "environ").read_text().replace("POWER_AGENT_KUBELET_DIR", "")
    assert "KUBE" not in seen
    assert children_of(node.pid("enforcer")) == []

"""The watcher's real process in any order of faults: it ends in the truth, and ends when told."""

from __future__ import annotations

import itertools
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest

from shared import messages as m
from tests.node.watcher_harness import KEY, WatcherNode, report
from tests.simnode.exposition import read
from tests.waiting import until

Wishes = dict[str, int | None]
LASTING = ("lasting-0", "lasting-1", "lasting-2")


@pytest.fixture
def node() -> Iterator[WatcherNode]:
    """A watcher is still to be started."""
    with WatcherNode() as made:
        yield made
    shutil.rmtree(made.folder)


# ---------------------------------------------------------------------- ends when told


def _listing(node: WatcherNode) -> None:
    """The API accepted the first list and says nothing."""
    node.api.freeze()
    node.start()
    until(lambda: node.logs("started"), "the start")


def _retrying(node: WatcherNode) -> None:
    node.api.go_down()
    node.start()
    until(lambda: node.logs("kubernetes_failing"), "a failure")


def _without_enforcer(node: WatcherNode) -> None:
    assert node.enforcer
    node.enforcer.stop()
    node.started()


def _before_a_stuck_enforcer(node: WatcherNode) -> None:
    """It takes everything and answers nothing."""
    assert node.enforcer
    node.enforcer.answer = None
    node.started()
    until(node.sent, "a snapshot")


def _with_too_many_pods(node: WatcherNode) -> None:
    for number in range(m.MAX_PODS + 1):
        node.pod(f"p{number}")
    node.start()
    until(lambda: node.logs("snapshot_impossible"), "the error")


def _in_a_plugin_that_hangs(node: WatcherNode) -> None:
    plugin = node.folder / "plugin"
    plugin.write_text(f"#!/bin/sh\ntouch {node.folder}/called\nexec sleep 600\n")
    plugin.chmod(0o755)
    text = node.kubeconfig.read_text()
    version = "client.authentication.k8s.io/v1"
    user = f"user: {{exec: {{apiVersion: {version}, command: {plugin}}}}}"
    assert "user: {}" in text
    node.kubeconfig.write_text(text.replace("user: {}", user))
    node.start()
    until((node.folder / "called").exists, "the plugin")


@pytest.mark.parametrize(
    "state",
    [
        _listing,
        _retrying,
        _without_enforcer,
        _before_a_stuck_enforcer,
        _with_too_many_pods,
        _in_a_plugin_that_hangs,
    ],
)
def test_sigterm_ends_it_in_every_state(
    node: WatcherNode, state: Callable[[WatcherNode], None]
) -> None:
    state(node)
    assert node.stop() == 0
    assert node.errors == ""


def test_sigterm_in_a_stream_of_events_is_no_error(node: WatcherNode) -> None:
    node.pod("a", "1")
    node.started()
    end = threading.Event()

    def change() -> None:
        for watts in itertools.cycle(range(1, 9000)):
            if end.is_set():
                return
            node.annotate("a", str(watts))

    busy = threading.Thread(target=change)
    busy.start()
    until(lambda: len(node.sent()) > 20, "a stream")
    status = node.stop()
    end.set()
    busy.join()
    assert (status, node.errors) == (0, "")
    worse = [line["event"] for line in node.logs() if line["level"] != "info"]
    assert set(worse) <= {"api_unverified"}


# ---------------------------------------------------------------------- an enforcer that is silent


def _with_gpu(snapshot: m.Snapshot) -> m.Report:
    gpu = m.Gpu(index=0, uuid="GPU-0", limit_mw=350_000, managed=True)
    return msgspec.structs.replace(report(snapshot), gpus=[gpu])


def test_a_silent_enforcer_is_told_once_and_what_it_last_said_stays(node: WatcherNode) -> None:
    assert node.enforcer
    node.enforcer.answer = _with_gpu
    node.pod("a", "350")
    node.started()
    until(lambda: node.page("/readyz") == (200, "ok\n"), "green")
    limits = "power_agent_gpu_limit_watts"
    assert read(node.page("/metrics")[1])[limits].one(gpu="0", UUID="GPU-0") == 350
    node.enforcer.answer = None
    red = (503, "enforcer: no answer\n")
    until(lambda: node.page("/readyz") == red, "red")
    found = read(node.page("/metrics")[1])
    assert found[limits].one(gpu="0", UUID="GPU-0") == 350
    assert found["power_agent_report_age_seconds"].one() >= 5
    assert found["power_agent_enforcer_up"].one() == 0
    assert found["power_agent_snapshot_age_seconds"].one() >= 5
    assert node.page("/healthz") == (200, "ok\n")  # a restart would help nobody
    node.enforcer.answer = _with_gpu
    until(lambda: node.page("/readyz") == (200, "ok\n"), "green again")
    until(lambda: node.logs("enforcer_answers"), "the end of the silence")
    assert len(node.logs("enforcer_silent")) == 1
    until(lambda: (node.metric("power_agent_report_age_seconds") or 99) < 5, "a new answer")


# ---------------------------------------------------------------------- many, and any order


def test_a_thousand_pods_are_one_message_and_a_change_is_told(node: WatcherNode) -> None:
    for number in range(1000):
        node.pod(f"p{number}", "300")
    node.start()
    until(lambda: len(node.wishes() or {}) == 1000, "all of them")
    assert node.sent()[0].revision == 1
    assert len(node.sent()[0].pods) == 1000
    until(lambda: node.api.open_watches == 1, "the watch")
    node.annotate("p500", "310")
    until(lambda: (node.wishes() or {})["p500"] == 310_000, "the change")
    until(lambda: len(node.logs("wanted")) == 2, "one line more")


@pytest.mark.parametrize("seed", range(4))
def test_any_stream_ends_in_the_truth_and_no_living_pod_is_ever_left_out(
    node: WatcherNode, seed: int
) -> None:
    """The values of the lasting pods only rise: a step back in time would be seen."""
    chance = random.Random(seed)
    truth: dict[str, str | None] = dict.fromkeys(LASTING, "1")
    for name, watts in truth.items():
        node.pod(name, watts)
    node.started()
    for number in range(2, 42):
        _disturb(node, chance)
        _change(node, chance, truth, number)
        time.sleep(chance.choice([0, 0, 0.001, 0.02]))  # when it happens is the input here
    node.api.thaw()
    node.api.come_back()
    _enforcer_is_back(node)
    wanted: Wishes = {n: int(w) * 1000 for n, w in truth.items() if w is not None}
    others = sorted(n for n, w in truth.items() if w is None)
    until(lambda: node.wishes() == wanted, "the truth")
    assert len(node.sent()[-1].others) == len(others)
    for name in LASTING:
        seen = [_limit(snapshot, name) for snapshot in node.sent()]  # fails where it is absent
        assert seen == sorted(seen)
    sessions = {snapshot.session for snapshot in node.sent()}
    revisions = [snapshot.revision for snapshot in node.sent()]
    assert len(sessions) == 1
    assert revisions == sorted(revisions)


def _limit(snapshot: m.Snapshot, name: str) -> int:
    (limit_mw,) = [pod.limit_mw for pod in snapshot.pods if pod.name == name]
    assert limit_mw is not None
    return limit_mw


def _enforcer_is_back(node: WatcherNode) -> None:
    assert node.enforcer
    if node.enforcer._thread is None:
        node.enforcer.start()


def _disturb(node: WatcherNode, chance: random.Random) -> None:
    assert node.enforcer
    faults: list[Callable[[], Any]] = [
        node.api.expire_watches,
        lambda: node.api.cut_watches(mid_line=True),
        node.api.cut_watches,
        node.api.compact,
        lambda: node.api.fail_next(1, 410, verb="watch"),
        lambda: node.api.fail_next(1, 503),
        node.api.freeze,
        node.api.go_down,
        node.enforcer.stop,
    ]
    if chance.random() < 0.25:
        chance.choice(faults)()
    else:
        node.api.thaw()
        node.api.come_back()
        _enforcer_is_back(node)


def _change(
    node: WatcherNode, chance: random.Random, truth: dict[str, str | None], number: int
) -> None:
    fleeting = sorted(name for name in truth if name not in LASTING)
    kind = chance.randrange(4)
    if kind == 0:
        name, watts = f"fleeting-{number}", chance.choice([None, str(number)])
        node.pod(name, watts)
        truth[name] = watts
    elif kind == 1 and fleeting:
        name = chance.choice(fleeting)
        del truth[name]
        if chance.random() < 0.5:
            node.api.set_phase("default", name, "Failed")
        else:
            node.api.delete_pod("default", name)
    else:
        name = chance.choice(LASTING)
        node.api.annotate("default", name, KEY, str(number))
        truth[name] = str(number)

"""Kubernetes Events: only on change, never too many, and no trouble where they are refused."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from shared import messages as m
from shared.client import Client
from shared.logs import Log
from tests.simnode.kubeapi import KubeApi
from tests.waiting import joined, until
from watcher import events
from watcher.__main__ import Watcher
from watcher.events import Note, Recorder, notes
from watcher.kube import Api, ApiError
from watcher.settings import WatcherSettings


def pod(name: str = "trainer", /, **more: object) -> m.Pod:
    known: dict[str, object] = {
        "uid": f"uid-{name}",
        "namespace": "default",
        "name": name,
        "raw": "350",
        "requested_mw": 350_000,
        "effective_mw": 350_000,
        "gpus": ["GPU-0"],
        "state": "enforced",
        "reason": "asked for",
    }
    return m.Pod(**(known | more))  # type: ignore[arg-type]


def report(*pods: m.Pod) -> m.Report:
    return m.Report(
        session="s",
        revision=1,
        nvml="ok",
        nvml_message="",
        gpus=[],
        pods=list(pods),
        counters=m.Counters(),
    )


def take(recorder: Recorder, *pods: m.Pod) -> None:
    recorder.take(report(*pods), [])


# ---------------------------------------------------------------------- what is worth one


@pytest.mark.parametrize(
    ("state", "kind", "reason", "said"),
    [
        ("enforced", "Normal", "PowerLimitApplied", "350 W holds on GPU-0"),
        ("clamped", "Warning", "PowerLimitClamped", "asked for 350 W: because"),
        ("conflict", "Warning", "PowerLimitConflict", "asked for 350 W: because"),
        ("invalid", "Warning", "InvalidPowerLimit", "'350' cannot be used: because"),
        ("failed", "Warning", "PowerLimitFailed", "350 W could not be set: because"),
    ],
)
def test_each_state_has_its_event(state: str, kind: str, reason: str, said: str) -> None:
    (note,) = notes({}, [pod(state=state, reason="because")])
    assert (note.kind, note.reason) == (kind, reason)
    assert said in note.message


def test_waiting_is_not_worth_an_event() -> None:
    assert notes({}, [pod(state="waiting", gpus=[], effective_mw=None)]) == []


@pytest.mark.parametrize(
    ("change", "worth"),
    [
        ({"state": "clamped"}, True),
        ({"raw": "351"}, True),
        ({"effective_mw": 1}, True),
        ({"gpus": ["GPU-1"]}, True),
        ({"reason": "in other words"}, False),
        ({}, False),
    ],
)
def test_only_a_change_of_facts_is_worth_one(change: dict[str, object], *, worth: bool) -> None:
    assert bool(notes({"uid-trainer": pod()}, [pod(**change)])) is worth


# ---------------------------------------------------------------------- written, for real


class Lines(Log):
    """A log that can be looked at."""

    def __init__(self) -> None:
        super().__init__("watcher", "info", "json")
        self.lines: list[str] = []

    def _write(self, level: str, event: str, values: dict[str, object]) -> None:
        self.lines.append(f"{level} {event} {values['message']}")


class Recording:
    """Notes what was asked, and refuses it."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def post(self, path: str, body: bytes, *, read_timeout_s: float) -> None:
        assert body
        assert read_timeout_s > 0
        self.asked.append(path)
        raise ApiError("not here", 404)


@pytest.fixture
def kube() -> Iterator[KubeApi]:
    with KubeApi(tokens={"t": "watcher"}) as api:
        for name in ("team-a", "team-b"):
            api.create_namespace(name)
        yield api


@pytest.fixture
def log() -> Lines:
    return Lines()


@pytest.fixture
def recorder(kube: KubeApi, log: Lines, tmp_path: Path) -> Iterator[Recorder]:
    api = Api(str(kube.write_kubeconfig(tmp_path / "kubeconfig", "t")), in_kubernetes=False)
    made, stop = Recorder(api, "node-a", log), threading.Event()
    take(made)
    thread = threading.Thread(target=made.run, args=(stop,), daemon=True)
    thread.start()
    yield made
    stop.set()
    take(made, pod("last", raw="to wake it"))
    joined(thread)
    api.close()


def test_an_event_is_as_the_api_takes_it(recorder: Recorder, kube: KubeApi, log: Lines) -> None:
    take(recorder, pod("n" * 253))
    until(kube.events, "an event")
    (event,) = kube.events("default")
    assert event["type"] == "Normal"
    assert event["involvedObject"]["name"] == "n" * 253
    assert event["involvedObject"]["uid"] == f"uid-{'n' * 253}"
    assert event["source"] == {"component": "power-agent", "host": "node-a"}
    assert len(event["metadata"]["name"]) <= 253
    assert log.lines == []


def test_what_stays_the_same_is_written_once(recorder: Recorder, kube: KubeApi) -> None:
    for _ in range(100):
        take(recorder, pod())
    take(recorder, pod(), pod("other"))
    until(lambda: len(kube.events()) >= 2, "two events")
    assert [e["involvedObject"]["name"] for e in kube.events()] == ["other", "trainer"]


def test_the_first_report_only_shows_what_has_been_so_all_along(kube: KubeApi, log: Lines) -> None:
    """Or every restart of the agent would write an Event for each pod."""

    made = Recorder(Recording(), "node-a", log)
    take(made, pod())
    take(made, pod())
    assert made._waiting == {}
    assert kube.events() == []


def test_403_is_told_once_with_the_rule_whatever_the_namespace(
    recorder: Recorder, kube: KubeApi, log: Lines
) -> None:
    """The text of a 403 names the namespace, so two namespaces are two texts."""
    kube.deny("watcher", "create", resource="events")
    for watts in range(1, 6):
        asked = {"raw": str(watts), "effective_mw": watts}
        pods = [pod(name[-1], namespace=name, **asked) for name in ("team-a", "team-b")]
        take(recorder, *pods)
        tries = 2 * watts
        until(lambda n=tries: kube.count("create", resource="events") == n, "tries")  # type: ignore[misc]
    assert len(log.lines) == 1
    assert events.RULE in log.lines[0]
    kube.allow_all()
    take(recorder, pod("a", namespace="team-a", raw="7"))
    until(kube.events, "an event")


def test_an_outage_is_told_once(recorder: Recorder, kube: KubeApi, log: Lines) -> None:
    kube.go_down()
    for watts in range(5):
        take(recorder, pod(raw=str(watts)))
        until(lambda: not recorder._waiting, "a try")
    until(lambda: log.lines, "a line")
    kube.come_back()
    take(recorder, pod(raw="again"))
    until(kube.events, "an event")
    assert len(log.lines) == 1


def test_many_changes_are_a_burst_and_then_one_event_a_second(
    recorder: Recorder, kube: KubeApi
) -> None:
    begun_s = time.monotonic()
    take(recorder, *[pod(f"p{number}") for number in range(100)])
    until(lambda: len(kube.events()) >= events._BURST, "the burst")
    until(lambda: len(kube.events()) >= events._BURST + 1, "one more")
    assert time.monotonic() - begun_s >= 0.9
    assert len(kube.events()) <= events._BURST + (time.monotonic() - begun_s) * events._PER_S + 1
    take(recorder)  # nobody waits for the rest of them here


def waiting(recorder: Recorder) -> list[tuple[str, str]]:
    """Whose Events wait, in which order, and which."""
    return [(note.name, note.reason) for note in recorder._waiting.values()]


def test_of_a_flapping_pod_only_the_newest_waits_and_others_keep_their_place(log: Lines) -> None:
    recorder = Recorder(Recording(), "node-a", log)
    take(recorder, pod("a"), pod("b"))
    for number in range(200):
        take(recorder, pod("a", raw=str(number)), pod("b"))
    broken = pod("b", state="failed", reason="NO_PERMISSION")
    take(recorder, pod("a", raw="199"), broken)
    take(recorder, pod("a", state="clamped"), broken)
    assert waiting(recorder) == [("a", "PowerLimitClamped"), ("b", "PowerLimitFailed")]
    note = recorder._next()
    assert note is not None
    assert note.name == "a"
    take(recorder, pod("a"), broken)
    assert waiting(recorder) == [("b", "PowerLimitFailed"), ("a", "PowerLimitApplied")]


def test_an_event_of_a_pod_that_is_gone_waits_no_longer(log: Lines) -> None:
    """Pods that come and go faster than Events may be written would add up."""
    recorder = Recorder(Recording(), "node-a", log)
    take(recorder)
    take(recorder, pod("a"), pod("b"))
    take(recorder, pod("b"))
    assert waiting(recorder) == [("b", "PowerLimitApplied")]


def test_an_event_of_a_static_pod_names_the_kubelets_id_of_it(log: Lines) -> None:
    """Which is what `kubectl describe` asks for, since the kubelet's own Events carry it."""
    recorder = Recorder(Recording(), "node-a", log)
    known: dict[str, Any] = {"namespace": "default", "limit_mw": 350_000, "raw": "350"}
    asked = [
        m.DesiredPod(uid="uid-static", aliases=["f" * 32], name="static", **known),
        m.DesiredPod(uid="uid-other", aliases=[], name="other", **known),
    ]
    take(recorder)
    recorder.take(report(pod("static"), pod("other")), asked)
    assert [note.uid for note in recorder._waiting.values()] == ["f" * 32, "uid-other"]


def test_nothing_waits_for_an_api_that_hangs(recorder: Recorder, kube: KubeApi) -> None:
    kube.freeze()
    for number in range(1000):  # each try would wait for ten seconds
        take(recorder, pod(raw=str(number)))
    kube.thaw()


def test_body_is_bounded_and_safe_whatever_the_annotation_says() -> None:
    note = Note("uid", "default", "name", "Normal", "Reason", "x" * 5000 + '"\n\x00')
    decoded = json.loads(events.body(note, "node"))
    assert len(decoded["message"]) == 1024
    assert msgspec.json.decode(events.body(note, "node")) == decoded


def test_a_namespace_cannot_change_the_path(log: Lines) -> None:
    api = Recording()
    note = Note("uid", "../../pods?x=", "name", "Normal", "Reason", "text")
    Recorder(api, "node", log)._write(note)
    assert api.asked == ["/api/v1/namespaces/..%2F..%2Fpods%3Fx%3D/events"]


# ---------------------------------------------------------------------- its thread


class Raising:
    """Raises what it is told to; notes what it was asked when there is nothing to raise."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.asked: list[str] = []

    def post(self, path: str, body: bytes, *, read_timeout_s: float) -> None:
        assert body
        assert read_timeout_s > 0
        if self.errors:
            raise self.errors.pop(0)
        self.asked.append(path)


def test_an_error_of_its_own_costs_one_event_and_is_told(log: Lines) -> None:
    api, stop = Raising(RuntimeError("a mistake")), threading.Event()
    recorder = Recorder(api, "node-a", log)
    take(recorder)
    take(recorder, pod("a"), pod("b"))
    thread = threading.Thread(target=recorder.run, args=(stop,), daemon=True)
    thread.start()
    until(lambda: api.asked, "the other Event")
    assert log.lines == ["error events_failed RuntimeError('a mistake')"]
    assert thread.is_alive()
    stop.set()
    take(recorder, pod("c"))
    thread.join(20)
    assert not thread.is_alive()


def test_it_turns_also_while_nothing_happens(log: Lines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "_IDLE_S", 0.01)
    stop = threading.Event()
    recorder = Recorder(Raising(), "node-a", log)
    thread = threading.Thread(target=recorder.run, args=(stop,), daemon=True)
    thread.start()
    for _ in range(2):
        before = recorder.turned_at
        until(lambda at=before: recorder.turned_at > at, "another turn")  # type: ignore[misc]
    stop.set()
    thread.join(20)
    assert not thread.is_alive()
    assert log.lines == []


@pytest.fixture
def watcher(kube: KubeApi, log: Lines, tmp_path: Path) -> Iterator[Watcher]:
    """All its threads run but the publisher's, which is the main one."""
    kubeconfig = str(kube.write_kubeconfig(tmp_path / "kubeconfig", "t"))
    settings = WatcherSettings(
        run_dir=tmp_path, log_level="info", log_format="json", in_kubernetes=False,
        node="node-a", kubeconfig=kubeconfig, namespace=None, annotation="example.com/watts",
        metrics=None, events=True,
    )  # fmt: skip
    made = Watcher(settings, log)
    yield made
    made._stop.set()
    made._reflector.stop()
    made._reflecting.join(20)
    client = made._publisher._client
    assert isinstance(client, Client)
    client.close()


def test_an_events_thread_that_hangs_or_has_ended_is_not_healthy(watcher: Watcher) -> None:
    recorder, thread = watcher._recorder, watcher._recording
    assert recorder is not None
    assert thread is not None
    assert watcher._stuck() == ["reflector: stuck", "events: stuck"]  # neither has begun
    watcher._reflecting.start()
    thread.start()
    until(lambda: watcher._stuck() == [], "health")
    recorder.turned_at -= events.TURN_S + 1
    assert watcher._stuck() == ["events: stuck"]
    watcher._stop.set()  # whatever it is that ends it
    take(recorder)
    take(recorder, pod())
    thread.join(20)
    recorder.turned_at = time.monotonic()
    assert watcher._stuck() == ["events: stuck"]


def test_its_longest_turn_is_shorter_than_what_counts_as_stuck() -> None:
    """What it waits for: a note, its place in the rate, and two answers with their connections."""
    assert events._IDLE_S + 1 / events._PER_S + 2 * (events._TIMEOUT_S + 30) < events.TURN_S

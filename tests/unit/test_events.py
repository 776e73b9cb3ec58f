"""Kubernetes Events: only on change, never too many, and no trouble where they are refused."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from shared import messages as m
from shared.logs import Log
from tests.simnode.kubeapi import KubeApi
from watcher import events
from watcher.events import Note, Recorder, notes
from watcher.kube import Api, ApiError


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


def until(condition: Callable[[], object], what: str) -> None:
    end_s = time.monotonic() + 8
    while not condition():
        assert time.monotonic() < end_s, what
        time.sleep(0.005)


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
    made.take(report())
    thread = threading.Thread(target=made.run, args=(stop,), daemon=True)
    thread.start()
    yield made
    stop.set()
    made.take(report(pod("last", raw="to wake it")))
    thread.join(2)
    assert not thread.is_alive()
    api.close()


def test_an_event_is_as_the_api_takes_it(recorder: Recorder, kube: KubeApi, log: Lines) -> None:
    recorder.take(report(pod("n" * 253)))
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
        recorder.take(report(pod()))
    recorder.take(report(pod(), pod("other")))
    until(lambda: len(kube.events()) >= 2, "two events")
    assert [e["involvedObject"]["name"] for e in kube.events()] == ["other", "trainer"]


def test_the_first_report_only_shows_what_has_been_so_all_along(kube: KubeApi, log: Lines) -> None:
    """Or every restart of the agent would write an Event for each pod."""

    made = Recorder(Recording(), "node-a", log)
    made.take(report(pod()))
    made.take(report(pod()))
    assert made._queue.empty()
    assert kube.events() == []


def test_403_is_told_once_with_the_rule_whatever_the_namespace(
    recorder: Recorder, kube: KubeApi, log: Lines
) -> None:
    """The text of a 403 names the namespace, so two namespaces are two texts."""
    kube.deny("watcher", "create", resource="events")
    for watts in range(1, 6):
        asked = {"raw": str(watts), "effective_mw": watts}
        recorder.take(
            report(pod("a", namespace="team-a", **asked), pod("b", namespace="team-b", **asked))
        )
    until(lambda: kube.count("create", resource="events") == 10, "tries")
    until(recorder._queue.empty, "the end of the queue")
    assert len(log.lines) == 1
    assert events.RULE in log.lines[0]
    kube.allow_all()
    recorder.take(report(pod("a", namespace="team-a", raw="7")))
    until(kube.events, "an event")


def test_an_outage_is_told_once(recorder: Recorder, kube: KubeApi, log: Lines) -> None:
    kube.go_down()
    for watts in range(5):
        recorder.take(report(pod(raw=str(watts))))
    until(lambda: log.lines, "a line")
    until(recorder._queue.empty, "the end of the queue")
    kube.come_back()
    recorder.take(report(pod(raw="again")))
    until(kube.events, "an event")
    assert len(log.lines) == 1


def test_a_flapping_pod_writes_a_burst_and_then_one_a_second(
    recorder: Recorder, kube: KubeApi
) -> None:
    begun_s = time.monotonic()
    for number in range(1000):
        recorder.take(report(pod(raw=str(number))))
    until(lambda: len(kube.events()) >= events._BURST, "the burst")
    until(lambda: len(kube.events()) >= events._BURST + 1, "one more")
    assert time.monotonic() - begun_s >= 0.9
    assert len(kube.events()) <= events._BURST + (time.monotonic() - begun_s) * events._PER_S + 1
    assert recorder._queue.qsize() <= events._QUEUE
    while not recorder._queue.empty():  # nobody waits for the rest of them here
        recorder._queue.get_nowait()


def test_nothing_waits_for_an_api_that_hangs(recorder: Recorder, kube: KubeApi) -> None:
    kube.freeze()
    begun_s = time.monotonic()
    for number in range(1000):
        recorder.take(report(pod(raw=str(number))))
    assert time.monotonic() - begun_s < 0.5
    kube.thaw()
    while not recorder._queue.empty():
        recorder._queue.get_nowait()


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

"""What is sent when, and what is said of an enforcer that does not answer: time is handed in."""

from __future__ import annotations

import itertools
import os
import select
import threading
import time
from collections.abc import Mapping

import msgspec
import pytest

from shared import messages as m
from shared.logs import Log
from watcher.annotations import read
from watcher.metadata import Pod
from watcher.metrics import Counts
from watcher.publisher import HEARTBEAT_S, SILENT_S, Mailbox, Publisher
from watcher.reflector import Heard, Scope

NODE = "node-a"


class Lines(Log):
    """A log that can be looked at."""

    def __init__(self) -> None:
        super().__init__("watcher", "info", "json")
        self.lines: list[tuple[str, dict[str, object]]] = []

    def _write(self, level: str, event: str, values: dict[str, object]) -> None:
        if level != "debug":
            self.lines.append((event, values))

    def take(self) -> list[str]:
        events, self.lines = [event for event, _ in self.lines], []
        return events


class Link:
    """The enforcer as `shared.client.Client` shows it; records what reaches it."""

    def __init__(self) -> None:
        self.connected, self.connections, self.takes = False, 0, True
        self.sent: list[m.Snapshot] = []
        self.unlisted: list[m.Unlisted] = []
        self.hinders: tuple[str, str] | None = None
        self.broken: msgspec.DecodeError | None = None

    def connect(self) -> None:
        self.connected, self.connections = True, self.connections + 1

    def watch(self, fd: int) -> None:
        assert fd >= 0

    def send(self, request: m.Request) -> bool:
        taken = self.connected and self.takes
        if isinstance(request, m.Snapshot):
            self.sent += [request] * taken
        else:
            assert isinstance(request, m.Unlisted)
            self.unlisted += [request] * taken
        return taken

    def hindrance(self) -> tuple[str, str] | None:
        return self.hinders

    def wait(self, timeout_s: float) -> list[m.Reply]:
        assert timeout_s >= 0
        if self.broken is not None:
            raise self.broken
        return []

    def take(self) -> list[m.Snapshot]:
        sent, self.sent = self.sent, []
        return sent


class Subject:
    """A publisher, and a clock that only goes on when it is told to."""

    def __init__(self) -> None:
        self.link, self.box, self.log, self.counts = Link(), Mailbox(), Lines(), Counts()
        self.heard = Heard(0.5)
        self.reports: list[tuple[m.Report, list[m.DesiredPod]]] = []
        self.publisher = Publisher(
            self.link,
            self.box,
            Scope(NODE, None),
            self.counts,
            self.log,
            self._on_report,
            lambda: self.heard,
        )
        self.now = time.monotonic()

    def _on_report(self, report: m.Report, asked: list[m.DesiredPod]) -> None:
        self.reports.append((report, asked))

    def step(self, *replies: m.Reply, after_s: float = 0.0) -> list[m.Snapshot]:
        """Let time go on, then turn once; return what was sent."""
        self.now += after_s
        self.publisher.step(self.now, list(replies))
        return self.link.take()

    def offer(self, *pods: Pod, arrived_at: float | None = None) -> None:
        self.box.offer({pod.uid: pod for pod in pods}, arrived_at)

    def report(self, snapshot: m.Snapshot, nvml: m.NvmlState = "ok") -> m.Report:
        return m.Report(
            session=snapshot.session,
            revision=snapshot.revision,
            nvml=nvml,
            nvml_message="no library" if nvml != "ok" else "",
            gpus=[],
            pods=[],
            counters=m.Counters(),
        )

    def seen(self, *gpus: m.Gpu) -> m.Report:
        """The answer to the last `unlisted`."""
        return m.Report(
            session=self.link.unlisted[-1].session,
            revision=0,
            nvml="ok",
            nvml_message="",
            gpus=list(gpus),
            pods=[],
            counters=m.Counters(),
        )

    def missing(self) -> list[str]:
        return self.publisher.missing(self.now)

    def settle(self, *pods: Pod) -> m.Snapshot:
        """An enforcer that has answered the first snapshot."""
        self.link.connect()
        self.offer(*pods)
        snapshot = self.step()[-1]
        self.step(self.report(snapshot))
        self.log.take()
        return snapshot


@pytest.fixture
def subject() -> Subject:
    return Subject()


def pod(uid: str, watts: str | None = None, **more: str) -> Pod:
    wish = None if watts is None else read(watts)
    name = more.get("name", uid)
    return Pod(uid, "default", name, "2026-01-01T00:00:00Z", wish, None)


# ---------------------------------------------------------------------- what is sent when


def test_nothing_is_sent_before_the_first_list(subject: Subject) -> None:
    subject.link.connect()
    subject.heard = Heard(7.0, never=True, error="connection refused")
    assert subject.step() == []
    for _ in range(20):
        assert subject.step(subject.seen(m.Gpu(uuid="GPU-0")), after_s=1.0) == []
    assert subject.log.take() == []
    assert subject.missing() == []  # the enforcer answers, and is not blamed
    link = subject.publisher.link(subject.now)
    assert link.up
    assert link.report  # so that nobody reads "no load" from a node that holds load
    assert [gpu.uuid for gpu in link.report.gpus] == ["GPU-0"]
    assert link.report_age_s == 0
    assert link.snapshot_age_s == pytest.approx(20, abs=1)
    assert len(subject.link.unlisted) == 11  # one for each heartbeat
    said = subject.link.unlisted[-1]
    assert said.why == "the API server gave no list of pods yet: connection refused"
    assert (said.node, said.api_age_s, said.api_error) == (NODE, None, "connection refused")
    assert subject.reports == []  # no Event rests on an answer that may lack pods


def test_each_snapshot_tells_how_the_api_does_and_that_is_no_new_wish(subject: Subject) -> None:
    first = subject.settle(pod("a", "350"))
    assert (first.api_age_s, first.api_error) == (0.5, "")
    subject.heard = Heard(80.12345, error="€" * 1000)
    (next_,) = subject.step(after_s=HEARTBEAT_S)
    assert (next_.revision, next_.api_age_s) == (first.revision, 80.123)
    assert next_.api_error == "€" * 300
    assert m.decode_request(m.encode(next_)) == next_


def test_an_enforcer_that_hangs_before_the_first_list_is_not_up(subject: Subject) -> None:
    subject.link.connect()
    for _ in range(10):
        subject.step(after_s=1.0)
    assert subject.missing() == ["enforcer: no answer"]
    assert subject.log.take() == ["enforcer_silent"]
    assert not subject.publisher.link(subject.now).up


def test_between_the_first_snapshot_and_its_report_the_report_is_missing(subject: Subject) -> None:
    subject.link.connect()
    subject.step()
    subject.step(subject.seen())
    subject.offer()
    (sent,) = subject.step()
    assert subject.missing() == ["enforcer: no report yet"]
    subject.step(subject.report(sent))
    assert subject.missing() == []


def test_the_first_snapshot_goes_out_at_once(subject: Subject) -> None:
    subject.link.connect()
    subject.step(after_s=1.0)
    subject.offer(pod("a", "350"), pod("b"))
    (sent,) = subject.step(after_s=0.001)
    assert (sent.node, sent.revision) == (NODE, 1)
    assert [(wanted.uid, wanted.limit_mw) for wanted in sent.pods] == [("a", 350_000)]
    assert sent.others == ["b"]


def test_an_empty_node_is_an_empty_snapshot(subject: Subject) -> None:
    subject.link.connect()
    subject.offer()
    sent = subject.step()[-1]
    assert (sent.pods, sent.others) == ([], [])


def test_a_burst_is_one_snapshot_the_newest(subject: Subject) -> None:
    subject.settle()
    for watts in range(1, 100):
        subject.offer(pod("a", str(watts)))
    (sent,) = subject.step()
    assert sent.pods[0].limit_mw == 99_000
    assert subject.step() == []


def test_revision_rises_by_one_with_each_that_differs(subject: Subject) -> None:
    first = subject.settle(pod("a", "1"))
    revisions = []
    for watts in ("2", "2", "3", "3", "2"):
        subject.offer(pod("a", watts))
        revisions += [sent.revision for sent in subject.step()]
    assert revisions == [first.revision + 1, first.revision + 2, first.revision + 3]


def test_the_heart_beats_every_two_seconds_with_the_same_words(subject: Subject) -> None:
    first = subject.settle(pod("a", "350"))
    beats = []
    for _ in range(100):
        for sent in subject.step(subject.report(first), after_s=0.1):
            beats.append(subject.now)
            assert sent == first
    assert 4 <= len(beats) <= 5
    assert all(HEARTBEAT_S <= b - a < HEARTBEAT_S + 0.2 for a, b in itertools.pairwise(beats))
    assert subject.log.take() == []


def test_a_heartbeat_counts_from_the_last_message(subject: Subject) -> None:
    subject.settle(pod("a", "1"))
    subject.offer(pod("a", "2"))
    assert len(subject.step(after_s=HEARTBEAT_S * 0.75)) == 1
    assert subject.step(after_s=HEARTBEAT_S * 0.75) == []
    assert len(subject.step(after_s=HEARTBEAT_S * 0.25)) == 1


def test_an_outage_of_the_api_changes_nothing(subject: Subject) -> None:
    """Nothing is offered then; what was offered last goes on being sent."""
    first = subject.settle(pod("a", "350"))
    for _ in range(500):
        assert all(s == first for s in subject.step(subject.report(first), after_s=HEARTBEAT_S))
    assert subject.missing() == []


def test_a_new_connection_gets_all_at_once(subject: Subject) -> None:
    first = subject.settle(pod("a", "350"))
    subject.link.connected = False
    assert subject.step(after_s=0.1) == []
    subject.link.connect()
    assert subject.step(after_s=0.1) == [first]


def test_what_changes_while_the_enforcer_is_away_is_not_kept_for_it(subject: Subject) -> None:
    subject.settle(pod("a", "1"))
    subject.link.connected = False
    for watts in ("2", "3", "4"):
        subject.offer(pod("a", watts))
        assert subject.step(after_s=0.5) == []
    subject.link.connect()
    (sent,) = subject.step()
    assert sent.pods[0].limit_mw == 4000


def test_a_connection_that_takes_nothing_is_tried_again_soon_and_more_slowly(
    subject: Subject,
) -> None:
    subject.settle(pod("a", "1"))
    subject.link.takes = False
    subject.offer(pod("a", "2"))
    subject.step()
    waits = []
    for _ in range(12):
        wait_s = subject.publisher._due_at - subject.now
        waits.append(wait_s)
        subject.step(after_s=wait_s)
    assert waits[0] <= 0.01
    assert waits == sorted(waits)
    assert waits[-1] <= HEARTBEAT_S
    subject.link.takes = True
    assert len(subject.step(after_s=HEARTBEAT_S)) == 1


def test_every_start_is_a_session_of_its_own() -> None:
    assert Subject().settle().session != Subject().settle().session


# ---------------------------------------------------------------------- too much to say


def test_more_pods_than_fit_are_told_and_nothing_is_sent(subject: Subject) -> None:
    first = subject.settle(pod("a", "350"))
    many = [pod(str(k)) for k in range(m.MAX_PODS)]
    subject.offer(pod("a", "350"), *many)
    subject.step(after_s=HEARTBEAT_S)
    for _ in range(20):
        assert subject.step(subject.seen(), after_s=1.0) == []
    assert subject.log.take() == ["snapshot_impossible"]
    (missing,) = subject.missing()
    assert f"{m.MAX_PODS + 1} pods" in missing
    assert f"{m.MAX_PODS + 1} pods" in subject.link.unlisted[-1].why
    assert subject.publisher.link(subject.now).up
    for _ in range(8):  # it hangs
        assert subject.step(after_s=1.0) == []
    assert subject.missing() == [missing, "enforcer: no answer"]
    assert not subject.publisher.link(subject.now).up
    subject.step(subject.seen())
    subject.log.take()
    subject.offer(pod("a", "350"))
    (sent,) = subject.step()
    assert (sent.pods, sent.revision) == (first.pods, first.revision + 1)
    assert "snapshot_possible" in subject.log.take()
    subject.step(subject.report(sent))
    assert subject.missing() == []


def test_more_bytes_than_fit_are_told(subject: Subject) -> None:
    """libzmq would drop the frame without a word."""
    subject.settle()
    name = "n" * 253
    subject.offer(*[pod(str(k), "界" * 64, name=name) for k in range(m.MAX_PODS)])
    assert subject.step() == []
    assert subject.log.take() == ["snapshot_impossible"]
    assert "bytes; at most" in subject.missing()[0]


def test_as_many_pods_as_fit_are_sent(subject: Subject) -> None:
    subject.settle()
    subject.offer(*[pod(f"{k:036}", "350", name="n" * 63) for k in range(m.MAX_PODS)])
    (sent,) = subject.step()
    assert len(sent.pods) == m.MAX_PODS
    assert len(m.encode(sent)) <= m.MAX_MESSAGE_BYTES
    assert m.decode_request(m.encode(sent)) == sent


# ---------------------------------------------------------------------- an enforcer that is silent


def test_a_silent_enforcer_is_told_once_and_turns_ready_red_then_green(subject: Subject) -> None:
    first = subject.settle(pod("a", "350"))
    assert subject.missing() == []
    begun = subject.now
    while not subject.missing():
        subject.step(after_s=0.1)
        assert subject.now - begun < HEARTBEAT_S + SILENT_S + 1
    assert subject.missing() == ["enforcer: no answer"]
    for _ in range(100):
        subject.step(after_s=1.0)
    assert subject.log.take() == ["enforcer_silent"]
    subject.step(subject.report(first), after_s=0.1)
    assert subject.log.take() == ["enforcer_answers"]
    assert subject.missing() == []


def test_an_enforcer_that_is_not_there_from_the_start_is_told_once(subject: Subject) -> None:
    subject.offer()
    for _ in range(30):
        subject.step(after_s=1.0)
        assert subject.missing() == ["enforcer: no answer"]
    assert subject.log.take() == ["wanted", "enforcer_silent"]


def test_a_short_restart_of_the_enforcer_is_not_worth_a_word(subject: Subject) -> None:
    first = subject.settle()
    subject.link.connected = False
    subject.step(after_s=1.0)
    assert subject.missing() == ["enforcer: no answer"]  # but readiness knows at once
    subject.link.connect()
    assert subject.step(after_s=1.0) == [first]
    subject.step(subject.report(first))
    assert subject.missing() == []
    assert subject.log.take() == []


def test_slow_answers_are_answers(subject: Subject) -> None:
    first = subject.settle()
    for _ in range(10):
        subject.step(after_s=SILENT_S - 0.5)
        subject.step(subject.report(first))
    assert subject.log.take() == []


# ---------------------------------------------------------------------- what it answers


@pytest.mark.parametrize("code", ["stale", "denied", "malformed", "too_many"])
def test_a_refusal_is_told_once_and_turns_ready_red(subject: Subject, code: m.ErrorCode) -> None:
    first = subject.settle()
    for _ in range(5):
        subject.step(m.Error(code=code, message="because"), after_s=1.0)
    assert subject.log.take() == ["enforcer_refuses"]
    (missing,) = subject.missing()
    assert "because" in missing
    assert ("another watcher" in missing) == (code == "stale")
    assert subject.publisher.link(subject.now).report_age_s == 5
    subject.step(subject.report(first), after_s=1.0)
    assert subject.log.take() == ["enforcer_accepts"]
    assert subject.missing() == []


def test_an_answer_that_makes_no_sense_is_told_and_survived(subject: Subject) -> None:
    subject.settle()
    subject.link.broken = msgspec.DecodeError("bad byte")
    subject.publisher.turn()
    subject.publisher.turn()
    assert subject.log.take() == ["enforcer_refuses"]
    assert "bad byte" in subject.missing()[0]


def test_a_report_to_another_session_counts_as_no_acceptance(subject: Subject) -> None:
    first = subject.settle()
    subject.step(m.Error(code="stale", message="x"))
    other = msgspec.structs.replace(subject.report(first), session="another")
    subject.step(other)
    assert subject.missing() != []


@pytest.mark.parametrize("nvml", ["absent", "failing"])
def test_missing_nvml_turns_ready_red_and_says_why(subject: Subject, nvml: m.NvmlState) -> None:
    first = subject.settle()
    subject.step(subject.report(first, nvml))
    assert subject.missing() == [f"nvml: {nvml}: no library"]


def test_the_last_report_stays_with_its_age(subject: Subject) -> None:
    subject.settle()
    for age_s in (0, 3600):
        link = subject.publisher.link(subject.now + age_s)
        assert link.report is not None
        assert [link.report_age_s, link.snapshot_age_s] == pytest.approx([age_s, age_s])


def test_a_refusal_is_over_when_nothing_is_sent_that_could_be_refused(
    subject: Subject,
) -> None:
    subject.settle(pod("a", "300"))
    subject.step(m.Error(code="malformed", message="x"))
    subject.offer(*(pod(f"p{n}") for n in range(m.MAX_PODS + 1)))
    subject.step(after_s=HEARTBEAT_S)
    subject.step(subject.seen())
    assert [line for line in subject.missing() if "enforcer" in line] == []


def test_every_report_is_handed_on_with_what_was_asked(subject: Subject) -> None:
    first = subject.settle(pod("a", "350"))
    assert subject.reports == [(subject.report(first), first.pods)]


# ---------------------------------------------------------------------- latency


def judged(subject: Subject, snapshot: m.Snapshot, **states: m.PodState) -> m.Report:
    """A report in which each pod stands as told, by its uid; the others are enforced."""
    pods = [
        m.Pod(
            uid=wanted.uid,
            namespace=wanted.namespace,
            name=wanted.name,
            raw=wanted.raw,
            requested_mw=wanted.limit_mw,
            effective_mw=wanted.limit_mw,
            gpus=["GPU-0"],
            state=states.get(wanted.uid, "enforced"),
            reason="",
        )
        for wanted in snapshot.pods
    ]
    return msgspec.structs.replace(subject.report(snapshot), pods=pods)


def observed(subject: Subject) -> tuple[float, float]:
    """How many latencies were observed, and their sum in seconds."""
    (family,) = subject.counts.latency.collect()
    samples = {sample.name.rpartition("_")[2]: sample.value for sample in family.samples}
    return samples["count"], samples["sum"]


def test_latency_runs_from_the_first_event_of_a_burst_to_the_report(subject: Subject) -> None:
    subject.settle(pod("a", "1"))
    subject.offer(pod("a", "2"), arrived_at=subject.now)
    subject.offer(pod("a", "3"), arrived_at=subject.now + 0.5)
    (sent,) = subject.step(after_s=0.5)
    subject.step(judged(subject, sent), after_s=0.5)
    count, sum_s = observed(subject)
    assert (count, sum_s) == pytest.approx((1, 1.0))
    subject.step(judged(subject, sent), after_s=2.0)  # a heartbeat's report is no measurement
    assert observed(subject) == (count, sum_s)


def test_a_new_pods_lead_is_observed_when_a_report_first_has_it(subject: Subject) -> None:
    subject.settle()
    subject.offer(pod("a", "2"))
    (sent,) = subject.step()
    report = judged(subject, sent)
    led = [msgspec.structs.replace(each, lead_s=0.25) for each in report.pods]
    for reported in (report, *[msgspec.structs.replace(report, pods=led)] * 2):
        subject.step(reported, after_s=0.5)
    (family,) = subject.counts.lead.collect()
    buckets = {s.labels["le"]: s.value for s in family.samples if "le" in s.labels}
    assert (buckets["0.1"], buckets["0.25"], buckets["+Inf"]) == (0, 1, 1)


def test_lists_and_changes_that_ask_nothing_new_are_not_measured(subject: Subject) -> None:
    first = subject.settle(pod("a", "1"))
    subject.offer(pod("a", "1"), arrived_at=subject.now)
    subject.step(judged(subject, first), after_s=1.0)
    assert observed(subject)[0] == 0


def test_the_first_list_is_not_measured(subject: Subject) -> None:
    """Nobody knows since when its pods had been asking."""
    first = subject.settle(pod("a", "1"))
    subject.step(judged(subject, first), after_s=1.0)
    assert observed(subject)[0] == 0


def test_a_report_to_an_older_revision_measures_nothing_newer(subject: Subject) -> None:
    first = subject.settle(pod("a", "1"))
    subject.offer(pod("a", "2"), arrived_at=subject.now)
    (sent,) = subject.step()
    subject.step(judged(subject, first), after_s=1.0)
    assert observed(subject)[0] == 0
    subject.step(judged(subject, sent), after_s=1.0)
    assert observed(subject) == pytest.approx((1, 2.0))


def test_pods_that_ask_nothing_are_not_measured(subject: Subject) -> None:
    """A CronJob's pods come and go; each would be an observation of a millisecond."""
    subject.settle(pod("a", "1"))
    subject.offer(pod("a", "1"), pod("job"), arrived_at=subject.now)
    (sent,) = subject.step()
    subject.step(judged(subject, sent), after_s=0.001)
    assert observed(subject)[0] == 0


@pytest.mark.parametrize("watts", [None, "350W"], ids=["goes", "becomes unusable"])
def test_an_annotation_that_asks_for_no_limit_any_more_is_not_measured(
    subject: Subject, watts: str | None
) -> None:
    """A limit is given back then, or held: none was enforced."""
    subject.settle(pod("a", "1"), pod("b", "1"))
    subject.offer(pod("a", watts), pod("b", "1"), arrived_at=subject.now)
    (sent,) = subject.step()
    subject.step(judged(subject, sent), after_s=0.5)
    assert observed(subject)[0] == 0


def test_the_same_limit_in_other_words_is_not_measured(subject: Subject) -> None:
    subject.settle(pod("a", "350"))
    subject.offer(pod("a", "350.0"), arrived_at=subject.now)
    (sent,) = subject.step()
    assert sent.pods[0].raw == "350.0"
    subject.step(judged(subject, sent), after_s=0.5)
    assert observed(subject)[0] == 0


@pytest.mark.parametrize("state", ["enforced", "clamped"])
def test_a_limit_that_was_read_back_is_measured(subject: Subject, state: m.PodState) -> None:
    subject.settle()
    subject.offer(pod("a", "1"), arrived_at=subject.now)
    (sent,) = subject.step()
    subject.step(judged(subject, sent, a=state), after_s=0.5)
    assert observed(subject) == pytest.approx((1, 0.5))


@pytest.mark.parametrize("state", ["waiting", "failed", "invalid", "conflict", None])
def test_what_is_not_enforced_at_once_is_never_measured(
    subject: Subject, state: m.PodState | None
) -> None:
    """Its first process may come ten minutes later, and that would be no latency of ours."""
    subject.settle(pod("a", "1"))
    subject.offer(pod("a", "2"), arrived_at=subject.now)
    (sent,) = subject.step()
    now = subject.report(sent) if state is None else judged(subject, sent, a=state)
    subject.step(now, after_s=0.5)
    subject.step(judged(subject, sent), after_s=600)
    assert observed(subject)[0] == 0


def test_a_revision_counts_once_however_many_of_its_pods_are_enforced(subject: Subject) -> None:
    subject.settle()
    some = [pod(uid, "1") for uid in ("a", "b", "c")]
    subject.offer(*some, arrived_at=subject.now)
    (sent,) = subject.step()
    subject.step(judged(subject, sent, b="waiting"), after_s=0.5)
    assert observed(subject) == pytest.approx((1, 0.5))


def test_revisions_that_one_report_answers_count_by_the_pods_that_they_settled(
    subject: Subject,
) -> None:
    subject.settle()
    subject.offer(pod("a", "1"), arrived_at=subject.now)
    subject.step()
    subject.offer(pod("a", "1"), pod("b", "1"), arrived_at=subject.now + 1)
    subject.step(after_s=1)
    subject.offer(pod("a", "1"), pod("b", "1"), pod("c", "1"), arrived_at=subject.now + 1)
    (sent,) = subject.step(after_s=1)
    subject.step(judged(subject, sent, b="waiting"), after_s=1)
    assert observed(subject) == pytest.approx((2, 3.0 + 1.0))


@pytest.mark.parametrize("last", ["2", "3"])
def test_a_pods_newer_wish_overtakes_its_older_ones(subject: Subject, last: str) -> None:
    """Decided on together, only the newest was enforced, though it ask for the same as before."""
    subject.settle(pod("a", "1"))
    for watts in ("2", "9", last):
        subject.offer(pod("a", watts), arrived_at=subject.now)
        (sent,) = subject.step(after_s=1)
    subject.step(judged(subject, sent), after_s=0)
    assert observed(subject) == pytest.approx((1, 1.0))


def test_a_wish_that_was_taken_back_before_the_report_is_not_measured(subject: Subject) -> None:
    subject.settle(pod("a", "1"))
    subject.offer(pod("a", "2"), arrived_at=subject.now)
    subject.step()
    subject.offer(pod("a"), arrived_at=subject.now)
    (sent,) = subject.step()
    subject.step(judged(subject, sent))
    assert observed(subject)[0] == 0


def test_the_same_limit_in_other_words_overtakes_nothing(subject: Subject) -> None:
    subject.settle(pod("a", "1"))
    subject.offer(pod("a", "2"), arrived_at=subject.now)
    subject.step()
    subject.offer(pod("a", "2.0"), arrived_at=subject.now + 1)
    (sent,) = subject.step(after_s=1)
    subject.step(judged(subject, sent), after_s=1)
    assert observed(subject) == pytest.approx((1, 2.0))


@pytest.mark.parametrize("listed", ["2", "3"])
def test_a_wish_that_a_list_overtakes_is_not_measured(subject: Subject, listed: str) -> None:
    """Nobody knows since when the pod had been asking for what the list says."""
    subject.settle(pod("a", "1"))
    subject.offer(pod("a", "2"), arrived_at=subject.now)
    subject.step()
    subject.offer(pod("a"))
    subject.step()
    subject.offer(pod("a", listed))
    (sent,) = subject.step(after_s=1)
    subject.step(judged(subject, sent))
    assert observed(subject)[0] == 0


def test_each_revision_with_a_report_of_its_own_is_measured(subject: Subject) -> None:
    """The next may be on its way already: the limit of this one was written all the same."""
    subject.settle(pod("a", "1"))
    subject.offer(pod("a", "2"), arrived_at=subject.now)
    (second,) = subject.step()
    subject.offer(pod("a", "3"), arrived_at=subject.now)
    (third,) = subject.step()
    subject.step(judged(subject, second), after_s=1)
    assert observed(subject) == pytest.approx((1, 1.0))
    subject.step(judged(subject, third), after_s=1)
    assert observed(subject) == pytest.approx((2, 3.0))


def test_an_enforcer_that_hangs_in_a_storm_costs_bounded_memory(subject: Subject) -> None:
    subject.settle()
    begun = subject.now
    for number in range(1, 11):
        many = [pod(f"p{k}", str(number)) for k in range(m.MAX_PODS)]
        subject.offer(*many, arrived_at=subject.now)
        (sent,) = subject.step(after_s=1)
    assert len(subject.publisher._pending) == m.MAX_PODS
    subject.step(judged(subject, sent))
    assert subject.now - begun == 10
    assert observed(subject) == pytest.approx((1, 1.0))  # the newest, not the first


@pytest.mark.parametrize("nvml", ["absent", "failing"])
def test_without_nvml_nothing_was_read_back_and_nothing_is_measured(
    subject: Subject, nvml: m.NvmlState
) -> None:
    subject.settle(pod("a", "1"))
    subject.offer(pod("a", "2"), arrived_at=subject.now)
    (sent,) = subject.step()
    subject.step(msgspec.structs.replace(judged(subject, sent), nvml=nvml))
    subject.step(judged(subject, sent), after_s=60)
    assert observed(subject)[0] == 0


def test_what_another_watcher_was_there_for_is_not_measured_later(subject: Subject) -> None:
    subject.settle(pod("a", "1"))
    subject.offer(pod("a", "2"), arrived_at=subject.now)
    (sent,) = subject.step()
    subject.step(m.Error(code="stale", message="x"))
    subject.step(judged(subject, sent), after_s=600)
    assert observed(subject)[0] == 0


# ---------------------------------------------------------------------- what is logged


def test_unusable_annotation_is_warned_of_once_per_change(subject: Subject) -> None:
    subject.settle()
    for watts in ("350W", "350W", "-1", "350", "-1"):
        subject.offer(pod("a", watts))
        subject.step()
    warned = [values for event, values in subject.log.lines if event == "annotation_unusable"]
    assert [values["value"] for values in warned] == ["350W", "-1", "-1"]
    assert all(values["pod"] == "a" and values["problem"] for values in warned)


def test_pods_that_ask_nothing_come_and_go_without_a_line(subject: Subject) -> None:
    subject.settle(pod("a", "1"))
    subject.offer(pod("a", "1"), pod("b"))
    assert len(subject.step()) == 1
    assert subject.log.take() == []


def test_a_change_is_told_with_watts_and_one_line_names_few_of_many(subject: Subject) -> None:
    subject.settle(pod("x", "1"))
    subject.offer(*[pod(f"a{k}", "350.5") for k in range(500)])
    subject.step()
    ((event, values),) = subject.log.lines
    assert event == "wanted"
    assert isinstance(values["watts"], Mapping)
    assert len(values["watts"]) == 16
    assert values["watts"]["default/a0"] == "350.5"
    assert values["gone"] == ["default/x"]


def test_pods_are_named_with_their_uids_also_when_they_have_gone(subject: Subject) -> None:
    subject.settle(pod("uid-x", "1", name="x"))
    subject.offer(pod("uid-a", "350", name="a"), pod("uid-b", "350W", name="b"))
    subject.step()
    (_, wanted), (_, unusable) = subject.log.lines
    uids = {"default/a": "uid-a", "default/b": "uid-b", "default/x": "uid-x"}
    assert wanted["uids"] == uids
    assert (unusable["namespace"], unusable["pod"], unusable["uid"]) == ("default", "b", "uid-b")
    assert "goes on holding" in str(unusable["holds"])


def enforcer(*, dry_run: bool) -> m.EnforcerStatus:
    return m.EnforcerStatus(
        version="1",
        pid=1,
        dry_run=dry_run,
        min_mw=None,
        max_mw=None,
        conflict="lowest",
        cgroup_roots=[],
        ledger="/l",
    )


def test_what_is_wanted_is_told_with_whether_it_is_written(subject: Subject) -> None:
    subject.link.connect()
    subject.offer(pod("a", "1"))
    sent = subject.step()[-1]
    assert dict(subject.log.lines)["wanted"]["dry_run"] is None  # who writes was not asked yet
    for dry_run in (True, False):
        told = msgspec.structs.replace(subject.report(sent), enforcer=enforcer(dry_run=dry_run))
        subject.step(told)
        subject.log.take()
        subject.offer(pod("a", f"{3 + dry_run}"))
        (sent,) = subject.step()
        assert dict(subject.log.lines)["wanted"]["dry_run"] is dry_run


def test_a_silent_enforcer_is_told_with_its_socket_and_what_holds(subject: Subject) -> None:
    subject.publisher.socket = "/run/x/control.sock"
    subject.offer(pod("a", "300"))
    subject.step()
    subject.step(after_s=8.0)
    line = dict(subject.log.lines)["enforcer_silent"]
    assert (line["socket"], line["next_try_s"]) == ("/run/x/control.sock", 2)
    assert "limits that are set stay in force" in str(line["holds"])


def test_a_thousand_wrong_pods_are_no_storm(subject: Subject) -> None:
    subject.settle()
    subject.offer(*[pod(f"u{number}", "x") for number in range(1000)])
    subject.step()
    assert len(subject.log.lines) < 30


# ---------------------------------------------------------------------- mailbox


def test_mailbox_wakes_and_hands_over_the_newest_once() -> None:
    box = Mailbox()
    poll = select.poll()
    poll.register(box.wake_fd, select.POLLIN)
    assert poll.poll(0) == []
    for watts in range(100_000):  # more than the pipe holds
        if watts % 1000 == 0:
            box.offer({"a": pod("a", str(watts))}, float(watts))
        else:
            box.ring()
    assert poll.poll(0) != []
    pods, arrived_at = box.take()
    assert pods is not None
    assert pods["a"].wish == read("99000")
    assert arrived_at == 0.0
    while poll.poll(0):
        assert box.take() == (None, None)
    for fd in (box.wake_fd, box.ring_fd):
        os.close(fd)


def test_the_first_arrival_of_what_waits_counts_and_a_list_has_none() -> None:
    box = Mailbox()
    box.offer({}, None)
    box.offer({}, 1.0)
    box.offer({}, 2.0)
    assert box.take() == ({}, 1.0)
    box.offer({}, 3.0)
    assert box.take() == ({}, 3.0)
    for fd in (box.wake_fd, box.ring_fd):
        os.close(fd)


def test_run_ends_when_told(subject: Subject) -> None:
    stop = threading.Event()
    stop.set()
    subject.publisher.run(stop)


@pytest.mark.parametrize(("state", "ready"), [("waiting", False), ("enforced", True)])
def test_a_pod_that_waits_on_a_gpu_whose_processes_cannot_be_seen_is_not_ready(
    subject: Subject, state: m.PodState, ready: bool
) -> None:
    """Where nobody waits, one unreadable list of eight is no reason to call the node unready."""
    sent = subject.settle(pod("a", "300"))
    unread = m.Process(pid=0, owner="unknown", evidence="FUNCTION_NOT_FOUND; update the driver")
    asked = m.Pod(
        uid="a",
        namespace="default",
        name="a",
        raw="300",
        requested_mw=300_000,
        effective_mw=None,
        gpus=[],
        state=state,
        reason="",
    )
    report = msgspec.structs.replace(
        subject.report(sent), pods=[asked], gpus=[m.Gpu(uuid="GPU-0", index=3, processes=[unread])]
    )
    subject.step(report)
    said = subject.missing()
    assert bool(said) != ready
    if not ready:
        assert said == [f"processes: the list of GPU 3 cannot be read: {unread.evidence}"]


def test_what_hinders_is_told_in_the_log_and_in_readyz(subject: Subject) -> None:
    subject.link.hinders = "uid 65532 may not connect", "with SELinux give it spc_t"
    subject.offer(pod("a", "300"))
    for _ in range(8):
        subject.step(after_s=1.0)
    (values,) = [values for event, values in subject.log.lines if event == "enforcer_silent"]
    assert values["why"] == "uid 65532 may not connect"
    assert values["remedy"] == "with SELinux give it spc_t"
    assert subject.missing() == ["enforcer: uid 65532 may not connect"]

"""The publisher, turn by turn with a clock of the test's: what it says, when, and how often."""

import os
import select
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from shared import messages as m
from shared.logs import Log
from watcher import annotations
from watcher.metadata import Pod
from watcher.metrics import Counts
from watcher.publisher import HEARTBEAT_S, SILENT_S, Mailbox, Publisher


class Notes(Log):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__("test", "info", "json")
        self.lines: list[tuple[str, dict[str, Any]]] = []

    def _write(self, level: str, event: str, values: dict[str, object]) -> None:
        if level != "debug":
            self.lines.append((event, values))

    def events(self) -> list[str]:
        return [event for event, _ in self.lines]


class FakeClient:
    """A link that takes note; `wait` only lets the time pass."""

    def __init__(self) -> None:
        self.connected, self.connections = True, 1
        self.takes = True
        self.tries = 0
        self.sent: list[m.Request] = []
        self.nonsense = False
        self.watched: list[int] = []
        self.now = 1000.0
        self.waits: list[float] = []

    def watch(self, fd: int) -> None:
        self.watched.append(fd)

    def send(self, request: m.Request) -> bool:
        self.tries += 1
        if self.connected and self.takes:
            # Through the codec: what the enforcer would refuse must not be sent.
            self.sent.append(m.decode_request(m.encode(request)))
            return True
        return False

    def wait(self, timeout_s: float) -> list[m.Reply]:
        self.waits.append(timeout_s)
        if self.nonsense:
            self.nonsense = False
            raise msgspec.DecodeError("what?")
        self.now += timeout_s
        return []

    def reconnect(self) -> None:
        self.connected = True
        self.connections += 1


class Bench:
    """A publisher with everything around it."""

    def __init__(self) -> None:
        self.client, self.mailbox = FakeClient(), Mailbox()
        self.counts, self.log = Counts(), Notes()
        self.reports: list[m.Report] = []
        self.publisher = Publisher(
            self.client,
            self.mailbox,
            "n1",
            self.counts,
            self.log,
            self.reports.append,
            lambda: self.client.now,
        )

    def offer(self, *pods: Pod, arrived_at: float | None = None) -> None:
        self.mailbox.offer({pod.uid: pod for pod in pods}, arrived_at)

    def turn(self, *replies: m.Reply, after_s: float = 0.0) -> None:
        """One turn, woken after `after_s`."""
        self.client.now += after_s
        self.publisher.step(self.client.now, list(replies))

    def turns_for(self, span_s: float) -> None:
        """As many turns as the publisher wants in that time."""
        end = self.client.now + span_s
        while self.client.now < end:
            self.publisher.turn()

    def sent(self) -> list[m.Snapshot]:
        return [request for request in self.client.sent if isinstance(request, m.Snapshot)]

    def answered(self, nvml: m.NvmlState = "ok", session: str | None = None) -> m.Report:
        """The report on the last snapshot."""
        last = self.sent()[-1]
        return m.Report(
            session=session or last.session,
            revision=last.revision,
            nvml=nvml,
            nvml_message="" if nvml == "ok" else "no driver",
            gpus=[],
            pods=[],
            counters=m.Counters(),
        )

    def missing(self) -> list[str]:
        return self.publisher.missing(self.client.now)


@pytest.fixture
def bench() -> Bench:
    return Bench()


def pod(uid: str, limit: str | None = None) -> Pod:
    wish = None if limit is None else annotations.read(limit)
    return Pod(uid, "ns", f"pod-{uid}", "", wish, None)


# ---------------------------------------------------------------------- when


def test_nothing_is_said_before_the_first_list(bench: Bench) -> None:
    bench.turn()
    bench.client.reconnect()
    bench.turns_for(4 * HEARTBEAT_S)
    assert bench.client.tries == 0
    assert bench.log.events() == []


def test_an_empty_node_is_said(bench: Bench) -> None:
    bench.offer()
    bench.turn()
    (first,) = bench.sent()
    assert (first.revision, first.node, first.pods, first.others) == (1, "n1", [], [])


def test_a_change_is_said_in_the_turn_that_it_woke(bench: Bench) -> None:
    bench.offer(pod("a", "300"))
    bench.turn()
    bench.offer(pod("a", "310"))
    bench.turn(after_s=0.001)
    assert [(s.revision, s.pods[0].limit_mw) for s in bench.sent()] == [(1, 300_000), (2, 310_000)]


def test_a_burst_is_one_snapshot(bench: Bench) -> None:
    for watts in range(100, 200):
        bench.offer(pod("a", str(watts)))
    bench.turn()
    assert [(s.revision, s.pods[0].limit_mw) for s in bench.sent()] == [(1, 199_000)]


def test_the_heart_beats_every_two_seconds_with_the_same_revision(bench: Bench) -> None:
    bench.offer(pod("a", "300"))
    bench.turn()
    bench.turns_for(10 * HEARTBEAT_S)
    assert len(bench.sent()) == 11
    assert {s.revision for s in bench.sent()} == {1}
    assert len({s.session for s in bench.sent()}) == 1
    assert len(bench.client.waits) == 10  # no wakeup more than that


def test_what_asks_for_the_same_is_no_new_revision(bench: Bench) -> None:
    bench.offer(pod("a", "300"), pod("b"))
    bench.turn()
    bench.offer(pod("b"), pod("a", "300"))
    bench.turn()
    assert len(bench.sent()) == 1


def test_a_heartbeat_counts_from_the_last_message(bench: Bench) -> None:
    bench.offer(pod("a", "300"))
    bench.turn()
    bench.offer(pod("a", "310"))
    bench.turn(after_s=1.5)
    bench.turn(after_s=1.5)
    assert len(bench.sent()) == 2
    bench.turn(after_s=0.5)
    assert len(bench.sent()) == 3


def test_each_watcher_has_a_session_of_its_own() -> None:
    sessions = set()
    for _ in range(20):
        bench = Bench()
        bench.offer()
        bench.turn()
        sessions.add(bench.sent()[0].session)
    assert len(sessions) == 20


# ---------------------------------------------------------------------- an enforcer that is away


def test_a_reconnect_is_answered_at_once(bench: Bench) -> None:
    bench.offer(pod("a", "300"))
    bench.turn()
    before = len(bench.sent())
    bench.client.connected = False
    bench.turns_for(2 * HEARTBEAT_S)
    assert len(bench.sent()) == before
    bench.client.reconnect()
    bench.turn(after_s=0.01)
    assert len(bench.sent()) == before + 1
    assert bench.sent()[-1].revision == 1


def test_a_link_that_takes_nothing_yet_is_tried_again_soon_but_not_for_ever(bench: Bench) -> None:
    bench.client.takes = False
    bench.offer(pod("a", "300"))
    bench.turn()
    bench.turns_for(0.02)
    assert bench.client.tries >= 2
    bench.turns_for(60)
    assert bench.client.tries < 50
    bench.client.takes = True
    bench.turns_for(HEARTBEAT_S)
    assert bench.sent()


def test_silence_is_said_once_and_so_is_its_end(bench: Bench) -> None:
    bench.offer(pod("a", "300"))
    bench.turn()
    bench.turn(bench.answered())
    assert bench.missing() == []
    bench.turns_for(60)
    assert bench.missing() == ["enforcer: no answer"]
    link = bench.publisher.link(bench.client.now)
    assert (link.up, link.current) == (False, False)
    assert link.snapshot_age_s >= 55
    bench.turn(bench.answered())
    assert bench.missing() == []
    assert bench.publisher.link(bench.client.now).current
    said = [event for event in bench.log.events() if event.startswith("enforcer")]
    assert said == ["enforcer_silent", "enforcer_answers"]


def test_silence_takes_more_than_a_late_answer(bench: Bench) -> None:
    bench.offer(pod("a", "300"))
    bench.turn()
    bench.turn(bench.answered())
    for _ in range(20):
        bench.turn(after_s=HEARTBEAT_S)
        bench.turn(bench.answered(), after_s=HEARTBEAT_S)
    assert "enforcer_silent" not in bench.log.events()
    assert 2 * HEARTBEAT_S < SILENT_S


def test_a_lost_connection_is_down_at_once(bench: Bench) -> None:
    bench.offer(pod("a", "300"))
    bench.turn()
    bench.turn(bench.answered())
    bench.client.connected = False
    assert not bench.publisher.link(bench.client.now).up
    assert bench.missing() == ["enforcer: no answer"]


def test_an_enforcer_that_never_was_there_is_not_up(bench: Bench) -> None:
    bench.client.connected = False
    assert not bench.publisher.link(bench.client.now).up
    assert bench.missing() == ["enforcer: no answer"]


# ---------------------------------------------------------------------- what it answers


@pytest.mark.parametrize(
    ("code", "words"),
    [("stale", "another watcher took over"), ("denied", "refuses"), ("malformed", "refuses")],
)
def test_a_refusal_is_said_once_and_ends_with_a_report(
    bench: Bench, code: m.ErrorCode, words: str
) -> None:
    bench.offer(pod("a", "300"))
    bench.turn()
    bench.turn(bench.answered())
    for _ in range(5):
        bench.turn(m.Error(code=code, message="why"), after_s=HEARTBEAT_S)
    (missing,) = bench.missing()
    assert words in missing
    assert "why" in missing
    assert not bench.publisher.link(bench.client.now).current
    bench.turn(bench.answered())
    assert bench.missing() == []
    said = [event for event in bench.log.events() if event.startswith("enforcer")]
    assert said == ["enforcer_refuses", "enforcer_accepts"]


def test_nvml_that_is_not_ok_is_missing(bench: Bench) -> None:
    bench.offer()
    bench.turn()
    bench.turn(bench.answered(nvml="absent"))
    assert bench.missing() == ["nvml: absent: no driver"]


def test_an_answer_of_nonsense_ends_nothing(bench: Bench) -> None:
    bench.offer(pod("a", "300"))
    bench.turn()
    bench.client.nonsense = True
    bench.publisher.turn()
    assert "what?" in bench.missing()[0]
    bench.turns_for(3 * HEARTBEAT_S)
    assert len(bench.sent()) >= 3


def test_a_report_of_another_session_is_not_taken(bench: Bench) -> None:
    bench.offer()
    bench.turn()
    other = bench.answered(session="somebody-else")
    bench.turn(other)
    assert bench.reports == []
    bench.turn(bench.answered())
    assert len(bench.reports) == 1


# ---------------------------------------------------------------------- too much


def test_more_than_fits_is_said_once_and_nothing_is_sent(bench: Bench) -> None:
    bench.offer(pod("a", "300"))
    bench.turn()
    before = len(bench.sent())
    crowd = [pod(f"u{number}") for number in range(m.MAX_PODS + 1)]
    for _ in range(3):
        bench.offer(*crowd)
        bench.turn()
    bench.turns_for(4 * HEARTBEAT_S)
    assert len(bench.sent()) == before
    assert f"{m.MAX_PODS + 1} pods" in bench.missing()[0]
    assert bench.log.events().count("snapshot_impossible") == 1
    assert "enforcer_silent" not in bench.log.events()  # it was asked nothing
    bench.offer(pod("a", "300"))
    bench.turn()
    assert len(bench.sent()) > before
    assert bench.sent()[-1].revision == 2
    bench.turn(bench.answered())
    assert bench.missing() == []


def test_fewer_pods_that_take_more_bytes_than_fit_are_too_much_too(bench: Bench) -> None:
    wish = annotations.read("x" * m.RAW_CHARS)
    long = [Pod(f"{n:064}", "n" * 253, f"{n:0253}", "", wish, None) for n in range(500)]
    bench.offer(*long)
    bench.turn()
    assert bench.sent() == []
    assert "bytes" in bench.missing()[0]


# ---------------------------------------------------------------------- latency


def test_latency_is_from_the_event_to_the_report_that_covers_it(bench: Bench) -> None:
    bench.offer(pod("a", "300"))
    bench.turn()
    bench.turn(bench.answered())
    began = bench.client.now
    bench.offer(pod("a", "310"), arrived_at=began)
    bench.turn()
    early = bench.answered()
    bench.offer(pod("a", "320"), arrived_at=began + 0.5)
    bench.turn(after_s=0.5)
    bench.turn(early, after_s=0.1)  # covers the first only
    assert _count(bench.counts) == 1
    bench.turn(bench.answered(), after_s=0.1)
    bench.turn(bench.answered(), after_s=0.1)  # a heartbeat's covers nothing new
    assert _count(bench.counts) == 2
    lines = bench.counts.latency.lines("x")
    assert 'x_bucket{le="0.5"} 1' in lines  # 0.2 s
    assert 'x_bucket{le="1.0"} 2' in lines  # 0.6 s


def test_a_burst_is_measured_from_its_first_event(bench: Bench) -> None:
    bench.offer(pod("a", "300"))
    bench.turn()
    now = bench.client.now
    for number in range(3):
        bench.offer(pod("a", str(310 + number)), arrived_at=now + number)
    bench.turn(after_s=3)
    bench.turn(bench.answered())
    (total,) = [line for line in bench.counts.latency.lines("x") if line.startswith("x_sum")]
    assert float(total.split()[1]) == pytest.approx(3.0)


def test_lists_and_events_that_ask_nothing_new_are_not_measured(bench: Bench) -> None:
    bench.offer(pod("a", "300"))
    bench.turn()
    bench.offer(pod("a", "300"), arrived_at=bench.client.now)
    bench.turn()
    bench.offer(pod("a", "310"))
    bench.turn()
    bench.turn(bench.answered())
    assert _count(bench.counts) == 0


def _count(counts: Counts) -> int:
    return int(counts.latency.lines("x")[-1].split()[1])


# ---------------------------------------------------------------------- log


def test_an_unusable_annotation_is_said_once_per_change_of_its_value(bench: Bench) -> None:
    for limit in ("350W", "350W", "lots", "lots", "300", "lots"):
        bench.offer(pod("a", limit), pod("b", "-1"))
        bench.turn()
    said = [(v["pod"], v["value"]) for e, v in bench.log.lines if e == "annotation_unusable"]
    assert said == [
        ("pod-a", "350W"),
        ("pod-b", "-1"),
        ("pod-a", "lots"),
        ("pod-a", "lots"),
    ]


def test_wishes_are_logged_as_they_change_and_other_pods_are_not(bench: Bench) -> None:
    steps: list[Callable[[], None]] = [
        lambda: bench.offer(pod("a", "300"), pod("b")),
        lambda: bench.offer(pod("a", "300"), pod("b"), pod("c")),
        lambda: bench.offer(pod("b", "48.75")),
    ]
    for step in steps:
        step()
        bench.turn()
    wanted = [values for event, values in bench.log.lines if event == "wanted"]
    assert [(v["watts"], v["gone"]) for v in wanted] == [
        ({"ns/pod-a": "300"}, []),
        ({"ns/pod-b": "48.75"}, ["ns/pod-a"]),
    ]


def test_a_thousand_wrong_pods_are_no_storm(bench: Bench) -> None:
    bench.offer(*(pod(f"u{number}", "x") for number in range(1000)))
    bench.turn()
    assert len(bench.log.lines) < 30


# ---------------------------------------------------------------------- the mailbox


def test_the_mailbox_wakes_and_is_silent_when_taken() -> None:
    box = Mailbox()
    assert box.take() == (None, None)
    assert not _readable(box.wake_fd)
    box.offer({}, None)
    assert _readable(box.wake_fd)
    assert box.take() == ({}, None)
    assert not _readable(box.wake_fd)
    assert box.take() == (None, None)


def test_ringing_never_blocks_the_reflector() -> None:
    box = Mailbox()
    for _ in range(100_000):  # more than a pipe holds
        box.ring()
    while _readable(box.wake_fd):
        os.read(box.wake_fd, 1 << 20)


def test_the_first_arrival_of_what_waits_counts() -> None:
    box = Mailbox()
    box.offer({}, None)
    box.offer({}, 1.0)
    box.offer({}, 2.0)
    assert box.take()[1] == 1.0
    box.offer({}, 3.0)
    assert box.take()[1] == 3.0


def _readable(fd: int) -> bool:
    return bool(select.select([fd], [], [], 0)[0])

"""Tells the enforcer what is wanted: at once when it changes, and every two seconds.

Rules:
1. Without a complete list the enforcer is only told so (`unlisted`): "not known" is not "nothing".
2. Each message is the whole wish; the revision rises by one with each that differs.
3. What was offered last goes on being sent, whatever becomes of the Kubernetes API.
"""

import contextlib
import os
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import msgspec

from shared import messages
from shared.logs import Log
from shared.pace import Backoff
from shared.units import format_watts
from watcher import snapshot
from watcher.leads import Leads
from watcher.metadata import Pod
from watcher.metrics import Counts, Link
from watcher.reflector import Heard, Scope

HEARTBEAT_S = 2.0
SILENT_S = 5.0  # two heartbeats and a turn without any answer
_RETRY = Backoff(first_s=0.005, most_s=HEARTBEAT_S)  # a connection that is there takes nothing
_HOLDS = ("enforced", "clamped")  # a pod's limit was written, and read back
_NO_ANSWER = "no answer"
_UNUSABLE = "a limit that the pod has goes on holding, else the safe default if one is set"
_SEE_THE_LOG = "the socket can be opened, but the enforcer does not answer: see its log"
_MEANWHILE = "limits that are set stay in force; what is wanted anew is not enforced"
_MEANWHILE_TOO_MUCH = "limits stay as they are, and no power is raised or given back"
_SHOWN = 16  # pods named in one log line
# What is said of the API comes with each message: this much of one is kept free for it.
_API_CHARS = 300
_API_BYTES = 4 * _API_CHARS + 100
_NO_LIST = "the API server gave no list of pods yet"


class Client(Protocol):
    """What `shared.client.Client` offers."""

    connected: bool
    connections: int

    def watch(self, fd: int) -> None: ...
    def send(self, request: messages.Request) -> bool: ...
    def wait(self, timeout_s: float) -> list[messages.Reply]: ...
    def hindrance(self) -> tuple[str, str] | None: ...


class Mailbox:
    """Hands the newest pods from the reflector's thread to the publisher's; a burst is one."""

    def __init__(self) -> None:
        """Open the pipe that wakes the publisher."""
        self.wake_fd, self._ring_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._lock = threading.Lock()
        self._pods: Mapping[str, Pod] | None = None
        self._arrived_at: float | None = None

    @property
    def ring_fd(self) -> int:
        """The descriptor that wakes the publisher when something is written to it."""
        return self._ring_fd

    def offer(self, pods: Mapping[str, Pod], arrived_at: float | None) -> None:
        """Replace what waits by `pods`, which a watch event of `arrived_at` made so."""
        with self._lock:
            self._pods = pods
            if self._arrived_at is None:
                self._arrived_at = arrived_at
        self.ring()

    def ring(self) -> None:
        """Wake the publisher."""
        with contextlib.suppress(BlockingIOError):  # full: it is awake already
            os.write(self._ring_fd, b"\0")

    def take(self) -> tuple[Mapping[str, Pod] | None, float | None]:
        """Return what waits, None where nothing does, and clear the wake-up."""
        with contextlib.suppress(BlockingIOError):
            os.read(self.wake_fd, 4096)
        with self._lock:
            taken = self._pods, self._arrived_at
            self._pods = self._arrived_at = None
        return taken


class _Change(NamedTuple):
    """A pod asks for a limit that it did not ask for before.

    `arrived_at` is when a watch event said so, None where only a list did.
    """

    revision: int
    arrived_at: float | None
    uid: str


@dataclass(slots=True)
class _Reports:
    """The enforcer's answers: the last report, and whether and when a snapshot was last taken.

    Both times begin with the start.
    """

    last_at: float
    taken_at: float
    last: messages.Report | None = None
    has_taken: bool = False


class Publisher:
    """Owns the link to the enforcer; one thread runs it, others only look at it."""

    socket = ""  # the path of the enforcer's, for the log
    _dry_run: bool | None = None  # as the enforcer said last, None where it has not

    def __init__(  # noqa: PLR0913 - its parts
        self,
        client: Client,
        mailbox: Mailbox,
        scope: Scope,
        counts: Counts,
        log: Log,
        on_report: Callable[[messages.Report, list[messages.DesiredPod]], None],
        heard: Callable[[], Heard],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare; nothing is sent before `run`. `on_report` gets what was asked for too."""
        self._client, self._mailbox = client, mailbox
        self._scope = scope
        self._counts, self._log = counts, log
        self._on_report = on_report
        self._api = heard
        self._clock, now = clock, clock()
        self._session = secrets.token_hex(16)
        self._content = snapshot.EMPTY
        self._leads = Leads(counts.lead.observe)
        self._snapshot: messages.Snapshot | None = None
        self._revision = self._connections = 0
        self._due_at = now
        self._retry = _RETRY
        # Oldest first. The newest count, so a full one forgets its oldest; a whole node fits in.
        self._pending: deque[_Change] = deque(maxlen=messages.MAX_PODS)
        self._reports = _Reports(now, now)
        self._heard = False
        self._owed_since: float | None = None  # when the oldest request without an answer was due
        self._silence = ""  # why there is no answer, as it was found when it began
        self.too_much: str | None = None
        self._refusal: tuple[str, str] | None = None  # its code, and what it says
        self.turned_at = now

    def run(self, stop: threading.Event) -> None:
        """Publish until `stop` is set (and the mailbox's bell rung)."""
        self._client.watch(self._mailbox.wake_fd)
        while not stop.is_set():
            self.turn()

    def turn(self) -> None:
        """Wait for something to do and do it."""
        try:
            replies = self._client.wait(max(0.0, self._due_at - self._clock()))
        except msgspec.DecodeError as error:
            self._refuse("answer", f"the enforcer's answer makes no sense: {error}")
            replies = []
        self.step(self._clock(), replies)

    def step(self, now: float, replies: list[messages.Reply]) -> None:
        """Take what came in and send what is due."""
        self.turned_at = now
        for reply in replies:
            self._take(reply, now)
        if self._client.connections != self._connections:
            self._connections = self._client.connections
            self._due_at = now  # it may have forgotten everything
        self._update(now)
        if now >= self._due_at:
            self._send(now)
        self._watch_silence(now)

    def _update(self, now: float) -> None:
        """Make the newest pods the wish, if they ask for something else than before."""
        pods, arrived_at = self._mailbox.take()
        if pods is None:
            return
        try:
            content = snapshot.content(pods.values())
            if self._snapshot is not None and content == self._content:
                return
            candidate = self._make(content)
        except snapshot.TooMuchError as error:
            self._suspend(str(error))
            return
        if self.too_much is not None:
            self._log.info("snapshot_possible")
        self.too_much = None
        self._revision = candidate.revision
        before, self._content, self._snapshot = self._content, content, candidate
        self._leads.wanted(content)
        self._send(now)
        changed, gone = snapshot.changed(before, content), snapshot.gone(before, content)
        for uid in snapshot.newly_limited(before, content):
            self._pending.append(_Change(self._revision, arrived_at, uid))
        self._tell(changed, gone, pods)

    def _make(self, content: snapshot.Content) -> messages.Snapshot:
        made = messages.Snapshot(
            session=self._session,
            revision=self._revision + 1,
            node=self._scope.node,
            pods=content.pods,
            others=content.others,
            scope="namespace" if self._scope.namespace else "node",
        )
        size = len(messages.encode(made))
        most = messages.MAX_MESSAGE_BYTES - _API_BYTES
        if size > most:
            raise snapshot.TooMuchError(f"the snapshot has {size} bytes; at most {most}")
        return made

    def _suspend(self, problem: str) -> None:
        """Only say so from now on: what is wanted cannot be told, and what was told is outdated."""
        if self.too_much is None:
            self._log.error("snapshot_impossible", message=problem, holds=_MEANWHILE_TOO_MUCH)
        self.too_much = problem
        self._snapshot = None
        self._pending.clear()

    def _send(self, now: float) -> None:
        self._due_at = now + HEARTBEAT_S
        if self._owed_since is None:
            self._owed_since = now
        if self._client.send(self._message()):
            self._retry = self._retry.cleared()
        elif self._client.connected:
            self._retry = self._retry.failed(now)
            self._due_at = now + self._retry.left_s(now)

    def _message(self) -> messages.Request:
        """Return what there is to tell: the snapshot, or why there is none."""
        heard = self._api()
        age_s = None if heard.age_s is None else round(heard.age_s, 3)
        error = heard.error[:_API_CHARS]
        if self._snapshot is not None:
            return msgspec.structs.replace(self._snapshot, api_age_s=age_s, api_error=error)
        why = self.too_much or (f"{_NO_LIST}: {heard.error}" if heard.error else _NO_LIST)
        return messages.Unlisted(
            session=self._session,
            node=self._scope.node,
            why=why[:_API_CHARS],
            api_age_s=age_s,
            api_error=error,
        )

    def _take(self, reply: messages.Reply, now: float) -> None:
        if isinstance(reply, messages.Report):
            self._note_dry_run(reply.enforcer)
        self._heard = True
        self._owed_since = None
        match reply:
            case messages.Report() if reply.session == self._session:
                self._reports.last, self._reports.last_at = reply, now
                self._accepted()
                if reply.revision:  # else it answers an `unlisted`, and pods may be missing
                    self._reports.has_taken, self._reports.taken_at = True, now
                    self._measure(reply, now)
                    self._leads.told(reply.pods)
                    self._on_report(reply, self._content.pods)
            case messages.Error(code="stale"):
                self._pending.clear()  # the other watcher had them enforced, or nobody
                self._refuse("stale", f"another watcher took over this node: {reply.message}")
            case messages.Error():
                self._refuse(reply.code, f"the enforcer refuses ({reply.code}): {reply.message}")
            case _:
                pass  # an answer to nothing that was asked here

    def _measure(self, report: messages.Report, now: float) -> None:
        """Observe each revision of which a limit was written and read back.

        Whatever else this report answers is forgotten. A pod that waits now may wait for minutes,
        and that would be no latency of ours.
        """
        answered = []
        while self._pending and self._pending[0].revision <= report.revision:
            answered.append(self._pending.popleft())
        if report.nvml == "ok":  # else no limit was read back
            for arrived_at in _enforced(answered, report.pods):
                self._counts.latency.observe(now - arrived_at)

    def _note_dry_run(self, enforcer: messages.EnforcerStatus | None) -> None:
        """Let each line say that it is a dry run, where it is one."""
        if enforcer is None or enforcer.dry_run == self._dry_run:
            return
        if enforcer.dry_run or self._dry_run:
            self._log.mark(dry_run=enforcer.dry_run)
        self._dry_run = enforcer.dry_run

    def _refuse(self, code: str, problem: str) -> None:
        if self._refusal is None or code != self._refusal[0]:
            more = {"holds": _MEANWHILE, "next_try_s": HEARTBEAT_S}
            self._log.error("enforcer_refuses", code=code, message=problem, **more)
        self._refusal = code, problem

    def _accepted(self) -> None:
        if self._refusal is not None:
            self._log.info("enforcer_accepts")
        self._refusal = None

    def _watch_silence(self, now: float) -> None:
        silent_s = 0.0 if self._owed_since is None else now - self._owed_since
        if silent_s >= SILENT_S and not self._silence:
            self._silence, remedy = self._client.hindrance() or (_NO_ANSWER, _SEE_THE_LOG)
            self._log.warning(
                "enforcer_silent",
                connected=self._client.connected,
                socket=self.socket,
                why=self._silence,
                remedy=remedy,
                holds=_MEANWHILE,
                next_try_s=HEARTBEAT_S,
            )
        elif self._silence and self._owed_since is None:
            self._silence = ""
            self._log.info("enforcer_answers")

    def _tell(
        self,
        changed: list[messages.DesiredPod],
        gone: list[messages.DesiredPod],
        pods: Mapping[str, Pod],
    ) -> None:
        """Log what is wanted now, and what cannot be made sense of: once per change."""
        wanted, others = self._content.pods, self._content.others
        sizes = {"revision": self._revision, "pods": len(wanted), "others": len(others)}
        if not changed and not gone and self._revision > 1:
            self._log.debug("wanted", **sizes)
            return
        watts = {f"{p.namespace}/{p.name}": format_watts(p.limit_mw) for p in changed[:_SHOWN]}
        names = [f"{p.namespace}/{p.name}" for p in gone[:_SHOWN]]
        shown = [*changed[:_SHOWN], *gone[:_SHOWN]]
        uids = {f"{p.namespace}/{p.name}": p.uid for p in shown}
        # Only the enforcer knows whether what is wanted is going to be written.
        unknown = {"dry_run": None} if self._dry_run is None else {}
        self._log.info("wanted", **sizes, watts=watts, gone=names, uids=uids, **unknown)
        for pod in [pod for pod in changed if pod.limit_mw is None][:_SHOWN]:
            wish = pods[pod.uid].wish
            problem = wish.problem if wish is not None else ""
            place = {"namespace": pod.namespace, "pod": pod.name, "uid": pod.uid}
            said = {"value": pod.raw, "problem": problem, "holds": _UNUSABLE}
            self._log.warning("annotation_unusable", **place, **said)

    def link(self, now: float) -> Link:
        """Return how the enforcer is doing, for the metrics."""
        up = self._heard and self._client.connected and not self._silence
        return Link(
            up=up,
            snapshot_age_s=now - self._reports.taken_at,
            report=self._reports.last,
            report_age_s=now - self._reports.last_at,
        )

    def missing(self, now: float) -> list[str]:
        """Return what keeps limits from being enforced, as far as this side can see."""
        missing = [] if self.too_much is None else [f"snapshot: {self.too_much}"]
        link = self.link(now)
        if self._refusal is not None:
            missing.append(f"enforcer: {self._refusal[1]}")
        elif not link.up:
            missing.append(f"enforcer: {self._silence or _NO_ANSWER}")
        elif self._snapshot is not None and not self._reports.has_taken:
            missing.append("enforcer: no report yet")
        elif link.report is not None:
            missing += _unfit(link.report)
        return missing


def _enforced(changes: list[_Change], pods: list[messages.Pod]) -> list[float]:
    """Return when each revision arrived of which at least one limit holds now."""
    holding = {pod.uid for pod in pods if pod.state in _HOLDS}
    # A pod's later change overtakes its earlier ones, if one report answers both.
    latest = {change.uid: change for change in changes}
    arrived_at = {
        change.revision: change.arrived_at
        for change in latest.values()
        if change.uid in holding and change.arrived_at is not None
    }
    return list(arrived_at.values())


def _unfit(report: messages.Report) -> list[str]:
    unfit = [] if report.nvml == "ok" else [f"nvml: {report.nvml}: {report.nvml_message}"]
    return unfit + _unseen(report)


def _unseen(report: messages.Report) -> list[str]:
    """Return the GPUs whose processes cannot be seen, where a pod waits that may be on them."""
    if not any(pod.state == "waiting" and not pod.gpus for pod in report.pods):
        return []
    return [
        f"processes: the list of GPU {gpu.index} cannot be read: {gpu.unread}"
        for gpu in report.gpus
        if gpu.unread is not None
    ]

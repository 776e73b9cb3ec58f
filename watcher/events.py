"""Kubernetes Events on pods: tells a pod's author what became of the limit asked for.

Only a help for people, so it gives way: for each pod the newest alone waits to be written, at a
bounded rate, and nothing waits for it.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Literal, Protocol
from urllib.parse import quote

import msgspec

from shared import messages
from shared.logs import Log
from shared.pace import Bucket
from shared.units import format_watts
from watcher.kube import ApiError

RULE = '- {apiGroups: [""], resources: ["events"], verbs: ["create"]}'
_HOLDS = "limits are set all the same; this Event is left out, the next one is tried"
_BURST = 25
_PER_S = 1.0
_TIMEOUT_S = 10.0
_IDLE_S = 60.0
# Far longer than a turn takes: it waits for a note, for its place in the rate, and for two answers
# (a token that was rotated is tried again), each with its connection.
TURN_S = 180.0
_REASONS: dict[str, tuple[Literal["Normal", "Warning"], str]] = {
    "enforced": ("Normal", "PowerLimitApplied"),
    "clamped": ("Warning", "PowerLimitClamped"),
    "conflict": ("Warning", "PowerLimitConflict"),
    "invalid": ("Warning", "InvalidPowerLimit"),
    "failed": ("Warning", "PowerLimitFailed"),
}


class Api(Protocol):
    """What `kube.Api` offers."""

    def post(self, path: str, body: bytes, *, read_timeout_s: float) -> None: ...


@dataclass(frozen=True, slots=True)
class Note:
    """One Event to be: which pod, and what there is to say.

    `uid` is what `kubectl describe` looks for: of a static pod the kubelet's id of it.
    """

    uid: str
    namespace: str
    name: str
    kind: Literal["Normal", "Warning"]
    reason: str
    message: str


def notes(before: dict[str, messages.Pod], pods: list[messages.Pod]) -> list[Note]:
    """Return what is new for each pod; waiting for a first process is not worth an Event."""
    return [
        Note(pod.uid, pod.namespace, pod.name, *_REASONS[pod.state], _text(pod))
        for pod in pods
        if pod.state in _REASONS and _facts(before.get(pod.uid)) != _facts(pod)
    ]


def _facts(pod: messages.Pod | None) -> tuple[object, ...]:
    # Not the reason: its words may hold numbers that move.
    return () if pod is None else (pod.state, pod.raw, pod.effective_mw, pod.gpus)


def _text(pod: messages.Pod) -> str:
    has, asked = format_watts(pod.effective_mw), format_watts(pod.requested_mw)
    if pod.state == "invalid":
        return f"GPU power limit {pod.raw!r} cannot be used: {pod.reason}"
    if pod.state == "failed":
        return f"GPU power limit {asked} W could not be set: {pod.reason}"
    on = f"on {', '.join(pod.gpus)}"
    text = f"GPU power limit {has} W holds {on}"
    return text if pod.state == "enforced" else f"{text}, asked for {asked} W: {pod.reason}"


class Recorder:
    """Writes Events from a thread of its own."""

    def __init__(
        self, api: Api, node: str, log: Log, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Prepare; nothing is written before `run`."""
        self._api = api
        self._node = node
        self._log = log
        self._clock = clock
        self._waiting: dict[str, Note] = {}  # by pod, which keeps its place in the line
        self._changed = threading.Condition()
        self._known: dict[str, messages.Pod] | None = None
        self._bucket = Bucket.full(_PER_S, _BURST, clock())
        self._problem: str | None = None
        self.turned_at = clock()

    def take(self, report: messages.Report, asked: list[messages.DesiredPod]) -> None:
        """Note what `report` brings of the pods that `asked`.

        The first report causes no Events: it shows what was so before.
        """
        pods = {pod.uid: pod for pod in report.pods}
        static_ids = {pod.uid: pod.aliases[0] for pod in asked if pod.aliases}
        fresh = [] if self._known is None else notes(self._known, report.pods)
        self._known = pods
        with self._changed:
            for note in fresh:
                shown = replace(note, uid=static_ids.get(note.uid, note.uid))
                self._waiting[note.uid] = shown
            for gone in self._waiting.keys() - pods.keys():  # else they would add up
                del self._waiting[gone]
            self._changed.notify()

    def run(self, stop: threading.Event) -> None:
        """Write until stopped; `turned_at` shows that it goes on."""
        while not stop.is_set():
            self.turned_at = self._clock()
            try:
                self._turn(stop)
            # The top of this thread. Ending it would end all Events, for what one may have caused.
            except Exception as error:  # noqa: BLE001
                self._log.error("events_failed", message=repr(error)[:500])
                stop.wait(1.0)  # no storm of lines where it fails at once

    def _turn(self, stop: threading.Event) -> None:
        note = self._next()
        if note is None:
            return
        self._bucket = self._bucket.filled(self._clock()).spent(1)
        stop.wait(self._bucket.short_s(0))
        self._write(note)

    def _next(self) -> Note | None:
        """Return the note that has waited longest, None where none comes for a while."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._waiting, _IDLE_S):
                return None
            return self._waiting.pop(next(iter(self._waiting)))

    def _write(self, note: Note) -> None:
        path = f"/api/v1/namespaces/{quote(note.namespace, safe='')}/events"
        try:
            self._api.post(path, body(note, self._node), read_timeout_s=_TIMEOUT_S)
        except ApiError as error:
            remedy = f"; add to the watcher's rules: {RULE}" if error.status == 403 else ""
            # A 403 names the namespace: the text alone would be new with each.
            problem = str(error.status or error)
            if problem != self._problem:
                pod = messages.pod_text(note.namespace, note.name, note.uid)
                said = f"{error}{remedy}"
                self._log.warning("event_not_written", pod=pod, message=said, holds=_HOLDS)
            self._problem = problem
        else:
            self._problem = None


def body(note: Note, node: str) -> bytes:
    """Return the Event as the API takes it (core/v1)."""
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return msgspec.json.encode(
        {
            "apiVersion": "v1",
            "kind": "Event",
            # generateName adds 5 characters to at most 253.
            "metadata": {"namespace": note.namespace, "generateName": f"{note.name[:230]}."},
            "involvedObject": {
                "apiVersion": "v1",
                "kind": "Pod",
                "namespace": note.namespace,
                "name": note.name,
                "uid": note.uid,
            },
            "type": note.kind,
            "reason": note.reason,
            "message": note.message[:1024],
            "source": {"component": "power-agent", "host": node},
            "reportingComponent": "power-agent",
            "reportingInstance": node,
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
        }
    )

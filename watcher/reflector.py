"""List and watch: keeps the pods of this node as the API server has them.

Rules:
1. The first list asks for the newest state: a stale cache could release a limit.
2. One list per start and per 410. Whatever else ends a watch, it goes on where it was. But where
   it did not end in order and the next brings nothing for a minute, not even a bookmark, one list
   shows whether the cluster was restored from a backup: its versions have gone back then, and a
   server that is asked to watch from one in its future is silent until it has come there.
3. A list is swapped in whole; a half-read one is never seen.
4. What is held goes back in time only after the server has said that it was never as far; and a
   failure never empties it.
5. Only a watch that lasts is a success: whatever else comes again and again waits ever longer,
   or a second at most where it brings something each time.
6. A watch that brings nothing for longer than a bookmark takes is asked for again. A server that
   hangs does not answer that, and one that sends no bookmarks does at once.

`verdict` judges each end, and `after_end` and `Pace` follow from it. They are pure; the rest acts.
"""

import random
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from types import MappingProxyType
from typing import Literal, Protocol

from shared.logs import Log
from shared.pace import Backoff
from watcher import metadata
from watcher.kube import ApiError
from watcher.metadata import Pod
from watcher.metrics import Counts

LIST_BYTES = 64 * 1024 * 1024
LINE_BYTES = 4 * 1024 * 1024
LIST_TIMEOUT_S = 60.0
WATCH_S = (240, 300)  # asked of the server; spread, so that a cluster's agents do not come at once
DOUBT_S = (60, 75)  # of a watch after one that was lost; a bookmark comes each minute (cacher.go)
# Of the first watch after a failure. Its end in order says soon that the trouble is over, also
# where nothing happens: a read that is waited in cannot look at the clock.
PROOF_S = (2, 3)
WATCH_SLACK_S = 20.0
SILENT_S = 70.0  # rule 6
STEADY_S = 1.0  # a watch that lived as long has proved that the server can be watched
# A server that restarts is tried five times within half a minute, so that its failures can be told
# from those of an outage.
_BACKOFF = Backoff(first_s=0.25, most_s=30.0, factor=4.0)
_DIGITS = 39  # versions are 128 bits at most (KEP-5504)

Offer = Callable[[Mapping[str, Pod], float | None], None]

# What is so while the API cannot be asked.
_HOLDS = "the pods and limits that it told of last go on holding"
_HOLDS_UNLISTED = "there is no list of pods yet, so no limit is set, raised or given back"


class Answer(Protocol):
    """What `kube.Answer` offers."""

    def read(self) -> bytes: ...
    def read_all(self, limit_bytes: int) -> bytes: ...
    def interrupt(self) -> None: ...
    def close(self) -> None: ...


class Api(Protocol):
    """What `kube.Api` offers."""

    def get(
        self, path: str, query: Mapping[str, str], *, accept: str, read_timeout_s: float
    ) -> Answer: ...


@dataclass(frozen=True, slots=True)
class Listing:
    """Nothing to go on from: the next step lists the newest.

    `rewound`: the server has said that it was never as far as what is held.
    """

    rewound: bool = False


@dataclass(frozen=True, slots=True)
class Relisting:
    """Up to `version` is held, perhaps of another past: the next step lists what is no older.

    The server has that in memory (its watch cache), so a whole cluster may come at once.
    """

    version: str


@dataclass(frozen=True, slots=True)
class Resuming:
    """Everything up to `version` is held: the next step opens a watch there.

    `doubtful`: a watch was lost, and nothing has shown since that the server knows the version.
    """

    version: str
    doubtful: bool = False


@dataclass(frozen=True, slots=True)
class Watching:
    """A watch is open since `opened_s`: the next step takes what it brings.

    `rest` is a line not yet whole; `failure` is what ended it after events that were still good.
    """

    version: str
    opened_s: float
    doubtful: bool = False
    rest: bytes = b""
    fruitful: bool = False
    failure: ApiError | None = None


State = Listing | Relisting | Resuming | Watching


@dataclass(frozen=True, slots=True)
class Scope:
    """Which pods: those of `node`, in `namespace` or in all."""

    node: str
    namespace: str | None

    @property
    def path(self) -> str:
        """The API's path of them."""
        return f"/api/v1/namespaces/{self.namespace}/pods" if self.namespace else "/api/v1/pods"

    @property
    def selector(self) -> dict[str, str]:
        """The query that selects them; a pod that has finished leaves it and comes as DELETED."""
        chosen = f"spec.nodeName={self.node},status.phase!=Succeeded,status.phase!=Failed"
        return {"fieldSelector": chosen}

    @property
    def rule(self) -> str:
        """The RBAC rule that reading them takes, as YAML on one line."""
        kind = f"Role in namespace {self.namespace}" if self.namespace else "ClusterRole"
        rule = '- {apiGroups: [""], resources: ["pods"], verbs: ["get", "list", "watch"]}'
        return f"add to the rules of the watcher's {kind}: {rule}"


def is_expiry(error: ApiError) -> bool:
    """Tell whether the server does not know the version to go on from: no longer, or not yet."""
    return error.status == 410 or error.too_large


class Worth(Enum):
    """What a watch was good for, however it ended."""

    BARE = "it ended as soon as it was open, or there was none"
    FRUITFUL = "it was short, but it brought something"
    STEADY = "it lasted: this server can be watched"
    SILENT = "it lasted, but it was in doubt and brought nothing for a minute"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What an end means. `cause` is the metric's label for it."""

    worth: Worth
    cause: Literal["closed", "expired", "failed"]

    @property
    def lasted(self) -> bool:
        """Whether it was a success (rule 5)."""
        return self.worth in (Worth.STEADY, Worth.SILENT)


def verdict(state: State, error: ApiError | None, now_s: float) -> Verdict:
    """Judge the end of `state`; `error` None where the server ended a watch in order."""
    worth = Worth.BARE
    if isinstance(state, Watching):
        lasted_s = now_s - state.opened_s
        if state.doubtful and lasted_s >= DOUBT_S[0] - STEADY_S:
            worth = Worth.SILENT
        elif lasted_s >= STEADY_S:
            worth = Worth.STEADY
        elif state.fruitful:
            worth = Worth.FRUITFUL
    if error is None:
        return Verdict(worth, "failed" if worth is Worth.BARE else "closed")
    # A list of the newest asks for no version, so there is none that could have expired.
    expired = is_expiry(error) and not isinstance(state, Listing)
    return Verdict(worth, "expired" if expired else "failed")


def after_end(state: State, error: ApiError | None, judged: Verdict) -> State:
    """Return where to go on: from a new list only if the server does not know our version."""
    if isinstance(state, Listing):
        return state
    if error is not None and judged.cause == "expired":
        return Listing(rewound=error.too_large)
    if judged.worth is Worth.SILENT:
        return Relisting(state.version)
    if isinstance(state, Watching) and error is None:
        return Resuming(state.version, state.doubtful)
    # If the server refuses the list that would settle the doubt, the watch goes on.
    if isinstance(state, Relisting) and error is not None and error.status not in (400, 403, 422):
        return state
    return Resuming(state.version, doubtful=True)


@dataclass(frozen=True, slots=True)
class Pace:
    """How long to wait before the next request: `wait_s`, after the ends so far.

    `let_off`: the last end cost no wait, so the next of its kind does.
    """

    backoff: Backoff = _BACKOFF
    let_off: bool = False
    wait_s: float = 0.0

    def after(
        self, judged: Verdict, now_s: float, *, share: float = 1.0, least_s: float = 0.0
    ) -> "Pace":
        """Return it after one more end; `share` is chance's, `least_s` the server's."""
        backoff, let_off = self.backoff, self.let_off
        if judged.lasted:
            backoff, let_off = backoff.cleared(), False
            if judged.cause == "closed":
                return Pace(backoff)
        elif judged.worth is Worth.FRUITFUL and judged.cause != "expired":
            backoff = backoff.capped(1)  # so this wait is a second at most
        # A short watch that ends in order, or a version that is not known, is an answer. It is
        # no reason to wait, unless it comes again and again.
        answer = judged.cause in ("closed", "expired")
        if answer and not let_off:
            return Pace(backoff, let_off=True)
        backoff = backoff.failed(now_s, share=share, least_s=least_s)
        return Pace(backoff, let_off=answer, wait_s=backoff.left_s(now_s))


@dataclass(frozen=True, slots=True)
class Heard:
    """The API server as it was heard last.

    `silent_s` is how long ago it last said something useful (a list, the head of a watch, an event,
    a bookmark), or since the start where it `never` did. `error` is what is wrong now, if anything.
    """

    silent_s: float
    never: bool = False
    error: str = ""

    @property
    def age_s(self) -> float | None:
        """How old its last word is; None where it said none."""
        return None if self.never else self.silent_s


@dataclass(frozen=True, slots=True)
class Trouble:
    """What is wrong with the server. Troubles of the same `kind` are said once."""

    text: str
    kind: object  # the status, or the text without its numbers
    since_s: float


class Reflector:
    """Steps through the states for ever and offers the pods whenever they have changed.

    Only the thread that is in `run` writes here. Others call `stop` and `heard`, and look at
    `listed`, `problem` and `turned_at`.
    """

    address = ""  # the API server's, for the log

    def __init__(  # noqa: PLR0913 - its parts
        self,
        api: Api,
        scope: Scope,
        pods: metadata.PodReader,
        offer: Offer,
        counts: Counts,
        log: Log,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare; nothing is asked before `run`."""
        self._api = api
        self._scope = scope
        self._reader = pods
        self._offer = offer
        self._counts = counts
        self._log = log
        self._clock = clock
        self._pods: dict[str, Pod] = {}
        # How new `_pods` is (rule 4), -1 where versions are no numbers. Where to go on is another
        # fact, which the states hold: after a 410 there is no such place, but pods are held.
        self._held_version = -1
        self._answer: Answer | None = None  # of the watch that is open
        self._pace = Pace()
        self._trouble: Trouble | None = None
        self._stop = threading.Event()
        self.listed = False
        self.turned_at = clock()
        self._began_at = self.turned_at
        self._heard_at: float | None = None

    @property
    def problem(self) -> str | None:
        """What keeps the server from being watched; None where nothing does."""
        trouble = self._trouble
        return None if trouble is None else trouble.text

    def heard(self) -> Heard:
        """Return when the server last said something, and what is wrong."""
        heard_at = self._heard_at
        since = self._began_at if heard_at is None else heard_at
        silent_s = max(0.0, self._clock() - since)
        return Heard(silent_s, never=heard_at is None, error=self.problem or "")

    def run(self) -> None:
        """Reflect until stopped."""
        state: State = Listing()
        while not self._stop.is_set():
            self.turned_at = self._clock()
            try:
                state = self.step(state)
            except ApiError as error:
                state = self._end(state, error)
            # The top of this thread. Ending it would end the reflecting, while the next list sets
            # everything right.
            except Exception as error:  # noqa: BLE001
                self._log.error("reflector_failed", error=repr(error)[:500], state=repr(state)[:80])
                state = self._end(Listing(), ApiError(f"internal error: {error!r}"[:300]))
        self._hang_up()

    def stop(self) -> None:
        """End `run`, also where it waits for the server."""
        self._stop.set()
        answer = self._answer
        if answer is not None:
            answer.interrupt()

    def step(self, state: State) -> State:
        """Do the one thing that `state` calls for and return the next; raises ApiError."""
        match state:
            case Listing() | Relisting():
                return self._list(state)
            case Resuming():
                return self._watch(state)
            case Watching():
                return self._take(state)

    def _list(self, state: Listing | Relisting) -> State:
        self._counts.list_requests += 1
        query = self._scope.selector
        if isinstance(state, Relisting):  # without `limit`: for that older servers ask etcd
            query |= {"resourceVersion": state.version, "resourceVersionMatch": "NotOlderThan"}
        answer = self._api.get(
            self._scope.path,
            query,
            accept=metadata.LIST_ACCEPT,
            read_timeout_s=LIST_TIMEOUT_S,
        )
        try:
            version, pods = self._reader.pods(answer.read_all(LIST_BYTES))
        except metadata.SENSELESS as error:
            raise ApiError(f"the list of pods makes no sense: {error}") from error
        if _number(version) < self._held_version:
            if isinstance(state, Relisting):
                raise ApiError(
                    f"the list of pods is older ({version}) than what is held "
                    f"({self._held_version}) and was asked for, and is not taken"
                )
            if not state.rewound:
                return Relisting(str(self._held_version))
            self._log.warning("kubernetes_restored", held=str(self._held_version), listed=version)
        self._held_version = _number(version)
        self._pods = pods
        self.listed = True
        self._heard_at = self._clock()
        self._offer(MappingProxyType(pods.copy()), None)
        return Resuming(version)

    def _watch(self, state: Resuming) -> State:
        spread = DOUBT_S if state.doubtful else WATCH_S
        if self._trouble is not None:
            spread = PROOF_S
        seconds = random.randint(*spread)  # noqa: S311 - not a secret
        query = {
            "watch": "1",
            "allowWatchBookmarks": "true",
            "resourceVersion": state.version,
            "timeoutSeconds": str(seconds),
        }
        self._answer = self._api.get(
            self._scope.path,
            self._scope.selector | query,
            accept=metadata.WATCH_ACCEPT,
            read_timeout_s=min(SILENT_S, seconds + WATCH_SLACK_S),
        )
        self._heard_at = self._clock()
        return Watching(state.version, self._heard_at, state.doubtful)

    def _take(self, state: Watching) -> State:
        """Wait for the next bytes of the watch and apply the lines they complete."""
        if state.failure is not None:
            raise state.failure
        assert self._answer is not None
        try:
            data = self._answer.read()
        except ApiError as error:
            if not _is_overdue(state, error, self._clock()):
                raise
            return self._end(state, None)
        arrived_at = self._clock()
        if not data:
            return self._closed(state, arrived_at)
        *lines, rest = (state.rest + data).split(b"\n")
        if len(rest) > LINE_BYTES or any(len(line) > LINE_BYTES for line in lines):
            raise ApiError(f"an event of the watch is longer than {LINE_BYTES} bytes")
        state, changed = replace(state, rest=rest), False
        for line in filter(bytes.strip, lines):
            try:
                version, pods_changed = self._apply(line)
            except ApiError as error:
                state = replace(state, failure=error)
                break
            state = replace(state, version=version, fruitful=True, doubtful=False)
            self._heard_at = arrived_at
            changed = changed or pods_changed
        if changed:
            self._offer(MappingProxyType(self._pods.copy()), arrived_at)
        return state

    def _closed(self, state: Watching, now_s: float) -> State:
        if verdict(state, None, now_s).cause == "failed":
            raise ApiError("the watch was closed as soon as it was open")
        return self._end(state, None)

    def _apply(self, line: bytes) -> tuple[str, bool]:
        """Take one event in; return its version and whether pods changed."""
        try:
            event = metadata.event(line)
            self._counts.watch_events[event.type] += 1
            if event.type == "ERROR":
                raise _watch_error(metadata.failure(event.object))
            if event.type == "BOOKMARK":
                version, changed = metadata.version(event.object), False
            else:
                version, pod = self._reader.pod(event.object)
                changed = self._put(pod, gone=event.type == "DELETED")
        except metadata.SENSELESS as error:
            raise ApiError(f"an event of the watch makes no sense: {error}") from error
        self._held_version = max(self._held_version, _number(version))
        return version, changed

    def _put(self, pod: Pod, *, gone: bool) -> bool:
        if gone:
            return self._pods.pop(pod.uid, None) is not None
        changed = self._pods.get(pod.uid) != pod
        self._pods[pod.uid] = pod
        return changed

    def _end(self, state: State, error: ApiError | None) -> State:
        """Draw the conclusions from the end of `state`, wait, and return where to go on."""
        self._hang_up()
        # Stopping: whatever ended did so because its connection was taken away.
        if self._stop.is_set():
            return state
        now_s = self._clock()
        judged = verdict(state, error, now_s)
        self._counts.watch_restarts[judged.cause] += 1
        if judged.lasted:
            self._recovered(now_s)
        self._pace = self._pace.after(
            judged,
            now_s,
            # So that the nodes of a cluster do not come at once.
            share=random.uniform(0.5, 1.0),  # noqa: S311 - not a secret
            least_s=0.0 if error is None else error.retry_after_s,
        )
        if judged.cause == "expired":
            self._log.debug("watch_expired", message=str(error))
        elif error is not None:
            self._say(state, error, now_s)
        self._stop.wait(self._pace.wait_s)
        return after_end(state, error, judged)

    def _hang_up(self) -> None:
        if self._answer is not None:
            self._answer.close()
            self._answer = None

    def _say(self, state: State, error: ApiError, now_s: float) -> None:
        """Keep what is wrong, and say it where it is new."""
        text = str(error)
        if error.status == 403:
            # A server that has just started refuses before it knows its rules.
            text = f"{text}; if it stays so, {self._scope.rule}"
        kind: object = error.status or re.sub("[0-9]+", "", text)
        before = self._trouble
        self._trouble = Trouble(text, kind, now_s if before is None else before.since_s)
        if before is None or before.kind != kind:
            self._log.warning(
                "kubernetes_failing",
                doing="list" if isinstance(state, Listing | Relisting) else "watch",
                api=self.address,
                message=text,
                holds=_HOLDS if self.listed else _HOLDS_UNLISTED,
                next_try_s=round(self._pace.wait_s, 3),
            )

    def _recovered(self, now_s: float) -> None:
        trouble, self._trouble = self._trouble, None
        if trouble is not None:
            outage_s = round(now_s - trouble.since_s, 3)
            self._log.info("kubernetes_answers", outage_s=outage_s)


def _is_overdue(state: Watching, error: ApiError, now_s: float) -> bool:
    """Tell whether a watch was silent for so long that it is asked for again (rule 6)."""
    return error.silent and now_s - state.opened_s >= SILENT_S - STEADY_S


def _watch_error(failure: metadata.Failure) -> ApiError:
    text = f"the watch ended with status {failure.code}: {failure.message[:300]}"
    return ApiError(text, failure.code)


def _number(version: str) -> int:
    """Return the version as the number it is (KEP-5504), -1 where a server thinks otherwise."""
    number = version.isascii() and version.isdigit() and len(version) <= _DIGITS
    return int(version) if number else -1

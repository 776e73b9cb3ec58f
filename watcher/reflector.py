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
"""

import random
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Protocol

from shared.logs import Log
from watcher import metadata
from watcher.kube import ApiError
from watcher.metadata import Pod
from watcher.metrics import Counts

LIST_BYTES = 64 * 1024 * 1024
LINE_BYTES = 4 * 1024 * 1024
LIST_TIMEOUT_S = 60.0
WATCH_S = (240, 300)  # asked of the server; spread, so that a cluster's agents do not come at once
DOUBT_S = (60, 75)  # of a watch after one that was lost; a bookmark comes each minute (cacher.go)
WATCH_SLACK_S = 20.0
STEADY_S = 1.0  # a watch that lived as long has proved that the server can be watched
_FIRST_DELAY_S = 0.25
_MAX_DELAY_S = 30.0
_DIGITS = 39  # versions are 128 bits at most (KEP-5504)

Offer = Callable[[Mapping[str, Pod], float | None], None]


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
    """A watch is open: the next step takes what it brings.

    `rest` is a line not yet whole; `failure` is what ended it after events that were still good.
    """

    version: str
    answer: Answer
    since: float
    doubtful: bool = False
    rest: bytes = b""
    fruitful: bool = False
    failure: ApiError | None = None

    @property
    def steady(self) -> bool:
        """Whether this watch was a success, however it ends."""
        return time.monotonic() - self.since >= STEADY_S

    @property
    def silent(self) -> bool:
        """Whether it was in doubt and has proved nothing in the time it had, however it ends."""
        return self.doubtful and time.monotonic() - self.since >= DOUBT_S[0] - STEADY_S


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


def after_failure(state: State, error: ApiError) -> State:
    """Return where to go on after `error`: from the beginning only without a common past."""
    if isinstance(state, Listing):
        return state
    if is_expiry(error):
        return Listing(rewound=error.too_large)
    if isinstance(state, Watching) and state.silent:
        return Relisting(state.version)
    # A doubt that the server does not let be settled must not cost the watch.
    if isinstance(state, Relisting) and error.status not in (400, 403, 422):
        return state
    return Resuming(state.version, doubtful=True)


class Backoff:
    """How long to wait after watches in a row that did not last."""

    def __init__(self) -> None:
        """Begin without failures."""
        self.failures, self._excused = 0, False

    def succeed(self) -> None:
        """Begin anew."""
        self.failures, self._excused = 0, False

    def progress(self) -> None:
        """Wait a second at most after a watch that did not last but brought something."""
        self.failures = min(self.failures, 2)

    def fail(self, error: ApiError) -> float:
        """Return the seconds to wait after one more failure.

        That a version is not known is an answer, and no reason to wait: a list is next.
        """
        return self._wait_s(error.retry_after_s, excused=is_expiry(error))

    def end(self) -> float:
        """Return the seconds to wait after a short watch that the server ended in order."""
        return self._wait_s(0.0, excused=True)

    def _wait_s(self, least_s: float, *, excused: bool) -> float:
        # What is excused once is none of it when it comes again and again.
        again, self._excused = self._excused, excused
        if excused and not again:
            return 0.0
        self.failures += 1
        longest_s = min(_MAX_DELAY_S, _FIRST_DELAY_S * 2.0 ** min(self.failures - 1, 10))
        jittered_s = longest_s * random.uniform(0.5, 1.0)  # noqa: S311 - not a secret
        return min(_MAX_DELAY_S, max(jittered_s, least_s))


class Reflector:
    """Steps through the states for ever and offers the pods whenever they have changed."""

    def __init__(
        self,
        api: Api,
        scope: Scope,
        pods: metadata.PodReader,
        offer: Offer,
        counts: Counts,
        log: Log,
    ) -> None:
        """Prepare; nothing is asked before `run`."""
        self._api, self._scope, self._reader = api, scope, pods
        self._offer, self._counts, self._log = offer, counts, log
        self._pods: dict[str, Pod] = {}
        self._newest = -1  # the newest version seen, where versions are numbers
        self._backoff = Backoff()
        self._stop = threading.Event()
        self._open: Answer | None = None
        self._troubled_since: float | None = None
        self._trouble: object = None  # its kind: status, or the text without its numbers
        self._proof: threading.Timer | None = None
        self.listed = False
        self.problem: str | None = None
        self.turned_at = time.monotonic()

    def run(self) -> None:
        """Reflect until stopped."""
        state: State = Listing()
        while not self._stop.is_set():
            self.turned_at = time.monotonic()
            try:
                state = self.step(state)
            except ApiError as error:
                state = self._recover(state, error)
            # The top of this thread. Ending it would end the reflecting, while the next list sets
            # everything right.
            except Exception as error:  # noqa: BLE001
                self._log.error("reflector_failed", error=repr(error)[:500], state=repr(state)[:80])
                state = self._recover(Listing(), ApiError(f"internal error: {error!r}"[:300]))
        self._hang_up()

    def stop(self) -> None:
        """End `run`, also where it waits for the server."""
        self._stop.set()
        if self._open is not None:
            self._open.interrupt()

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
        if _number(version) < self._newest:
            if isinstance(state, Relisting):
                raise ApiError(
                    f"the list of pods is older ({version}) than what is held ({self._newest}) "
                    "and was asked for, and is not taken"
                )
            if not state.rewound:
                return Relisting(str(self._newest))
            self._log.warning("kubernetes_restored", held=str(self._newest), listed=version)
        self._newest = _number(version)
        self._pods = pods
        self.listed = True
        self._offer(MappingProxyType(pods.copy()), None)
        return Resuming(version)

    def _watch(self, state: Resuming) -> State:
        spread = DOUBT_S if state.doubtful else WATCH_S
        seconds = random.randint(*spread)  # noqa: S311 - not a secret
        query = {
            "watch": "1",
            "allowWatchBookmarks": "true",
            "resourceVersion": state.version,
            "timeoutSeconds": str(seconds),
        }
        answer = self._api.get(
            self._scope.path,
            self._scope.selector | query,
            accept=metadata.WATCH_ACCEPT,
            read_timeout_s=seconds + WATCH_SLACK_S,
        )
        self._open = answer
        if self._troubled_since is not None:  # a server may say 200 and fail right after
            self._proof = threading.Timer(STEADY_S, self._recovered)
            self._proof.daemon = True
            self._proof.start()
        return Watching(state.version, answer, time.monotonic(), state.doubtful)

    def _take(self, state: Watching) -> State:
        """Wait for the next bytes of the watch and apply the lines they complete."""
        if state.failure is not None:
            raise state.failure
        data = state.answer.read()
        arrived_at = time.monotonic()
        if not data:
            return self._closed(state)
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
            changed = changed or pods_changed
        if changed:
            self._offer(MappingProxyType(self._pods.copy()), arrived_at)
        return state

    def _closed(self, state: Watching) -> State:
        if not (state.steady or state.fruitful):
            raise ApiError("the watch was closed as soon as it was open")
        self._hang_up()
        self._counts.watch_restarts["closed"] += 1
        if state.steady:
            self._recovered()
            self._backoff.succeed()
        else:
            self._backoff.progress()
            self._stop.wait(self._backoff.end())
        if state.silent:
            return Relisting(state.version)
        return Resuming(state.version, state.doubtful)

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
        self._newest = max(self._newest, _number(version))
        return version, changed

    def _put(self, pod: Pod, *, gone: bool) -> bool:
        if gone:
            return self._pods.pop(pod.uid, None) is not None
        changed = self._pods.get(pod.uid) != pod
        self._pods[pod.uid] = pod
        return changed

    def _recover(self, state: State, error: ApiError) -> State:
        """Say what is wrong, once; wait; return where to go on."""
        self._hang_up()
        # Stopping: whatever failed did so because its connection was taken away.
        if self._stop.is_set():
            return state
        if isinstance(state, Watching) and state.steady:
            self._backoff.succeed()
        elif isinstance(state, Watching) and state.fruitful and not is_expiry(error):
            self._backoff.progress()
        following = after_failure(state, error)
        expired = isinstance(following, Listing) and not isinstance(state, Listing)
        self._counts.watch_restarts["expired" if expired else "failed"] += 1
        delay_s = self._backoff.fail(error)
        if expired:
            self._log.debug("watch_expired", message=str(error))
        else:
            self._say(state, error)
        self._stop.wait(delay_s)
        return following

    def _hang_up(self) -> None:
        if self._proof is not None:
            self._proof.cancel()
            self._proof = None
        if self._open is not None:
            self._open.close()
            self._open = None

    def _say(self, state: State, error: ApiError) -> None:
        text = str(error)
        if error.status == 403:
            # A server that has just started refuses before it knows its rules.
            text = f"{text}; if it stays so, {self._scope.rule}"
        if self._troubled_since is None:
            self._troubled_since = time.monotonic()
        self.problem, trouble = text, error.status or re.sub("[0-9]+", "", text)
        if trouble != self._trouble:
            self._trouble = trouble
            doing = "list" if isinstance(state, Listing | Relisting) else "watch"
            self._log.warning("kubernetes_failing", doing=doing, message=text)

    def _recovered(self) -> None:
        since, self._troubled_since = self._troubled_since, None
        self.problem = self._trouble = None
        if since is not None:
            outage_s = round(time.monotonic() - since, 3)
            self._log.info("kubernetes_answers", outage_s=outage_s)


def _watch_error(failure: metadata.Failure) -> ApiError:
    text = f"the watch ended with status {failure.code}: {failure.message[:300]}"
    return ApiError(text, failure.code)


def _number(version: str) -> int:
    """Return the version as the number it is (KEP-5504), -1 where a server thinks otherwise."""
    number = version.isascii() and version.isdigit() and len(version) <= _DIGITS
    return int(version) if number else -1

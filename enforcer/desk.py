"""Who may ask what: decodes requests, checks them against a closed table, keeps the answers due."""

import time
from collections import Counter, deque
from collections.abc import Callable

from enforcer.policy import Desired, Link
from shared import __version__
from shared import messages as m
from shared.logs import Log
from shared.settings import EnforcerSettings
from shared.transport import Incoming, Server

LIVING_S = 10.0  # a watcher that sends its snapshot every two seconds is silent after this
_RETIRED = 64  # sessions that another one has replaced


class Desk:
    """The requests of one turn and the state that they bring: the last complete snapshot."""

    def __init__(self, server: Server, settings: EnforcerSettings, log: Log) -> None:
        self._server, self._log, self._lease_s = server, log, settings.lease_s
        watcher = frozenset({settings.watcher_uid})
        # message type -> who may send it, what is done. What is not here is refused.
        self._table: dict[type, tuple[frozenset[int], Callable[[Incoming, m.Request], None]]] = {
            m.Snapshot: (watcher, self._take_snapshot),
            m.Status: (watcher | settings.reader_uids, self._take_question),
            m.Ping: (watcher | settings.reader_uids, self._answer_ping),
        }
        self._started_s = time.monotonic()
        self._heard_s: float | None = None
        self._retired: deque[str] = deque(maxlen=_RETIRED)
        self._desired = Desired()
        self.snapshot: m.Snapshot | None = None
        self.changed = False  # the snapshot differs from the one last decided on
        self.due: list[tuple[Incoming, m.Snapshot | m.Status]] = []
        self.counts: Counter[str] = Counter()

    @property
    def uptime_s(self) -> float:
        """Return the seconds since start."""
        return time.monotonic() - self._started_s

    def take(self, requests: list[Incoming]) -> None:
        """Take the requests of a turn; each gets an answer, now or when limits are read back."""
        for incoming in requests:
            try:
                request = m.decode_request(incoming.payload)
                allowed, handle = self._table[type(request)]
                if incoming.uid not in allowed:
                    kind = type(request).__name__.lower()
                    raise m.RefusedError("denied", f"uid {incoming.uid} may not send {kind}")
                handle(incoming, request)
            except m.RefusedError as error:
                self._refuse(incoming, error)

    def _refuse(self, incoming: Incoming, error: m.RefusedError) -> None:
        known: m.ErrorCode = error.code
        self.counts[known if known in ("denied", "stale") else "malformed"] += 1
        key = f"{known} {incoming.uid}"
        if not self.counts[key]:  # once for each code and uid: a flood is counted, not logged
            self._log.warning(
                "message_denied", code=known, uid=incoming.uid, pid=incoming.pid, why=str(error)
            )
        self.counts[key] += 1
        self._server.reply(incoming, m.Error(code=known, message=str(error)))
        self._server.publish(
            m.MessageDenied(ts=time.time(), message=str(error), code=known, uid=incoming.uid)
        )

    def _answer_ping(self, incoming: Incoming, _request: m.Request) -> None:
        self._server.reply(incoming, m.Pong(version=__version__, uptime_s=self.uptime_s))

    def _take_question(self, incoming: Incoming, request: m.Request) -> None:
        assert isinstance(request, m.Status)
        self.due.append((incoming, request))

    def _take_snapshot(self, incoming: Incoming, request: m.Request) -> None:
        assert isinstance(request, m.Snapshot)
        last = self.snapshot
        if request.session in self._retired:
            raise m.RefusedError("stale", f"session {request.session} was replaced by a newer one")
        if last and last.session == request.session and request.revision < last.revision:
            raise m.RefusedError("stale", f"revision {request.revision} is before {last.revision}")
        if last and last.session != request.session:
            self._retired.append(last.session)
            self._log.info("watcher_session", session=request.session, replaces=last.session)
        self.counts["snapshots"] += 1
        self._heard_s = time.monotonic()
        self.snapshot = request
        self.due.append((incoming, request))
        if last is None or (last.pods, last.others) != (request.pods, request.others):
            self._accept(request)

    def _accept(self, snapshot: m.Snapshot) -> None:
        self.changed = True
        ids = {alias: pod.uid for pod in snapshot.pods for alias in pod.aliases}
        pods = {pod.uid: pod.limit_mw for pod in snapshot.pods}
        self._desired = Desired("living", pods, ids, frozenset(snapshot.others))
        self._server.publish(
            m.SnapshotAccepted(
                ts=time.time(),
                message=f"{len(pods)} annotated pods, {len(snapshot.others)} others",
                session=snapshot.session,
                revision=snapshot.revision,
                pods=len(pods),
            )
        )

    def desired(self) -> Desired:
        """Return the last complete snapshot and whether its watcher is still heard."""
        link: Link = "living"
        if self.silent_s > LIVING_S or self._heard_s is None:
            link = "silent"
        if self._lease_s is not None and self.silent_s > self._lease_s:
            link = "expired"
        return Desired(link, self._desired.pods, self._desired.ids, self._desired.others)

    @property
    def silent_s(self) -> float:
        """Return how long no snapshot came, since start if none ever came."""
        heard = self._started_s if self._heard_s is None else self._heard_s
        return time.monotonic() - heard

    def watcher(self) -> m.WatcherStatus:
        """Return the watcher as it looks from here."""
        snapshot = self.snapshot
        return m.WatcherStatus(
            connected=snapshot is not None and self.silent_s <= LIVING_S,
            session=snapshot.session if snapshot else None,
            revision=snapshot.revision if snapshot else None,
            age_s=round(self.silent_s, 3) if snapshot else None,
        )

"""Who may ask what: decodes requests, checks them against a closed table, keeps the answers due.

It knows no GPU, no NVML and no process.
"""

import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

import msgspec

from enforcer.clock import Clock
from enforcer.policy import Desired
from enforcer.server import Incoming, Server
from enforcer.settings import EnforcerSettings
from shared import __version__
from shared import messages as m
from shared.logs import Log
from shared.pace import Bucket

# A watcher repeats its snapshot every two seconds; it is silent beyond this.
_LIVING_S = 10.0
# Two heartbeats and a turn.
_MISSED_S = 5.0
# Sessions remembered as replaced.
_RETIRED = 64
# Log lines about new sessions: one right after a restart of the watcher is told, and many
# sessions do not flood the log.
_SESSIONS_PER_S = 0.1
_SESSIONS = 4.0
# Refusals of one kind are told once a minute. Only uids that may connect send messages, so the
# kinds are few.
_TELL_S = 60.0


@dataclass(slots=True)
class Tally:
    """How many messages came since the start, by what became of them."""

    snapshots: int = 0
    denied: int = 0
    refused_connections: int = 0
    malformed: int = 0
    stale: int = 0


class Told:
    """What was told when: the same kind at most once a minute, with how often it came."""

    def __init__(self, now: Callable[[], float]) -> None:
        """Begin with nothing told."""
        self._now = now
        self._last: dict[tuple[str, int | None], tuple[float, int]] = {}

    def lately(self, kind: str, uid: int | None) -> bool:
        """Tell whether it was told within the last minute."""
        told_s, _ = self._last.get((kind, uid), (-_TELL_S, 0))
        return self._now() < told_s + _TELL_S

    def count(self, kind: str, uid: int | None) -> int:
        """Count one more; return how many are to be told now, 0 where it is too soon."""
        now_s = self._now()
        told_s, count = self._last.get((kind, uid), (-_TELL_S, 0))
        due = now_s >= told_s + _TELL_S
        self._last[kind, uid] = (now_s, 0) if due else (told_s, count + 1)
        return count + 1 if due else 0


class Desk:
    """Takes the requests of each turn; holds the last complete snapshot and who still waits."""

    def __init__(self, server: Server, settings: EnforcerSettings, log: Log, clock: Clock) -> None:
        """Prepare; nothing is received before `take`."""
        self._server = server
        self._log = log
        self._clock = clock
        self._lease_s = settings.lease_s
        self._told = Told(self._clock.now_s)
        watcher = frozenset({settings.watcher_uid})
        readers = watcher | settings.reader_uids | {os.geteuid()}  # powerctl beside it, as a probe
        # Who may send which message; what is not here nobody may.
        self._may = {
            m.Snapshot: watcher,
            m.Unlisted: watcher,
            m.Status: readers,
            m.Ping: readers,
        }
        self.started_s = clock.now_s()
        self._heard_s = self.started_s
        self._deaf_s = 0.0  # of the time since then
        # What was said of the watcher's silence, empty while it speaks.
        self._silence = ""
        self._sessions = Bucket.full(_SESSIONS_PER_S, _SESSIONS, self.started_s)
        self._retired: deque[str] = deque(maxlen=_RETIRED)
        self._desired = Desired("unheard")
        self.tally = Tally()
        self._unsaid = 0  # connections that were refused and not told of
        self.snapshot: m.Snapshot | None = None
        # What the watcher said last of itself, and when.
        self._word: m.Snapshot | m.Unlisted | None = None
        self._word_s = self.started_s
        self.changed = False  # the snapshot differs from the one last decided on
        self.due: list[tuple[Incoming, m.Request]] = []

    def take(self, requests: list[Incoming]) -> None:
        """Take requests; each gets its answer, at once or when limits are read back."""
        self._count_refused()
        for incoming in requests:
            try:
                request = m.decode_request(incoming.payload)
                if incoming.uid not in self._may.get(type(request), ()):
                    raise m.RefusedError("denied", f"uid {incoming.uid} may not send that")
                if isinstance(request, m.Ping):
                    up_s = self._clock.now_s() - self.started_s
                    self._server.reply(incoming, m.Pong(version=__version__, uptime_s=up_s))
                    continue
                if isinstance(request, m.Snapshot):
                    self._take(request)
                if isinstance(request, m.Unlisted) and self.desired().link != "living":
                    self._keep(request)  # no heartbeat, and no pod is taken for gone
                self.due.append((incoming, request))
            except m.RefusedError as error:
                self._refuse(incoming, error)

    def miss(self, span_s: float) -> None:
        """Note that nothing could be heard for so long: that is no silence of the watcher's.

        Else a lease could run out while a session is opened, and everything would be given back.
        """
        self._deaf_s += span_s

    @property
    def is_asked(self) -> bool:
        """Whether a person waits for an answer, which is to be true now."""
        return any(isinstance(request, m.Status) for _, request in self.due)

    def taken(self) -> list[tuple[Incoming, m.Request]]:
        """Return the requests that wait for their answer, for the last time."""
        due, self.due = self.due, []
        return due

    def _refuse(self, incoming: Incoming, error: m.RefusedError) -> None:
        code, uid, why = error.code, incoming.uid, str(error)
        kind = code if code in ("denied", "stale") else "malformed"
        setattr(self.tally, kind, getattr(self.tally, kind) + 1)
        self._server.reply(incoming, m.Error(code=code, message=why))
        count = self._told.count(code, uid)
        if count:
            pid = incoming.pid
            self._log.warning("message_denied", code=code, uid=uid, pid=pid, count=count, why=why)
            self._publish_denied(code, uid, why)

    def _publish_denied(self, code: m.ErrorCode, uid: int | None, why: str) -> None:
        ts = self._clock.wall_s()
        self._server.publish(m.MessageDenied(ts=ts, message=why, code=code, uid=uid))

    def _count_refused(self) -> None:
        """Count the connections that were refused, and say whose they are once it is known."""
        refused = self._server.take_refused()
        self.tally.refused_connections += refused
        self._unsaid += refused
        whose = self._server.take_whose()
        if not self._unsaid or (whose is None and self._server.is_looking):
            return
        uid, pid = whose or (None, None)
        if uid is None and self._told.lately("stranger", None):
            return  # most likely the same one again
        if not self._told.count("somebody" if uid is None else "stranger", None):
            return
        count, self._unsaid = self._unsaid, 0
        who = "whose they were is not known" if uid is None else f"uid {uid}"
        why = f"connections refused: {count}; {who}; POWER_AGENT_READER_UIDS names who may connect"
        self._log.warning("connections_refused", uid=uid, pid=pid, count=count, why=why)
        self._publish_denied("denied", uid, why)

    def _take(self, new: m.Snapshot) -> None:
        last, now_s = self.snapshot, self._clock.now_s()
        self._check_session(new, now_s)
        if last and last.session != new.session:
            self._retire(last.session, new.session, now_s)
        self.tally.snapshots += 1
        # What a silence had put off is due.
        self.changed |= self.desired().link != "living"
        self._say_back(new, now_s)
        self._heard_s = now_s
        self._deaf_s = 0.0
        self.snapshot = new
        self._keep(new)
        if last and _asks(last) == _asks(new):
            return  # a heartbeat
        self.changed = True
        pods = {pod.uid: pod.limit_mw for pod in new.pods}
        ids = {alias: pod.uid for pod in new.pods for alias in pod.aliases}
        self._desired = Desired("living", pods, ids, frozenset(new.others), new.scope == "node")
        self._publish_accepted(new)

    def _keep(self, word: m.Snapshot | m.Unlisted) -> None:
        self._word, self._word_s = word, self._clock.now_s()

    def _check_session(self, new: m.Snapshot, now_s: float) -> None:
        """Raise RefusedError for what is older than the snapshot that is held."""
        last = self.snapshot
        if new.session in self._retired:
            if now_s - self._heard_s - self._deaf_s <= self._gone_s():
                raise m.RefusedError("stale", f"session {new.session} was replaced by a newer one")
            self._retired.remove(new.session)  # the newer one is gone
        if last and last.session == new.session and new.revision < last.revision:
            raise m.RefusedError("stale", f"revision {new.revision} came after {last.revision}")

    def _gone_s(self) -> float:
        """Return how long the newer session must be silent before an older one is taken again."""
        if self._lease_s is None:
            return _LIVING_S
        return min(_LIVING_S, max(_MISSED_S, self._lease_s / 2))

    def _retire(self, old: str, new: str, now_s: float) -> None:
        self._retired.append(old)
        self._sessions = self._sessions.filled(now_s)
        if self._sessions.credit >= 1:
            self._sessions = self._sessions.spent(1)
            self._log.info("watcher_session", session=new, replaces=old)

    def _publish_accepted(self, new: m.Snapshot) -> None:
        said = f"{len(new.pods)} annotated pods, {len(new.others)} others"
        event = m.SnapshotAccepted(
            ts=self._clock.wall_s(),
            message=said,
            session=new.session,
            revision=new.revision,
            pods=len(new.pods),
        )
        self._server.publish(event)

    def desired(self) -> Desired:
        """Return the last complete snapshot, with whether its watcher is still heard."""
        silent_s = self._clock.now_s() - self._heard_s
        if self._lease_s is not None and silent_s - self._deaf_s > self._lease_s:
            return replace(self._desired, link="expired")
        if silent_s > _LIVING_S and self._desired.link == "living":
            return replace(self._desired, link="silent")
        return self._desired

    def watch_silence(self) -> None:
        """Say once that the watcher has fallen silent, and once that it is there without pods."""
        now_s = self._clock.now_s()
        silent_s = now_s - self._heard_s
        if silent_s - self._deaf_s <= _LIVING_S:
            return
        told = self._of_itself(now_s)
        silence = "it has no pods to tell" if told.unlisted else "nothing came of it"
        if silence == self._silence:
            return
        self._silence = silence
        since = f"for {silent_s:.0f} s" if self.snapshot else "since this start"
        more = told.unlisted
        if told.api_error not in more:
            more += f"; the API: {told.api_error}"
        self._log.warning(
            "watcher_silent",
            why=f"{silence} {since}" + (f": {more}" if more else ""),
            silent_s=round(silent_s, 3),
            session=self.snapshot.session if self.snapshot else None,
            holds=self._holds(),
            remedy="see the watcher's log, and its /readyz",
        )

    def _holds(self) -> str:
        """Return what becomes of limits while the watcher is silent."""
        if self._lease_s is None:
            return "no power is raised or given back, a limit may still go down"
        lease = f"{self._lease_s:g} s of silence (POWER_AGENT_LEASE)"
        if self.desired().link == "expired":
            return f"limits are given back, after {lease}"
        return f"no power is raised, a limit may still go down; all is given back after {lease}"

    def _say_back(self, new: m.Snapshot, now_s: float) -> None:
        if self._silence:
            silent_s = round(now_s - self._heard_s, 3)
            self._log.info("watcher_back", silent_s=silent_s, session=new.session)
        self._silence = ""

    def lease_ends_s(self) -> float | None:
        """Return when the lease runs out if nothing is heard; None where it is never, or has."""
        if self._lease_s is None or self.desired().link == "expired":
            return None
        return self._heard_s + self._deaf_s + self._lease_s

    def watcher(self) -> m.WatcherStatus:
        """Return the watcher as it looks from here."""
        now_s = self._clock.now_s()
        seen, age_s = self.snapshot, round(now_s - self._heard_s, 3)
        told = self._of_itself(now_s)
        if seen is None:
            return told
        return msgspec.structs.replace(
            told,
            connected=age_s - self._deaf_s <= _LIVING_S,
            session=seen.session,
            revision=seen.revision,
            age_s=age_s,
        )

    def _of_itself(self, now_s: float) -> m.WatcherStatus:
        """Return what the watcher says of itself and of the API, as far as it still holds."""
        word, ago_s = self._word, now_s - self._word_s
        if word is None or ago_s - self._deaf_s > _LIVING_S:
            return m.WatcherStatus()
        api_age_s = None if word.api_age_s is None else round(word.api_age_s + ago_s, 3)
        why = word.why if isinstance(word, m.Unlisted) else ""
        return m.WatcherStatus(unlisted=why, api_age_s=api_age_s, api_error=word.api_error)


def _asks(snapshot: m.Snapshot) -> tuple[object, ...]:
    """Return what a snapshot says of the node; a heartbeat says the same again."""
    return snapshot.scope, snapshot.pods, snapshot.others

"""Who may ask what: decodes requests, checks them against a closed table, keeps the answers due."""

import os
import time
from collections import deque
from dataclasses import replace
from typing import Any

from enforcer.policy import Desired
from enforcer.server import Incoming, Server
from enforcer.settings import EnforcerSettings
from shared import __version__
from shared import messages as m
from shared.logs import Log

_LIVING_S = 10.0  # a watcher repeats its snapshot every two seconds; silent beyond this
_MISSED_S = 5.0  # two heartbeats and a turn
_RETIRED = 64  # sessions remembered as replaced


class Desk:
    """Takes the requests of each turn; holds the last complete snapshot and who still waits."""

    def __init__(
        self, server: Server, settings: EnforcerSettings, log: Log, counts: m.Counters
    ) -> None:
        self._server, self._log, self._lease_s = server, log, settings.lease_s
        self._counts, self._told = counts, set[str]()
        watcher = frozenset({settings.watcher_uid})
        readers = watcher | settings.reader_uids | {os.geteuid()}  # powerctl beside it, as a probe
        # Who may send which message; what is not here nobody may.
        self._may = {m.Snapshot: watcher, m.Status: readers, m.Ping: readers}
        self.started_s = time.monotonic()
        self._heard_s = self._sessions_told_s = self.started_s
        self._retired: deque[str] = deque(maxlen=_RETIRED)
        self._desired = Desired("unheard")
        self.snapshot: m.Snapshot | None = None
        self.changed = False  # the snapshot differs from the one last decided on
        self.due: list[tuple[Incoming, m.Request]] = []

    def take(self, requests: list[Incoming]) -> None:
        """Take requests; each gets its answer, at once or when limits are read back."""
        self._counts.denied += self._server.take_refused()
        for incoming in requests:
            try:
                request = m.decode_request(incoming.payload)
                if incoming.uid not in self._may.get(type(request), ()):
                    raise m.RefusedError("denied", f"uid {incoming.uid} may not send that")
                if isinstance(request, m.Ping):
                    up_s = time.monotonic() - self.started_s
                    self._server.reply(incoming, m.Pong(version=__version__, uptime_s=up_s))
                    continue
                if isinstance(request, m.Snapshot):
                    self._take(request)
                self.due.append((incoming, request))
            except m.RefusedError as error:
                self._refuse(incoming, error)

    def _refuse(self, incoming: Incoming, error: m.RefusedError) -> None:
        code, uid, why = error.code, incoming.uid, str(error)
        kind = code if code in ("denied", "stale") else "malformed"
        setattr(self._counts, kind, getattr(self._counts, kind) + 1)
        if f"{code} {uid}" not in self._told:  # each once: a flood is counted, not logged
            self._told.add(f"{code} {uid}")
            self._log.warning("message_denied", code=code, uid=uid, pid=incoming.pid, why=why)
        self._server.reply(incoming, m.Error(code=code, message=why))
        self._server.publish(m.MessageDenied(ts=time.time(), message=why, code=code, uid=uid))

    def _take(self, new: m.Snapshot) -> None:
        last = self.snapshot
        if new.session in self._retired:
            # Where the newer one is gone, before a lease gives everything back.
            gone_s = min(_LIVING_S, max(_MISSED_S, (self._lease_s or 1e9) / 2))
            if time.monotonic() - self._heard_s <= gone_s:
                raise m.RefusedError("stale", f"session {new.session} was replaced by a newer one")
            self._retired.remove(new.session)  # the newer one is gone
        if last and last.session == new.session and new.revision < last.revision:
            raise m.RefusedError("stale", f"revision {new.revision} came after {last.revision}")
        if last and last.session != new.session:
            self._retired.append(last.session)
            now = time.monotonic()
            # One right after a watcher's restart is told too; a storm is no storm of lines.
            if self._sessions_told_s < now + 3 * _LIVING_S:
                self._sessions_told_s = max(now, self._sessions_told_s) + _LIVING_S
                self._log.info("watcher_session", session=new.session, replaces=last.session)
        self._counts.snapshots += 1
        self.changed |= self.desired().link != "living"  # what a silence had put off is due
        self._heard_s = time.monotonic()
        self.snapshot = new
        if last and (last.pods, last.others) == (new.pods, new.others):
            return  # a heartbeat
        self.changed = True
        pods = {pod.uid: pod.limit_mw for pod in new.pods}
        ids = {alias: pod.uid for pod in new.pods for alias in pod.aliases}
        self._desired = Desired("living", pods, ids, frozenset(new.others))
        who: dict[str, Any] = {"session": new.session, "revision": new.revision}
        said = f"{len(pods)} annotated pods, {len(new.others)} others"
        event = m.SnapshotAccepted(ts=time.time(), message=said, pods=len(pods), **who)
        self._server.publish(event)

    def desired(self) -> Desired:
        """Return the last complete snapshot, with whether its watcher is still heard."""
        silent_s = time.monotonic() - self._heard_s
        if self._lease_s is not None and silent_s > self._lease_s:
            return replace(self._desired, link="expired")
        if silent_s > _LIVING_S and self._desired.link == "living":
            return replace(self._desired, link="silent")
        return self._desired

    def watcher(self) -> m.WatcherStatus:
        """Return the watcher as it looks from here."""
        seen, age_s = self.snapshot, round(time.monotonic() - self._heard_s, 3)
        if seen is None:
            return m.WatcherStatus()
        near = age_s <= _LIVING_S
        return m.WatcherStatus(
            connected=near, session=seen.session, revision=seen.revision, age_s=age_s
        )

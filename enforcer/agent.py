"""The loop: observe, decide, act, answer. No policy lives here."""

import os
import time
from collections.abc import Container, Mapping
from dataclasses import replace
from typing import Any

from enforcer import standing
from enforcer.desk import Desk
from enforcer.gpus import WRITE_GAP_S, Card, Gpus, Retry
from enforcer.ledger import Ledger, LedgerError
from enforcer.nvml import NvmlError
from enforcer.policy import Desired, Owned, bounds, plan
from enforcer.procfs import ProcessReader
from enforcer.server import Server
from enforcer.settings import EnforcerSettings
from shared import __version__
from shared import messages as m
from shared.logs import Log
from shared.units import MAX_MW, same_limit

_WAITING_SCAN_S, _EARLY = 0.1, 6  # a CUDA context comes seconds after its pod; six waits: 63 s
_TURN_S = 0.02  # snapshots that come faster are decided on together
_FRESH_S = 1.0  # a question within this time is answered from the last reading
_IDLE_S = 5.0  # NVML is let go when nobody asked for this long
_LAST_TRIES, _LAST_GAP_S = 3, 0.5  # at a stop: an uninstalled agent gives nothing back any more


class Agent:
    """Joins what is wanted with what is seen and acts on the difference."""

    def __init__(
        self, c: EnforcerSettings, log: Log, server: Server, reader: ProcessReader, ledger: Ledger
    ) -> None:
        self._config, self._log, self._server = c, log, server
        self._ledger = ledger
        self._counts = m.Counters()
        self._desk = Desk(server, c, log, self._counts)
        self._me = m.EnforcerStatus(
            version=__version__,
            pid=os.getpid(),
            dry_run=c.dry_run,
            min_mw=c.min_mw,
            max_mw=c.max_mw,
            conflict=c.conflict,
            cgroup_roots=list(reader.roots),
            ledger=str(ledger.path),
        )
        self._gpus = Gpus(self._me, ledger.entries, reader, log, server)
        self._cards = self._gpus.cards
        self._looked_s = self._scan_s = self._due_s = 0.0
        self._asked_s = time.monotonic()
        self._waiting: frozenset[str] = frozenset()
        self._search = Retry()

    def turn(self) -> None:
        """Wait for a request or the next deadline, then observe, decide, act and answer."""
        incoming = self._server.receive(self._wake_s() - time.monotonic())
        now = time.monotonic()
        if not self._desk.due:
            self._due_s = now
        self._desk.take(incoming)
        if self._desk.changed and now < self._looked_s + _TURN_S:
            return  # whoever asked is answered after the next look
        if any(isinstance(request, m.Status) for _, request in self._desk.due):
            self._asked_s = self._scan_s = now
        if self._desk.changed or now >= self._wake_s():
            self._look(now)
        late = any(c.decision.action and not c.failed for c in self._cards.values())
        if self._desk.due and (not late or now > self._due_s + 2 * WRITE_GAP_S):
            self._answer(now)  # a write that waits for its gap comes first

    def _wake_s(self) -> float:
        if self._desk.changed:
            return self._looked_s + _TURN_S
        writes = (card.may_write_s() for card in self._cards.values() if card.decision.action)
        return min([self._scan_s, *writes])

    def _look(self, now: float) -> None:
        desired = self._desk.desired()
        if self._desk.changed:  # a scan is no reason to let the next change wait
            self._desk.changed, self._looked_s = False, now
        needed = bool(desired.pods or self._ledger.entries) or now < self._asked_s + _IDLE_S
        scan = now >= self._scan_s or not needed or bool(self._homeless(desired))
        due = needed or self._gpus.incomplete or self._gpus.nvml.is_open  # a last look
        if due and self._gpus.opened(now, needed=needed):
            if now >= self._gpus.read_s + self._config.reconcile_s:
                self._gpus.read(now)
            self._decide_and_act(desired, None if scan else self._touched(desired))
        if not needed:
            self._gpus.close()
        if scan:
            waiting = self._homeless(desired)
            if waiting != self._waiting:
                self._waiting, self._search = waiting, Retry()
                self._search.failed()
            elif waiting and now >= self._search.due_s:
                self._gpus.incomplete = True  # NVML lists the GPUs there were when it was opened
                self._search.failed()
            early = waiting and self._search.failures <= _EARLY
            self._scan_s = now + min(self._config.scan_s, _WAITING_SCAN_S if early else 1e9)

    def _homeless(self, desired: Desired) -> frozenset[str]:
        """Return the annotated pods that were not seen on any GPU."""
        seen = [owner for card in self._cards.values() for owner in card.occupants or ()]
        return frozenset(desired.pods.keys() - desired.pods_among(seen))

    def _touched(self, desired: Desired) -> set[str]:
        """Return the GPUs that a new snapshot bears on: only they are looked at again for it."""
        seen = self._gpus.observe(desired, ())
        decisions = plan(desired, seen, self._ledger.entries, self._config)
        return {uuid for uuid, decision in decisions.items() if decision.action}

    def _decide_and_act(self, desired: Desired, among: Container[str] | None) -> None:
        """Decide on every GPU; write the ledger, then the limits that may be written now."""
        entries, ready = dict(self._ledger.entries), []
        seen = self._gpus.observe(desired, among)
        for uuid, decision in plan(desired, seen, entries, self._config).items():
            card, action, why = self._cards[uuid], decision.action, decision.reason
            if decision.state != card.logged:
                card.logged = decision.state
                self._log.info("gpu_state", uuid=uuid, state=decision.state, why=why)
            if card.failed and action == "drift":  # the write that failed, once more
                action = card.failed.action
            if self._config.dry_run and action:
                action, why = None, f"dry run, nothing is written; would be: {why}"
            card.decision = replace(decision, action=action, reason=why)
            if action and time.monotonic() >= card.may_write_s():
                ready.append(card)
                self._enter(entries, card)
        if entries != self._ledger.entries or self._me.ledger_fault:
            self._store(entries)
        for card in ready:
            if card.gpu.uuid in self._ledger.entries:  # I2: else its original is not on disk
                self._write(card)
        for uuid, card in self._cards.items():
            card.show(self._ledger.entries.get(uuid))

    def _enter(self, entries: dict[str, Owned], card: Card) -> None:
        """Enter what is about to be written, with the original limit where it is the first time.

        A GPU that is given back is nobody's from here on: see policy's _hold.
        """
        gpu, decision, target_mw = card.gpu, card.decision, card.decision.target_mw
        assert target_mw is not None  # there is one with every action
        owned = entries.get(gpu.uuid)
        if owned is None:
            self._gpus.read_one(card)
            original_mw = gpu.limit_mw or 0
            if not 0 < original_mw <= MAX_MW:
                why = f"not taken: its present limit cannot be read ({gpu.limit_mw} mW)"
                self._failed(card, "UNREADABLE", why)
                return
            owned = Owned(original_mw, target_mw, decision.pods, time.time())
        pods, aliases = decision.pods, decision.aliases
        entries[gpu.uuid] = replace(owned, set_mw=target_mw, pods=pods, aliases=aliases)

    def _store(self, entries: Mapping[str, Owned]) -> None:
        """Write the ledger; where that fails no new GPU is taken, and owned ones are still kept."""
        fault = ""
        try:
            self._ledger.store(entries)
        except LedgerError as error:
            fault = str(error)
            for uuid in entries.keys() - self._ledger.entries.keys():
                self._failed(self._cards[uuid], "LEDGER", f"not taken: {error}")
            self._ledger.entries = {u: e for u, e in entries.items() if u in self._ledger.entries}
        if bool(fault) != bool(self._me.ledger_fault):
            say = self._log.error if fault else self._log.info
            say("ledger", why=fault or "can be written again")
        self._me.ledger_fault = fault

    def _write(self, card: Card) -> None:
        """Set the limit unless it is that already, read it back, and say what came of it."""
        gpu, target_mw, nvml = card.gpu, card.decision.target_mw, self._gpus.nvml
        assert target_mw is not None
        if card.decision.action == "note":  # the ledger has it, the GPU has nothing to learn
            self._done(card, target_mw)
            return
        try:
            before_mw = nvml.limit_mw(card.handle)
            if before_mw != target_mw:
                card.wrote_s = time.monotonic()
                nvml.set_limit(card.handle, target_mw)
                action = str(card.decision.action)
                gpu.writes[action] = gpu.writes.get(action, 0) + 1
                self._counts.limit_writes += 1
            nvml.read_into(card.handle, gpu)
        except NvmlError as error:
            self._failed(card, error.name, str(error))
            if error.stale:
                self._gpus.lose(card, str(error))
            return
        if gpu.limit_mw is None or not same_limit(gpu.limit_mw, target_mw):
            why = f"set to {target_mw} mW without an error, yet it reads {gpu.limit_mw} mW"
            self._failed(card, "NOT_HELD", why)
        else:
            self._done(card, before_mw)

    def _done(self, card: Card, before_mw: int) -> None:
        action, why = card.decision.action, card.decision.reason
        drifted_to_mw, card.drifted_to_mw = card.drifted_to_mw, None
        if action == "release":
            self._store({u: e for u, e in self._ledger.entries.items() if u != card.gpu.uuid})
            self._gpus.tell(m.LimitReleased, card, before_mw, why)
        elif action == "drift":
            self._counts.drifts += 1
            card.drifted_to_mw = before_mw
            if drifted_to_mw != before_mw:  # once a value: it may come every second
                why = f"somebody else had changed it; again {why}"
                self._gpus.tell(m.LimitDrifted, card, before_mw, why)
        elif action != "note":
            self._gpus.tell(m.LimitSet, card, before_mw, why)
        card.decision = replace(card.decision, action=None)

    def _failed(self, card: Card, error: str, why: str) -> None:
        """Count the failure, tell it once, and let the next try wait for longer."""
        failures = card.gpu.write_failures
        failures[error] = failures.get(error, 0) + 1
        self._counts.limit_write_failures += 1
        failed = replace(card.decision, state="failed", reason=why)
        if failed != card.failed:
            card.failed, card.retry = failed, Retry()
            self._gpus.tell(m.LimitFailed, card, card.gpu.limit_mw, why)
        card.retry.failed()

    def _answer(self, now: float) -> None:
        """Answer everybody who waits, from one reading."""
        if self._gpus.nvml.is_open and now >= self._gpus.read_s + _FRESH_S:
            self._gpus.read(now)
        me, snapshot = self._me, self._desk.snapshot
        me.uptime_s = round(now - self._desk.started_s, 3)
        me.node = snapshot.node if snapshot else None
        gpus = [card.gpu for card in self._cards.values()]
        gpus.sort(key=lambda gpu: (gpu.index is None, gpu.index))
        pods = standing.pods(snapshot.pods if snapshot else (), gpus, self._clamp)
        seen: dict[str, Any] = {"gpus": gpus, "pods": pods, "counters": self._counts}
        due, self._desk.due = self._desk.due, []
        for incoming, request in due:
            reply: m.Reply = m.StatusReply(enforcer=me, watcher=self._desk.watcher(), **seen)
            if isinstance(request, m.Snapshot):
                to: dict[str, Any] = {"session": request.session, "revision": request.revision}
                reply = m.Report(nvml=me.nvml, nvml_message=me.nvml_message, **to, **seen)
            self._server.reply(incoming, reply)

    def _clamp(self, limit_mw: int, gpu: m.Gpu) -> int:
        low, high = bounds(self._config, gpu.min_mw or 0, gpu.max_mw or limit_mw)
        return max(low, min(high, limit_mw))

    def stop(self) -> None:
        """Give every GPU back, or leave limits and ledger for the next start, as configured."""
        for _ in range(_LAST_TRIES if self._config.on_exit == "restore" else 0):
            self._gpus.retry_now()
            if self._ledger.entries and self._gpus.opened(time.monotonic(), needed=True):
                self._decide_and_act(Desired("stopping"), ())
            if not any(card.failed for card in self._cards.values()):
                break
            time.sleep(_LAST_GAP_S)
        self._gpus.close()

"""The loop: observe, decide, act, answer. No policy lives here."""

import os
import time
from collections.abc import Container, Mapping
from dataclasses import replace

from enforcer.desk import Desk
from enforcer.gpus import WRITE_GAP_S, Card, Fault, Gpus, backoff_s
from enforcer.ledger import Ledger, LedgerError
from enforcer.nvml import NvmlError
from enforcer.policy import Decision, Desired, Owned, Rules, plan
from enforcer.procfs import ProcessReader
from shared import __version__, standing
from shared import messages as m
from shared.logs import Log
from shared.settings import EnforcerSettings
from shared.transport import Server
from shared.units import same_limit

_WAITING_SCAN_S, _WAITING_FOR_S = 0.1, 60.0  # a CUDA context comes seconds after its pod
_TURN_S = 0.02  # snapshots that come faster are decided on together
_FRESH_S = 1.0  # a question within this time is answered from the last reading
_SEARCH_S = 1.0, 32.0  # NVML lists the GPUs there were when it was initialised
_IDLE_S = 5.0  # NVML is let go when nobody asked for this long


class Agent:
    """Joins what is wanted with what is seen and acts on the difference."""

    def __init__(
        self, c: EnforcerSettings, log: Log, server: Server, reader: ProcessReader, ledger: Ledger
    ) -> None:
        self._config, self._log, self._server = c, log, server
        self._rules = Rules(c.min_mw, c.max_mw, c.safe_default, c.conflict, c.release_to)
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
        self._looked_s = self._scan_s = self._due_s = self._waiting_since_s = self._search_s = 0.0
        self._asked_s = time.monotonic()
        self._waiting: frozenset[str] = frozenset()

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
        late = any(c.decision.action and not c.fault for c in self._cards.values())
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
        scan = now >= self._scan_s or not self._gpus.nvml.is_open or bool(self._homeless(desired))
        if (needed or self._gpus.incomplete) and self._gpus.opened(now):
            if now >= self._gpus.read_s + self._config.reconcile_s:
                self._gpus.read(now)
            self._decide_and_act(desired, None if scan else self._touched(desired))
        if not needed:
            self._gpus.close()
        if scan:
            waiting = self._homeless(desired)
            if waiting != self._waiting:
                self._waiting, self._waiting_since_s = waiting, now
                self._search_s = now + _SEARCH_S[0]
            elif waiting and now >= self._search_s:  # its GPU may have come after NVML was opened
                self._gpus.incomplete = True
                self._search_s = now + min(_SEARCH_S[1], now - self._waiting_since_s)
            soon = waiting and now < self._waiting_since_s + _WAITING_FOR_S
            self._scan_s = now + min(self._config.scan_s, _WAITING_SCAN_S if soon else 1e9)

    def _homeless(self, desired: Desired) -> frozenset[str]:
        """Return the annotated pods that were not seen on any GPU."""
        seen = [one.owner for card in self._cards.values() for one in card.occupants or ()]
        found = {desired.uid_of(owner) for owner in seen if isinstance(owner, str)}
        return frozenset(desired.pods.keys() - found)

    def _touched(self, desired: Desired) -> set[str]:
        """Return the GPUs that a new snapshot bears on: only they are looked at again for it."""
        seen = self._gpus.observe(desired, ())
        decisions = plan(desired, seen, self._ledger.entries, self._rules)
        return {uuid for uuid, decision in decisions.items() if decision.action}

    def _decide_and_act(self, desired: Desired, among: Container[str] | None) -> None:
        """Decide on every GPU; write the ledger, then the limits that may be written now."""
        entries, ready = dict(self._ledger.entries), []
        seen = self._gpus.observe(desired, among)
        for uuid, decision in plan(desired, seen, entries, self._rules).items():
            card = self._cards[uuid]
            if decision.state != card.decision.state:
                self._log.info("gpu_state", uuid=uuid, state=decision.state, why=decision.reason)
            if card.fault and decision.action == "drift":  # the write that failed, once more
                decision = replace(decision, action=card.fault.action)  # noqa: PLW2901
            card.decision = decision
            if self._config.dry_run and decision.action:
                why = f"dry run, nothing is written; would be: {decision.reason}"
                card.decision = replace(decision, action=None, reason=why)
            elif decision.action and time.monotonic() >= card.may_write_s():
                ready.append(card)
                self._enter(entries, card, decision)
        if entries != self._ledger.entries or self._me.ledger_fault:
            self._store(entries, durable=entries.keys() != self._ledger.entries.keys())
        for card in ready:
            if card.gpu.uuid in self._ledger.entries:  # I2: else its original is not on disk
                self._write(card)
        for uuid, card in self._cards.items():
            card.show(self._ledger.entries.get(uuid))

    def _enter(self, entries: dict[str, Owned], card: Card, decision: Decision) -> None:
        """Enter what is about to be written, with the original limit where it is the first time."""
        gpu, target_mw = card.gpu, decision.target_mw
        owned = entries.get(gpu.uuid)
        if target_mw is None:
            return
        if owned and decision.action == "release":  # nobody's from here on: see policy's _hold
            entries[gpu.uuid] = Owned(owned.original_mw, target_mw, frozenset(), owned.since)
            return
        if owned is None:
            self._gpus.read_one(card)
            if gpu.limit_mw is None:
                self._failed(card, "UNREADABLE", "not taken: its present limit cannot be read")
                return
            owned = Owned(gpu.limit_mw, target_mw, decision.pods, time.time())
        pods, aliases = decision.pods, decision.aliases
        entries[gpu.uuid] = replace(owned, set_mw=target_mw, pods=pods, aliases=aliases)

    def _store(self, entries: Mapping[str, Owned], *, durable: bool) -> None:
        """Write the ledger; where that fails no new GPU is taken, and owned ones are still kept."""
        try:
            self._ledger.store(entries, durable=durable)
        except LedgerError as error:
            for uuid in entries.keys() - self._ledger.entries.keys():
                self._failed(self._cards[uuid], "LEDGER", f"not taken: {error}")
            self._ledger.entries = {u: e for u, e in entries.items() if u in self._ledger.entries}
            if not self._me.ledger_fault:
                self._log.error("ledger", why=str(error), remedy="free or repair that disk")
            self._me.ledger_fault = str(error)
        else:
            if self._me.ledger_fault:
                self._log.info("ledger", why="can be written again")
            self._me.ledger_fault = ""

    def _write(self, card: Card) -> None:
        """Set the limit, read it back, and say what came of it."""
        gpu, decision = card.gpu, card.decision
        action, target_mw, before_mw = decision.action, decision.target_mw, gpu.limit_mw
        if action is not None and action != "note" and target_mw is not None:
            card.wrote_s = time.monotonic()
            try:
                before_mw = self._gpus.nvml.limit_mw(card.handle)
                if before_mw != target_mw:
                    self._gpus.nvml.set_limit(card.handle, target_mw)
                    gpu.writes[action] = gpu.writes.get(action, 0) + 1
                    self._counts.limit_writes += 1
                self._gpus.nvml.read_into(card.handle, gpu)
            except NvmlError as error:
                self._failed(card, error.name, str(error))
                if error.stale:
                    self._gpus.lose(card, str(error))
                return
            if gpu.limit_mw is None or not same_limit(gpu.limit_mw, target_mw):
                why = f"set to {target_mw} mW without an error, yet it reads {gpu.limit_mw} mW"
                self._failed(card, "NOT_HELD", why)
                return
        self._done(card, before_mw)

    def _done(self, card: Card, before_mw: int | None) -> None:
        decision = card.decision
        if decision.action == "release":
            kept = {u: e for u, e in self._ledger.entries.items() if u != card.gpu.uuid}
            self._store(kept, durable=False)
            self._gpus.tell(m.LimitReleased, card, before_mw, decision.reason)
        elif decision.action == "drift":
            self._counts.drifts += 1
            if card.drifted_to_mw != before_mw:  # once a value: it may come every second
                card.drifted_to_mw = before_mw
                why = f"somebody else had changed it; again {decision.reason}"
                self._gpus.tell(m.LimitDrifted, card, before_mw, why)
        elif decision.action != "note":
            card.drifted_to_mw = None
            self._gpus.tell(m.LimitSet, card, before_mw, decision.reason)
        card.decision, card.fault, card.retries = replace(decision, action=None), None, 0

    def _failed(self, card: Card, error: str, why: str) -> None:
        failures = card.gpu.write_failures
        failures[error] = failures.get(error, 0) + 1
        self._counts.limit_write_failures += 1
        fault = Fault(why, card.decision.target_mw, card.decision.action)
        if card.fault is None or (card.fault.why, card.fault.target_mw) != (why, fault.target_mw):
            card.fault, card.retries = fault, 0
            self._gpus.tell(m.LimitFailed, card, card.gpu.limit_mw, why)
        card.retry_s = time.monotonic() + backoff_s(card.retries)
        card.retries += 1

    def _answer(self, now: float) -> None:
        if self._gpus.nvml.is_open and now >= self._gpus.read_s + _FRESH_S:
            self._gpus.read(now)
        me, snapshot = self._me, self._desk.snapshot
        me.uptime_s = round(now - self._desk.started_s, 3)
        me.node = snapshot.node if snapshot else None
        gpus = [card.gpu for card in self._cards.values()]
        gpus.sort(key=lambda gpu: (gpu.index is None, gpu.index))
        pods = standing.pods(snapshot.pods if snapshot else (), gpus, self._clamp)
        due, self._desk.due = self._desk.due, []
        for incoming, request in due:
            if isinstance(request, m.Snapshot):
                reply: m.Reply = m.Report(
                    session=request.session,
                    revision=request.revision,
                    nvml=me.nvml,
                    nvml_message=me.nvml_message,
                    gpus=gpus,
                    pods=pods,
                    counters=self._counts,
                )
            else:
                link = self._desk.watcher()
                reply = m.StatusReply(
                    enforcer=me, watcher=link, gpus=gpus, pods=pods, counters=self._counts
                )
            self._server.reply(incoming, reply)

    def _clamp(self, limit_mw: int, gpu: m.Gpu) -> int:
        low, high = self._rules.bounds(gpu.min_mw or 0, gpu.max_mw or limit_mw)
        return max(low, min(high, limit_mw))

    def stop(self) -> None:
        """Give every GPU back, or leave limits and ledger for the next start, as configured."""
        if self._config.on_exit == "restore" and self._ledger.entries:
            self._gpus.retry_now()
            if self._gpus.opened(time.monotonic()):
                self._decide_and_act(Desired("stopping"), ())
        self._gpus.close()

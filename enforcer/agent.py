"""The loop: observe, decide, act. No policy lives here, and nothing else touches the hardware."""

import os
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from enforcer import procfs, report
from enforcer.desk import Desk
from enforcer.ledger import Ledger, LedgerError
from enforcer.nvml import Handle, Nvml, NvmlError
from enforcer.policy import Decision, Desired, Occupant, Owned, Rules, SeenGpu, plan, same_limit
from enforcer.procfs import ProcessReader
from shared import __version__
from shared import messages as m
from shared.logs import Log
from shared.settings import EnforcerSettings
from shared.transport import Server

_WAITING_SCAN_S, _WAITING_FOR_S = 0.1, 60.0  # a CUDA context comes seconds after its pod
_TURN_S = 0.02  # snapshots that come faster are decided on together
_WRITE_GAP_S = 0.1  # frequent writes disturb collective operations on the GPU
_FRESH_S = 1.0  # a question within this time is answered from the last reading
_IDLE_S = 5.0  # NVML is let go when it was not needed for this long
_RETRY_S, _RETRY_MOST_S = 1.0, 30.0
_SHOWN = 32  # processes that a GPU shows in an answer


_UNDECIDED = Decision("free", "not looked at yet")


@dataclass(slots=True)
class Card:
    """One GPU between turns: its record, its handle (None while it does not answer), its writes."""

    gpu: m.Gpu
    handle: Handle | None = None
    decision: Decision = _UNDECIDED
    fault: tuple[str, int | None] | None = None  # why the last write failed, and to what limit
    retry_s: float = 0.0
    retries: int = 0
    wrote_s: float = -_WRITE_GAP_S
    drifted_to_mw: int | None = None

    def may_write_s(self) -> float:
        """Return when the next write may go out: ten a second, and a failed one backs off."""
        failed = self.fault is not None and self.fault[1] == self.decision.target_mw
        return max(self.wrote_s + _WRITE_GAP_S, self.retry_s if failed else 0.0)


class Agent:
    """Joins what is wanted with what is seen and acts on the difference."""

    def __init__(
        self,
        config: EnforcerSettings,
        log: Log,
        server: Server,
        reader: ProcessReader,
        book: Ledger,
    ) -> None:
        self._config, self._log, self._server = config, log, server
        self._reader, self._ledger, self._ledger_fault = reader, book, ""
        c = config
        self._rules = Rules(c.min_mw, c.max_mw, c.safe_default, c.conflict, c.release_to)
        self._desk, self._nvml = Desk(server, config, log), Nvml()
        self._nvml_is: tuple[m.NvmlState, str] = ("absent", "not opened yet")
        self._cards = {uuid: Card(m.Gpu(uuid=uuid, managed=True)) for uuid in book.entries}
        self._incomplete, self._opens, self._open_s = True, 0, 0.0
        self._scan_s = self._read_s = self._looked_s = 0.0
        self._asked_s = time.monotonic()
        self._waiting: tuple[frozenset[str], float] = (frozenset(), 0.0)
        self._counts: Counter[str] = Counter()

    def turn(self) -> None:
        """Wait for a request or the next deadline, then observe, decide, act and answer."""
        self._desk.take(self._server.receive(self._wait_s()))
        now = time.monotonic()
        asked = any(isinstance(request, m.Status) for _, request in self._desk.due)
        if self._desk.changed and now < self._looked_s + _TURN_S:
            return  # whoever asked gets his answer with the next look
        if asked:
            self._asked_s = now
        if self._desk.changed or asked or now >= self._wake_s():
            self._look(now)
        if self._desk.due:
            self._answer(now)

    def _wake_s(self) -> float:
        ready = (card.may_write_s() for card in self._cards.values() if card.decision.action)
        return min([self._scan_s, *ready])

    def _wait_s(self) -> float:
        wake_s = self._looked_s + _TURN_S if self._desk.changed else self._wake_s()
        return max(0.0, wake_s - time.monotonic())

    def _look(self, now: float) -> None:
        desired = self._desk.desired()
        self._desk.changed, self._looked_s = False, now
        needed = bool(desired.pods or self._ledger.entries) or now < self._asked_s + _IDLE_S
        if (needed or self._incomplete) and self._opened(now):
            if now >= self._read_s:
                self._read_all(now)
            self._act(desired, self._observe(desired))
        if not needed:
            self._nvml.close()
        found = {process.owner for card in self._cards.values() for process in card.gpu.processes}
        waiting = frozenset(desired.pods.keys() - found)
        if waiting != self._waiting[0]:
            self._waiting = (waiting, now)
        soon = waiting and now < self._waiting[1] + _WAITING_FOR_S
        self._scan_s = now + min(self._config.scan_s, _WAITING_SCAN_S if soon else 1e9)

    # observe

    def _opened(self, now: float) -> bool:
        """Open NVML, or open it anew when a GPU is missing; tells whether it is usable."""
        if now < self._open_s or (self._nvml.is_open and not self._incomplete):
            return self._nvml.is_open
        self._open_s = now + min(_RETRY_S * 2**self._opens, _RETRY_MOST_S)
        self._opens = min(self._opens + 1, 10)
        try:
            found, faults = self._nvml.open()
        except NvmlError as error:
            self._nvml.close()
            self._say_nvml("absent" if error.absent else "failing", str(error))
            self._incomplete = True
            return False
        self._say_nvml("failing" if faults else "ok", "; ".join(faults) or "ok")
        for handle, seen in found:
            card = self._cards.setdefault(seen.uuid, Card(seen))
            if card.gpu.state == "lost":
                self._tell(m.GpuBack, card, None, f"it answers again, as GPU {seen.index}")
            seen.writes, seen.write_failures = card.gpu.writes, card.gpu.write_failures
            card.handle, card.gpu = handle, seen
        present = {seen.uuid for _, seen in found}
        for uuid in self._cards.keys() - present:
            self._lose(self._cards[uuid], "it is not among the GPUs that NVML lists")
        self._incomplete = bool(faults) or len(present) < len(self._cards)
        if not self._incomplete:
            self._opens, self._open_s = 0, 0.0
        self._read_all(now)
        return self._nvml.is_open

    def _say_nvml(self, state: m.NvmlState, why: str) -> None:
        if (state, why) != self._nvml_is:
            self._nvml_is = (state, why)
            say = self._log.info if state == "ok" else self._log.error
            say("nvml", state=state, why=why, driver=self._nvml.driver_version)

    def _lose(self, card: Card, why: str) -> None:
        card.handle, card.gpu.index, card.gpu.processes = None, None, []
        card.gpu.limit_mw = card.gpu.enforced_mw = card.gpu.power_mw = None
        self._incomplete = True
        if card.gpu.state != "lost":
            card.gpu.state, card.gpu.reason = "lost", why
            self._tell(m.GpuLost, card, None, why)

    def _read_all(self, now: float) -> None:
        self._read_s = now + self._config.reconcile_s
        for card in self._cards.values():
            self._read(card)

    def _read(self, card: Card) -> None:
        if card.handle is not None:
            try:
                self._nvml.read_into(card.handle, card.gpu)
            except NvmlError as error:
                if error.stale:
                    self._lose(card, str(error))

    def _observe(self, desired: Desired) -> list[SeenGpu]:
        seen = []
        for uuid, card in self._cards.items():
            occupants = self._occupants(card, desired) if card.handle is not None else None
            if card.handle is not None:
                g = card.gpu
                low, default, high = g.min_mw or 0, g.default_mw or 0, g.max_mw or 0
                seen.append(SeenGpu(uuid, occupants, g.limit_mw, default, low, high))
        return seen

    def _occupants(self, card: Card, desired: Desired) -> frozenset[Occupant] | None:
        asked_ticks = procfs.now_ticks()
        try:
            pids = self._nvml.pids(card.handle)
        except NvmlError as error:
            card.gpu.processes = [m.Process(pid=0, owner="unknown", evidence=str(error))]
            if error.stale:
                self._lose(card, str(error))
            return None
        found, card.gpu.processes = set(), []
        for pid in sorted(pids):
            owner, evidence = self._reader.owner(pid, asked_ticks)
            if owner is not None:
                found.add(Occupant(owner))
                name = desired.uid_of(owner) if isinstance(owner, str) else owner.value
                if len(card.gpu.processes) < _SHOWN:
                    card.gpu.processes.append(m.Process(pid=pid, owner=name, evidence=evidence))
        return frozenset(found)

    # act

    def _act(self, desired: Desired, seen: list[SeenGpu]) -> None:
        """Decide on every GPU; write the ledger, then the limits that may be written now."""
        ready: dict[str, Decision] = {}
        entries = dict(self._ledger.entries)
        for uuid, decision in plan(desired, seen, entries, self._rules).items():
            card = self._cards[uuid]
            if self._config.dry_run and decision.action:
                why = f"dry run, nothing is written; would be: {decision.reason}"
                decision = replace(decision, action=None, reason=why)  # noqa: PLW2901
            if decision.state != card.decision.state:
                self._log.info("gpu_state", uuid=uuid, state=decision.state, why=decision.reason)
            card.decision = decision
            if decision.action and time.monotonic() >= card.may_write_s():
                ready[uuid] = decision
                if decision.action != "release" and decision.target_mw is not None:
                    self._enter(entries, card, decision, decision.target_mw)
        if ready or self._ledger_fault:
            self._store(entries, durable=entries.keys() != self._ledger.entries.keys())
        for uuid in ready.keys() & self._ledger.entries.keys():  # I2: what is not on disk waits
            self._write(self._cards[uuid], ready[uuid])
        for uuid, card in self._cards.items():
            self._show(card, self._ledger.entries.get(uuid))

    def _enter(
        self, entries: dict[str, Owned], card: Card, decision: Decision, target_mw: int
    ) -> None:
        uuid, owned = card.gpu.uuid, entries.get(card.gpu.uuid)
        if owned is None:
            self._read(card)
            if card.gpu.limit_mw is None:
                self._failed(card, "UNREADABLE", "not taken: its present limit cannot be read")
                return
            owned = Owned(card.gpu.limit_mw, target_mw, decision.pods, time.time())
        entries[uuid] = replace(owned, set_mw=target_mw, pods=decision.pods)

    def _store(self, entries: Mapping[str, Owned], *, durable: bool) -> None:
        """Write the ledger; where that fails no new GPU is taken, and owned ones are still kept."""
        try:
            self._ledger.store(entries, durable=durable)
        except LedgerError as error:
            for uuid in entries.keys() - self._ledger.entries.keys():
                self._failed(self._cards[uuid], "LEDGER", f"not taken: {error}")
            self._ledger.entries = {u: e for u, e in entries.items() if u in self._ledger.entries}
            if not self._ledger_fault:
                self._log.error("ledger", why=str(error), remedy="free or repair that disk")
            self._ledger_fault = str(error)
            return
        if self._ledger_fault:
            self._log.info("ledger", why="can be written again")
        self._ledger_fault = ""

    def _write(self, card: Card, decision: Decision) -> None:
        """Set the limit, read it back, and say what came of it."""
        target_mw, action = decision.target_mw, decision.action
        if target_mw is None or action is None or action == "note":
            return
        card.wrote_s, before_mw = time.monotonic(), card.gpu.limit_mw
        try:
            before_mw = self._nvml.limit_mw(card.handle)
            if before_mw != target_mw:
                self._nvml.set_limit(card.handle, target_mw)
                card.gpu.writes[action] = card.gpu.writes.get(action, 0) + 1
                self._counts["limit_writes"] += 1
            self._nvml.read_into(card.handle, card.gpu)
        except NvmlError as error:
            self._failed(card, error.name, str(error))
            if error.stale:
                self._lose(card, str(error))
            return
        reads_mw = card.gpu.limit_mw
        if reads_mw is None or not same_limit(reads_mw, target_mw):
            why = f"set to {target_mw} mW without an error, yet it reads {reads_mw} mW"
            self._failed(card, "NOT_HELD", why)
            return
        card.fault, card.retries = None, 0
        card.decision = replace(decision, action=None)
        if action == "release":
            kept = {u: e for u, e in self._ledger.entries.items() if u != card.gpu.uuid}
            self._store(kept, durable=False)
            self._ledger.entries = kept
        elif action == "drift":
            self._counts["drifts"] += 1
        self._wrote(card, action, before_mw)

    def _wrote(self, card: Card, action: str, before_mw: int | None) -> None:
        if action != "drift":
            card.drifted_to_mw = None
            kind = m.LimitReleased if action == "release" else m.LimitSet
            self._tell(kind, card, before_mw, card.decision.reason)
        elif card.drifted_to_mw != before_mw:  # once a value: another writer may come every second
            card.drifted_to_mw = before_mw
            why = f"somebody else had changed it; again {card.decision.reason}"
            self._tell(m.LimitDrifted, card, before_mw, why)

    def _failed(self, card: Card, error: str, why: str) -> None:
        failures = card.gpu.write_failures
        failures[error] = failures.get(error, 0) + 1
        self._counts["limit_write_failures"] += 1
        fault = (why, card.decision.target_mw)
        if card.fault != fault:
            card.fault, card.retries = fault, 0
            self._tell(m.LimitFailed, card, card.gpu.limit_mw, why)
        card.retry_s = time.monotonic() + min(_RETRY_S * 2**card.retries, _RETRY_MOST_S)
        card.retries = min(card.retries + 1, 10)

    def _show(self, card: Card, owned: Owned | None) -> None:
        """Bring the record up to date; what failed last outranks what was decided."""
        gpu, decision = card.gpu, card.decision
        if card.fault and (decision.action is None or card.fault[1] != decision.target_mw):
            card.fault = None
        gpu.managed, gpu.original_mw = owned is not None, owned.original_mw if owned else None
        gpu.target_mw, gpu.pods = owned.set_mw if owned else None, sorted(decision.pods)
        if card.handle is not None:
            gpu.state, gpu.reason = decision.state, decision.reason
            if card.fault:
                gpu.state, gpu.reason = "failed", card.fault[0]

    def _tell(self, kind: type[m.GpuEvent], card: Card, from_mw: int | None, why: str) -> None:
        """Log and publish one decision about one GPU."""
        gpu, decision = card.gpu, card.decision
        event = kind(
            ts=time.time(),
            message=why,
            index=gpu.index,
            uuid=gpu.uuid,
            pods=sorted(decision.pods),
            from_mw=from_mw,
            to_mw=decision.target_mw,
            reason=decision.state,
        )
        bad = kind in (m.LimitFailed, m.GpuLost)
        (self._log.error if bad else self._log.info)(
            m.name_of(event),
            gpu=gpu.index,
            uuid=gpu.uuid,
            from_mw=from_mw,
            to_mw=event.to_mw,
            why=why,
        )
        self._server.publish(event)

    # answer

    def _answer(self, now: float) -> None:
        if self._nvml.is_open and now >= self._read_s - self._config.reconcile_s + _FRESH_S:
            self._read_all(now)
        due, self._desk.due = self._desk.due, []
        gpus = [card.gpu for card in self._cards.values()]
        snapshot, seen = self._desk.snapshot, self._desk.counts
        pods = report.pods(snapshot.pods if snapshot else (), gpus, self._rules)
        counters = m.Counters(
            **self._counts,
            snapshots=seen["snapshots"],
            denied=seen["denied"] + self._server.refused,
            malformed=seen["malformed"],
            stale=seen["stale"],
        )
        common: dict[str, Any] = {"gpus": gpus, "pods": pods, "counters": counters}
        for incoming, request in due:
            reply: m.Reply
            if isinstance(request, m.Snapshot):
                reply = m.Report(
                    session=request.session,
                    revision=request.revision,
                    nvml=self._nvml_is[0],
                    nvml_message=self._nvml_is[1],
                    **common,
                )
            else:
                me, link = self._self_status(), self._desk.watcher()
                reply = m.StatusReply(enforcer=me, watcher=link, **common)
            self._server.reply(incoming, reply)

    def _self_status(self) -> m.EnforcerStatus:
        c, snapshot = self._config, self._desk.snapshot
        return m.EnforcerStatus(
            version=__version__,
            pid=os.getpid(),
            uptime_s=round(time.monotonic() - self._desk.started_s, 3),
            dry_run=c.dry_run,
            nvml=self._nvml_is[0],
            nvml_message=self._nvml_is[1],
            driver_version=self._nvml.driver_version,
            node=snapshot.node if snapshot else None,
            min_mw=c.min_mw,
            max_mw=c.max_mw,
            conflict=c.conflict,
            cgroup_roots=list(self._reader.roots),
            ledger=self._ledger_fault or str(self._ledger.path),
        )

    def stop(self) -> None:
        """Give every GPU back, or leave limits and ledger for the next start, as configured."""
        if self._config.on_exit == "restore" and self._ledger.entries:
            self._open_s = 0.0
            if self._opened(time.monotonic()):
                for card in self._cards.values():
                    card.wrote_s = card.retry_s = 0.0
                stopping = Desired("stopping")
                self._act(stopping, self._observe(stopping))
        self._nvml.close()

"""The loop: observe, decide, act. No policy lives here, and nothing else touches the hardware."""

import os
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from enforcer import procfs, report
from enforcer.desk import Desk
from enforcer.ledger import Ledger, LedgerError
from enforcer.nvml import Device, Nvml, NvmlError, Reading
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
_IDLE_S = 5.0  # NVML is let go when nothing was asked of it for this long
_RETRY_S = (1.0, 30.0)
_SHOWN = 32  # processes a GPU shows in an answer
_UNREAD = Reading(None, None, None)


@dataclass(slots=True)
class Gpu:
    """What is remembered of one GPU between turns; `device` None while it does not answer."""

    device: Device
    here: bool = True
    reading: Reading = _UNREAD
    processes: list[m.Process] = field(default_factory=list)
    decision: Decision = Decision("free", "not looked at yet")
    fault: str | None = None  # why the last write failed, with what it was to be
    fault_mw: int | None = None
    retry_s: float = 0.0
    retries: int = 0
    wrote_s: float = -_WRITE_GAP_S
    drifted_to: int | None = None
    writes: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)

    def may_write_s(self) -> float:
        """Return when the next write may go out: ten a second, and a failed one backs off."""
        failed = self.fault is not None and self.fault_mw == self.decision.target_mw
        return max(self.wrote_s + _WRITE_GAP_S, self.retry_s if failed else 0.0)


class Agent:
    """Joins what is wanted with what is seen and acts on the difference."""

    def __init__(
        self, settings: EnforcerSettings, log: Log, server: Server, reader: ProcessReader, ledger: Ledger
    ) -> None:
        self._settings, self._log, self._server = settings, log, server
        self._reader, self._ledger = reader, ledger
        s = settings
        self._rules = Rules(s.min_mw, s.max_mw, s.safe_default, s.conflict, s.release_to)
        self._desk = Desk(server, settings, log)
        self._nvml = Nvml()
        self._gpus: dict[str, Gpu] = {}
        self._nvml_state: m.NvmlState = "absent"
        self._nvml_message = "not opened yet"
        self._reopen_s, self._reopens, self._incomplete = 0.0, 0, True
        self._next_scan_s = self._next_read_s = self._planned_s = self._asked_s = 0.0
        self._waiting: frozenset[str] = frozenset()
        self._waiting_since_s = 0.0
        self._ledger_fault: str | None = None
        self.counts: Counter[str] = Counter()

    def turn(self) -> None:
        """Wait for a request or the next deadline, then observe, decide, act, answer."""
        self._desk.take(self._server.receive(self._wait_s()))
        now = time.monotonic()
        asked = any(isinstance(request, m.Status) for _, request in self._desk.due)
        if asked:
            self._asked_s = now
        if self._desk.changed and now < self._planned_s + _TURN_S:
            return  # the answers wait with it
        if self._desk.changed or now >= self._next_scan_s or asked:
            self._look(now)
        self._answer(now)

    def _wait_s(self) -> float:
        if self._desk.changed:
            return max(0.0, self._planned_s + _TURN_S - time.monotonic())
        pending = [
            gpu.may_write_s() for gpu in self._gpus.values() if gpu.here and gpu.decision.action
        ]
        return max(0.0, min([self._next_scan_s, *pending]) - time.monotonic())

    def _look(self, now: float) -> None:
        desired = self._desk.desired()
        self._desk.changed = False
        self._planned_s = now
        used = bool(desired.pods or self._ledger.entries) or now < self._asked_s + _IDLE_S
        if (used or self._incomplete) and self._opened(now):
            if now >= self._next_read_s:
                self._read_all()
                self._next_read_s = now + self._settings.reconcile_s
            self._decide_and_act(desired, self._observe(), now)
        if not used:
            self._nvml.close()
        self._next_scan_s = now + self._scan_s(desired, now)

    def _scan_s(self, desired: Desired, now: float) -> float:
        """Return when to look again: soon while an annotated pod has no GPU yet."""
        found = {process.owner for gpu in self._gpus.values() for process in gpu.processes}
        waiting = frozenset(desired.pods.keys() - found)
        if waiting != self._waiting:
            self._waiting, self._waiting_since_s = waiting, now
        soon = waiting and now < self._waiting_since_s + _WAITING_FOR_S
        return min(self._settings.scan_s, _WAITING_SCAN_S) if soon else self._settings.scan_s

    # observe ---------------------------------------------------------------------------------

    def _opened(self, now: float) -> bool:
        """Open NVML, or again when something is missing; tells whether it is usable."""
        if self._nvml.is_open and (not self._incomplete or now < self._reopen_s):
            return True
        if now < self._reopen_s:
            return False
        self._reopens += 1
        self._reopen_s = now + min(_RETRY_S[0] * 2 ** (self._reopens - 1), _RETRY_S[1])
        try:
            devices, faults = self._nvml.open()
        except NvmlError as error:
            self._nvml.close()
            self._nvml_is("absent" if error.absent else "failing", str(error))
            self._incomplete = True
            return False
        self._nvml_is("failing" if faults else "ok", "; ".join(faults) or "ok")
        for device in devices:
            gpu = self._gpus.setdefault(device.uuid, Gpu(device))
            gpu.device = device
            if not gpu.here:
                gpu.here = True
                self._tell(m.GpuBack, gpu, None, device.uuid)
        present = {device.uuid for device in devices}
        for uuid, gpu in self._gpus.items():
            if gpu.here and uuid not in present:
                self._lose(gpu, "not among the GPUs that NVML lists")
        missing = (self._gpus.keys() | self._ledger.entries.keys()) - present
        self._incomplete = bool(faults or missing)
        if not self._incomplete:
            self._reopens, self._reopen_s = 0, 0.0
        self._next_read_s = 0.0
        return True

    def _nvml_is(self, state: m.NvmlState, message: str) -> None:
        if (state, message) != (self._nvml_state, self._nvml_message):
            self._nvml_state, self._nvml_message = state, message
            say = self._log.info if state == "ok" else self._log.error
            say("nvml", state=state, why=message, driver=self._nvml.driver_version)

    def _lose(self, gpu: Gpu, why: str) -> None:
        gpu.here, gpu.reading, gpu.processes = False, _UNREAD, []
        self._incomplete = True
        self._tell(m.GpuLost, gpu, None, why)

    def _read_all(self) -> None:
        for gpu in self._gpus.values():
            if gpu.here:
                self._read(gpu)

    def _read(self, gpu: Gpu) -> None:
        try:
            gpu.reading = self._nvml.reading(gpu.device)
        except NvmlError as error:
            gpu.reading = _UNREAD
            if error.stale:
                self._lose(gpu, str(error))

    def _observe(self) -> list[SeenGpu]:
        seen = []
        for uuid, gpu in self._gpus.items():
            occupants = self._occupants(gpu) if gpu.here else None
            if gpu.here:
                d, limit_mw = gpu.device, gpu.reading.limit_mw
                seen.append(SeenGpu(uuid, occupants, limit_mw, d.default_mw, d.min_mw, d.max_mw))
        return seen

    def _occupants(self, gpu: Gpu) -> frozenset[Occupant] | None:
        listed_ticks = procfs.now_ticks()
        try:
            pids = self._nvml.pids(gpu.device)
        except NvmlError as error:
            gpu.processes = [m.Process(pid=0, owner="unknown", evidence=str(error))]
            if error.stale:
                self._lose(gpu, str(error))
            return None
        found, gpu.processes = set(), []
        for pid in sorted(pids):
            owner, evidence = self._reader.owner(pid, listed_ticks)
            if owner is None:
                continue
            found.add(Occupant(owner))
            if len(gpu.processes) < _SHOWN:
                name = owner if isinstance(owner, str) else owner.value
                gpu.processes.append(m.Process(pid=pid, owner=name, evidence=evidence))
        return frozenset(found)

    # act -------------------------------------------------------------------------------------

    def _decide_and_act(self, desired: Desired, seen: list[SeenGpu], now: float) -> None:
        decisions = plan(desired, seen, self._ledger.entries, self._rules)
        ready: dict[str, Decision] = {}
        for uuid, decision in decisions.items():
            gpu = self._gpus.get(uuid)
            if gpu is None:
                continue
            if self._settings.dry_run and decision.action:
                text = f"dry run, nothing is written; would be {decision.reason}"
                decision = replace(decision, action=None, reason=text)
            if decision.state != gpu.decision.state:
                self._log.info("gpu_state", gpu=uuid, state=decision.state, why=decision.reason)
            gpu.decision = decision
            if decision.action and now >= gpu.may_write_s():
                ready[uuid] = decision
        if ready or self._ledger_fault:
            self._act(ready)

    def _act(self, ready: Mapping[str, Decision]) -> None:
        entries = dict(self._ledger.entries)
        for uuid, decision in ready.items():
            if decision.action == "release" or decision.target_mw is None:
                continue
            owned = entries.get(uuid)
            original_mw = owned.original_mw if owned else self._fresh_limit(self._gpus[uuid])
            if original_mw is not None:
                since = owned.since if owned else time.time()
                entries[uuid] = Owned(original_mw, decision.target_mw, decision.pods, since)
        self._store(entries, durable=entries.keys() != self._ledger.entries.keys())
        for uuid, decision in ready.items():
            if uuid in self._ledger.entries and decision.action != "note":
                self._write(self._gpus[uuid], decision)

    def _fresh_limit(self, gpu: Gpu) -> int | None:
        self._read(gpu)
        if gpu.reading.limit_mw is None:
            self._failed(gpu, gpu.decision, "UNREADABLE", "its present limit cannot be read")
        return gpu.reading.limit_mw

    def _store(self, entries: Mapping[str, Owned], *, durable: bool) -> None:
        """Write the ledger. Where that fails no new GPU is taken, owned ones are still kept."""
        if entries == self._ledger.entries and not self._ledger_fault:
            return
        try:
            self._ledger.store(entries, durable=durable)
        except LedgerError as error:
            for uuid in entries.keys() - self._ledger.entries.keys():
                gpu = self._gpus[uuid]
                self._failed(gpu, gpu.decision, "LEDGER", f"not taken: {error}")
            kept = {u: e for u, e in entries.items() if u in self._ledger.entries}
            self._ledger.entries = kept
            if self._ledger_fault is None:
                self._log.error("ledger", why=str(error), remedy="free or repair that disk")
            self._ledger_fault = str(error)
        else:
            if self._ledger_fault:
                self._log.info("ledger", why="written again")
            self._ledger_fault = None

    def _write(self, gpu: Gpu, decision: Decision) -> None:
        """Set the limit, read it back, and say what came of it."""
        target_mw, action = decision.target_mw, decision.action
        assert target_mw is not None and action is not None and action != "note"
        before_mw = gpu.reading.limit_mw
        gpu.wrote_s = time.monotonic()
        try:
            before_mw = self._nvml.limit_mw(gpu.device)
            if before_mw != target_mw:
                self._nvml.set_limit(gpu.device, target_mw)
                gpu.writes[action] += 1
                self.counts["limit_writes"] += 1
            gpu.reading = self._nvml.reading(gpu.device)
        except NvmlError as error:
            self._failed(gpu, decision, error.name, str(error))
            if error.stale:
                self._lose(gpu, str(error))
            return
        limit_mw = gpu.reading.limit_mw
        if limit_mw is None or not same_limit(limit_mw, target_mw):
            why = f"set to {target_mw} mW without an error, yet it reads {limit_mw} mW"
            self._failed(gpu, decision, "NOT_HELD", why)
            return
        gpu.fault, gpu.retries = None, 0
        if action == "release":
            kept = {u: e for u, e in self._ledger.entries.items() if u != gpu.device.uuid}
            self._store(kept, durable=False)
            self._tell(m.LimitReleased, gpu, before_mw, decision.reason)
        elif action == "drift":
            self.counts["drifts"] += 1
            self._drifted(gpu, decision, before_mw)
        else:
            gpu.drifted_to = None
            self._tell(m.LimitSet, gpu, before_mw, decision.reason)
        gpu.decision = replace(decision, action=None)

    def _drifted(self, gpu: Gpu, decision: Decision, before_mw: int | None) -> None:
        if gpu.drifted_to != before_mw:  # once for each value: another writer may come every second
            gpu.drifted_to = before_mw
            why = f"somebody else had set another limit; again {decision.reason}"
            self._tell(m.LimitDrifted, gpu, before_mw, why)

    def _failed(self, gpu: Gpu, decision: Decision, error: str, why: str) -> None:
        gpu.failures[error] += 1
        self.counts["limit_write_failures"] += 1
        if (gpu.fault, gpu.fault_mw) != (why, decision.target_mw):
            gpu.fault, gpu.fault_mw, gpu.retries = why, decision.target_mw, 0
            self._tell(m.LimitFailed, gpu, gpu.reading.limit_mw, why)
        gpu.retry_s = time.monotonic() + min(_RETRY_S[0] * 2**gpu.retries, _RETRY_S[1])
        gpu.retries = min(gpu.retries + 1, 10)

    def _tell(
        self,
        kind: type[m.LimitSet | m.LimitReleased | m.LimitFailed | m.LimitDrifted | m.GpuLost | m.GpuBack],
        gpu: Gpu,
        from_mw: int | None,
        why: str,
    ) -> None:
        """Log and publish one decision about one GPU."""
        event = kind(
            ts=time.time(),
            message=f"GPU {gpu.device.index}: {why}",
            index=gpu.device.index,
            uuid=gpu.device.uuid,
            pods=sorted(gpu.decision.pods),
            from_mw=from_mw,
            to_mw=gpu.decision.target_mw,
            reason=gpu.decision.action or gpu.decision.state,
        )
        name = kind.__struct_config__.tag
        say = self._log.error if name in ("limit_failed", "gpu_lost") else self._log.info
        say(name, gpu=event.index, uuid=event.uuid, from_mw=from_mw, to_mw=event.to_mw, why=why)
        self._server.publish(event)

    # answer ----------------------------------------------------------------------------------

    def _answer(self, now: float) -> None:
        due, self._desk.due = self._desk.due, []
        if not due:
            return
        if self._nvml.is_open and now >= self._next_read_s - self._settings.reconcile_s + _FRESH_S:
            self._read_all()
            self._next_read_s = now + self._settings.reconcile_s
        gpus = [
            report.gpu(gpu, self._ledger.entries.get(uuid), self._nvml.is_open)
            for uuid, gpu in self._gpus.items()
        ]
        gpus += [
            report.absent_gpu(uuid, owned, self._nvml_message)
            for uuid, owned in self._ledger.entries.items()
            if uuid not in self._gpus
        ]
        snapshot = self._desk.snapshot
        pods = [report.pod(pod, gpus, self._rules) for pod in (snapshot.pods if snapshot else [])]
        seen = self._desk.counts
        counters = m.Counters(
            **self.counts,
            snapshots=seen["snapshots"],
            denied=seen["denied"] + self._server.refused,
            malformed=seen["malformed"],
            stale=seen["stale"],
        )
        for incoming, request in due:
            reply: m.Reply
            if isinstance(request, m.Snapshot):
                reply = m.Report(
                    session=request.session,
                    revision=request.revision,
                    nvml=self._nvml_state,
                    nvml_message=self._nvml_message,
                    gpus=gpus,
                    pods=pods,
                    counters=counters,
                )
            else:
                reply = m.StatusReply(
                    enforcer=self._own_status(),
                    watcher=self._desk.watcher(),
                    gpus=gpus,
                    pods=pods,
                    counters=counters,
                )
            self._server.reply(incoming, reply)

    def _own_status(self) -> m.EnforcerStatus:
        s, snapshot = self._settings, self._desk.snapshot
        return m.EnforcerStatus(
            version=__version__,
            pid=os.getpid(),
            uptime_s=round(self._desk.uptime_s, 3),
            dry_run=s.dry_run,
            nvml=self._nvml_state,
            nvml_message=self._nvml_message,
            driver_version=self._nvml.driver_version,
            node=snapshot.node if snapshot else None,
            min_mw=s.min_mw,
            max_mw=s.max_mw,
            conflict=s.conflict,
            cgroup_roots=list(self._reader.roots),
            ledger=self._ledger_fault or str(self._ledger.path),
        )

    # stop ------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Give every GPU back, or leave limits and ledger for the next start, as configured."""
        if self._settings.on_exit == "restore" and self._ledger.entries:
            self._reopen_s = 0.0
            if self._opened(time.monotonic()):
                for gpu in self._gpus.values():
                    gpu.wrote_s = gpu.retry_s = -_WRITE_GAP_S
                self._read_all()
                self._decide_and_act(Desired("stopping"), self._observe(), time.monotonic())
        self._nvml.close()

"""The GPUs as they are: finds them, reads them, and sees who runs on them. Decides nothing."""

import time
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Any

from enforcer import procfs
from enforcer.nvml import Handle, Nvml, NvmlError
from enforcer.policy import Decision, Desired, Occupants, Owned, SeenGpu
from enforcer.procfs import ProcessReader
from enforcer.server import Server
from shared import messages as m
from shared.logs import Log

WRITE_GAP_S = 0.1  # frequent writes disturb collective operations on the GPU
_DOUBLINGS = 5  # 1, 2, 4 ... 32 s
_SHOWN = 32  # processes that a GPU shows in an answer
_UNDECIDED = Decision("free", "not looked at yet")


@dataclass(slots=True)
class Retry:
    """When to try again after failures in a row."""

    due_s: float = 0.0
    failures: int = 0

    def failed(self) -> None:
        """Wait from now, each time for twice as long."""
        self.due_s = time.monotonic() + 2.0 ** min(self.failures, _DOUBLINGS)
        self.failures += 1


@dataclass(slots=True)
class Card:
    """One GPU between turns: its record, its handle (None while it does not answer), its writes."""

    gpu: m.Gpu
    handle: Handle | None = None
    occupants: Occupants | None = None  # None: its process list cannot be read
    decision: Decision = _UNDECIDED
    failed: Decision | None = None  # what could not be done last, and why
    logged: str = _UNDECIDED.state
    retry: Retry = field(default_factory=Retry)
    lost: Retry = field(default_factory=Retry)
    wrote_s: float = -WRITE_GAP_S
    drifted_to_mw: int | None = None

    def may_write_s(self) -> float:
        """Return when the next write may go out: ten a second, and a failed one backs off."""
        again = self.failed is not None and self.failed.target_mw == self.decision.target_mw
        return max(self.wrote_s + WRITE_GAP_S, self.retry.due_s if again else 0.0)

    def show(self, owned: Owned | None) -> None:
        """Bring the record up to date; what failed last outranks what was decided."""
        gpu, decision = self.gpu, self.decision
        if decision.action is None:
            self.failed = None
        gpu.managed = owned is not None
        gpu.pods = sorted(decision.pods or (owned.pods if owned else ()))
        gpu.original_mw = owned.original_mw if owned else None
        gpu.target_mw = (decision.target_mw or owned.set_mw) if owned else None
        if self.handle is not None:
            said = self.failed or decision
            gpu.state, gpu.reason = said.state, said.reason


class Gpus:
    """Every GPU that was ever seen or is owned, by UUID."""

    def __init__(
        self,
        me: m.EnforcerStatus,
        owned: Mapping[str, Owned],
        reader: ProcessReader,
        log: Log,
        server: Server,
    ) -> None:
        self._me, self._reader, self._log, self._server = me, reader, log, server
        self.nvml = Nvml()
        self.cards = {uuid: Card(m.Gpu(uuid=uuid)) for uuid in owned}
        for uuid, entry in owned.items():
            self.cards[uuid].show(entry)
            self.cards[uuid].gpu.reason = "owned since before this start, not seen yet"
        self.incomplete = True  # NVML or a GPU is missing: look for it again
        self.read_s = 0.0  # when limits were last read
        self._retry = Retry()
        self._refused = False  # NVML itself could not be opened

    def opened(self, now: float, *, needed: bool) -> bool:
        """Open NVML, or open it anew when a GPU is missing; tells whether it is usable.

        A missing GPU is waited for; it lets no pod on another one wait (I11).
        """
        if self.nvml.is_open and not self.incomplete:
            if now >= self._retry.due_s:  # whole for as long as the next wait would be
                self._retry = Retry()
            return True
        if now < self._retry.due_s and (self.nvml.is_open or self._refused or not needed):
            return self.nvml.is_open
        self._retry.failed()
        try:
            found, faults = self.nvml.open()
        except NvmlError as error:
            self.nvml.close()
            found, faults = [], [error]
        self._refused = not self.nvml.is_open
        for handle, seen in found:
            self._found(handle, seen)
        usable = not faults or any(seen.max_mw for _, seen in found)
        state: m.NvmlState = "ok" if usable else "absent" if faults[0].absent else "failing"
        self._say(state, "; ".join(map(str, faults)) or "ok")
        present = {seen.uuid for _, seen in found}
        for uuid in self.cards.keys() - present:
            self.lose(self.cards[uuid], str(faults[0]) if self._refused else "not listed by NVML")
        self.incomplete = bool(faults) or len(present) < len(self.cards)
        self.read(now)
        return self.nvml.is_open

    def _found(self, handle: Handle, seen: m.Gpu) -> None:
        card = self.cards.setdefault(seen.uuid, Card(seen))
        last = card.gpu
        if seen.max_mw is None:  # what it told before holds: a board's bounds do not change
            seen.min_mw, seen.default_mw, seen.max_mw = last.min_mw, last.default_mw, last.max_mw
        seen.writes, seen.write_failures = last.writes, last.write_failures
        card.handle, card.gpu, card.occupants = handle, seen, None
        if last.state == "lost":
            self.tell(m.GpuBack, card, None, f"it answers again, as GPU {seen.index}")

    def retry_now(self) -> None:
        """Forget every wait: this is the last chance."""
        self._retry = Retry()
        for card in self.cards.values():
            card.wrote_s, card.retry = 0.0, Retry()

    def close(self) -> None:
        """Let go of the driver; what was read holds no longer."""
        if self.nvml.is_open:
            self.nvml.close()
            for card in self.cards.values():
                card.gpu.limit_mw = card.gpu.enforced_mw = card.gpu.power_mw = None

    def _say(self, state: m.NvmlState, why: str) -> None:
        me = self._me
        me.driver_version = self.nvml.driver_version
        if (state, why) != (me.nvml, me.nvml_message):
            me.nvml, me.nvml_message = state, why
            say = self._log.info if why == "ok" else self._log.error
            say("nvml", state=state, why=why, driver=me.driver_version)

    def lose(self, card: Card, why: str) -> None:
        """Note that a GPU does not answer."""
        if card.handle is not None and time.monotonic() >= card.lost.due_s:
            card.lost.failed()
            self._retry.due_s = 0.0  # for this one at once, however long another one is missing
        gpu, card.handle, self.incomplete = card.gpu, None, True
        gpu.index = gpu.limit_mw = gpu.enforced_mw = gpu.power_mw = None
        gpu.processes = []
        if gpu.state != "lost":
            gpu.state, gpu.reason = "lost", why
            card.decision = _UNDECIDED
            self.tell(m.GpuLost, card, None, why)

    def tell(self, kind: type[m.GpuEvent], card: Card, from_mw: int | None, why: str) -> None:
        """Log and publish what happened to one GPU."""
        gpu, decision = card.gpu, card.decision
        facts: dict[str, Any] = {
            "index": gpu.index,
            "uuid": gpu.uuid,
            "pods": sorted(decision.pods),
        }
        facts |= {"from_mw": from_mw, "to_mw": decision.target_mw}
        reason = decision.action or decision.state
        event = kind(ts=time.time(), message=why, reason=reason, **facts)
        say = self._log.error if kind in (m.LimitFailed, m.GpuLost) else self._log.info
        say(m.name_of(event), why=why, **facts)
        self._server.publish(event)

    def read(self, now: float) -> None:
        """Read back the limit and power of every GPU."""
        self.read_s = now
        for card in self.cards.values():
            self.read_one(card)

    def read_one(self, card: Card) -> None:
        """Read one GPU; what cannot be read is None afterwards."""
        if card.handle is not None:
            try:
                self.nvml.read_into(card.handle, card.gpu)
            except NvmlError as error:
                if error.stale:
                    self.lose(card, str(error))

    def observe(self, desired: Desired, among: Container[str] | None) -> list[SeenGpu]:
        """Return every GPU that answers and who runs on it.

        Those `among` (None: all) are looked at, and those of which nothing is known.
        """
        seen = []
        for uuid, card in self.cards.items():
            if card.handle and (among is None or uuid in among or card.occupants is None):
                card.occupants = self._occupants(card, desired)
            if card.handle is not None:  # still
                g = card.gpu
                low, default, high = g.min_mw or 0, g.default_mw or 0, g.max_mw or 0
                seen.append(SeenGpu(uuid, card.occupants, g.limit_mw, default, low, high))
        return seen

    def _occupants(self, card: Card, desired: Desired) -> Occupants | None:
        asked_ticks = procfs.now_ticks()
        try:
            pids = self.nvml.pids(card.handle)
        except NvmlError as error:
            card.gpu.processes = [m.Process(pid=0, owner="unknown", evidence=str(error))]
            if error.stale:
                self.lose(card, str(error))
            return None
        found, shown = set(), []
        for pid in sorted(pids):
            owner, evidence = self._reader.owner(pid, asked_ticks)
            if owner is not None:
                found.add(owner)
                name = desired.uid_of(owner) if isinstance(owner, str) else owner.value
                shown.append(m.Process(pid=pid, owner=name, evidence=evidence))
        shown.sort(key=lambda process: process.owner not in desired.pods)
        card.gpu.processes = shown[:_SHOWN]
        return frozenset(found)

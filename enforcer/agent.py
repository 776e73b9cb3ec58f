"""The loop: hear, see, decide, enter, carry out, settle, tell, answer. No rule lives here.

Reading, writing and changing what is held are three different steps. The rules are pure and lie
elsewhere: policy.py says what a GPU is to have, gpu.py what becomes of it, driver.py when NVML is
opened, agenda.py what is due.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from enforcer import driver as sessions
from enforcer import gpu as one
from enforcer import lead, report
from enforcer.agenda import Agenda, Due
from enforcer.announce import Announcer
from enforcer.brake import Brake, Orders
from enforcer.clock import Clock
from enforcer.desk import Desk
from enforcer.device import Device, DeviceError
from enforcer.driver import Open, Refused, Shut, Step
from enforcer.fleet import Bus, Fleet
from enforcer.gpu import WRITE_GAP_S, Gpu, NotEntered, Outcome, Present
from enforcer.ledger import Ledger, LedgerError, Notes
from enforcer.policy import UNDECIDED, Decision, Desired, Link, Owned, plan
from enforcer.roster import Roster
from enforcer.server import Incoming, Server
from enforcer.settings import EnforcerSettings
from enforcer.sources import Assignments, Source, Tenants
from enforcer.writeahead import entered
from shared import messages as m
from shared.logs import Log
from shared.pace import Backoff

# Between two tries to give back, at a stop.
_LAST_GAP_S = 0.5
_JUST_AFTER_S = 0.001
# What is so while NVML cannot be used, or not in full.
_NVML_HOLDS = {
    False: "limits stay as they are in the hardware; none can be read or set",
    True: "the GPUs that answer are served",
}
_LEDGER_HOLDS = "no new GPU is taken; the limits of owned ones are kept"
_LEDGER_AGAIN = "with each write that waits, each 32 s at least"


@dataclass(frozen=True, slots=True)
class World:
    """Everything outside that the enforcer touches while it runs; tests hand in another one."""

    server: Server
    device: Device
    source: Source
    bus: Bus
    clock: Clock
    # What the source knows of the kubelet's assignments; None where these are not read.
    kubelet: Assignments | None = None


class Agent:
    """Joins what is wanted with what is seen and acts on the difference."""

    def __init__(
        self,
        config: EnforcerSettings,
        log: Log,
        world: World,
        ledger: Ledger,
        me: m.EnforcerStatus,
    ) -> None:
        """Prepare; nothing is opened before the first turn. `me` is what never changes."""
        self._config = config
        self._log = log
        self._server = world.server
        self._device = world.device
        self._clock = world.clock
        self._kubelet = world.kubelet
        self._ledger = ledger
        self._brake = Brake(ledger.path.parent)
        self._orders = Orders()
        self._me = me
        self._desk = Desk(world.server, config, log, world.clock)
        if config.dry_run:
            log.mark(dry_run=True)
        self._roster = Roster(ledger.notes.names if ledger.notes else {})
        self._announcer = Announcer(
            log, world.server, world.clock, self._roster, dry_run=config.dry_run
        )
        adopted = _adopted(ledger)
        self._fleet = Fleet(adopted, world.device, world.source, world.bus, world.clock)
        self._agenda = Agenda.begin(config.scan_s, config.reconcile_s, world.clock.now_s())
        # What was known of the watcher at the last decision.
        self._link: Link = "unheard"
        # Since when the oldest question waits for its answer.
        self._waits_since_s = 0.0

    def turn(self) -> None:
        """Wait for a request or for what is due next, and do it."""
        self._hear(self._server.receive(self._wake_s() - self._clock.now_s()))
        self._work()
        if self._may_answer():
            self._answer()

    def begin(self) -> int | None:
        """Look around before anybody is heard; returns how many GPUs answer, None if unknown."""
        self._work()
        return self._fleet.count

    def _work(self) -> None:
        """Do what is due."""
        self._obey()
        desired = self._desk.desired()
        if desired.link == "expired" and self._link != "expired":
            self._agenda = self._agenda.scan_now(self._clock.now_s())
        due = self._due(desired)
        if due.decide:
            self._link = desired.link
            if self._see(desired, due):
                # Reading may have taken half a minute, and the watcher may be silent by now.
                desired = self._desk.desired()
                self._act(desired)
                self._follow(desired)
                self._ledger.remember(self._beside(), self._notes())
            self._tell()
            self._move_on(desired, due)

    @property
    def hopeless(self) -> str | None:
        """Why only a new container may help; None where that is not so."""
        driver = self._fleet.driver
        if not isinstance(driver, Refused) or not sessions.is_hopeless(driver):
            return None
        return (
            f"NVML worked before, and every try for {sessions.HOPELESS_S / 60:g} minutes was "
            f"refused: {driver.why}; ending with status 1, so that a new container is made, which "
            "gets its devices (systemctl daemon-reload and the static CPU manager take them away) "
            "and the driver's library anew; what is owned stays in the ledger"
        )

    def _act(self, desired: Desired) -> None:
        """Decide, write ahead what may be written now, carry it out, settle what came of it."""
        self._obey()  # reading may have taken half a minute
        batch = self._decide(desired)
        refused = self._enter(batch)
        for gpu in batch:
            outcome = refused.get(gpu.uuid) or self._carry_out(gpu)
            self._settle(gpu, outcome)

    # ---- hear ----

    def _obey(self) -> None:
        """Take what a person on the node has ordered; what is new is decided on at once."""
        orders = self._brake.look()
        if orders == self._orders:
            return
        self._orders = orders
        self._log.warning("brake", why=str(orders))
        self._agenda = self._agenda.scan_now(self._clock.now_s())

    def _mute(self, uuid: str) -> str:
        """Return why this GPU may not be written now, empty where it may."""
        if self._config.dry_run:
            return "dry run"
        # The order for one GPU goes before the one for all.
        may_write = self._orders.paused is None or uuid in self._orders.released
        return "" if may_write else self._orders.words

    def _wake_s(self) -> float:
        wake_s = self._agenda.wake_s(changed=self._desk.changed, write_s=self._write_s())
        lease_s = self._desk.lease_ends_s()
        # Only after its end it has run out.
        return wake_s if lease_s is None else min(wake_s, lease_s + _JUST_AFTER_S)

    def _write_s(self) -> float | None:
        """Return when the next write may go out."""
        times = [one.may_write_s(gpu) for gpu in self._fleet]
        return min((time for time in times if time is not None), default=None)

    def _hear(self, incoming: list[Incoming]) -> None:
        now_s = self._clock.now_s()
        if not self._desk.due:
            self._waits_since_s = now_s
        self._desk.take(incoming)
        self._desk.watch_silence()
        if self._desk.changed and self._desk.snapshot:
            self._roster.learn(self._desk.snapshot.pods, self._spoken_of())
        if self._desk.is_asked:
            self._agenda = self._agenda.asked(now_s)

    def _due(self, desired: Desired) -> Due:
        everywhere = bool(self._fleet.homeless(desired)) or not self._needed(desired)
        return self._agenda.due(
            self._clock.now_s(),
            changed=self._desk.changed,
            write_s=self._write_s(),
            everywhere=everywhere,
        )

    def _needed(self, desired: Desired) -> bool:
        """Tell whether there is a reason to have NVML open."""
        asked = self._agenda.asked_lately(self._clock.now_s())
        return bool(desired.pods or self._ledger.entries) or asked

    # ---- see: all reading ----

    def _see(self, desired: Desired, due: Due) -> bool:
        """Read what is due; tells whether there is anything to decide on."""
        before = self._fleet.driver
        if due.scan:
            self._fleet.look_at_the_bus()
        self._keep_session(desired)
        if not isinstance(self._fleet.driver, Open):
            self._agenda = self._agenda.not_read(self._clock.now_s())
            # Where it is refused there is something to say of each GPU that is owned.
            return not isinstance(self._fleet.driver, Shut)
        if due.read or self._fleet.driver is not before:
            self._fleet.read_all()
            self._agenda = self._agenda.read(self._clock.now_s())
        if due.scan:
            self._fleet.look_at_all()
        else:
            self._fleet.look_at(self._touched(desired))
        return True

    def _keep_session(self, desired: Desired) -> None:
        began_s = self._clock.now_s()
        self._fleet.keep_session(self._view(desired))
        self._desk.miss(self._clock.now_s() - began_s)
        self._say_nvml()

    def _view(self, desired: Desired) -> sessions.View:
        return self._fleet.view(desired, self._ledger.entries, needed=self._needed(desired))

    def _touched(self, desired: Desired) -> set[str]:
        """Return the GPUs for which a snapshot changes something: only these are seen again."""
        decisions = self._plan(desired)
        return {uuid for uuid, decision in decisions.items() if decision.action}

    # ---- decide ----

    def _plan(self, desired: Desired) -> dict[str, Decision]:
        views = [one.view_of(gpu, self._orders.released) for gpu in self._fleet]
        seen = [view for view in views if view is not None]
        return plan(desired, seen, self._ledger.entries, self._config)

    def _decide(self, desired: Desired) -> list[Gpu]:
        """Decide on every GPU; return those that may be written now."""
        now_s = self._clock.now_s()
        self._decide_all(desired)
        stale = [gpu for gpu in self._ready(now_s) if self._reads_first(gpu, desired)]
        for gpu in stale:
            self._fleet.read(gpu)
        if stale:
            self._decide_all(desired)
        return self._ready(now_s)

    def _decide_all(self, desired: Desired) -> None:
        decisions = self._plan(desired)
        is_blind = not isinstance(self._fleet.driver, Open)
        for gpu in self._fleet:
            if is_blind and gpu.uuid not in decisions:
                continue  # nothing new is known of it, and who used it stays known
            decision = decisions.get(gpu.uuid, UNDECIDED)
            self._fleet.become(one.decided(gpu, decision, mute=self._mute(gpu.uuid)))

    def _ready(self, now_s: float) -> list[Gpu]:
        return [gpu for gpu in self._fleet if one.is_ready(gpu, now_s)]

    def _reads_first(self, gpu: Gpu, desired: Desired) -> bool:
        """Tell whether a write must not rely on a reading that is some seconds old.

        The original limit is the one that is there just before the first write, and while the
        watcher is silent nothing may be raised above what there is (I4).
        """
        return gpu.uuid not in self._ledger.entries or desired.link == "silent"

    # ---- enter: write ahead ----

    def _enter(self, batch: list[Gpu]) -> Mapping[str, NotEntered]:
        """Write ahead what is about to be set; return the GPUs that must not be written (I2)."""
        entries, refused = entered(self._ledger.entries, batch, self._clock.wall_s())
        if entries != self._ledger.entries or self._me.ledger_fault:
            self._store(entries)
        for uuid in entries.keys() - self._ledger.entries.keys():
            refused[uuid] = NotEntered("LEDGER", f"not taken: {self._me.ledger_fault}")
        return refused

    def _store(self, entries: dict[str, Owned]) -> None:
        """Write the ledger; where that fails no new GPU is taken, and owned ones are still kept."""
        fault = ""
        try:
            self._ledger.begin_notes()
            self._ledger.store(entries)
        except LedgerError as error:
            fault = str(error)
            owned = self._ledger.entries
            self._ledger.entries = {uuid: e for uuid, e in entries.items() if uuid in owned}
        if bool(fault) != bool(self._me.ledger_fault):
            if fault:
                self._log.error("ledger", why=fault, holds=_LEDGER_HOLDS, next_try=_LEDGER_AGAIN)
            else:
                self._log.info("ledger", why="can be written again")
        self._me = msgspec.structs.replace(self._me, ledger_fault=fault)

    # ---- carry out: all writing ----

    def _carry_out(self, gpu: Gpu) -> Outcome:
        """Set the limit unless it is that already, and read it back."""
        decision, here = gpu.decision, gpu.where
        if decision.action == "note" or decision.target_mw is None or not isinstance(here, Present):
            return one.Noted()
        call: one.Call = "read before"
        try:
            before_mw = self._device.limit_mw(here.board)
            if before_mw != decision.target_mw:
                call = "set"
                self._device.set_limit(here.board, decision.target_mw)
                call = "read after"
            reading = self._device.read(here.board)
        except DeviceError as error:
            return one.Refused(error, call)
        return one.Wrote(before_mw, reading)

    # ---- settle and tell: all changing ----

    def _settle(self, gpu: Gpu, outcome: Outcome) -> None:
        settled, told = one.after(gpu, outcome, self._clock.now_s())
        self._fleet.become(settled, told)
        if any(happening.kind == "limit_released" for happening in told):
            left = {uuid: e for uuid, e in self._ledger.entries.items() if uuid != gpu.uuid}
            self._store(left)

    def _follow(self, desired: Desired) -> None:
        """Note when the limits stood, beside when the processes began."""
        for gpu in self._fleet:
            self._fleet.become(lead.followed(gpu, desired, self._clock.boot_s()))

    def _tell(self) -> None:
        for happening in self._fleet.take_told():
            self._announcer.tell(happening)
        for gpu in self._fleet:
            after = one.news(gpu)
            if after is not gpu:
                self._fleet.become(after)
                owned = gpu.uuid in self._ledger.entries
                self._announcer.tell_state(after, owned=owned and self._link != "unheard")

    def _say_nvml(self) -> None:
        driver, version = self._fleet.driver, self._device.driver_version
        if isinstance(driver, Shut):
            return  # what was said last holds
        state, why = report.nvml_state(driver, self._fleet)
        if (state, why) != (self._me.nvml, self._me.nvml_message):
            if why == "ok":
                self._log.info("nvml", state=state, why=why, driver=version, gpus=self._fleet.count)
            else:
                next_try_s = round(driver.again.left_s(self._clock.now_s()), 3)
                more = {"holds": _NVML_HOLDS[isinstance(driver, Open)], "next_try_s": next_try_s}
                self._log.error("nvml", state=state, why=why, driver=version, **more)
        self._me = msgspec.structs.replace(
            self._me, nvml=state, nvml_message=why, driver_version=version
        )

    def _move_on(self, desired: Desired, due: Due) -> None:
        """Note what was done, and let go of the driver where nothing needs it any more."""
        now_s = self._clock.now_s()
        if self._desk.changed:
            self._desk.changed = False
            self._agenda = self._agenda.decided(now_s)
        if due.scan:
            self._agenda = self._agenda.scanned(self._fleet.homeless(desired), now_s)
        if sessions.next_step(self._fleet.driver, self._view(desired), now_s) is Step.SHUT:
            self._fleet.shut()

    # ---- answer ----

    def _may_answer(self) -> bool:
        """Tell whether to answer: a decision comes first, and a write that waits for its gap."""
        if not self._desk.due or self._desk.changed:
            return False
        late = any(gpu.decision.action and not gpu.trouble for gpu in self._fleet)
        return not late or self._clock.now_s() > self._waits_since_s + 2 * WRITE_GAP_S

    def _answer(self) -> None:
        """Answer everybody who waits, from the last reading."""
        snapshot, watcher = self._desk.snapshot, self._desk.watcher()
        gpus = report.records(self._fleet, self._ledger.entries, self._desk.desired())
        gpus = report.with_names(gpus, self._roster)
        asked = snapshot.pods if snapshot else ()
        pods = report.pods(asked, self._fleet, gpus, self._me.nvml_message)
        me = msgspec.structs.replace(
            self._me,
            uptime_s=round(self._clock.now_s() - self._desk.started_s, 3),
            node=snapshot.node if snapshot else None,
            kubelet=self._kubelet.state if self._kubelet else "off",
            paused=self._orders.paused,
            released=list(self._orders.released),
        )
        counters = report.counters(self._fleet, self._desk.tally, self._log.dropped)
        status = m.StatusReply(
            enforcer=me, watcher=watcher, gpus=gpus, pods=pods, counters=counters
        )
        for incoming, request in self._desk.taken():
            self._server.reply(incoming, report.answer(request, status))

    def _beside(self) -> dict[str, Tenants]:
        """Return who runs beside the pods of each GPU that is owned."""
        owned = self._ledger.entries
        return {gpu.uuid: gpu.beside for gpu in self._fleet if gpu.uuid in owned}

    def _notes(self) -> Notes:
        owned = self._ledger.entries
        stood = {gpu.uuid: gpu.stood_mw for gpu in self._fleet if gpu.uuid in owned}
        return Notes(
            stood={uuid: mw for uuid, mw in stood.items() if mw is not None},
            names=self._roster.of({uid for entry in owned.values() for uid in entry.pods}),
        )

    def _spoken_of(self) -> frozenset[str]:
        """Return the pods of which something may still be told."""
        uids = frozenset[str]().union(*(one.concerned(gpu) for gpu in self._fleet))
        return uids.union(*(entry.pods for entry in self._ledger.entries.values()))

    # ---- the end ----

    def stop(self) -> None:
        """Give every GPU back, or leave limits and ledger for the next start, as configured.

        A pause leaves them, too: else whoever stops the agent in a hurry would lift all limits.
        """
        self._obey()
        if self._orders.paused is not None and self._ledger.entries:
            self._log.warning("brake", why=f"nothing is given back: {self._orders.words}")
        elif self._config.on_exit == "restore" and not self._config.dry_run:
            self._give_back()
        self._fleet.shut()

    def _give_back(self) -> None:
        """Try until nothing is owned or the time is over, with the session that is open.

        Another session is tried only where no GPU of this one is left to be given back, and in the
        first half of the time: to open one may take longer than what is left.
        """
        end_s = self._clock.now_s() + self._config.exit_s
        half_s = end_s - self._config.exit_s / 2
        again = Backoff(_LAST_GAP_S, self._config.exit_s)
        while self._ledger.entries and self._clock.now_s() < end_s:
            may_open = self._clock.now_s() < half_s and again.may(self._clock.now_s())
            if may_open and not self._reaches_owned():
                self._fleet.open()
                self._say_nvml()
                again = again.failed(self._clock.now_s())
            for gpu in self._fleet:
                self._fleet.become(one.at_once(gpu))
            if isinstance(self._fleet.driver, Open):
                self._act(Desired("stopping"))
            self._tell()
            if self._ledger.entries:
                left_s = end_s - self._clock.now_s()
                self._clock.rest(max(0.0, min(_LAST_GAP_S, left_s)))

    def _reaches_owned(self) -> bool:
        if not isinstance(self._fleet.driver, Open):
            return False
        return any(isinstance(self._fleet[uuid].where, Present) for uuid in self._ledger.entries)


def _adopted(ledger: Ledger) -> list[Gpu]:
    """Return the GPUs that are owned since before this start.

    Without notes what the ledger says is taken to have stood.
    """
    stood = None if ledger.notes is None else ledger.notes.stood
    return [
        one.adopted(
            uuid,
            owned,
            ledger.beside.get(uuid, frozenset()),
            owned.set_mw if stood is None else stood.get(uuid),
        )
        for uuid, owned in ledger.entries.items()
    ]

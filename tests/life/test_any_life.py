"""Random lives: whatever happens in whatever order, the invariants hold at each step.

A life is a seed. What the enforcer does is checked where it happens, against what is true on the
hardware, on the disk and in /proc; what it is to come to in the end, against a plain rule.
"""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from enforcer.brake import PAUSE, RELEASE
from enforcer.ledger import Ledger, LedgerError
from enforcer.policy import Owned, Stranger
from shared import messages as m
from tests.life.hardware import Killed
from tests.life.life import Life

PODS = ("pod-a", "pod-b", "pod-c", "pod-d")
# Another id, which the cgroups of a static pod show.
ALIASES = {"static-a": "pod-a"}
OWNERS: tuple[str | Stranger, ...] = (
    *PODS, *PODS, *ALIASES, Stranger.OTHER, Stranger.UNKNOWN,
)  # fmt: skip
WATTS = (150.0, 250.0, 300.0, 300.5, 450.0, 700.0, 900.0, None)
FAULTS = {
    "pids": ("UNKNOWN", "GPU_IS_LOST", "NOT_SUPPORTED"),
    "limit": ("UNKNOWN", "GPU_IS_LOST", "TIMEOUT"),
    "set": ("UNKNOWN", "NO_PERMISSION", "GPU_IS_LOST"),
    "facts": ("UNKNOWN", "NOT_SUPPORTED"),
    "handle": ("UNKNOWN",),
    "power": ("UNKNOWN",),
}
SILENT_S = 10.0
LIVES = int(os.environ.get("LIVES", "64"))
STEPS = 40
GPUS = 3


class FickleLedger(Ledger):
    """A disk that is full at times, and at which the process is killed at times."""

    full = False
    kill_before = False
    kill_after = False
    takes: Callable[[str], None] = staticmethod(lambda _uuid: None)

    def store(self, entries: dict[str, Owned]) -> None:  # type: ignore[override]
        if type(self).full:
            raise LedgerError("ledger.json cannot be written: No space left on device")
        for uuid in entries.keys() - self.entries.keys():
            type(self).takes(uuid)
        if type(self).kill_before:
            raise Killed
        super().store(entries)
        if type(self).kill_after:
            raise Killed


class AnyLife:
    """One random life and what must hold in it."""

    def __init__(self, seed: int, state_dir: Path) -> None:
        self.chance = random.Random(seed)
        FickleLedger.full = FickleLedger.kill_before = FickleLedger.kill_after = False
        self.lease_s = self.chance.choice([None, None, None, 30.0])
        settings = {
            "release_to": self.chance.choice(["original", "original", "default"]),
            "lease": "hold" if self.lease_s is None else f"release:{self.lease_s:g}",
            "safe_default": self.chance.choice(["", "", "70%", "350"]),
            "max_watts": self.chance.choice(["", "", "600"]),
            "on_exit": self.chance.choice(["restore", "restore", "restore", "hold"]),
            "dry_run": self.chance.choice(["false"] * 9 + ["true"]),
        }
        if settings["safe_default"]:
            settings["conflict"] = self.chance.choice(["lowest", "safe-default"])
        self.life = Life(state_dir, gpus=GPUS, ledger=FickleLedger, **settings)
        self.device = self.life.device
        self.device.open_costs_s = self.chance.choice([0.0, 1.0, 1.0, 30.0])
        self.life.bus.readable = self.chance.random() < 0.8
        self.sessions = 1
        self.life.session = "s1"
        for gpu in self.device.gpus.values():
            gpu.limit_mw = self.chance.choice([700_000, 650_000, 500_000])
            gpu.step_mw = self.chance.choice([1, 1, 1000])
        self.pods: dict[str, float | None] = {}
        self.others: set[str] = set()
        self.pids: dict[int, str | Stranger] = {}
        self.stopping = False
        self.kill_at_set: str | None = None
        # What each GPU that was written had before: the truth that no crash may lose.
        self.originals: dict[str, int] = {}
        self.last_set: dict[str, int] = {}
        FickleLedger.takes = self._takes
        self.device.before_set = self._before_set
        self.device.after_set = self._after_set

    # ---- what must hold at each set ----

    def _takes(self, uuid: str) -> None:
        """A GPU is entered in the ledger: what it has now is what it had before."""
        self.originals[uuid] = self.device.gpus[uuid].limit_mw

    def _before_set(self, uuid: str, limit_mw: int) -> None:
        assert not self.life.config.dry_run, "written in a dry run"
        by_hand = self._released() == uuid
        assert by_hand or not (self.life.state_dir / PAUSE).exists(), "written while paused"
        if self.kill_at_set == "before":
            self.kill_at_set = None
            raise Killed
        gpu = self.device.gpus[uuid]
        entry = self.life.on_disk().get(uuid)
        if not FickleLedger.full:
            assert entry is not None, f"I2: {uuid} is written and is not on disk"
            assert entry.original_mw == self.originals[uuid], "I2: its original was lost"
        self._i3_bounds(uuid, limit_mw)
        if limit_mw > gpu.limit_mw and not by_hand:
            self._i4_up_only_on_evidence(uuid, limit_mw)

    def _released(self) -> str:
        """The GPU that a person on the node wants given back, empty where none."""
        file = self.life.state_dir / RELEASE
        return file.read_text().strip() if file.exists() else ""

    def _i3_bounds(self, uuid: str, limit_mw: int) -> None:
        gpu = self.device.gpus[uuid]
        low, high = 200_000, 700_000
        assert low <= limit_mw <= high, "I3: outside the hardware's bounds"
        most_mw = self.life.config.max_mw
        given_back = limit_mw in (self.originals.get(uuid), gpu.facts.default_mw)
        assert most_mw is None or limit_mw <= most_mw or given_back, "I3: above the bound"

    def _i4_up_only_on_evidence(self, uuid: str, limit_mw: int) -> None:
        if self.stopping or limit_mw == self.last_set.get(uuid):
            return  # somebody else had lowered it: a drift, or a kill came in between
        heard_s = self.life.started_s if self.life.heard_s is None else self.life.heard_s
        silent_s = self.life.clock.time_s - heard_s
        if self.lease_s is not None and silent_s > self.lease_s:
            return
        assert self.life.heard_s is not None, "I4: raised before any snapshot"
        assert silent_s <= SILENT_S + 5, "I4: raised while the watcher is silent"
        assert "pids" not in self.device.gpus[uuid].faults, "I5: unknown is not absent"

    def _after_set(self, uuid: str, limit_mw: int) -> None:
        self.last_set[uuid] = limit_mw
        if self.kill_at_set == "after":
            self.kill_at_set = None
            raise Killed

    def _note_released(self) -> None:
        """Forget the originals of GPUs that are nobody's any more, in memory and on disk."""
        owned = self.life.ledger.entries.keys() | self.life.on_disk().keys()
        for uuid in self.originals.keys() - owned:
            del self.originals[uuid]

    # ---- what happens ----

    def step(self) -> None:
        happens: Callable[[], None] = self.chance.choice(
            [
                *(self.change_wish,) * 4,
                *(self.start_process, self.end_process) * 3,
                self.start_many,
                *(self.pass_time,) * 4,
                self.silence,
                self.fault,
                self.fault,
                self.clear_faults,
                self.another_writer,
                self.vanish_or_return,
                self.driver_away,
                self.disk,
                self.kill,
                self.kill_amid_a_write,
                self.restart,
                self.brake,
                self.another_watcher,
                self.an_old_watcher,
                self.ask,
                self.ask,
            ]
        )
        with self._survives_kills():
            happens()
        self._note_released()

    @contextmanager
    def _survives_kills(self) -> Iterator[None]:
        try:
            yield
        except Killed:
            FickleLedger.kill_before = FickleLedger.kill_after = False
            self.kill_at_set = None
            self._start_again()

    def _start_again(self) -> None:
        self.life.kill()
        self.stopping = False

    def tell(self) -> None:
        others = self.others | {id_ for id_, uid in ALIASES.items() if uid in self.others}
        reply = self.life.snapshot(self.pods, others, ALIASES)
        assert isinstance(reply, m.Report), reply

    def change_wish(self) -> None:
        uid = self.chance.choice(PODS)
        self.others.discard(uid)
        self.pods.pop(uid, None)
        becomes = self.chance.choice(["asks", "asks", "asks", "is there", "is gone"])
        if becomes == "asks":
            self.pods[uid] = self.chance.choice(WATTS)
        elif becomes == "is there":
            self.others.add(uid)
        self.tell()

    def start_process(self) -> None:
        owner = OWNERS[self.chance.randrange(len(OWNERS))]
        self.pids[self.life.run(owner, self.chance.randrange(GPUS))] = owner

    def start_many(self) -> None:
        owner, number = self.chance.choice(OWNERS), self.chance.randrange(GPUS)
        for _ in range(40):
            self.pids[self.life.run(owner, number)] = owner

    def end_process(self) -> None:
        if self.pids:
            pid = self.chance.choice(list(self.pids))
            del self.pids[pid]
            self.life.end(pid)

    def pass_time(self) -> None:
        for _ in range(self.chance.choice([1, 1, 3, 10])):
            self.life.pass_s(self.chance.choice([0.05, 0.5, 2.0]), heartbeats=False)
            if self.life.heard_s is not None:
                self.tell()

    def silence(self) -> None:
        self.life.pass_s(self.chance.choice([5.0, 15.0, 60.0]), heartbeats=False)

    def fault(self) -> None:
        gpu = self.chance.choice(list(self.device.gpus.values()))
        call = self.chance.choice(list(FAULTS))
        gpu.faults[call] = self.chance.choice(FAULTS[call])
        gpu.ignores_sets = self.chance.random() < 0.1

    def clear_faults(self) -> None:
        for gpu in self.device.gpus.values():
            gpu.faults.clear()
            gpu.ignores_sets = False
        self.device.faults.clear()

    def another_writer(self) -> None:
        gpu = self.chance.choice(list(self.device.gpus.values()))
        gpu.limit_mw = self.chance.choice([700_000, 600_000, 200_000])

    def vanish_or_return(self) -> None:
        uuid = self.chance.choice(list(self.device.gpus))
        if self.device.gpus[uuid].there:
            self.device.vanish(uuid)
        else:
            # In the next session every other one may have another number.
            gpus = list(self.device.gpus.items())
            self.chance.shuffle(gpus)
            self.device.gpus = dict(gpus)
            self.device.reappear(uuid)

    def driver_away(self) -> None:
        self.device.faults["open"] = "DRIVER_NOT_LOADED"
        for uuid in self.device.gpus:
            self.device.vanish(uuid)
            self.device.reappear(uuid)

    def disk(self) -> None:
        FickleLedger.full = not FickleLedger.full

    def brake(self) -> None:
        """A person on the node pauses it, or goes on; or has a GPU given back, or not any more."""
        file = self.life.state_dir / self.chance.choice([PAUSE, RELEASE])
        if file.exists():
            file.unlink()
        else:
            file.write_text(self.chance.choice(list(self.device.gpus)))
        self.tell()

    def kill(self) -> None:
        self._start_again()

    def kill_amid_a_write(self) -> None:
        where = self.chance.choice(["store before", "store after", "set before", "set after"])
        FickleLedger.kill_before = where == "store before"
        FickleLedger.kill_after = where == "store after"
        self.kill_at_set = where.removeprefix("set ") if where.startswith("set") else None
        self.change_wish()
        self.life.pass_s(1.0, heartbeats=False)
        FickleLedger.kill_before = FickleLedger.kill_after = False
        self.kill_at_set = None

    def restart(self) -> None:
        self.stopping = True
        self.life.stop()
        self.stopping = False
        self.life.start()

    def another_watcher(self) -> None:
        self.sessions += 1
        self.life.session, self.life.revision = f"s{self.sessions}", 0
        self.tell()

    def an_old_watcher(self) -> None:
        """What a watcher says that another one has replaced changes nothing."""
        self.tell()
        self.another_watcher()
        assert self.life.last is not None
        heard_s = self.life.heard_s
        old = msgspec.structs.replace(self.life.last, session=f"s{self.sessions - 1}", pods=[])
        assert isinstance(self.life.deliver(old), m.Error), "an old watcher is heard"
        self.life.heard_s = heard_s

    def ask(self) -> None:
        began_s = self.life.clock.time_s
        status = self.life.status()
        took_s = self.life.clock.time_s - began_s
        assert took_s < 1 + 2 * self.device.open_costs_s, "an answer that comes late"
        assert all(gpu.reason for gpu in status.gpus), "I12"
        assert all(pod.reason for pod in status.pods), "I12"

    # ---- what it comes to ----

    def calm(self) -> None:
        """Everything is repaired, and long enough passes for every wait to be over."""
        self.clear_faults()
        self.life.bus.readable = True
        for name in (PAUSE, RELEASE):
            (self.life.state_dir / name).unlink(missing_ok=True)
        FickleLedger.full = False
        for uuid in self.device.gpus:
            self.device.vanish(uuid)
        ends: set[str | Stranger] = {Stranger.UNKNOWN}
        if self.chance.random() < 0.7:  # what is gone has ended, too
            here = self.pods.keys() | self.others
            ends |= {id_ for id_ in (*PODS, *ALIASES) if ALIASES.get(id_, id_) not in here}
        for pid in [pid for pid, owner in self.pids.items() if owner in ends]:
            del self.pids[pid]
            self.life.end(pid)
        with self._survives_kills():
            self.tell()
            self.life.pass_s(3)
            for uuid in self.device.gpus:
                self.device.reappear(uuid)
            self.life.pass_s(3)
            self.tell()
            self._until_all_are_back()
            # Longer than the longest wait after a refused write.
            self.life.pass_s(40)
        self._note_released()

    def _until_all_are_back(self) -> None:
        """What came and went often is searched for seldom: every ten minutes, in the end."""
        until_s = self.life.clock.time_s + 700 + 6 * self.device.open_costs_s
        while self.device.is_open and any(gpu.state == "lost" for gpu in self._told().gpus):
            assert self.life.clock.time_s < until_s, "a GPU that is there stays lost"
            self.life.pass_s(20)

    def _told(self) -> m.Report:
        reply = self.life.deliver(self.life.last or m.Ping())
        assert isinstance(reply, m.Report)
        return reply

    def _owner(self, pid: int) -> str | Stranger:
        owner = self.pids[pid]
        is_known = isinstance(owner, str) and ALIASES.get(owner, owner) in self.pods
        return ALIASES.get(owner, owner) if is_known and isinstance(owner, str) else owner

    def _wanted_mw(self, usable: list[int]) -> int:
        """Return what a GPU is to have whose pods ask for these."""
        most_mw = min(700_000, self.life.config.max_mw or 700_000)
        limits = {max(200_000, min(most_mw, mw)) for mw in usable}
        default = self.life.config.safe_default
        if len(limits) == 1 or default is None or self.life.config.conflict == "lowest":
            return min(limits)
        return max(200_000, min(most_mw, default.for_gpu(700_000) or 0))

    def comes_to_what_is_asked(self) -> None:
        for uuid, gpu in self.device.gpus.items():
            owners = {self._owner(pid) for pid in gpu.pids}
            asked = [self.pods[uid] for uid in owners & self.pods.keys() if isinstance(uid, str)]
            usable = [round(watts * 1000) for watts in asked if watts is not None]
            shown = (uuid, self.life.gpu(int(uuid[-1])).reason)
            others = self.others | {id_ for id_, uid in ALIASES.items() if uid in self.others}
            gone = owners - self.pods.keys() - others - {Stranger.OTHER}
            if usable and not gone:
                wanted_mw = self._wanted_mw(usable)
                assert gpu.limit_mw == wanted_mw // gpu.step_mw * gpu.step_mw, shown
            if not owners & self.pods.keys() and not gone and uuid in self.originals:
                entry = self.life.ledger.entries[uuid]
                assert entry.pods & self.pods.keys(), shown  # its worker restarts
                assert not owners, shown

    def is_quiet(self) -> None:
        sets, lines = len(self.device.sets), len(self.life.log.lines)
        opens = len(self.device.opens)
        self.life.pass_s(120)
        assert len(self.device.sets) == sets, "I10: writes in steady state"
        assert self.life.log.lines[lines:] == [], "I10: log lines in steady state"
        assert len(self.device.opens) == opens, "I10: sessions in steady state"

    def ends_as_configured(self) -> None:
        limits = {uuid: gpu.limit_mw for uuid, gpu in self.device.gpus.items()}
        entries = self.life.on_disk()
        originals = dict(self.originals)
        self.stopping = True
        self.life.stop()
        if self.life.config.on_exit == "hold":
            assert self.life.on_disk() == entries
            assert limits == {uuid: gpu.limit_mw for uuid, gpu in self.device.gpus.items()}
            return
        assert self.life.on_disk() == {}
        for uuid, original_mw in originals.items():
            gpu = self.device.gpus[uuid]
            found_mw = original_mw
            if self.life.config.release_to == "default":
                found_mw = gpu.facts.default_mw or original_mw
            assert gpu.limit_mw == found_mw // gpu.step_mw * gpu.step_mw, uuid


def live(seed: int, state_dir: Path) -> None:
    any_life = AnyLife(seed, state_dir)
    for _ in range(STEPS):
        any_life.step()
    any_life.calm()
    if not any_life.life.config.dry_run:
        any_life.comes_to_what_is_asked()
    any_life.is_quiet()
    any_life.ends_as_configured()


@pytest.mark.parametrize("part", range(8))
def test_any_life(part: int) -> None:
    # Memory, not disk: the code that writes is the real one, and thousands of lives fsync.
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        for seed in range(part, LIVES, 8):
            try:
                live(seed, Path(folder) / str(seed))
            except AssertionError as error:
                raise AssertionError(f"in the life with seed {seed}: {error}") from error

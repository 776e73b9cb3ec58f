"""A node in one process: the real loop, desk, policy and ledger; the rest is the test's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from enforcer.agent import Agent, World
from enforcer.ledger import Ledger
from enforcer.policy import Stranger
from enforcer.processes import Processes
from enforcer.report import about
from enforcer.server import Incoming, Server
from enforcer.settings import EnforcerSettings
from enforcer.sources import Joined
from shared import messages as m
from shared.logs import Level, Log
from shared.settings import parse_settings
from tests.life.hardware import FakeBus, FakeDevice, FakeGpu, FakeKubelet, FakeProc, HandClock

WATCHER_UID = 65532
MOST_TURNS_PER_S = 200


class RecordingLog(Log):
    """Keeps the lines."""

    def __init__(self) -> None:
        super().__init__("enforcer", "info", "json")
        self.lines: list[tuple[str, dict[str, object]]] = []

    def _write(self, level: Level, event: str, values: dict[str, object]) -> None:
        self.lines.append((event, {"level": level, **values}))

    def events(self, event: str) -> list[dict[str, object]]:
        return [values for name, values in self.lines if name == event]


class HandServer:
    """Delivers what the test has put in; otherwise waiting lets time pass."""

    def __init__(self, clock: HandClock) -> None:
        self._clock = clock
        self.waiting: list[Incoming] = []
        self.replies: list[m.Reply] = []
        self.events: list[m.Event | m.GpuEvent] = []
        self.until_s = 0.0
        self.turns = 0

    def receive(self, timeout_s: float) -> list[Incoming]:
        self.turns += 1
        if not self.waiting:
            # Never beyond what the test wants to see happen.
            left_s = max(0.0, self.until_s - self._clock.time_s)
            self._clock.rest(min(max(0.0, timeout_s), left_s) + 1e-4)
        taken, self.waiting = self.waiting, []
        return taken

    def take_refused(self) -> int:
        return 0

    def take_whose(self) -> tuple[int, int] | None:
        return None

    is_looking = False

    def reply(self, _incoming: Incoming, message: m.Reply) -> None:
        # As the wire has it: what cannot be encoded must not go unseen.
        self.replies.append(m.decode_reply(m.encode(message)))

    def publish(self, event: m.Event | m.GpuEvent) -> None:
        self.events.append(m.decode_event(m.encode(event)))


class Life:
    """One node and at most one enforcer on it."""

    def __init__(
        self, state_dir: Path, *, gpus: int = 2, ledger: type[Ledger] = Ledger, **settings: str
    ) -> None:
        self.clock = HandClock()
        self.device = FakeDevice([FakeGpu(f"GPU-{k}") for k in range(gpus)], self.clock)
        self.bus = FakeBus(self.device)
        self.proc = FakeProc()
        self.kubelet = FakeKubelet()
        self.log = RecordingLog()
        self.server = HandServer(self.clock)
        self.state_dir = state_dir
        named = {f"POWER_AGENT_{name.upper()}": value for name, value in settings.items()}
        self.config = parse_settings(EnforcerSettings, named)
        self.boot_id = "boot"
        self._ledger_type = ledger
        self._next_pid = 100
        self.session, self.revision = "s", 0
        self.last: m.Snapshot | None = None
        # When this enforcer last heard the watcher.
        self.heard_s: float | None = None
        # Why the enforcer ended by itself, each time; the kubelet makes a new container.
        self.ends: list[str] = []
        self.start()

    # -- the enforcer --

    def start(self) -> None:
        """As `enforcer/__main__.py` does it."""
        self.device.close()
        self.ledger = self._ledger_type(self.state_dir, self.boot_id)
        assert self.ledger.try_lock()
        self.said = self.ledger.load()
        self.server.waiting.clear()
        self.heard_s = None
        self.started_s = self.clock.time_s
        source = Joined(Processes(self.device, self.proc), self.kubelet)
        server = cast("Server", self.server)
        world = World(server, self.device, source, self.bus, self.clock)
        me = about(self.config, ("/",), self.ledger.path)
        self.agent = Agent(self.config, self.log, world, self.ledger, me)

    def kill(self) -> None:
        """`kill -9` and a new start; hardware and disk are what they are."""
        self.ledger.close()
        self.start()

    def stop(self) -> None:
        self.agent.stop()
        self.ledger.close()

    # -- time --

    def pass_s(self, span_s: float, *, heartbeats: bool = True) -> None:
        """Let time pass, with the watcher's heartbeat every two seconds or without."""
        end_s = self.clock.time_s + span_s
        while self.clock.time_s < end_s:
            piece_s = min(2.0, end_s - self.clock.time_s)
            self._turn_until(self.clock.time_s + piece_s)
            if heartbeats and self.last is not None:
                self.deliver(self.last)

    def _turn_until(self, end_s: float) -> None:
        turns, began_s = self.server.turns, self.clock.time_s
        self.server.until_s = end_s
        while self.clock.time_s < end_s:
            self._turn()
        span_s = self.clock.time_s - began_s
        assert self.server.turns - turns <= MOST_TURNS_PER_S * (span_s + 1), "a busy loop"

    def _turn(self) -> None:
        self.agent.turn()
        if why := self.agent.hopeless:
            asked = list(self.server.waiting)
            self.ends.append(why)
            self.device.cut_off = None
            self.kill()
            self.server.waiting = asked

    # -- asking --

    def deliver(self, request: m.Request, uid: int = WATCHER_UID) -> m.Reply:
        """Send a request and turn until it is answered."""
        self.server.waiting.append(Incoming((b"peer",), m.encode(request), uid, 1))
        if isinstance(request, m.Snapshot):
            self.heard_s = self.clock.time_s
        before = len(self.server.replies)
        deadline_s = self.clock.time_s + 200
        self.server.until_s = deadline_s
        while len(self.server.replies) == before:
            assert self.clock.time_s < deadline_s, "no answer"
            self._turn()
        return self.server.replies[-1]

    def snapshot(
        self,
        pods: Mapping[str, float | None],
        others: Iterable[str] = (),
        aliases: Mapping[str, str] | None = None,
    ) -> m.Report | m.Error:
        """Say what is wanted, watts by pod."""
        self.revision += 1
        listed = [
            m.DesiredPod(
                uid=uid,
                aliases=[alias for alias, of in (aliases or {}).items() if of == uid],
                namespace="default",
                name=uid,
                limit_mw=None if watts is None else round(watts * 1000),
                raw="much" if watts is None else f"{watts:g}",
            )
            for uid, watts in pods.items()
        ]
        self.last = m.Snapshot(
            session=self.session,
            revision=self.revision,
            node="node-1",
            pods=listed,
            others=list(others),
        )
        reply = self.deliver(self.last)
        assert isinstance(reply, m.Report | m.Error), reply
        return reply

    def status(self) -> m.StatusReply:
        reply = self.deliver(m.Status(), uid=0)
        assert isinstance(reply, m.StatusReply), reply
        return reply

    def gpu(self, number: int = 0) -> m.Gpu:
        (found,) = (gpu for gpu in self.status().gpus if gpu.uuid == f"GPU-{number}")
        return found

    def pod(self, uid: str) -> m.Pod:
        (found,) = (pod for pod in self.status().pods if pod.uid == uid)
        return found

    # -- what runs, what holds --

    def board(self, number: int = 0) -> FakeGpu:
        return self.device.gpus[f"GPU-{number}"]

    def run(self, owner: str | Stranger, *numbers: int) -> int:
        """Start a process of that pod (or stranger) on those GPUs."""
        self._next_pid += 1
        self.proc.owners[self._next_pid] = owner
        self.proc.began_s[self._next_pid] = self.clock.time_s
        for number in numbers or (0,):
            self.board(number).pids.add(self._next_pid)
        return self._next_pid

    def end(self, pid: int) -> None:
        del self.proc.owners[pid]
        for gpu in self.device.gpus.values():
            gpu.pids.discard(pid)

    def watts(self, number: int = 0) -> float:
        return self.board(number).limit_mw / 1000

    def on_disk(self) -> dict[str, Any]:
        """The entries of the ledger's file, as another enforcer would read them."""
        other = Ledger(self.state_dir, self.boot_id)
        other.load()
        other.close()
        return dict(other.entries)

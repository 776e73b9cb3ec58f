"""The node of tests/node in one process: the same words, but no process, no socket, no wall clock.

What is the enforcer's is the real one, NVML's binding and the simulated library under it included.
Only the clock and the socket's ends are the test's, and the pids are made up.
"""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, TypeVar, cast

from enforcer.agent import Agent, World
from enforcer.bus import Bus
from enforcer.kubelet import Kubelet
from enforcer.ledger import Ledger
from enforcer.nvml import Nvml
from enforcer.processes import Processes
from enforcer.procfs import ProcessReader
from enforcer.report import about
from enforcer.server import Incoming, Server
from enforcer.settings import EnforcerSettings
from enforcer.sources import Joined, Source
from shared import messages as m
from shared.settings import parse_settings
from tests.life.hardware import HandClock
from tests.life.life import HandServer, RecordingLog
from tests.node.enforcer_harness import EnforcerNode, named, pod_uid
from tests.simnode.nvml import SONAME, build_library

__all__ = ["LifeNode", "pod_uid", "until"]

T = TypeVar("T")
STEP_S = 0.02
LONGEST_S = 900.0
# The defaults: nobody has to wait for them here.
PACE = {"scan_seconds": "1", "reconcile_seconds": "15", "exit_seconds": "10"}
_current: list[LifeNode] = []
# Before nvidia-ml-py asks for a library of this name: the loader has it already then.
ctypes.CDLL(str(build_library() / SONAME), mode=ctypes.RTLD_GLOBAL)


def until(condition: Callable[[], T], what: str) -> T:
    """The first true value of the condition, on the clock of the node that the test made last."""
    return _current[-1].until(condition, what)


class MadeUpProcesses:
    """Processes that are nothing but a cgroup's text, with pids that a kernel gives last."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._next = 4_000_000
        root.mkdir()

    def start(self, cgroup: str) -> int:
        self._next += 1
        folder = self.root / str(self._next)
        folder.mkdir()
        (folder / "cgroup").write_text(cgroup)
        return self._next

    def end(self, pid: int) -> None:
        shutil.rmtree(self.root / str(pid))

    def end_all(self) -> None:
        """Nothing runs."""


class LifeNode(EnforcerNode):
    """A node whose enforcer is an object, and whose time passes only when it is waited for."""

    def __init__(self, *, gpus: int = 2, model: str = "H100", **settings: str) -> None:
        super().__init__(gpus=gpus, model=model, **(PACE | settings))
        shutil.rmtree(self.work.root)
        self.work = MadeUpProcesses(self.work.root)  # type: ignore[assignment]
        self.settings |= self.gpus.environment()
        for gpu in self.gpus:
            gpu.keep_dead = True  # the library would leave out pids that no kernel has
        self.clock = HandClock()
        self.log = RecordingLog()
        self.server = HandServer(self.clock)
        self.agent: Agent | None = None
        self.nvml = Nvml()
        self.ledger: Ledger | None = None
        _current.append(self)

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        _current.remove(self)
        self._end()
        super().__exit__(kind, *rest)

    # -- the enforcer --

    @contextmanager
    def _own_gpus(self) -> Iterator[None]:
        """The library asks for the folder of its GPUs when it is opened."""
        os.environ["SIM_NVML_DIR"] = self.settings["SIM_NVML_DIR"]
        yield

    def start(self, **settings: str) -> Self:
        """As `enforcer/__main__.py` does it, and one turn."""
        config = parse_settings(EnforcerSettings, self.settings | named(settings))
        boot = self.work.root / "sys/kernel/random/boot_id"
        self.ledger = Ledger(config.state_dir, boot.read_text() if boot.exists() else "boot")
        assert self.ledger.try_lock()
        for line in self.ledger.load():
            self.log.warning("ledger", why=line)
        source: Source = Processes(self.nvml, ProcessReader(config.proc_root, ("/",)))
        kubelet = None
        if config.kubelet_dir is not None:
            kubelet = Kubelet(
                config.kubelet_dir, config.kubelet_resources, self.log, self.nvml.whole_of
            )
            source = Joined(source, kubelet)
        server = cast("Server", self.server)
        world = World(server, self.nvml, source, Bus(config.sysfs_root), self.clock, kubelet)
        me = about(config, ("/",), self.ledger.path)
        self.agent = Agent(config, self.log, world, self.ledger, me)
        self.log.info("started", owned=len(self.ledger.entries))
        self.status()
        return self

    def _end(self) -> None:
        self.nvml.close()
        if self.ledger is not None:
            self.ledger.close()
        self.agent = self.ledger = None

    @property
    def pid(self) -> int:
        return os.getpid()

    def kill(self) -> None:
        """Nothing is done in order: the next start finds what is there."""
        self.server.waiting.clear()
        self._end()

    def stop(self) -> int:
        assert self.agent is not None
        assert self.ledger is not None
        with self._own_gpus():
            self.agent.stop()
        self.log.info("stopped", still_owned=len(self.ledger.entries))
        self._end()
        return 0

    # -- time --

    def _turn_until(self, end_s: float) -> None:
        assert self.agent is not None
        self.server.until_s = end_s
        with self._own_gpus():
            while self.clock.time_s < end_s:
                self.agent.turn()

    def lives_for(self, span_s: float) -> None:
        self._turn_until(self.clock.time_s + max(0.0, span_s))

    def until(
        self, condition: Callable[[], T], what: str, *, explain: Callable[[], object] = str
    ) -> T:
        end_s = self.clock.time_s + LONGEST_S
        while not (found := condition()):
            assert self.clock.time_s < end_s, f"{what}: not within {LONGEST_S} s: {explain()}"
            if self.agent is not None:
                self.lives_for(STEP_S)
        return found

    # -- what it says --

    def log_text(self) -> str:
        return "".join(f"{event} {values}\n" for event, values in self.log.lines)

    def logs(self, event: str | None = None) -> list[dict[str, Any]]:
        lines = [{"event": name, **values} for name, values in self.log.lines]
        return [line for line in lines if event in (None, line["event"])]

    # -- asking --

    def ask(self, request: m.Request) -> m.Reply:
        assert self.agent is not None
        payload = m.encode(request)
        self.server.waiting.append(Incoming((b"peer",), payload, os.geteuid(), self.pid))
        before = len(self.server.replies)
        self.server.until_s = self.clock.time_s + LONGEST_S
        with self._own_gpus():
            while len(self.server.replies) == before:
                self.agent.turn()
        return self.server.replies[-1]

"""The real enforcer process on simulated GPUs: starts, kills and asks it, and collects its logs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import zmq

from shared import messages as m
from shared.client import Client
from shared.sockets import TransportError, control_path
from tests.simnode.gpus import Kind, SimGpu, SimGpus
from tests.simnode.node import FAST as SIM_FAST
from tests.waiting import HANG_S, ended, until

REPOSITORY = Path(__file__).parents[2]
CONTAINER = "3fa9" * 16
T = TypeVar("T")
FAST = {**SIM_FAST, "POWER_AGENT_EXIT_SECONDS": "5"}


def pod_uid(number: int) -> str:
    """A pod's uid, the same for the same number."""
    return str(uuid.UUID(int=0x2C1F_7A54_0B6E_4D0B_9A51_0000_0000_0000 + number))


def pod_cgroup(uid: str, below: str = CONTAINER) -> str:
    """The cgroup text of a process in a container of that pod."""
    return f"0::/kubepods/burstable/pod{uid}/{below}\n"


HOST_CGROUP = "0::/system.slice/training.service\n"


class Workloads:
    """Real processes whose cgroups are made up, in a proc root of their own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        root.mkdir()

    def start(self, cgroup: str) -> int:
        """Start a process that NVML may list, and show it with this cgroup text."""
        process = subprocess.Popen(["sleep", "600"])
        folder = self.root / str(process.pid)
        folder.mkdir()
        (folder / "stat").symlink_to(f"/proc/{process.pid}/stat")
        (folder / "cgroup").write_text(cgroup)
        self._running[process.pid] = process
        return process.pid

    def end(self, pid: int) -> None:
        """End a process; its proc entry goes with it."""
        shutil.rmtree(self.root / str(pid))
        process = self._running.pop(pid)
        process.kill()
        process.wait()

    def end_all(self) -> None:
        for pid in list(self._running):
            self.end(pid)


class EnforcerNode:
    """A node with simulated GPUs and at most one enforcer of its own; use it with `with`.

    `snapshot` speaks as the watcher, `status` as a reader; both are whoever runs the test.
    """

    def __init__(self, *, gpus: int = 2, model: str = "H100", **settings: str) -> None:
        """Make the node; `settings` are POWER_AGENT_ variables, lower case and without that."""
        # Not pytest's folder: other uids must reach the socket, and its path must be short.
        self.folder = Path(tempfile.mkdtemp(prefix="power-agent-node-"))
        self.folder.chmod(0o755)
        self.run_dir, self.state_dir = self.folder / "run", self.folder / "state"
        self.gpus = SimGpus(self.folder / "gpus").create(gpus, model)
        self.work = Workloads(self.folder / "proc")
        self.settings = {
            "POWER_AGENT_RUN_DIR": str(self.run_dir),
            "POWER_AGENT_STATE_DIR": str(self.state_dir),
            "POWER_AGENT_PROC_ROOT": str(self.work.root),
            "POWER_AGENT_WATCHER_UID": str(os.geteuid()),
            "POWER_AGENT_READER_UIDS": str(os.geteuid()),
            **FAST,
            **named(settings),
        }
        self.session, self.revision = uuid.uuid4().hex, 0
        self.scope: Literal["node", "namespace"] = "node"  # of what the watcher is told
        self.process: subprocess.Popen[bytes] | None = None
        self._processes: list[subprocess.Popen[bytes]] = []
        self._log, self._errors = self.folder / "log", self.folder / "errors"
        self.wrapped_in: list[str] = []  # a command that ends by executing its arguments
        self.output: int | None = None  # standard output from the next start on, not the log
        self._client: Client | None = None
        self._sent: m.Snapshot | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._client is not None:
            self._client.close()
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        self.work.end_all()
        if kind is not None:
            print(f"--- log\n{self.log_text()}--- errors\n{self.errors()}")
        shutil.rmtree(self.folder)

    # -- the process --

    def spawn(self, **settings: str) -> subprocess.Popen[bytes]:
        """Start an enforcer and return at once."""
        environment = {"PATH": os.environ["PATH"], **self.gpus.environment(), **self.settings}
        environment |= named(settings)
        with self._log.open("ab") as log, self._errors.open("ab") as errors:
            process = subprocess.Popen(
                [*self.wrapped_in, sys.executable, "-m", "enforcer"],
                cwd=REPOSITORY,
                env=environment,
                stdout=log if self.output is None else self.output,
                stderr=errors,
            )
        self._processes.append(process)
        return process

    def start(self, **settings: str) -> Self:
        """Start the enforcer and wait until it answers."""
        self.process = self.spawn(**settings)
        pid = self.process.pid
        until(lambda: self._answers(pid), "the enforcer answers")
        return self

    def _answers(self, pid: int) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.errors()
        if self._client is not None:
            self._client.close()  # so that no answer of an enforcer before this one is taken
            self._client = None
        try:
            reply = self.client.request(m.Status(), 1.0)
        except TransportError:
            return False
        return isinstance(reply, m.StatusReply) and reply.enforcer.pid == pid

    @property
    def pid(self) -> int:
        """The enforcer's pid."""
        assert self.process is not None
        return self.process.pid

    def kill(self) -> None:
        """`kill -9`."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """SIGTERM; returns the exit status."""
        assert self.process is not None
        self.process.terminate()
        return ended(self.process)

    def run_to_end(self, **settings: str) -> tuple[int, str]:
        """Start an enforcer that is to end by itself; returns exit status and standard error."""
        before = len(self.errors())
        process = self.spawn(**settings)
        return ended(process), self.errors()[before:]

    def lives_for(self, span_s: float) -> None:
        """Let `span_s` pass; an AssertionError where the enforcer ends meanwhile."""
        assert self.process is not None
        try:
            status = self.process.wait(max(0.0, span_s))
        except subprocess.TimeoutExpired:
            return
        raise AssertionError(f"the enforcer ended with status {status}")

    def until(
        self, condition: Callable[[], T], what: str, *, explain: Callable[[], object] = str
    ) -> T:
        """Return the first true value of the condition."""
        return until(condition, what, explain=explain)

    # -- what it says --

    def errors(self) -> str:
        """Standard error of every enforcer so far."""
        return self._errors.read_text() if self._errors.exists() else ""

    def log_text(self) -> str:
        """Standard output of every enforcer so far."""
        return self._log.read_text() if self._log.exists() else ""

    def logs(self, event: str | None = None) -> list[dict[str, Any]]:
        """Log lines so far, of one event or all."""
        lines = [json.loads(line) for line in self.log_text().splitlines()]
        return [line for line in lines if event in (None, line["event"])]

    # -- asking --

    @property
    def client(self) -> Client:
        """The one connection of this node's watcher and reader."""
        if self._client is None:
            self._client = Client(self.run_dir)
        return self._client

    def ask(self, request: m.Request) -> m.Reply:
        """Send a request and return the answer."""
        return self.client.request(request, HANG_S)

    def snapshot(
        self,
        pods: Mapping[str, float | None],
        others: Iterable[str] = (),
        *,
        aliases: Mapping[str, list[str]] | None = None,
    ) -> m.Report:
        """Send the whole desired state, watts by pod uid, and return the report on it."""
        self.revision += 1
        reply = self.send(self.message(pods, others, aliases=aliases))
        assert isinstance(reply, m.Report), reply
        assert (reply.session, reply.revision) == (self.session, self.revision)
        return reply

    def message(
        self,
        pods: Mapping[str, float | None],
        others: Iterable[str] = (),
        *,
        aliases: Mapping[str, list[str]] | None = None,
    ) -> m.Snapshot:
        """The snapshot of that state, with the present session and revision."""
        listed = [
            m.DesiredPod(
                uid=uid,
                aliases=(aliases or {}).get(uid, []),
                namespace="default",
                name=f"pod-{uid[-4:]}",
                limit_mw=None if watts is None else round(watts * 1000),
                raw="much" if watts is None else f"{watts:g}",
            )
            for uid, watts in pods.items()
        ]
        return m.Snapshot(
            session=self.session,
            revision=self.revision,
            node="node-1",
            pods=listed,
            others=list(others),
            scope=self.scope,
        )

    def send(self, message: m.Snapshot) -> m.Reply:
        """Send a snapshot as it is and return whatever comes back."""
        self._sent = message
        return self.ask(message)

    def heartbeat(self) -> m.Report:
        """Repeat the last snapshot."""
        assert self._sent is not None
        reply = self.send(self._sent)
        assert isinstance(reply, m.Report), reply
        return reply

    def status(self) -> m.StatusReply:
        """Ask what holds."""
        reply = self.ask(m.Status())
        assert isinstance(reply, m.StatusReply), reply
        return reply

    def gpu(self, number: int = 0) -> m.Gpu:
        """What the enforcer says of one GPU."""
        wanted = self.gpus[number].uuid
        (found,) = (gpu for gpu in self.status().gpus if gpu.uuid == wanted)
        return found

    def pod(self, uid: str) -> m.Pod:
        """What the enforcer says of one annotated pod."""
        (found,) = (pod for pod in self.status().pods if pod.uid == uid)
        return found

    def raw(self, *frames: bytes, answered: bool = True) -> m.Reply | None:
        """Send frames as they are, over a connection of their own."""
        context = zmq.Context()
        try:
            sock = context.socket(zmq.DEALER)
            sock.linger = 0
            sock.connect(f"ipc://{control_path(self.run_dir)}")
            sock.send_multipart(frames)
            if not sock.poll(round(HANG_S * 1000) if answered else 500):
                assert not answered, "no answer"
                return None
            return m.decode_reply(sock.recv_multipart()[-1])
        finally:
            context.destroy(linger=0)

    def deaf_client(self) -> zmq.Socket[bytes]:
        """A connection over which many answers may be asked for and none is read."""
        sock: zmq.Socket[bytes] = zmq.Context().socket(zmq.DEALER)
        sock.linger = 0
        sock.rcvhwm = 1
        sock.connect(f"ipc://{control_path(self.run_dir)}")
        return sock

    # -- what runs, what holds --

    def run_pod(
        self, uid: str, *numbers: int, kind: Kind = "compute", cgroup: str | None = None
    ) -> int:
        """Start a process of that pod on those GPUs (the first if none is named)."""
        return self._run(cgroup or pod_cgroup(uid), numbers or (0,), kind)

    def run_host(self, *numbers: int) -> int:
        """Start a process of the host on those GPUs (the first if none is named)."""
        return self._run(HOST_CGROUP, numbers or (0,), "compute")

    def _run(self, cgroup: str, numbers: Iterable[int], kind: Kind) -> int:
        pid = self.work.start(cgroup)
        for number in numbers:
            self.gpus[number].add_process(pid, kind)
        return pid

    def end(self, pid: int) -> None:
        """End a process that runs on GPUs."""
        for gpu in self.gpus:
            gpu.remove_process(pid)
        self.work.end(pid)

    def limit(self, number: int = 0) -> float:
        """The limit that the hardware has, in watts."""
        return self.gpus[number].limit_mw / 1000

    def wait_limit(self, watts: float, number: int = 0) -> None:
        """Wait until the hardware has that limit."""
        self.until(
            lambda: self.limit(number) == watts,
            f"GPU {number} at {watts} W",
            explain=lambda: f"it has {self.limit(number)} W",
        )

    def wait_state(self, state: str, number: int = 0) -> m.Gpu:
        """Wait until the enforcer says that of a GPU."""

        def there() -> m.Gpu | None:
            gpu = self.gpu(number)
            return gpu if gpu.state == state else None

        found = self.until(there, f"GPU {number} {state}")
        assert found is not None
        return found

    def wait_drifts(self, count: int) -> None:
        """Wait until so many drifts were counted."""
        self.until(lambda: self.status().counters.drifts == count, f"{count} drifts counted")

    def looks(self, times: int = 3) -> None:
        """Let the enforcer look at the processes and decide that many times (a status is one)."""
        for _ in range(times):
            self.status()

    def writes(self, gpu: SimGpu | None = None) -> int:
        """How many sets the hardware has seen."""
        return len(self.gpus.sets() if gpu is None else gpu.sets())

    def owned(self) -> dict[str, int]:
        """What the ledger on disk has: original limits in mW by UUID."""
        path = self.state_dir / "ledger.json"
        if not path.exists():
            return {}
        gpus = json.loads(path.read_bytes())["gpus"]
        return {uuid: entry["original_mw"] for uuid, entry in gpus.items()}


def named(settings: Mapping[str, str]) -> dict[str, str]:
    """`scan_seconds` is POWER_AGENT_SCAN_SECONDS."""
    return {f"POWER_AGENT_{name.upper()}": value for name, value in settings.items()}

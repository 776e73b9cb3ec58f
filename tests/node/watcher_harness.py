"""The real watcher process between an embedded Kubernetes API and an enforcer that only notes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from enforcer.server import Server
from shared import messages as m
from tests.node.enforcer_harness import REPOSITORY
from tests.pages import page
from tests.simnode import exposition
from tests.simnode.controlplane_process import free_ports
from tests.simnode.kubeapi import KubeApi
from tests.waiting import until

KEY = "dynamo.nvidia.com/gpu-power-limit"
NODE = "gpu-node"
_WAIT_S = 0.05
# Sooner than anything that the watcher itself waits for, and than a kubelet that kills after 30 s.
_STOPPED_S = 15.0
_Asked = m.Snapshot | m.Unlisted
_Answer = Callable[[m.Snapshot], m.Reply]


def report(
    request: _Asked,
    *,
    pods: list[m.Pod] | None = None,
    nvml: m.NvmlState = "ok",
    nvml_message: str = "",
) -> m.Report:
    """What an enforcer without GPUs answers."""
    return m.Report(
        session=request.session,
        revision=request.revision if isinstance(request, m.Snapshot) else 0,
        nvml=nvml,
        nvml_message=nvml_message,
        gpus=[],
        pods=pods or [],
        counters=m.Counters(),
    )


class StandIn:
    """Listens where the enforcer would, from a thread of its own; answers as it is told."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.answer: _Answer | None = report  # None: it takes everything and says nothing
        self.got: list[tuple[float, m.Snapshot]] = []
        self._thread: threading.Thread | None = None
        self._end = threading.Event()
        self.start()

    def start(self) -> None:
        """Listen (again)."""
        self._end.clear()
        self._thread = threading.Thread(
            target=self._serve, args=(Server(self.run_dir, [os.geteuid()]),)
        )
        self._thread.start()

    def stop(self) -> None:
        """Be gone, as a process that ended."""
        if self._thread is not None:
            self._end.set()
            self._thread.join()
            self._thread = None

    def _serve(self, server: Server) -> None:
        while not self._end.is_set():
            for incoming in server.receive(_WAIT_S):
                request = m.decode_request(incoming.payload)
                if isinstance(request, m.Snapshot):
                    self.got.append((time.monotonic(), request))
                if self.answer is not None:
                    server.reply(incoming, self._reply(request, self.answer))
        server.close()

    @staticmethod
    def _reply(request: m.Request, answer: _Answer) -> m.Reply:
        if isinstance(request, m.Snapshot):
            return answer(request)
        assert isinstance(request, m.Unlisted)
        return report(request)

    def last(self) -> m.Snapshot | None:
        """The newest snapshot, None where none came."""
        return self.got[-1][1] if self.got else None


class WatcherNode:
    """One watcher on a node of its own; use it with `with`."""

    def __init__(
        self, *, api: KubeApi | None = None, enforcer: bool = True, **settings: str
    ) -> None:
        """Make everything but the watcher; `settings` are its environment, as it is."""
        self.folder = Path(tempfile.mkdtemp(prefix="power-agent-watcher-"))
        self.api = api or KubeApi()
        self.run_dir = self.folder / "run"
        self.enforcer = StandIn(self.run_dir) if enforcer else None
        self.port = free_ports(1)[0]
        self.kubeconfig = self.api.write_kubeconfig(self.folder / "kubeconfig")
        self.environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(REPOSITORY),
            "NODE_NAME": NODE,
            "KUBECONFIG": str(self.kubeconfig),
            "POWER_AGENT_RUN_DIR": str(self.run_dir),
            "POWER_AGENT_METRICS_ADDR": f"127.0.0.1:{self.port}",
            **settings,
        }
        self.process: subprocess.Popen[bytes] | None = None
        self._out, self._err = self.folder / "out", self.folder / "err"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            sys.stderr.write(self._out.read_text() if self._out.exists() else "")
        self.api.stop()
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if self.enforcer is not None:
            self.enforcer.stop()

    def start(self, *wrapper: str) -> Self:
        """Start the watcher; `wrapper` is a command that executes the one it is given."""
        command = [*wrapper, sys.executable, "-m", "watcher"]
        with self._out.open("ab") as out, self._err.open("ab") as err:
            self.process = subprocess.Popen(command, env=self.environment, stdout=out, stderr=err)
        return self

    def started(self) -> Self:
        """Start the watcher and wait until its watch is open."""
        self.start()
        until(lambda: self.api.open_watches == 1, "the watch")
        return self

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send that signal; return the exit status, which must come in time."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(_STOPPED_S)

    def pod(self, name: str, limit: str | None = None, **more: Any) -> str:  # noqa: ANN401
        """Make a pod of this node; return its uid."""
        marks = more.pop("annotations", {}) | ({} if limit is None else {KEY: limit})
        made = self.api.create_pod(name, node=NODE, annotations=marks, **more)
        return str(made["metadata"]["uid"])

    def annotate(self, name: str, limit: str | None) -> None:
        self.api.annotate("default", name, KEY, limit)

    def sent(self) -> list[m.Snapshot]:
        """The snapshots so far."""
        assert self.enforcer is not None
        return [snapshot for _, snapshot in self.enforcer.got]

    def wishes(self) -> dict[str, int | None] | None:
        """What the newest snapshot asks for, by name; None where none came."""
        assert self.enforcer is not None
        last = self.enforcer.last()
        return None if last is None else {pod.name: pod.limit_mw for pod in last.pods}

    def wait_for(self, **wishes: int | None) -> m.Snapshot:
        """Wait until exactly these wishes (milliwatts) are the newest; return that snapshot."""
        until(lambda: self.wishes() == wishes, f"the wishes {wishes}")
        return self.sent()[-1]

    def logs(self, event: str | None = None) -> list[dict[str, Any]]:
        """The log lines (of that event); each must be the program's own JSON."""
        lines = [json.loads(line) for line in self._out.read_text().splitlines()]
        return [line for line in lines if event in (None, line["event"])]

    @property
    def errors(self) -> str:
        """What came on standard error."""
        return self._err.read_text()

    def page(self, path: str) -> tuple[int, str]:
        """(status, text) of a page; status 0 where nobody answers."""
        return page(self.port, path)

    def metric(self, name: str, **labels: str) -> float | None:
        """The value of one sample, None where it, or the whole page, is not there."""
        status, text = self.page("/metrics")
        return exposition.value(text, name, **labels) if status == 200 else None

    @contextlib.contextmanager
    def outage(self) -> Any:  # noqa: ANN401
        """The API is away meanwhile."""
        self.api.go_down()
        try:
            yield
        finally:
            self.api.come_back()

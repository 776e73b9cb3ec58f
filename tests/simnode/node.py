"""A whole node without GPUs or a cluster: hardware, Kubernetes API, pods, and the real agent.

`SimNode` puts the parts together, waits with them, and takes them apart again. Only the hardware
and the kubelet are simulated; programs, sockets, users, processes and cgroups are real.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

from shared.messages import Status, StatusReply
from shared.powerctl import overview
from shared.powerctl.ask import UnreachableError, ask
from shared.units import format_watts
from tests.pages import page
from tests.simnode.checkpoint import Checkpoint
from tests.simnode.controlplane import ControlPlane
from tests.simnode.controlplane_process import free_ports
from tests.simnode.gpus import Kind, SimGpus
from tests.simnode.guardian import Guardian
from tests.simnode.kubeapi import KubeApi
from tests.simnode.kubelet import Kubelet
from tests.simnode.programs import Program, agent_environment, children_of
from tests.simnode.reachable import ROOT, base_folder, installation, watcher_uid
from tests.simnode.workloads import (
    RUNTIME,
    Driver,
    MadeUpProc,
    Worker,
    Workers,
    real_cgroups,
)
from tests.waiting import HANG_S, NotInTimeError, stays, until

ANNOTATION = "dynamo.nvidia.com/gpu-power-limit"
CONFIG_HASH = "kubernetes.io/config.hash"
MANIFEST = ROOT / "deploy" / "power_agent" / "daemonset.yaml"
_POLL_S = 0.002
# Processes are looked for ten times a second, so that a test need not wait a second for each.
FAST = {"POWER_AGENT_SCAN_SECONDS": "0.1", "POWER_AGENT_RECONCILE_SECONDS": "0.3"}

T = TypeVar("T")


@dataclass
class Pod:
    """A pod of this node and its workers."""

    namespace: str
    name: str
    uid: str
    cgroup_uid: str
    workers: list[Worker] = field(default_factory=list)

    @property
    def key(self) -> tuple[str, str]:
        return self.namespace, self.name


class SimNode:
    """`with SimNode(gpus=2) as node: node.add_pod("trainer", limit=350, gpus=[0])`."""

    def __init__(
        self,
        *,
        gpus: int = 2,
        model: str = "H100",
        models: Sequence[str] | None = None,
        name: str = "node-a",
        supervised: bool = False,
        start: bool = True,
        real_api: bool | None = None,
        api: Mapping[str, Any] | None = None,
        driver: Driver = "cgroupfs",
        cgroup_levels: Sequence[str] = (),
        runtime: str = RUNTIME,
        made_up_proc: bool = False,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        """`supervised`: under supervisord, else as two processes. `start`: the agent, at once.

        `real_api`: a real kube-apiserver instead of the embedded one; None: where
        KUBEBUILDER_ASSETS is set. `api`: arguments of KubeApi. `settings`: variables of the agent.
        `driver`, `cgroup_levels`, `runtime`: where pods' cgroups are (tests/simnode/workloads.py).
        """
        self.name, self.supervised = name, supervised
        self._start_agent, self._driver, self._made_up_proc = start, driver, made_up_proc
        self._levels, self._runtime = tuple(cgroup_levels), runtime
        self._fleet = list(models) if models is not None else [model] * gpus
        self._real_api = (
            bool(os.environ.get("KUBEBUILDER_ASSETS")) if real_api is None else real_api
        )
        self._api_options, self._settings = dict(api or {}), dict(settings or {})
        self._undo = contextlib.ExitStack()
        self._lock = threading.Lock()
        self.pods: dict[tuple[str, str], Pod] = {}

    # ------------------------------------------------------------------ life

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as undo:
            self._make(undo)
            self._undo = undo.pop_all()
        try:
            if self._start_agent:
                self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Nothing is left when this returns."""
        self._undo.close()

    def _make(self, undo: contextlib.ExitStack) -> None:
        self.watcher_uid, self.installation = watcher_uid(), installation()
        own = f"power-agent-sim-{secrets.token_hex(4)}"
        self.guardian = Guardian()
        undo.callback(self.guardian.close)
        self.folder = base_folder() / own
        self.guardian.path(self.folder)
        for folder in (self.folder, self.folder / "logs"):
            folder.mkdir()
            folder.chmod(0o755)
        self.run_dir, self.state_dir = self.folder / "run", self.folder / "state"
        self.checkpoint = Checkpoint(self.folder / "kubelet")
        place = None if self._made_up_proc else real_cgroups(own, self.guardian)
        self.place = place or MadeUpProc(self.folder / "proc", f"/{own}")
        self.workers = Workers(self.place, self._driver, levels=self._levels, runtime=self._runtime)
        undo.callback(self.workers.end_all)
        allowed = [] if _is_admin() else [os.geteuid()]
        self.gpus = SimGpus(self.folder / "gpus")
        self.gpus.create(models=self._fleet, allow_uids=allowed)
        self._make_api(undo)
        self._make_programs(undo)

    def _make_api(self, undo: contextlib.ExitStack) -> None:
        self.api: KubeApi | ControlPlane
        if self._real_api:
            cluster = undo.enter_context(ControlPlane(Path(os.environ["KUBEBUILDER_ASSETS"])))
            cluster.kubectl("apply", "-f", str(MANIFEST))
            token: str | None = cluster.service_account_token("dynamo-system", "power-agent")
            self.api = cluster
        else:
            self.api, token = undo.enter_context(KubeApi(**self._api_options)), None
        self.api.create_node(self.name)
        self.kubeconfig = self.api.write_kubeconfig(self.folder / "kubeconfig")
        self.watcher_kubeconfig = self.api.write_kubeconfig(self.folder / "watcher", token)
        os.chown(self.watcher_kubeconfig, self.watcher_uid, -1)
        self.kubelet = undo.enter_context(Kubelet(self.api, self.name, self._end_pod))

    def _make_programs(self, undo: contextlib.ExitStack) -> None:
        self.metrics_port = free_ports(1)[0]
        self.environment = agent_environment() | {
            **self.gpus.environment(),
            "NODE_NAME": self.name,
            "KUBECONFIG": str(self.watcher_kubeconfig),
            "POWER_AGENT_RUN_DIR": str(self.run_dir),
            "POWER_AGENT_STATE_DIR": str(self.state_dir),
            "POWER_AGENT_KUBELET_DIR": str(self.checkpoint.root),
            "POWER_AGENT_PROC_ROOT": str(self.place.proc_root),
            "POWER_AGENT_CGROUP_ROOT": ",".join(self.workers.cgroup_roots),
            "POWER_AGENT_WATCHER_UID": str(self.watcher_uid),
            "POWER_AGENT_READER_UIDS": str(os.geteuid()),
            "POWER_AGENT_METRICS_ADDR": f"127.0.0.1:{self.metrics_port}",
            "POWER_AGENT_LOG_FORMAT": "json",
            **self._settings,
        }
        self.programs = {
            each.name: each
            for each in (
                Program.supervisord(self.installation, self.environment, self._log("supervisord")),
                Program.enforcer(self.environment, self._log("enforcer")),
                Program.watcher(
                    self.installation, self.environment, self._log("watcher"), self.watcher_uid
                ),
            )
        }
        for program in self.programs.values():
            program.guardian = self.guardian
            undo.callback(program.kill)

    def _log(self, name: str) -> Path:
        return self.folder / "logs" / f"{name}.log"

    @property
    def log_file(self) -> Path:
        """What the agent writes under supervisord, both programs in one."""
        return self._log("supervisord")

    # ------------------------------------------------------------------ the agent

    def start(self, *, linked: bool = True) -> None:
        """The agent, in the way that was chosen; returns when the enforcer has its snapshot.

        Without `linked`, when it answers: its watcher may have nothing to tell.
        """
        if self.supervised:
            self.programs["supervisord"].start()
        else:
            self.start_enforcer()
            self.start_watcher()
        if linked:
            self.wait_for_link()
        else:
            self.wait_for(self._answers, "the enforcer")

    def _answers(self) -> bool | None:
        self._check_alive()
        with contextlib.suppress(UnreachableError):
            return bool(self.status(0.5))
        return None

    def start_enforcer(self) -> None:
        self.programs["enforcer"].start()

    def start_watcher(self) -> None:
        self.programs["watcher"].start()

    def stop(self) -> dict[str, int]:
        """SIGTERM, as the end of the agent's pod sends it; the exit status of each program."""
        running = [program for program in self.programs.values() if program.alive()]
        return {program.name: program.terminate() for program in reversed(running)}

    def pid(self, program: str) -> int:
        """Of `enforcer`, `watcher` or `supervisord`; raises LookupError where it does not run."""
        if self.supervised and program != "supervisord":
            found = children_of(self.programs["supervisord"].pid, program)
            if not found:
                raise LookupError(f"{program} does not run")
            return found[0]
        if not self.programs[program].alive():
            raise LookupError(f"{program} does not run")
        return self.programs[program].pid

    def kill(self, program: str) -> int:
        """kill -9; the pid it had."""
        pid = self.pid(program)
        if self.supervised and program != "supervisord":
            os.kill(pid, 9)
        else:
            self.programs[program].kill()
        return pid

    def kill_enforcer(self) -> int:
        return self.kill("enforcer")

    def kill_watcher(self) -> int:
        return self.kill("watcher")

    def status(self, timeout_s: float = HANG_S) -> StatusReply:
        """As `powerctl status` gets it; raises UnreachableError."""
        return ask(self.run_dir, Status(), StatusReply, timeout_s)

    def wait_for_link(self) -> StatusReply:
        """Until the enforcer answers and has heard of the watcher that runs now."""

        def linked() -> StatusReply | None:
            self._check_alive()
            with contextlib.suppress(UnreachableError):
                status = self.status(0.5)
                if status.watcher.connected:
                    return status
            return None

        return self.wait_for(linked, "the enforcer with a snapshot of the watcher")

    def _check_alive(self) -> None:
        """Nothing comes of waiting for a program that has ended."""
        for program in self.programs.values():
            if program.started and not program.alive():
                raise NotInTimeError(f"{program.name} has ended\n{self.explain()}")

    def log_lines(self) -> list[dict[str, Any]]:
        """What the programs have logged, each in its own order."""
        found = []
        for path in sorted((self.folder / "logs").glob("*.log")):
            for line in path.read_text().splitlines():
                with contextlib.suppress(ValueError):
                    entry = json.loads(line)
                    if isinstance(entry, dict):
                        found.append(entry)
        return found

    # ------------------------------------------------------------------ pods

    def add_pod(
        self,
        name: str,
        limit: str | float | None = None,
        gpus: Sequence[int] = (),
        *,
        namespace: str = "default",
        kind: Kind = "compute",
        static: bool = False,
    ) -> Pod:
        """A running pod with a worker on `gpus` (none: no worker yet). `limit` as annotated."""
        annotations = {} if limit is None else {ANNOTATION: f"{limit}"}
        # A static pod: its cgroup shows the kubelet's own id, which the mirror pod carries.
        hash_ = secrets.token_hex(16)
        created = self.api.create_pod(
            name,
            node=self.name,
            namespace=namespace,
            annotations=annotations | ({CONFIG_HASH: hash_} if static else {}),
            owner={"kind": "Node", "name": self.name} if static else None,
        )
        uid = created["metadata"]["uid"]
        pod = Pod(namespace, name, uid, hash_ if static else uid)
        with self._lock:
            self.pods[pod.key] = pod
        if gpus:
            self.add_worker(pod, gpus, kind=kind)
        return pod

    def add_worker(
        self,
        pod: Pod,
        gpus: Sequence[int],
        *,
        kind: Kind = "compute",
        driver: Driver | None = None,
    ) -> Worker:
        """`driver`: of this worker's runtime handler, where it is not the node's."""
        devices = [self.gpus[k] for k in gpus]
        worker = self.workers.of_pod(pod.cgroup_uid, devices, kind=kind, driver=driver)
        pod.workers.append(worker)
        return worker

    def assign(self, pod: Pod, gpus: Sequence[int]) -> None:
        """As the kubelet does at the pod's admission; its containers come later."""
        self.checkpoint.assign(pod.cgroup_uid, *(self.gpus[k].uuid for k in gpus))

    def restart_worker(self, pod: Pod, gpus: Sequence[int]) -> Worker:
        """Its container failed and starts anew: another process, the same pod."""
        self.end_workers(pod)
        return self.add_worker(pod, gpus)

    def end_workers(self, pod: Pod) -> None:
        while pod.workers:
            pod.workers.pop().end()

    def annotate(self, pod: Pod, limit: str | float | None) -> None:
        """None removes the annotation."""
        value = None if limit is None else f"{limit}"
        self.api.annotate(pod.namespace, pod.name, ANNOTATION, value)

    def delete_pod(self, pod: Pod, *, grace: bool = True) -> None:
        """With grace the kubelet ends the workers first; without, they live on."""
        self.api.delete_pod(pod.namespace, pod.name, grace=grace)

    def _end_pod(self, namespace: str, name: str, uid: str) -> None:
        with self._lock:
            pod = self.pods.get((namespace, name))
            if pod is not None and pod.uid == uid:
                del self.pods[pod.key]
        if pod is not None and pod.uid == uid:
            self.end_workers(pod)
        self.api.finish_deletion(namespace, name, uid=uid)

    @contextlib.contextmanager
    def api_outage(self) -> Iterator[None]:
        """The API server does not exist for that long."""
        self.api.go_down()
        try:
            yield
        finally:
            self.api.come_back()

    # ------------------------------------------------------------------ looking and waiting

    def limit_mw(self, gpu: int) -> int:
        """Read back from the hardware, past the agent."""
        return self.gpus[gpu].limit_mw

    def limits_mw(self) -> list[int]:
        return [gpu.limit_mw for gpu in self.gpus]

    def wait_for(
        self, condition: Callable[[], T | None], what: str, deadline_s: float = HANG_S
    ) -> T:
        """The first true answer of `condition`; raises NotInTimeError with all that may explain."""
        found = until(condition, what, deadline_s=deadline_s, poll_s=_POLL_S, explain=self.explain)
        assert found is not None
        return found

    @property
    def metrics_url(self) -> str | None:
        """Where the watcher serves its metrics, None where it does not."""
        host, colon, port = self.environment["POWER_AGENT_METRICS_ADDR"].rpartition(":")
        return f"http://{host or 'localhost'}:{port}/metrics" if colon else None

    def page(self, path: str) -> tuple[int, str]:
        """(status, text) of a page of the watcher; status 0 where nobody answers."""
        return page(self.metrics_port, path)

    def stays(self, condition: Callable[[], object], for_s: float) -> None:
        """Fails as soon as the condition does not hold, up to `for_s` from now."""
        stays(condition, for_s, explain=self.explain)

    def wait_for_limit(self, gpu: int, watts: float, deadline_s: float = HANG_S) -> None:
        wanted_mw = round(watts * 1000)
        self.wait_for(
            lambda: self.limit_mw(gpu) == wanted_mw, f"GPU {gpu} at {watts:g} W", deadline_s
        )

    def wait_for_state(self, pod: Pod, state: str) -> None:
        def reached() -> bool:
            with contextlib.suppress(UnreachableError):
                return any(p.uid == pod.uid and p.state == state for p in self.status().pods)
            return False

        self.wait_for(reached, f"pod {pod.name} {state}")

    def explain(self) -> str:
        """Hardware, status and the ends of all logs, for whoever reads a failure."""
        try:
            status = "\n".join(overview.status(self.status(0.5)))
        except UnreachableError as error:
            status = str(error)
        limits = ", ".join(f"{format_watts(limit)} W" for limit in self.limits_mw())
        tails = [program.log_tail() for program in self.programs.values()]
        return "\n".join([f"hardware: {limits}", status, *filter(None, tails)])


def _is_admin() -> bool:
    """Whether CAP_SYS_ADMIN is there, which the driver asks for (capability(7): bit 21)."""
    status = Path("/proc/self/status").read_text()
    effective = next(line for line in status.splitlines() if line.startswith("CapEff:"))
    return bool(int(effective.split()[1], 16) >> 21 & 1)

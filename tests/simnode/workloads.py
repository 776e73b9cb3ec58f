"""Worker processes of pods, and of the host: real processes where the enforcer looks for them.

As root they lie in real cgroups, below one of the node's own, on the cgroup2 tree of this
machine. Where that cannot be written they lie in a made-up proc root.

A node may have a parent of `kubepods` (the kubelet's --cgroup-root), one name a level, and two
drivers at once: `misfit` is what a runtime handler on cgroupfs makes under a kubelet on systemd. It
takes the text `slice:prefix:id` for one name, and makes it in the runtime's own cgroup.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, Protocol

from tests.simnode.gpus import Kind, SimGpu
from tests.simnode.guardian import Guardian

Driver = Literal["cgroupfs", "systemd", "misfit"]
Qos = Literal["guaranteed", "burstable", "besteffort"]

# Ends at the end of its standard input, which is the end of the node that started it.
_COMMAND = ["/bin/cat"]
RUNTIME = "system.slice/containerd.service"
_HOST_CGROUP = "0::/user.slice/user-1000.slice/session-1.scope\n"


def kubepods_parent(levels: Sequence[str], driver: Driver) -> str:
    """The kubelet's --cgroup-root as a path below the host's root, empty where it is that."""
    if driver == "cgroupfs":
        return "/".join(levels)
    # systemd reads a dash as a step down, so the kubelet writes those in names as underscores.
    names = [name.replace("-", "_") for name in levels]
    return "/".join(f"{'-'.join(names[:end])}.slice" for end in range(1, len(names) + 1))


def pod_cgroup(
    uid: str, *, driver: Driver = "cgroupfs", qos: Qos = "burstable", levels: Sequence[str] = ()
) -> str:
    """The kubelet's cgroup of a pod; `levels` lead to the parent of `kubepods`."""
    below = ["kubepods", *[qos] * (qos != "guaranteed"), f"pod{uid}"]
    return kubepods_parent([*levels, *below], driver)


def container_cgroup(container: str, *, driver: Driver = "cgroupfs") -> str:
    """The runtime's cgroup of a container, below its pod's."""
    return container if driver == "cgroupfs" else f"cri-containerd-{container}.scope"


def worker_cgroup(
    uid: str, container: str, *, driver: Driver, qos: Qos, levels: Sequence[str], runtime: str
) -> str:
    """Where a container of the pod is; `runtime` is the runtime's own cgroup."""
    pod = pod_cgroup(uid, driver=driver, qos=qos, levels=levels)
    if driver == "misfit":
        return f"{runtime}/{pod.rpartition('/')[2]}:cri-containerd:{container}"
    return f"{pod}/{container_cgroup(container, driver=driver)}"


# ---------------------------------------------------------------------- where they lie


class Place(Protocol):
    """Where the enforcer finds out whose process a pid is."""

    proc_root: Path
    cgroup_root: str
    described: str

    def put(self, pid: int, cgroup: str | None) -> None:
        """Put a process into a cgroup below the root; None: it belongs to no pod."""

    def clear(self, pid: int, cgroup: str | None) -> None:
        """The process has ended."""


class RealCgroups:
    """Cgroups of this machine, below one that is made for this node."""

    proc_root = Path("/proc")

    def __init__(self, folder: Path, cgroup_root: str) -> None:
        self.folder, self.cgroup_root = folder, cgroup_root
        self.described = f"real cgroups below {folder}"

    def put(self, pid: int, cgroup: str | None) -> None:
        if cgroup is not None:
            place = self.folder / cgroup
            place.mkdir(parents=True, exist_ok=True)
            (place / "cgroup.procs").write_text(str(pid))

    def clear(self, pid: int, cgroup: str | None) -> None:  # noqa: ARG002
        """The container's goes, and what is empty above it, as the kubelet does it."""
        if cgroup is not None:
            place = self.folder / cgroup
            with contextlib.suppress(OSError):  # another process of it lives on
                while place != self.folder:
                    place.rmdir()
                    place = place.parent


class MadeUpProc:
    """A proc root with a folder for each worker; what the folder says of its start is real."""

    def __init__(self, folder: Path, cgroup_root: str) -> None:
        self.proc_root, self.cgroup_root = folder, cgroup_root
        self.described = f"a made-up proc root at {folder}"
        folder.mkdir(parents=True)

    def put(self, pid: int, cgroup: str | None) -> None:
        process = self.proc_root / str(pid)
        process.mkdir(exist_ok=True)
        text = _HOST_CGROUP if cgroup is None else f"0::{self.cgroup_root}/{cgroup}\n"
        fresh = process / "cgroup.next"
        fresh.write_text(text)
        fresh.rename(process / "cgroup")
        with contextlib.suppress(FileExistsError):
            (process / "stat").symlink_to(f"/proc/{pid}/stat")

    def clear(self, pid: int, cgroup: str | None) -> None:  # noqa: ARG002
        process = self.proc_root / str(pid)
        for name in ("cgroup", "stat"):
            (process / name).unlink(missing_ok=True)
        process.rmdir()


def cgroup2_mounts(mountinfo: str) -> list[Path]:
    """Where cgroup2 trees are mounted, from the text of /proc/self/mountinfo (proc(5))."""
    found = []
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        if after.split()[:1] == ["cgroup2"]:
            # Blanks and the like are written in octal.
            point = re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), before.split()[4])
            found.append(Path(point))
    return found


def real_cgroups(name: str, guardian: Guardian | None) -> RealCgroups | None:
    """A cgroup `name` of the node's own, None where this machine does not allow it.

    Without a guardian the caller removes it.
    """
    if os.geteuid() != 0:
        return None
    for mount in cgroup2_mounts(Path("/proc/self/mountinfo").read_text()):
        folder = mount / name
        if guardian is not None:
            guardian.cgroup(folder)
        with contextlib.suppress(OSError), _waiting_process() as process:
            folder.mkdir()
            (folder / "cgroup.procs").write_text(str(process.pid))
            # What the tree's top is called in /proc depends on the cgroup namespace.
            for line in Path(f"/proc/{process.pid}/cgroup").read_text().splitlines():
                if line.startswith("0::/") and line.endswith(f"/{name}"):
                    return RealCgroups(folder, line.removeprefix("0::"))
    return None


@contextlib.contextmanager
def _waiting_process() -> Iterator[subprocess.Popen[bytes]]:
    process = _start()
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdin is not None
        process.stdin.close()


def _start() -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        _COMMAND,
        cwd="/",
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C on a terminal is for the node
    )


# ---------------------------------------------------------------------- the workers


class Worker:
    """A process on some GPUs; it ends when it is told to, and with the node at the latest."""

    def __init__(self, place: Place, cgroup: str | None, gpus: list[SimGpu], kind: Kind) -> None:
        self._place, self._kind = place, kind
        self.cgroup, self.gpus = cgroup, list(gpus)
        self._process = _start()
        self.pid = self._process.pid
        place.put(self.pid, cgroup)
        for gpu in gpus:
            gpu.add_process(self.pid, kind)

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def hop(self, *gpus: SimGpu) -> None:
        """Leave the GPUs it is on for these."""
        for gpu in gpus:
            gpu.add_process(self.pid, self._kind)
        for gpu in self.gpus:
            if gpu.uuid not in {each.uuid for each in gpus}:
                gpu.remove_process(self.pid)
        self.gpus = list(gpus)

    def end(self) -> None:
        """It finishes of its own accord."""
        self._gone()

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()
        self._gone()

    def _gone(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        for gpu in self.gpus:
            if not gpu.keep_dead:
                gpu.remove_process(self.pid)
        self._place.clear(self.pid, self.cgroup)
        self.gpus = []


class Workers:
    """Starts the workers of one node and ends them."""

    def __init__(
        self,
        place: Place,
        driver: Driver = "cgroupfs",
        *,
        levels: Sequence[str] = (),
        runtime: str = RUNTIME,
    ) -> None:
        self.place, self._driver = place, driver
        self._levels, self._runtime = tuple(levels), runtime
        self._all: list[Worker] = []

    @property
    def cgroup_roots(self) -> list[str]:
        """Where pods may be: below the kubelet's parent, and where the runtime itself is."""
        parents = [kubepods_parent(self._levels, self._driver)]
        if self._driver != "cgroupfs":
            parents.append(self._runtime)
        return [f"{self.place.cgroup_root}/{parent}".rstrip("/") for parent in parents]

    def of_pod(
        self,
        uid: str,
        gpus: list[SimGpu],
        *,
        qos: Qos = "burstable",
        kind: Kind = "compute",
        driver: Driver | None = None,
    ) -> Worker:
        """In a container of its own of the pod whose cgroup shows `uid`."""
        cgroup = worker_cgroup(
            uid,
            secrets.token_hex(32),
            driver=driver or self._driver,
            qos=qos,
            levels=self._levels,
            runtime=self._runtime,
        )
        return self._add(cgroup, gpus, kind)

    def of_host(self, gpus: list[SimGpu], *, kind: Kind = "compute") -> Worker:
        """Of no pod: somebody's shell on the node."""
        return self._add(None, gpus, kind)

    def in_cgroup(self, cgroup: str, gpus: list[SimGpu], *, kind: Kind = "compute") -> Worker:
        """In any cgroup below the root, such as one that only looks like a pod's."""
        return self._add(cgroup, gpus, kind)

    def _add(self, cgroup: str | None, gpus: list[SimGpu], kind: Kind) -> Worker:
        worker = Worker(self.place, cgroup, gpus, kind)
        self._all.append(worker)
        return worker

    def end_all(self) -> None:
        for worker in self._all:
            if worker.alive:
                worker.kill()
        self._all.clear()

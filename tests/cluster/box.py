"""A machine within this machine: namespaces and cgroups of its own that end with their maker.

Nothing of it outlives the block, nor this process: process 1 of the box dies with its parent and
takes all others along, mounts and network links go with the last of them, and the guardian then
removes the cgroups and the folder.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from tests.cluster.parts import LackingError, require_root
from tests.simnode.controlplane_process import Spawner
from tests.simnode.guardian import Guardian
from tests.waiting import until

INIT = Path(__file__).with_name("box_init.py")
HOSTNAME = "box"
# "hostPID" inside means the box: no process of this machine is seen or signalled.
NAMESPACES = ("--mount", "--net", "--pid", "--ipc", "--uts", "--cgroup")
_ENTER_CGROUPS = 'for file in $1; do echo $$ >"$file" || exit 1; done; shift; exec "$@"'
_START_TIMEOUT_S = 15.0


class BoxError(Exception):
    """The box did not come up; the text holds its last words."""


def require() -> None:
    """Raise LackingError where this machine lets nobody make namespaces and cgroups."""
    require_root()
    trial = ["unshare", *NAMESPACES, "--fork", "mount", "-t", "tmpfs", "none", "/mnt"]
    tried = subprocess.run(trial, capture_output=True, text=True, check=False)
    if tried.returncode != 0:
        raise LackingError(f"no namespaces of one's own here: {tried.stderr.strip()}")
    for tree in _own_hierarchies(f"power-agent-trial-{secrets.token_hex(4)}"):
        try:
            tree.folder.mkdir()
            tree.folder.rmdir()
        except OSError as error:
            raise LackingError(f"no cgroups of one's own here: {error}") from error


class Hierarchy:
    """One mounted cgroup tree of this machine, and the box's cgroup in it."""

    def __init__(self, mount: Path, options: str, own: str, name: str) -> None:
        self.mount, self.options = mount, options
        self.folder = mount / own.lstrip("/") / name

    def create(self) -> None:
        self.folder.mkdir()
        # Version 1 lets nobody into a cpuset without processors and memory.
        for file in ("cpuset.cpus", "cpuset.mems"):
            with contextlib.suppress(FileNotFoundError):
                (self.folder / file).write_text((self.folder.parent / file).read_text())


def hierarchies(mountinfo: str, own_cgroups: str, name: str) -> list[Hierarchy]:
    """All cgroup trees, from the texts of /proc/self/mountinfo and /proc/self/cgroup.

    Where there is only version 2 the box lies at the top: below a cgroup that holds processes
    (ours does) no controller could be handed on.
    """
    mine = {}
    for line in own_cgroups.splitlines():
        _, controllers, path = line.split(":", 2)
        mine[controllers] = path
    found = []
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = after.split()[:3]
        mount = Path(before.split()[4])
        if kind == "cgroup":
            named = ",".join(sorted(set(options.split(",")) - {"rw", "ro", "xattr"}))
            own = next(p for c, p in mine.items() if c and set(c.split(",")) <= {*named.split(",")})
            found.append(Hierarchy(mount, named, own, name))
        elif kind == "cgroup2":
            found.append(Hierarchy(mount, "", mine[""], name))
    if len(found) == 1 and not found[0].options:
        return [Hierarchy(found[0].mount, "", "/", name)]
    return found


def _own_hierarchies(name: str) -> list[Hierarchy]:
    mountinfo, own = Path("/proc/self/mountinfo"), Path("/proc/self/cgroup")
    return hierarchies(mountinfo.read_text(), own.read_text(), name)


class Box:
    """`with Box(services, addresses) as box`: its services run, see box_init.py."""

    def __init__(self) -> None:
        self._undo = contextlib.ExitStack()
        self.services: dict[str, list[str]] = {}
        self.addresses: dict[str, list[str]] = {"lo": []}
        self.binds: dict[str, str] = {}

    def __enter__(self) -> Self:
        guardian = Guardian()
        self._undo.callback(guardian.close)
        self.folder = Path(tempfile.mkdtemp(prefix="power-agent-box-"))
        self.folder.chmod(0o755)
        guardian.path(self.folder)
        self._guardian, self._spawner = guardian, Spawner(self._undo)
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def start(self) -> None:
        """Bring it up with what services, addresses and binds name by now."""
        trees = _own_hierarchies(f"power-agent-box-{secrets.token_hex(4)}")
        for tree in trees:
            self._guardian.cgroup(tree.folder)
            tree.create()
        config = {
            "hostname": HOSTNAME,
            "services": self.services,
            "addresses": self.addresses,
            "binds": self.binds,
            "hierarchies": {str(tree.mount): tree.options for tree in trees},
        }
        (self.folder / "box.json").write_text(json.dumps(config))
        self._entrances = " ".join(str(tree.folder / "cgroup.procs") for tree in trees)
        unshare = ["unshare", *NAMESPACES, "--fork", "--kill-child=KILL"]
        init = [sys.executable, "-I", "-S", str(INIT), str(self.folder)]
        command = ["/bin/sh", "-c", _ENTER_CGROUPS, "box", self._entrances, *unshare, *init]
        process = self._spawner.process(command, self.folder / "init.log")
        process.start()
        self._unshare_pid = process.pid

        def up() -> bool:
            if not process.alive():
                raise BoxError(f"the box ended:\n{process.log_tail()}")
            return (self.folder / "ready").exists()

        until(up, "the box", deadline_s=_START_TIMEOUT_S)

    @property
    def init_pid(self) -> int:
        """Process 1 of the box, as this machine numbers it."""
        children = Path(f"/proc/{self._unshare_pid}/task/{self._unshare_pid}/children")
        return int(children.read_text().split()[0])

    def in_network(self, command: Sequence[str | Path]) -> list[str]:
        """The command that runs `command` here, but with the box's network."""
        return ["nsenter", f"--target={self.init_pid}", "--net", "--", *map(str, command)]

    def inside(self, command: Sequence[str | Path]) -> list[str]:
        """The command that runs `command` as a process of the box, which ends with it."""
        enter = ["nsenter", f"--target={self.init_pid}", *NAMESPACES, "--", *map(str, command)]
        return ["/bin/sh", "-c", _ENTER_CGROUPS, "box", self._entrances, *enter]

    def run(self, *command: str | Path) -> str:
        """What a command inside prints; it must succeed."""
        done = subprocess.run(
            self.inside(command),
            capture_output=True,
            stdin=subprocess.DEVNULL,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise BoxError(f"{' '.join(map(str, command))}: {done.returncode}\n{done.stderr}")
        return done.stdout

    def path(self, inside: str) -> Path:
        """Where this machine sees a file of the box."""
        return Path(f"/proc/{self.init_pid}/root{inside}")

    def log_tails(self, lines: int = 8) -> str:
        tails = []
        for log in sorted(self.folder.glob("*.log")):
            text = log.read_text(errors="replace").splitlines()[-lines:]
            tails.append("\n".join([f"--- end of {log.name}", *text]))
        return "\n".join(tails)

"""Process 1 of the box: makes its view of the machine, then keeps its services running.

Started by box.py in namespaces of its own, with nothing but the standard library. When it ends,
every process of the box ends with it, and with the last of them every mount.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import subprocess
import sys
import time
from pathlib import Path

_RETRY_S = 0.2  # a service that ended, for instance because another one is not up yet

# The kubelet insists on these and would change the whole machine's (pkg/kubelet/cm).
_SYSCTLS = {
    "vm/overcommit_memory": "1",
    "kernel/panic": "10",
    "kernel/panic_on_oops": "1",
    "kernel/keys/root_maxkeys": "1000000",
    "kernel/keys/root_maxbytes": "25000000",
}


def run(*command: str) -> None:
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


def mount(kind: str, target: str, options: str = "") -> None:
    Path(target).mkdir(parents=True, exist_ok=True)
    run("mount", "-t", kind, *(["-o", options] if options else []), "box", target)


def make_view(folder: Path, hierarchies: dict[str, str], binds: dict[str, str]) -> None:
    """Mount what must be the box's own; nothing of it is seen outside."""
    run("umount", "--lazy", "/sys")  # and all below it: what lists cgroup mounts sees the box's
    mount("proc", "/proc")
    mount("sysfs", "/sys")
    if list(hierarchies) == ["/sys/fs/cgroup"]:
        mount("cgroup2", "/sys/fs/cgroup")
        delegate(Path("/sys/fs/cgroup"))
    else:
        mount("tmpfs", "/sys/fs/cgroup", "mode=755")
        for target, options in hierarchies.items():
            mount("cgroup" if options else "cgroup2", target, options)
    for target in ("/run", "/var/lib", "/var/log"):
        mount("tmpfs", target, "mode=755")
    for target, source in binds.items():
        Path(target).mkdir(parents=True, exist_ok=True)
        run("mount", "--bind", source, target)
    values = folder / "sysctl"
    for name, value in _SYSCTLS.items():
        entry = values / name
        entry.parent.mkdir(parents=True, exist_ok=True)
        entry.write_text(value + "\n")
        run("mount", "--bind", str(entry), f"/proc/sys/{name}")
    # Kubelet and containerd pass mounts on to containers; this group is the box's alone.
    run("mount", "--make-rshared", "/")


def delegate(root: Path) -> None:
    """A cgroup2 that hands controllers down may hold no process itself: into a child with us."""
    (root / "box").mkdir(exist_ok=True)
    (root / "box/cgroup.procs").write_text("0")
    for controller in (root / "cgroup.controllers").read_text().split():
        with contextlib.suppress(OSError):
            (root / "cgroup.subtree_control").write_text(f"+{controller}")


def make_network(addresses: dict[str, list[str]]) -> None:
    """The loopback, and a bridge without ports for each other name."""
    for link, its in addresses.items():
        if link != "lo":
            run("ip", "link", "add", link, "type", "bridge")
        for address in its:
            run("ip", "address", "add", address, "dev", link)
        run("ip", "link", "set", link, "up")
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")


class Services:
    """Starts each command, and again when it ends."""

    def __init__(self, commands: dict[str, list[str]], logs: Path) -> None:
        self._commands, self._logs = commands, logs
        # Kept, since subprocess reaps what nobody refers to, and its end would be missed here.
        self._running: dict[int, tuple[str, subprocess.Popen[bytes]]] = {}
        self._due: dict[str, float] = dict.fromkeys(commands, 0.0)

    def turn(self) -> None:
        """Start what is due, then reap, orphans of containers too."""
        now = time.monotonic()
        for name in [name for name, when in self._due.items() if when <= now]:
            del self._due[name]
            process = self._start(name)
            self._running[process.pid] = name, process
        try:
            pid, status = os.waitpid(-1, os.WNOHANG if self._due else 0)
        except ChildProcessError:
            pid = status = 0
        if pid in self._running:
            name, process = self._running.pop(pid)
            process.returncode = os.waitstatus_to_exitcode(status)
            self._due[name] = time.monotonic() + _RETRY_S
        elif pid == 0:
            time.sleep(_RETRY_S / 4)

    def _start(self, name: str) -> subprocess.Popen[bytes]:
        with (self._logs / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                self._commands[name],
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )


def main() -> None:
    folder = Path(sys.argv[1])
    config = json.loads((folder / "box.json").read_text())
    make_view(folder, config["hierarchies"], config["binds"])
    make_network(config["addresses"])
    ctypes.CDLL(None).sethostname(config["hostname"].encode(), len(config["hostname"]))
    (folder / "ready").touch()
    services = Services(config["services"], folder)
    while True:
        services.turn()


if __name__ == "__main__":
    main()

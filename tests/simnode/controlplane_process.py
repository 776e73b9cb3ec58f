"""Starts the control plane's servers so that none of them, and no file, outlives the caller."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import signal
import socket
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_prctl = ctypes.CDLL(None, use_errno=True).prctl  # looked up here: the forked child only calls it

# A shell that waits for the end of its standard input, which is the end of its parent.
_REMOVE_AT_END = 'read -r _; rm -rf -- "$1" || { sleep 1; rm -rf -- "$1"; }'


class Spawner:
    """Forks every server from one thread of its own.

    The kernel sends the parent-death signal when the *thread* that forked ends, so a server
    started from some short-lived thread would die with that one.
    """

    def __init__(self, undo: contextlib.ExitStack) -> None:
        self._undo = undo
        self._pool = undo.enter_context(ThreadPoolExecutor(1, thread_name_prefix="spawner"))

    def process(self, command: Sequence[str], log: Path) -> ServerProcess:
        process = ServerProcess(self, command, log)
        self._undo.callback(process.kill)
        return process

    def popen(self, command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
        return self._pool.submit(_popen, command, log).result()


class ServerProcess:
    """One server, which may be started again after its end; its log goes on."""

    def __init__(self, spawner: Spawner, command: Sequence[str], log: Path) -> None:
        self._spawner = spawner
        self._command = command
        self._log = log
        self._popen: subprocess.Popen[bytes] | None = None

    @property
    def name(self) -> str:
        return self._log.stem

    @property
    def pid(self) -> int:
        assert self._popen is not None, f"{self.name} was never started"
        return self._popen.pid

    def start(self) -> None:
        assert not self.alive(), f"{self.name} runs already"
        self._popen = self._spawner.popen(self._command, self._log)

    def alive(self) -> bool:
        return self._popen is not None and self._popen.poll() is None

    def kill(self) -> None:
        if self._popen is not None:
            self._popen.kill()
            self._popen.wait()

    def log_tail(self, lines: int = 30) -> str:
        text = self._log.read_text(errors="replace") if self._log.exists() else ""
        return "\n".join([f"--- end of {self._log.name}", *text.splitlines()[-lines:]])


def _popen(command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    parent = os.getpid()

    def die_with_parent() -> None:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)

    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            # Ctrl-C on a terminal is for the caller, who ends the servers in the right order.
            start_new_session=True,
            preexec_fn=die_with_parent,  # noqa: PLW1509 - calls prctl and getppid, nothing else
        )


def folder_that_vanishes(undo: contextlib.ExitStack) -> Path:
    """A private folder, removed at the end of the block and also when this process is killed."""
    folder = Path(tempfile.mkdtemp(prefix="power-agent-kube-"))
    keeper = subprocess.Popen(
        ["/bin/sh", "-c", _REMOVE_AT_END, "keeper", folder],
        cwd="/",
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    undo.callback(keeper.wait)
    assert keeper.stdin is not None
    undo.callback(keeper.stdin.close)
    return folder


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now.

    From below the range that the kernel takes for outgoing connections: while a server is down,
    a client that keeps dialling its port could otherwise be given that very port, connect to
    itself, and keep the server from coming back.
    """
    ephemeral = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    candidates = range(10_000, max(int(ephemeral[0]), 11_000))
    found: list[int] = []
    for port in random.sample(candidates, len(candidates)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    raise OSError(f"no {count} free ports between {candidates.start} and {candidates.stop}")

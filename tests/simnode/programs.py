"""The agent's programs as processes: started, ended, killed, and what they wrote."""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.simnode.guardian import Guardian, members
from tests.simnode.reachable import Installation, as_user

_TERM_TIMEOUT_S = 30.0
# What the watcher has no use for is what the root side alone may see, and the other way round.
_WATCHER_ONLY = ("KUBECONFIG", "NODE_NAME", "WATCH_NAMESPACE", "POWER_AGENT_METRICS_ADDR")
_ENFORCER_ONLY = ("SIM_NVML_DIR", "LD_LIBRARY_PATH", "POWER_AGENT_STATE_DIR")


class Program:
    """One program, which may be started again after its end; its log goes on."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        uid: int | None = None,
    ) -> None:
        self.name, self.log = name, log
        self.guardian: Guardian | None = None
        self.output: int | None = None  # standard output from its next start on, not the log
        self.environment = dict(environment)
        self._command, self._uid = list(command), os.geteuid() if uid is None else uid
        self._process: subprocess.Popen[bytes] | None = None

    @staticmethod
    def enforcer(environment: Mapping[str, str], log: Path) -> Program:
        seen = {k: v for k, v in environment.items() if k not in _WATCHER_ONLY}
        return Program("enforcer", [sys.executable, "-I", "-m", "enforcer"], seen, log)

    @staticmethod
    def watcher(
        where: Installation, environment: Mapping[str, str], log: Path, uid: int
    ) -> Program:
        seen = {k: v for k, v in environment.items() if k not in _ENFORCER_ONLY}
        command = [str(where.watcher_python), "-I", "-m", "watcher"]
        return Program("watcher", command, seen, log, uid)

    @staticmethod
    def supervisord(where: Installation, environment: Mapping[str, str], log: Path) -> Program:
        """Both, and their watchdog."""
        program = str(Path(sys.executable).with_name("supervisord"))
        arguments = _configuration(where.home / "supervisord.conf", log.parent)
        return Program("supervisord", [program, *arguments], environment, log)

    @property
    def pid(self) -> int:
        assert self._process is not None, f"{self.name} was never started"
        return self._process.pid

    @property
    def error_log(self) -> Path:
        """Standard error, which a healthy program does not use."""
        return self.log.with_suffix(".err")

    def start(self) -> None:
        assert not self.alive(), f"{self.name} runs already"
        with self.log.open("ab") as out, self.error_log.open("ab") as err:
            self._process = subprocess.Popen(
                self._command,
                cwd="/",
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=out if self.output is None else self.output,
                stderr=err,
                start_new_session=True,  # Ctrl-C on a terminal is for the node
                umask=0o022,
                **as_user(self._uid),  # type: ignore[call-overload]
            )
        if self.guardian is not None:
            self.guardian.session(self._process.pid)

    @property
    def started(self) -> bool:
        return self._process is not None

    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def terminate(self, timeout_s: float = _TERM_TIMEOUT_S) -> int:
        """SIGTERM and its exit status; killed, and an error, when it takes too long."""
        assert self._process is not None
        self._process.terminate()
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"{self.name} did not end within {timeout_s:g} s of SIGTERM\n{self.log_tail()}"
            ) from None
        finally:
            self.kill()

    def wait(self, timeout_s: float) -> int:
        """The exit status of a program that ends of its own accord."""
        assert self._process is not None
        return self._process.wait(timeout_s)

    def kill(self) -> None:
        """SIGKILL to it and to all that it started, if it still runs."""
        if self._process is None:
            return
        leader = self._process.pid
        # Again and again: what is killed may just have started something.
        while pids := list(members([leader], [])):
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, 9)
        self._process.wait()
        self._process = None
        if self.guardian is not None:
            self.guardian.session_ended(leader)

    def log_tail(self, lines: int = 25) -> str:
        parts = []
        for path in (self.log, self.error_log):
            text = path.read_text(errors="replace") if path.exists() else ""
            if text:
                parts += [f"--- end of {path.name}", *text.splitlines()[-lines:]]
        return "\n".join(parts)


def _configuration(file: Path, scratch: Path) -> list[str]:
    """Supervisord's arguments; without root everything runs as this user."""
    if os.geteuid() == 0:
        return ["-c", str(file)]
    try:
        return ["-u", pwd.getpwuid(os.geteuid()).pw_name, "-c", str(file)]
    except KeyError:  # supervisord would ask for a name, which the users of some clusters lack
        text = file.read_text().replace("%(here)s", str(file.parent))
        own = scratch / "supervisord.conf"
        own.write_text(re.sub(r"^user=.*\n", "", text, flags=re.MULTILINE))
        return ["-c", str(own)]


def children_of(parent: int, program: str | None = None) -> list[int]:
    """Pids of the children, those of `python -m program` or all."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_bytes().rpartition(b")")[2].split()
                arguments = (entry / "cmdline").read_bytes().rstrip(b"\0").split(b"\0")
                # launch.py has the name as its last argument too, before it becomes the program.
                wanted = program is None or arguments[-2:] == [b"-m", program.encode()]
                if int(fields[1]) == parent and wanted:
                    found.append(int(entry.name))
    return found


def descriptors_of(pid: int) -> dict[int, str]:
    """What its descriptors lead to; some are closed while they are looked at."""
    found = {}
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found[int(entry.name)] = os.readlink(entry)  # noqa: PTH115 - socket:[7] is no path
    return found


def agent_environment() -> dict[str, str]:
    """What the agent has of this process's own environment: nothing of Kubernetes, no proxies."""
    return {"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "LANG": "C.UTF-8"}

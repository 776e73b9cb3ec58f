"""Supervisord's event listener: kills an enforcer that hangs; ends all where nothing else helps.

An enforcer hangs when it answered before and then left a minute of pings unanswered: it answers
nobody while it opens NVML, which takes half a minute where persistence mode is off. One that never
answered may be waiting for another agent on this node to go, so it is given minutes; if it did
wait, it waits on after its restart. It gets SIGKILL, because a process that hangs handles no other
signal. Limits and ledger stay.

All ends, and the container with it, where a program cannot be started, and where the enforcer gave
up with status 1: it has lost its devices, and only a new container gets them back.

The watchdog asks over one connection that it keeps. That costs the enforcer one answer in five
seconds and starts no program. So it does not need the pulse, which saves the kubelet's probes the
start of a Python (deploy/probe). An answer says more.
"""

import contextlib
import os
import signal
import sys
from pathlib import Path
from typing import BinaryIO

import msgspec

from shared import messages
from shared.client import Client
from shared.logs import Log
from shared.settings import CommonSettings, SettingsError, parse_settings
from shared.sockets import TransportError

PING_TIMEOUT_S = 2.0
# Pings in a row, one every five seconds (TICK_5).
UNANSWERED = 12
UNANSWERED_FROM_THE_START = 60
PROC = Path("/proc")


def fields(line: bytes) -> dict[str, str]:
    """Parse `key:value key:value`, the form of supervisord's headers and payloads."""
    pairs = (word.partition(":") for word in line.decode("utf-8", "replace").split())
    return {key: value for key, _, value in pairs}


def children_named(program: str, parent: int) -> list[int]:
    """Return the children of `parent` whose last argument is `program`."""
    found = []
    for entry in PROC.iterdir():
        if not entry.name.isdigit():
            continue
        try:
            status = (entry / "stat").read_bytes().rpartition(b")")[2].split()
            arguments = (entry / "cmdline").read_bytes().rstrip(b"\0").split(b"\0")
        except OSError:
            continue  # ended meanwhile
        if int(status[1]) == parent and arguments[-1] == program.encode():
            found.append(int(entry.name))
    return found


def _gave_up(event: str, payload: dict[str, str]) -> bool:
    """Tell whether the enforcer ended with the status that supervisord.conf has in `exitcodes`."""
    ended = event == "PROCESS_STATE_EXITED" and payload.get("processname") == "enforcer"
    return ended and payload.get("expected") == "1"


class Watchdog:
    """Hears what supervisord tells, and acts."""

    def __init__(self, client: Client, log: Log) -> None:
        self._client = client
        self._log = log
        self._supervisor = os.getppid()
        self._unanswered = 0
        # Nothing was heard yet: after a restart of this listener the enforcer is in full swing.
        self._running = self._has_answered = True

    def hear(self, event: str, payload: dict[str, str]) -> None:
        """Act on one event."""
        if event == "TICK_5":
            self._tick()
        elif event == "PROCESS_STATE_FATAL" or _gave_up(event, payload):
            self._log.error("beyond_saving", program=payload.get("processname"))
            os.kill(self._supervisor, signal.SIGTERM)
        elif payload.get("processname") == "enforcer":
            # Not EXITED, BACKOFF and above all STOPPING, while it gives every GPU back.
            self._running = event in ("PROCESS_STATE_STARTING", "PROCESS_STATE_RUNNING")
            if event != "PROCESS_STATE_RUNNING":  # which is the process that was STARTING
                self._has_answered = False
                self._unanswered = 0
            self._tick()  # at once: the sooner it has answered, the sooner a hang shows

    def _tick(self) -> None:
        if not self._running:
            return
        if self._answers():
            self._has_answered = True
            self._unanswered = 0
            return
        self._unanswered += 1
        patience = UNANSWERED if self._has_answered else UNANSWERED_FROM_THE_START
        if self._unanswered < patience:
            return
        self._unanswered = 0
        for pid in children_named("enforcer", self._supervisor):
            self._log.error("enforcer_hangs", pid=pid, unanswered=patience)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _answers(self) -> bool:
        """Ping; any answer shows that the enforcer turns, a refusal too."""
        try:
            self._client.request(messages.Ping(), PING_TIMEOUT_S)
        except (TransportError, msgspec.DecodeError):
            return False
        return True


def settings() -> CommonSettings:
    """Return the settings, or the defaults: a wrong one is for the programs to complain about."""
    try:
        return parse_settings(CommonSettings, os.environ)
    except SettingsError:
        return parse_settings(CommonSettings, {})


def listen(watchdog: Watchdog, events: BinaryIO, answers: BinaryIO) -> None:
    """Speak supervisord's event listener protocol until it hangs up."""
    while True:
        answers.write(b"READY\n")
        answers.flush()
        header = fields(events.readline())
        if "len" not in header:
            return
        payload = fields(events.read(int(header["len"])))
        watchdog.hear(header["eventname"], payload)
        answers.write(b"RESULT 2\nOK")
        answers.flush()


def main() -> None:
    """Take standard output for the protocol, log to standard error, listen."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    chosen = settings()
    log = Log("watchdog", chosen.log_level, chosen.log_format)
    listen(Watchdog(Client(chosen.run_dir), log), sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()

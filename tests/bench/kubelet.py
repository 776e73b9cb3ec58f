"""Asks as the kubelet would: the probes of the manifest, at its periods, and what they cost."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from tests.simnode.node import MANIFEST, SimNode
from tests.simnode.reachable import ROOT

# The third, startupProbe, has ended where nothing changes.
_KINDS = ("livenessProbe", "readinessProbe")
_PATH = f"{ROOT}/deploy:{Path(sys.executable).parent}:{os.environ['PATH']}"


@dataclass(frozen=True)
class Probe:
    """One of `command` and `path` (asked over HTTP) is empty."""

    period_s: int
    command: Sequence[str] = ()
    path: str = ""


def probes() -> list[Probe]:
    """Those that the manifest lets the kubelet ask for as long as the pod lives."""
    (daemon_set,) = (
        each for each in yaml.safe_load_all(MANIFEST.read_text()) if each["kind"] == "DaemonSet"
    )
    found = []
    for container in daemon_set["spec"]["template"]["spec"]["containers"]:
        for asked in (container[kind] for kind in _KINDS if kind in container):
            command = asked.get("exec", {}).get("command", ())
            path = asked.get("httpGet", {}).get("path", "")
            found.append(Probe(asked["periodSeconds"], command, path))
    return found


def due(asked: Sequence[Probe], seconds: int) -> Iterator[tuple[float, Probe]]:
    """When each is asked in a span of so many seconds, in order, spread over its period."""
    moments = [
        (at_s + probe.period_s * number / len(asked), number)
        for number, probe in enumerate(asked)
        for at_s in range(0, seconds, probe.period_s)
    ]
    for at_s, number in sorted(moments):
        yield at_s, asked[number]


def play(node: SimNode, asked: Sequence[Probe], seconds: int) -> float:
    """Ask for so long; return the processor time in seconds that the commands took."""
    began_s, used_s = time.monotonic(), 0.0
    for at_s, probe in due(asked, seconds):
        time.sleep(max(0.0, began_s + at_s - time.monotonic()))
        used_s += _ask(node, probe)
    time.sleep(max(0.0, began_s + seconds - time.monotonic()))
    return used_s


def _ask(node: SimNode, probe: Probe) -> float:
    if probe.path:
        url = f"http://127.0.0.1:{node.metrics_port}{probe.path}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            assert answer.status == 200
        return 0.0  # it cost the watcher, and is counted there
    return run(probe.command, node.run_dir)


def run(command: Sequence[str], run_dir: Path) -> float:
    """Run a command as in the enforcer's container; return the seconds of processor it took."""
    environment = {"PATH": _PATH, "POWER_AGENT_RUN_DIR": str(run_dir)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, f"{command} ended with {process.returncode}"
    return used.ru_utime + used.ru_stime

"""The probe of the manifest against the real enforcer: what it says is what powerctl ping says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.node.enforcer_harness import REPOSITORY, EnforcerNode, pod_uid
from tests.waiting import HANG_S, until

A = pod_uid(1)
PROBE = ["/bin/sh", str(REPOSITORY / "deploy/probe"), "1"]
WITH_POWERCTL = str(Path(sys.executable).parent)  # the folder


def probe(node: EnforcerNode, path: str = "/nonexistent") -> bool:
    """Its verdict; without powerctl on its path it has nothing but the shell."""
    environment = {"PATH": path, "POWER_AGENT_RUN_DIR": str(node.run_dir)}
    done = subprocess.run(
        PROBE, cwd="/", env=environment, capture_output=True, check=False, timeout=HANG_S
    )
    return done.returncode == 0


def wait_for(node: EnforcerNode, *, good: bool, path: str = "/nonexistent") -> None:
    until(lambda: probe(node, path) == good, f"the probe says {good}")


def test_of_an_enforcer_that_turns_the_shell_alone_can_tell() -> None:
    with EnforcerNode() as node:
        assert not probe(node)
        node.start()
        wait_for(node, good=True)
        done = subprocess.run(
            [f"{WITH_POWERCTL}/powerctl", "doctor", "--json", "--socket", str(node.run_dir)],
            capture_output=True,
            check=False,
        )
        checks = {check["name"]: check["result"] for check in json.loads(done.stdout)["checks"]}
        assert checks["pulse"] == "ok"


def test_one_that_hangs_is_noticed_and_one_that_goes_on_too() -> None:
    with EnforcerNode() as node:
        node.start()
        wait_for(node, good=True)
        os.kill(node.pid, signal.SIGSTOP)
        wait_for(node, good=False, path=WITH_POWERCTL)
        os.kill(node.pid, signal.SIGCONT)
        wait_for(node, good=True)


def test_one_that_waits_for_anothers_lock_has_not_started() -> None:
    """Not even right after another in its place was killed."""
    with EnforcerNode() as node:
        node.start()
        wait_for(node, good=True)
        node.kill()
        other = node.spawn(run_dir=str(node.folder / "other"))
        until((node.folder / "other/pulse").exists, "another has the lock")
        node.process = node.spawn()
        until(lambda: node.logs("waiting"), "it waits")
        assert not probe(node)
        assert not probe(node, WITH_POWERCTL)
        other.terminate()
        wait_for(node, good=True)


def test_one_that_turns_seldom_is_asked() -> None:
    """Where nobody speaks to it, it turns when it looks for processes."""
    with EnforcerNode(scan_seconds="300", reconcile_seconds="300") as node:
        node.start()
        wait_for(node, good=False)  # by the pulse alone, which grows old
        assert probe(node, WITH_POWERCTL)
        wait_for(node, good=True)  # it has turned for that


def test_one_that_cannot_write_its_pulse_is_asked_and_sets_limits() -> None:
    with EnforcerNode() as node:
        (node.run_dir / "pulse").mkdir(parents=True)
        node.start()
        node.run_pod(A)
        node.snapshot({A: 300})
        node.wait_limit(300)
        assert not probe(node)
        assert probe(node, WITH_POWERCTL)


def test_one_that_turns_but_cannot_be_reached_is_not_well() -> None:
    """Whoever removes its socket cuts the watcher off, and only a restart helps."""
    with EnforcerNode() as node:
        node.start()
        wait_for(node, good=True)
        (node.run_dir / "control.sock").unlink()
        assert not probe(node, WITH_POWERCTL)


def test_a_pulse_of_another_clock_is_not_believed() -> None:
    """As where something else lies in the place of /proc/uptime."""
    with EnforcerNode() as node:
        node.start()
        wait_for(node, good=True)
        node.kill()  # its socket stays
        for text in ("9999999999", "0", "09", "-1", "x", "", "1 1; exit 0"):
            (node.run_dir / "pulse").write_text(f"{text:>10}\n")
            assert not probe(node), text

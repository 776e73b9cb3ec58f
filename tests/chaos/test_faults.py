"""Faults that no other test has: every NVML call with every code, a hanging driver, bad disks."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import product
from pathlib import Path

import pytest

from enforcer.ledger import Ledger, LedgerError
from enforcer.policy import Owned
from tests.chaos.mishaps import NVML_CALLS, NVML_CODES
from tests.chaos.scale import SEED, WHOLE, whole_only
from tests.node.enforcer_harness import REPOSITORY, EnforcerNode, named, pod_uid
from tests.simnode.node import SimNode
from tests.waiting import HANG_S, until

A, B = pod_uid(1), pod_uid(2)
FOUND_W = (650.0, 640.0)

# ---- each NVML call fails with each plausible code ----

_EACH = list(product(NVML_CALLS, NVML_CODES))
FAILURES = _EACH if WHOLE else random.Random(SEED).sample(_EACH, 6)
AT_A_TIME = 4


def fails_and_recovers(call: str, code: int) -> None:
    """While it runs, at a start, and at the end: what is owned is held, nothing is lost."""
    with EnforcerNode() as node:
        for gpu, watts in zip(node.gpus, FOUND_W, strict=True):
            gpu.limit_mw = round(watts * 1000)
        node.start()
        pids = [node.run_pod(A, 0), node.run_pod(B, 1)]
        node.snapshot({A: 300, B: 310})
        source = node.gpus if call in ("nvmlInit", "nvmlDeviceGetCount") else node.gpus[0]
        source.fault(call, error=code)
        node.snapshot({A: 400, B: 410})
        node.looks()
        assert node.limit(0) in (300, 400)  # never given back
        assert node.limit(1) in (310, 410)
        node.kill()
        node.start()
        node.snapshot({A: 400, B: 410})
        node.looks()
        assert node.limit(0) in (300, 400)
        assert node.limit(1) in (310, 410)
        node.gpus.clear_faults()
        node.wait_limit(400, 0)
        node.wait_limit(410, 1)
        assert set(node.owned().values()) == {650_000, 640_000}
        source.fault(call, error=code)
        while pids:
            node.end(pids.pop())
        node.snapshot({})
        node.looks()
        node.gpus.clear_faults()
        node.wait_limit(650, 0)
        node.wait_limit(640, 1)
        until(lambda: node.owned() == {}, "the ledger is empty")
        assert len(node.logs()) < 80, "a log storm"
        assert node.errors() == ""


@pytest.fixture(scope="module")
def failures() -> Iterator[Mapping[tuple[str, int], object]]:
    """All of them, some at a time: they mostly wait."""
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        yield {each: pool.submit(fails_and_recovers, *each) for each in FAILURES}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("failure", FAILURES, ids=lambda each: f"{each[0]}-{each[1]}")
def test_each_nvml_call_failing_with_each_code(
    failure: tuple[str, int],
    failures: Mapping[tuple[str, int], object],
) -> None:
    failures[failure].result()  # type: ignore[attr-defined]


def test_a_gpu_that_was_away_at_the_start_is_found_when_it_comes() -> None:
    """It is in no ledger, so nothing is missed; its pod's process waits for ever."""
    with EnforcerNode() as node:
        node.gpus[1].vanish()
        node.start()
        node.run_pod(A, 0)
        node.run_pod(B, 1)
        node.snapshot({A: 300, B: 310})
        node.gpus[1].reappear()
        node.wait_limit(310, 1)


# ---- a driver call that hangs ----


HUNG_CALLS = ["nvmlDeviceSetPowerManagementLimit", "nvmlDeviceGetComputeRunningProcesses"]


@whole_only
@pytest.mark.parametrize("call", HUNG_CALLS)
def test_an_enforcer_stuck_in_the_driver_turns_ready_red_and_limits_hold(call: str) -> None:
    with SimNode(gpus=2, real_api=False, settings={"POWER_AGENT_SCAN_SECONDS": "0.1"}) as node:
        pod = node.add_pod("trainer", 350, [0])
        node.wait_for_limit(0, 350)
        node.wait_for(lambda: node.page("/readyz")[0] == 200, "ready")
        node.gpus[0].fault(call, delay_ms=30_000)
        began_s = time.monotonic()
        node.annotate(pod, 300)
        node.wait_for(lambda: node.page("/readyz")[0] == 503, "red")
        assert time.monotonic() - began_s < 8
        assert "enforcer" in node.page("/readyz")[1]
        assert node.limit_mw(0) == 350_000
        node.gpus.clear_faults()
        node.kill_enforcer()  # as the probe or supervisord's watchdog does it
        node.start_enforcer()
        node.wait_for_limit(0, 300)
        node.wait_for(lambda: node.page("/readyz")[0] == 200, "ready again")


@whole_only
def test_an_enforcer_stuck_in_the_driver_is_restarted_by_the_watchdog() -> None:
    """Again and again for as long as the driver hangs; then all is well."""
    settings = {"POWER_AGENT_SCAN_SECONDS": "0.1"}
    with SimNode(gpus=2, real_api=False, supervised=True, settings=settings) as node:
        pod = node.add_pod("trainer", 350, [0])
        node.wait_for_limit(0, 350)
        stuck = node.pid("enforcer")
        time.sleep(12)  # the watchdog kills only one that it has heard before, at a tick of its
        node.gpus[0].fault("nvmlDeviceSetPowerManagementLimit", delay_ms=30_000, count=1)
        node.annotate(pod, 300)

        def replaced() -> bool:
            assert node.limit_mw(0) in (350_000, 300_000)
            with suppress(LookupError):
                return node.pid("enforcer") != stuck
            return False

        node.wait_for(replaced, "another enforcer")
        node.wait_for_limit(0, 300)
        assert node.stop() == {"supervisord": 0}
        assert node.limit_mw(0) == 700_000


# ---- disks ----

SLOW_DISK = """
import os, runpy, sys, time
real = os.fsync
def slow(descriptor):
    print("fsync", file=sys.stderr, flush=True)
    time.sleep(1.5)
    real(descriptor)
os.fsync = slow
runpy.run_module("enforcer", run_name="__main__", alter_sys=True)
"""


class OnASlowDisk(EnforcerNode):
    def spawn(self, **settings: str) -> subprocess.Popen[bytes]:
        environment = {"PATH": os.environ["PATH"], **self.gpus.environment(), **self.settings}
        command, changed = [sys.executable, "-c", SLOW_DISK], environment | named(settings)
        with self._log.open("ab") as log, self._errors.open("ab") as errors:
            process = subprocess.Popen(
                command, cwd=REPOSITORY, env=changed, stdout=log, stderr=errors
            )
        self._processes.append(process)
        return process


def test_i2_on_a_slow_disk_the_first_write_waits_and_later_ones_do_not() -> None:
    """Only an original limit needs the disk; a change of a limit must not wait for it."""
    node = OnASlowDisk()
    with node:
        node.start()
        node.run_pod(A)
        assert node.client.send(node.message({A: 300}))
        until(lambda: list(node.state_dir.glob("ledger.next")), "it is being written")
        assert node.limit() == 700
        node.wait_limit(300)
        assert node.errors().split() == ["fsync", "fsync"]  # the file, and the directory
        assert node.client.wait(HANG_S)  # the report
        node.revision += 1
        node.snapshot({A: 310})
        assert node.limit() == 310
        assert node.errors().split() == ["fsync", "fsync"]


BOOT = "11111111-aaaa"
ENTRIES = {
    "GPU-1": Owned(700_000, 300_000, frozenset({"pod-a", "pod-b"}), 1_700_000_000.25),
    "GPU-2": Owned(450_500, 200_000, frozenset({"pod-c"}), 1_700_000_001.0),
}


def test_no_flipped_bit_changes_an_original(tmp_path: Path) -> None:
    """Each bit of the ledger: noticed (the generation before serves), or without a meaning."""
    ledger = Ledger(tmp_path, BOOT)
    ledger.store(ENTRIES)
    ledger.store(ENTRIES)
    whole, before = ledger.path.read_bytes(), (tmp_path / "ledger.previous.json").read_bytes()
    ledger.close()
    wrong = []
    for place in range(0, len(whole) * 8, 1 if WHOLE else 9):
        flipped = bytearray(whole)
        flipped[place // 8] ^= 1 << place % 8
        for path in tmp_path.iterdir():
            path.unlink()
        (tmp_path / "ledger.json").write_bytes(flipped)
        (tmp_path / "ledger.previous.json").write_bytes(before)
        read = Ledger(tmp_path, BOOT)
        with suppress(LedgerError):  # it looks like one of a newer version: told, not used
            read.load()
            originals = {uuid: owned.original_mw for uuid, owned in read.entries.items()}
            if originals != {uuid: owned.original_mw for uuid, owned in ENTRIES.items()}:
                wrong.append((place, originals))
        read.close()
    assert wrong == []


def test_an_older_format_is_kept_aside_and_the_generation_before_adopted(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, BOOT)
    ledger.store(ENTRIES)
    ledger.store(ENTRIES)
    ledger.close()
    text = ledger.path.read_bytes().replace(b'"version": 1', b'"version": 0')
    assert b'"version": 0' in text
    ledger.path.write_bytes(text)
    again = Ledger(tmp_path, BOOT)
    said = again.load()
    again.close()
    assert again.entries == ENTRIES
    (aside,) = tmp_path.glob("*damaged*")
    assert aside.read_bytes() == text
    assert any(aside.name in line for line in said)

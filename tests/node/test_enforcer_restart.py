"""Ends and beginnings of the enforcer: kill -9, SIGTERM, ledger, lease, dry run, two at once."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable

import pytest

from tests.node.enforcer_harness import EnforcerNode, pod_uid
from tests.simnode import late_signal
from tests.waiting import ended, until

A, B = pod_uid(1), pod_uid(2)


def test_i9_killed_and_restarted_adopts_the_ledger_and_holds_until_a_snapshot() -> None:
    with EnforcerNode() as node:
        node.gpus[0].limit_mw = 650_000
        node.start()
        pid = node.run_pod(A)
        node.snapshot({A: 300})
        node.kill()
        assert node.limit() == 300  # limits hold in hardware
        node.end(pid)
        node.start()
        assert node.logs("started")[-1]["owned"] == 1
        node.looks()
        held = node.gpu()
        assert (held.state, held.original_mw, held.limit_mw) == ("held", 650_000, 300_000)
        assert node.writes() == 1
        node.snapshot({A: 300})  # its pod is still there
        node.looks()
        assert node.limit() == 300
        node.snapshot({})
        node.wait_limit(650)


Change = Callable[[EnforcerNode, int], None]


def test_i9_killed_between_ledger_and_write_is_finished_or_given_back() -> None:
    """The first set is held up inside NVML: the ledger is on disk, the limit is not."""
    with EnforcerNode() as node:
        node.gpus[0].limit_mw = 650_000
        node.start()
        pid = node.run_pod(A)
        node.gpus[0].fault("nvmlDeviceSetPowerManagementLimit", delay_ms=3000, error=999, count=1)
        node.revision += 1
        assert node.client.send(node.message({A: 300}))
        until(node.owned, "the original is on disk")
        node.kill()
        assert node.limit() == 650
        node.start()
        assert node.gpu().original_mw == 650_000
        node.end(pid)
        node.snapshot({})
        node.wait_limit(650)
        until(lambda: node.owned() == {}, "given back")


def test_i2_the_original_is_on_disk_before_the_first_write() -> None:
    with EnforcerNode() as node:
        node.start()
        node.run_pod(A)
        node.gpus.set_delay_us = 3_000_000
        assert node.client.send(node.message({A: 300}))
        until(node.owned, "the original is on disk")
        assert node.limit() == 700
        node.wait_limit(300)


def test_sigint_ends_it_cleanly_too() -> None:
    with EnforcerNode() as node:
        node.start()
        node.run_pod(A)
        node.snapshot({A: 300})
        assert node.process is not None
        node.process.send_signal(signal.SIGINT)
        assert ended(node.process) == 0
        assert node.limit() == 700


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_the_last_moment_before_a_wait_ends_it(how: signal.Signals) -> None:
    """The wait is longer than the test may take: what is seen only after it is lost."""
    with EnforcerNode(scan_seconds="300", reconcile_seconds="300") as node:
        node.settings |= late_signal.environment(how, 5)
        assert ended(node.spawn()) == 0, node.errors()
        assert node.logs("stopped")


def test_sigterm_with_a_release_refused_leaves_the_ledger_for_the_next_start() -> None:
    with EnforcerNode() as node:
        node.start()
        node.run_pod(A)
        node.snapshot({A: 300})
        node.gpus[0].fault("nvmlDeviceSetPowerManagementLimit", error=4)
        assert node.stop() == 0
        assert node.owned() == {node.gpus[0].uuid: 700_000}
        assert node.logs("stopped")[-1]["still_owned"] == 1


def test_a_pause_stops_all_writing_at_once_and_a_release_frees_one_gpu() -> None:
    with EnforcerNode(scan_seconds="300", reconcile_seconds="300") as node:
        node.start()
        node.run_pod(A, 0, 1)
        node.snapshot({A: 300})
        node.wait_limit(300, 1)
        (node.state_dir / "pause").write_text("the breaker hums")
        node.snapshot({A: 400})
        assert node.limit() == node.limit(1) == 300
        (node.state_dir / "release").write_text(node.gpus[1].uuid)
        node.heartbeat()
        node.wait_limit(700, 1)
        assert node.stop() == 0
        assert node.limit() == 300
        assert node.owned() == {node.gpus[0].uuid: 700_000}


def test_sigterm_holds_where_so_configured() -> None:
    with EnforcerNode(on_exit="hold") as node:
        node.start()
        pid = node.run_pod(A)
        node.snapshot({A: 300})
        assert node.stop() == 0
        assert node.limit() == 300
        assert node.owned() == {node.gpus[0].uuid: 700_000}
        node.end(pid)
        node.start()
        node.snapshot({})
        node.wait_limit(700)


def test_another_boot_drops_the_ledger_since_hardware_forgot() -> None:
    with EnforcerNode() as node:
        boot = node.work.root / "sys/kernel/random/boot_id"
        boot.parent.mkdir(parents=True)
        boot.write_text("first-boot\n")
        node.start()
        node.run_pod(A)
        node.snapshot({A: 300})
        node.kill()
        boot.write_text("second-boot\n")
        node.gpus.forget_limits()
        node.start()
        assert node.logs("started")[-1]["owned"] == 0
        assert any(node.gpus[0].uuid in line["why"] for line in node.logs("ledger"))
        node.looks()
        assert node.limit() == 700
        node.snapshot({A: 300})
        node.wait_limit(300)
        assert node.gpu().original_mw == 700_000


def test_i5_a_ledger_that_cannot_be_read_is_waited_for_and_nothing_is_done_meanwhile() -> None:
    with EnforcerNode() as node:
        node.start()
        node.run_pod(A)
        node.snapshot({A: 300})
        node.kill()
        ledger, aside = node.state_dir / "ledger.json", node.state_dir / "aside"
        ledger.rename(aside)
        with socket.socket(socket.AF_UNIX) as obstacle:
            obstacle.bind(str(ledger))  # to open one is ENXIO
            node.process = node.spawn()
            until(lambda: node.logs("ledger"), "it is said")
            (line,) = node.logs("ledger")
            assert "cannot be read: No such device or address" in str(line["why"])
            assert len(node.logs("started")) == 1
            assert node.gpus.open_by() == set()
            aside.rename(ledger)
        until(lambda: node.logs("started")[1:], "it goes on")
        node.snapshot({})
        node.snapshot({}, others=[A])
        node.wait_limit(700)


def test_i6_a_second_enforcer_waits_and_takes_over() -> None:
    with EnforcerNode() as node:
        node.start()
        pid = node.run_pod(A)
        node.snapshot({A: 300})
        second = node.spawn()
        until(lambda: node.logs("waiting"), "the second one says that it waits")
        assert str(node.state_dir) in node.logs("waiting")[0]["why"]
        node.snapshot({A: 350})  # the first one is not disturbed
        node.wait_limit(350)
        assert node.status().enforcer.pid == node.pid
        node.kill()
        node.process = second
        until(lambda: len(node.logs("started")) == 2, "the second one has started")
        assert len(node.logs("waiting")) == 1
        until(lambda: node.status().enforcer.pid == second.pid, "the second one answers")
        node.end(pid)
        node.snapshot({})
        node.wait_limit(700)


def test_i6_a_waiting_enforcer_ends_cleanly() -> None:
    with EnforcerNode() as node:
        node.start()
        second = node.spawn()
        until(lambda: node.logs("waiting"), "the second one says that it waits")
        second.terminate()
        assert ended(second) == 0
        assert node.status().enforcer.pid == node.pid


def test_dry_run_decides_and_reports_and_writes_nothing() -> None:
    with EnforcerNode(dry_run="true") as node:
        node.start()
        node.run_pod(A)
        report = node.snapshot({A: 300})
        assert node.status().enforcer.dry_run
        gpu = node.gpu()
        assert "dry run" in gpu.reason
        assert "300" in gpu.reason
        assert not gpu.managed
        assert report.counters.limit_writes == 0
        node.snapshot({A: 250})
        node.looks()
        assert node.stop() == 0
        assert node.writes() == 0
        assert node.owned() == {}
        assert node.limit() == 700

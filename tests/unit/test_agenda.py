"""What is due when: the table, on times that the test makes up."""

from __future__ import annotations

from dataclasses import replace

import pytest

from enforcer.agenda import Agenda, Due

BEGIN = 1000.0
RESTING = Agenda.begin(scan_s=1.0, reconcile_s=15.0, now_s=BEGIN)
RESTING = RESTING.read(BEGIN).scanned(frozenset(), BEGIN)
NOTHING = Due()
DECIDE = Due(decide=True)
SCAN = Due(decide=True, scan=True)
ALL = Due(decide=True, scan=True, read=True)

# after seconds, changed, a write may go out at, everywhere: what is due
TABLE: dict[str, tuple[float, bool, float | None, bool, Due]] = {
    "nothing yet": (0.5, False, None, False, NOTHING),
    "nothing yet, though a decision would look everywhere": (0.5, False, None, True, NOTHING),
    "a scan": (1.0, False, None, False, SCAN),
    "a scan and a reading": (15.0, False, None, False, ALL),
    "a changed snapshot": (0.5, True, None, False, DECIDE),
    "a changed snapshot with a pod that waits": (0.5, True, None, True, SCAN),
    "a write that may go out": (0.5, False, BEGIN + 0.5, False, DECIDE),
    "a write that may not go out yet": (0.4, False, BEGIN + 0.5, False, NOTHING),
}


@pytest.mark.parametrize("case", TABLE)
def test_each_row_of_the_table(case: str) -> None:
    after_s, changed, write_s, everywhere, due = TABLE[case]
    now_s = BEGIN + after_s
    found = RESTING.due(now_s, changed=changed, write_s=write_s, everywhere=everywhere)
    assert found == due


def test_a_reading_does_not_wait_for_a_scan() -> None:
    seldom = replace(RESTING, next_scan_s=BEGIN + 300)
    assert seldom.wake_s(changed=False, write_s=None) == BEGIN + 15
    read = seldom.due(BEGIN + 15, changed=False, write_s=None, everywhere=False)
    assert read == Due(decide=True, read=True)
    assert seldom.not_read(BEGIN + 15).wake_s(changed=False, write_s=None) == BEGIN + 30


def test_at_the_start_everything_is_due_at_once() -> None:
    fresh = Agenda.begin(1.0, 15.0, BEGIN)
    assert fresh.due(BEGIN, changed=False, write_s=None, everywhere=False) == ALL
    assert fresh.asked_lately(BEGIN + 4.9)
    assert not fresh.asked_lately(BEGIN + 5)


def test_a_burst_of_snapshots_is_decided_on_together() -> None:
    decided = RESTING.decided(BEGIN + 0.5)
    soon, later = BEGIN + 0.51, BEGIN + 0.521
    assert decided.due(soon, changed=True, write_s=None, everywhere=False) == NOTHING
    assert decided.due(later, changed=True, write_s=None, everywhere=False) == DECIDE
    assert decided.wake_s(changed=True, write_s=None) == pytest.approx(BEGIN + 0.52)


def test_a_scan_does_not_make_the_next_change_wait() -> None:
    scanned = RESTING.scanned(frozenset(), BEGIN + 1)
    assert scanned.due(BEGIN + 1.001, changed=True, write_s=None, everywhere=False) == DECIDE


def test_while_a_pod_waits_scans_come_every_tenth_of_a_second_for_a_minute() -> None:
    waiting = RESTING.scanned(frozenset({"a"}), BEGIN)
    assert waiting.next_scan_s == pytest.approx(BEGIN + 0.1)
    assert waiting.scanned(frozenset({"a"}), BEGIN + 59).next_scan_s == pytest.approx(BEGIN + 59.1)
    assert waiting.scanned(frozenset({"a"}), BEGIN + 60).next_scan_s == BEGIN + 61
    another = waiting.scanned(frozenset({"a"}), BEGIN + 60).scanned(frozenset({"b"}), BEGIN + 70)
    assert another.next_scan_s == pytest.approx(BEGIN + 70.1)


def test_a_scan_that_is_asked_for_oftener_stays_so_while_a_pod_waits() -> None:
    quick = replace(RESTING, scan_s=0.05).scanned(frozenset({"a"}), BEGIN)
    assert quick.next_scan_s == pytest.approx(BEGIN + 0.05)


def test_a_question_brings_a_scan_and_a_reading_that_is_no_older_than_a_second() -> None:
    asked = RESTING.asked(BEGIN + 0.5)
    assert asked.due(BEGIN + 0.5, changed=False, write_s=None, everywhere=False) == SCAN
    asked = RESTING.asked(BEGIN + 1.0)
    assert asked.due(BEGIN + 1.0, changed=False, write_s=None, everywhere=False) == ALL
    assert asked.asked_lately(BEGIN + 5.9)

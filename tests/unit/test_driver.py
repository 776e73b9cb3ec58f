"""When the session with the driver is opened, opened anew and let go: the table, row by row."""

from __future__ import annotations

import pytest

from enforcer import driver as d
from enforcer.driver import Driver, Open, Refused, Search, Shut, Step, View
from shared.pace import Backoff

NOW = 5000.0
FRESH = Backoff(1.0, 32.0)
WAITS = Backoff(1.0, 32.0, failures=3, due_s=NOW + 1)
OVER = Backoff(1.0, 32.0, failures=3, due_s=NOW)
BUS = frozenset({"0000:0f:00.0 nvidia", "0000:17:00.0 nvidia"})
IDLE = View(needed=False, missing=False, used=False)
NEEDED = View(needed=True, missing=False, used=True)
MISSING = View(needed=True, missing=True, used=True)
WAITING = View(needed=True, missing=False, used=False)
UNUSED = View(needed=True, missing=True, used=False)


def session(
    *,
    age_s: float = 1.0,
    faults: tuple[str, ...] = (),
    again: Backoff = FRESH,
    search: Search | None = None,
) -> Open:
    return Open(1, NOW - age_s, faults, again, BUS, search)


TABLE: dict[str, tuple[Driver, View, Step]] = {
    "shut and needed": (Shut(), NEEDED, Step.OPEN),
    "shut and not needed": (Shut(), IDLE, Step.KEEP),
    "refused, its wait over": (Refused("x", True, OVER), NEEDED, Step.OPEN),
    "refused, its wait over, not needed": (Refused("x", True, OVER), IDLE, Step.OPEN),
    "refused, its wait not over": (Refused("x", True, WAITS), NEEDED, Step.KEEP),
    "open and needed": (session(), NEEDED, Step.KEEP),
    "open and not needed": (session(age_s=5), IDLE, Step.SHUT),
    "open and not needed, young": (session(age_s=4.9), IDLE, Step.KEEP),
    "not needed, whatever is searched for": (
        session(age_s=5, search=Search(3, NOW)),
        IDLE,
        Step.SHUT,
    ),
    "a search is due": (session(search=Search(3, NOW)), MISSING, Step.OPEN),
    "a search is not due": (session(search=Search(3, NOW + 1), again=WAITS), MISSING, Step.KEEP),
    "a device came though none is missing": (session(search=Search(3, NOW)), NEEDED, Step.OPEN),
    "missing, another one used": (session(age_s=9999, again=WAITS), MISSING, Step.KEEP),
    "missing, none used, old": (session(age_s=600), UNUSED, Step.OPEN),
    "missing, none used, young": (session(age_s=599, again=WAITS), UNUSED, Step.KEEP),
    "a fault, none used, old": (session(age_s=600, faults=("x",)), WAITING, Step.OPEN),
    "a fault, another used": (session(age_s=9999, faults=("x",), again=OVER), NEEDED, Step.LIST),
    "missing, asked again in the session": (session(again=OVER), MISSING, Step.LIST),
    "a fault, its wait over": (session(faults=("GPU 1: x",), again=OVER), NEEDED, Step.LIST),
    "a fault, its wait not over": (session(faults=("GPU 1: x",), again=WAITS), NEEDED, Step.KEEP),
}


@pytest.mark.parametrize("case", TABLE)
def test_each_row_of_the_table(case: str) -> None:
    driver, view, step = TABLE[case]
    assert d.next_step(driver, view, NOW) is step


def test_a_lost_gpu_is_searched_for_three_times_and_no_more() -> None:
    driver: Open = d.lost_one(session(), NOW)
    now_s, tries = NOW, []
    while driver.search is not None:
        now_s = driver.search.due_s
        assert d.next_step(driver, MISSING, now_s) is Step.OPEN
        tries.append(now_s - NOW)
        driver = d.opened(driver, 2, BUS, now_s)
        driver = d.listed(driver, (), missing=True, now_s=now_s)
    assert tries == [0, 1, 3]


def test_a_search_ends_when_all_are_there() -> None:
    driver = d.opened(d.lost_one(session(), NOW), 2, BUS, NOW)
    assert d.listed(driver, (), missing=False, now_s=NOW).search is None
    assert d.listed(driver, ("GPU 1: x",), missing=False, now_s=NOW).search is not None


def test_an_earlier_search_is_not_put_off_by_a_later_loss() -> None:
    searching = session(search=Search(1, NOW))
    assert d.lost_one(searching, NOW + 5) == searching


@pytest.mark.parametrize(
    ("devices", "searches"),
    [
        (BUS, False),
        (BUS | {"0000:2f:00.0 nvidia"}, True),
        (BUS - {"0000:17:00.0 nvidia"}, False),
        (BUS - {"0000:17:00.0 nvidia"} | {"0000:17:00.0 -"}, True),
        (None, False),
    ],
    ids=["the same", "one more", "one less", "another driver", "unreadable"],
)
def test_what_comes_to_the_bus_is_a_reason_to_search(devices: d.Devices, searches: bool) -> None:
    assert (d.on_the_bus(session(), devices, NOW).search is not None) == searches


def test_what_goes_and_comes_back_is_a_reason_too() -> None:
    gone = d.on_the_bus(session(), BUS - {"0000:17:00.0 nvidia"}, NOW)
    assert d.on_the_bus(gone, BUS, NOW + 1).search == Search(3, NOW + 1)


def test_a_bus_that_can_be_read_for_the_first_time_is_no_news() -> None:
    blind = Open(1, NOW, (), FRESH, None, None)
    assert d.on_the_bus(blind, BUS, NOW).search is None


@pytest.mark.parametrize(
    ("tries", "hopeless"),
    [
        pytest.param([(0, True), (179, True)], False, id="not yet"),
        pytest.param([(0, True), (180, True)], True, id="three minutes of them"),
        pytest.param([(0, False), (180, True)], False, id="another error before"),
        pytest.param([(0, True), (90, False), (180, True)], False, id="another in between"),
        pytest.param([(0, True), (180, False)], False, id="another at last"),
    ],
)
def test_it_is_hopeless_where_every_try_says_so(
    tries: list[tuple[float, bool]], hopeless: bool
) -> None:
    driver: Driver = session()
    for after_s, cut_off in tries:
        now_s = NOW + after_s
        driver = d.refused(driver, "x", absent=False, now_s=now_s, cut_off=cut_off)
    assert d.is_hopeless(driver) == hopeless


@pytest.mark.parametrize("driver", [Shut(), session(age_s=9999), Refused("x", False, OVER)])
def test_nothing_is_hopeless_while_a_session_is_open_or_none_is_missed(driver: Driver) -> None:
    assert not d.is_hopeless(driver)


def test_refusals_in_a_row_wait_ever_longer() -> None:
    driver: Driver = session()
    waits = []
    for _ in range(7):
        driver = d.refused(driver, "nvmlInit: UNKNOWN", absent=False, now_s=NOW)
        assert driver.again.due_s is not None
        waits.append(driver.again.due_s - NOW)
    assert waits == [1, 2, 4, 8, 16, 32, 32]

"""The session with the driver: when it is opened, opened anew, and let go. Pure: no NVML here.

Opening a session is expensive: it takes one to two seconds with eight GPUs, and half a minute where
persistence mode is off; all wait for it meanwhile. Where it fails, no GPU can be reached at all.
So a session is kept, and opened anew only for a reason to expect more of it:

| the session is | and                                                           | step      |
|----------------|---------------------------------------------------------------|-----------|
| shut           | something is asked for or owned                               | open      |
| shut           | nothing is                                                    | keep      |
| refused        | its wait is over                                              | open      |
| refused        | its wait is not over                                          | keep      |
| open           | nothing is asked for or owned, and it is five seconds old     | shut      |
| open           | nothing is asked for or owned, and it is younger              | keep      |
| open           | a GPU has just been lost, or a device has come to the bus     | open anew |
| open           | a GPU or a fact is missing, no GPU is in use, and it is ten   |           |
|                | minutes old                                                   | open anew |
| open           | a GPU or a fact of one is missing, and its wait is over       | list      |
| open           | all else                                                      | keep      |

Only a new container may help where NVML worked in this process and every try for three minutes was
refused as when a container has lost its devices. The program ends then (`is_hopeless`), never while
a session is open: through that one GPUs can still be given back.

A session that took half a minute to open is not let go before those who waited for it are heard.

To list the boards of an open session again costs next to nothing, and finds those that had a
passing fault. The session has to be let go as well: an open handle keeps a driver from being
upgraded.
"""

from dataclasses import dataclass, replace
from enum import Enum

from shared.pace import Backoff

# A board that is back is listed only after a moment: three tries, after 0, 1 and 3 seconds.
_TRIES = 3
# With a GPU missing and no reason to expect it back.
_WITHOUT_REASON_S = 600.0
# NVML may answer so while a driver is exchanged, too.
HOPELESS_S = 180.0
# How long one is kept that nothing needs.
_LEAST_S = 5.0
_FIRST_S = 1.0
_MOST_S = 32.0
# A device that comes to the bus again and again is news ever more seldom.
_NEWS = Backoff(_FIRST_S, _MOST_S)

Devices = frozenset[str] | None  # on the bus; None where that cannot be told


class Step(Enum):
    """What is to be done about the session."""

    KEEP = "keep"
    OPEN = "open"
    LIST = "list"
    SHUT = "shut"


@dataclass(frozen=True, slots=True)
class Search:
    """A reason to open a new session: how many tries are left, and when the next one is due."""

    left: int
    due_s: float
    wait_s: float = _FIRST_S


@dataclass(frozen=True, slots=True)
class Shut:
    """No session, and none is missed."""


@dataclass(frozen=True, slots=True)
class Refused:
    """No session: opening failed, and is tried again when `again` lets it.

    `at_s` is when it was last tried. `cut_off_s`: since when every try was refused as where only a
    new container helps, though NVML had worked in this process; None where it was not.
    """

    why: str
    absent: bool
    again: Backoff
    at_s: float = 0.0
    cut_off_s: float | None = None


@dataclass(frozen=True, slots=True)
class Open:
    """A session; handles of one with another `number` are worthless.

    `faults` are what went wrong on listing and may not do so again. `devices` were on the bus, and
    `news` says from when on what comes there is a reason again.
    """

    number: int
    since_s: float
    faults: tuple[str, ...]
    again: Backoff
    devices: Devices
    search: Search | None
    news: Backoff = _NEWS


Driver = Shut | Refused | Open


@dataclass(frozen=True, slots=True)
class View:
    """What the decision about the session depends on.

    `used`: a GPU that answers is owned, or a pod that asks for something runs on it.
    """

    needed: bool
    missing: bool
    used: bool


def next_step(driver: Driver, view: View, now_s: float) -> Step:
    """Return what is to be done now: the table above."""
    if isinstance(driver, Shut):
        return Step.OPEN if view.needed else Step.KEEP
    if isinstance(driver, Refused):
        return Step.OPEN if driver.again.may(now_s) else Step.KEEP
    if not view.needed:
        return Step.SHUT if now_s >= driver.since_s + _LEAST_S else Step.KEEP
    if driver.search is not None and now_s >= driver.search.due_s:
        return Step.OPEN
    old = now_s >= driver.since_s + _WITHOUT_REASON_S
    lacking = view.missing or bool(driver.faults)
    if lacking and not view.used and old:
        return Step.OPEN
    if lacking and driver.again.may(now_s):
        return Step.LIST
    return Step.KEEP


def refused(
    before: Driver, why: str, *, absent: bool, now_s: float, cut_off: bool = False
) -> Refused:
    """Return the state after a session that could not be opened.

    `cut_off`: NVML had worked in this process, and only a new container may help.
    """
    again, since_s = Backoff(_FIRST_S, _MOST_S), None
    if isinstance(before, Refused):
        again, since_s = before.again, before.cut_off_s
    since_s = (now_s if since_s is None else since_s) if cut_off else None
    return Refused(why, absent, again.failed(now_s), now_s, since_s)


def is_hopeless(driver: Driver) -> bool:
    """Tell whether to end, so that a new container is made; asked after a try, not between two."""
    if not isinstance(driver, Refused) or driver.cut_off_s is None:
        return False
    return driver.at_s >= driver.cut_off_s + HOPELESS_S


def opened(before: Driver, number: int, devices: Devices, now_s: float) -> Open:
    """Return the state after a session was opened, before its boards are listed."""
    search = before.search if isinstance(before, Open) else None
    again = Backoff(_FIRST_S, _MOST_S)
    news = before.news if isinstance(before, Open) else _NEWS
    return Open(number, now_s, (), again, devices, _next_try(search, now_s), news)


def _next_try(search: Search | None, now_s: float) -> Search | None:
    if search is None or search.left <= 1:
        return None
    return Search(search.left - 1, now_s + search.wait_s, search.wait_s * 2)


def listed(driver: Open, faults: tuple[str, ...], *, missing: bool, now_s: float) -> Open:
    """Return the state after the boards were listed; `missing`: a GPU that was known is not there.

    Where all are there, nothing is searched for any more.
    """
    if faults or missing:
        return replace(driver, faults=faults, again=driver.again.failed(now_s))
    return replace(driver, faults=(), again=driver.again.cleared(), search=None)


def lost_one(driver: Open, due_s: float) -> Open:
    """Return the state after a GPU was lost: a new session may show it, from `due_s` on."""
    if driver.search is not None and driver.search.due_s <= due_s:
        return driver
    return replace(driver, search=Search(_TRIES, due_s))


def on_the_bus(driver: Open, devices: Devices, now_s: float) -> Open:
    """Return the state after a look at the bus: a new session may show what came to it."""
    if devices is None or devices == driver.devices:
        return driver
    came = driver.devices is not None and bool(devices - driver.devices)
    driver = replace(driver, devices=devices)
    return _expect(driver, now_s) if came else driver


def _expect(driver: Open, now_s: float) -> Open:
    """Return the state after a device came: it is searched for now, or when its wait is over."""
    news = driver.news
    if news.due_s is not None and now_s - news.due_s > news.most_s:
        news = news.cleared()
    due_s = now_s + news.left_s(now_s)
    if driver.search is not None:
        due_s = min(due_s, driver.search.due_s)
    return replace(driver, search=Search(_TRIES, due_s), news=news.failed(now_s))

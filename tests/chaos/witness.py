"""Judges from outside whether each limit that was written might have been written. Pure.

It is given what could be seen at moments (who runs on which GPU, what each pod asks) and what the
driver recorded, and shares no code with the enforcer. Between two moments either may have been
the case; a set is wrong where neither allows it.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from tests.simnode.gpus import SetRecord

S = 1_000_000_000
SETS_A_SECOND = 12  # "about ten"


@dataclass(frozen=True)
class Board:
    """A GPU: what may be asked of it at all, and the limit it was found with."""

    uuid: str
    low_mw: int
    high_mw: int
    found_mw: int

    def clamp(self, limit_mw: int) -> int:
        return max(self.low_mw, min(self.high_mw, limit_mw))


@dataclass(frozen=True)
class View:
    """One moment: pods with a living process on each GPU, what each annotated pod asks.

    `asks` has None for a value that cannot be used. `ending`: a clean stop was ordered. `calm`:
    no fault is at work that keeps the agent from seeing or doing.
    """

    at_ns: int
    on: Mapping[str, frozenset[str]]
    asks: Mapping[str, int | None]
    ending: bool = False
    calm: bool = True


@dataclass
class _Held:
    """A GPU that was written and not given back."""

    since_ns: int
    limit_mw: int


@dataclass
class Witness:
    """`lag_ns`: how old an annotation may be that is acted on, `scan_ns`: how old a process list.

    `trouble_ns`: both, where faults were at work lately.
    """

    boards: Iterable[Board]
    lag_ns: int = 10 * S
    scan_ns: int = 3 * S
    trouble_ns: int = 60 * S
    views: list[View] = field(default_factory=list)
    judged: int = 0
    held: dict[str, _Held] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.board = {board.uuid: board for board in self.boards}

    def see(self, view: View) -> None:
        """Views come in order."""
        self.views.append(view)

    def _during(self, begin_ns: int, end_ns: int) -> list[View]:
        """The views of that time, with the one before it and the one after it."""
        first = bisect_left(self.views, begin_ns, key=lambda view: view.at_ns)
        last = bisect_right(self.views, end_ns, key=lambda view: view.at_ns)
        return self.views[max(0, first - 1) : last + 1]

    def _back(self, from_ns: int, lag_ns: int) -> int:
        """The moment `lag_ns` before; longer before where there was trouble."""
        lately = self._during(from_ns - self.trouble_ns, from_ns)
        return from_ns - (lag_ns if all(view.calm for view in lately) else self.trouble_ns)

    def judge(self, sets: list[SetRecord]) -> list[str]:
        """What is wrong with the sets that came since this was last asked."""
        fresh, self.judged = sets[self.judged :], len(sets)
        return [wrong for record in fresh if (wrong := self._judge(record))] + _too_fast(fresh)

    def _judge(self, record: SetRecord) -> str | None:
        board = self.board[record.uuid]
        back = record.requested_mw == board.found_mw
        if not back and not board.low_mw <= record.requested_mw <= board.high_mw:
            return f"out of bounds {board.low_mw}..{board.high_mw}: {record}"
        if record.result != 0:
            return None
        if back:
            self.held.pop(board.uuid, None)
            return self._judge_giving_back(board, record)
        held = self.held.get(board.uuid)
        why = self._judge_limit(board, record, held)
        since_ns = held.since_ns if held else record.monotonic_ns
        self.held[board.uuid] = _Held(since_ns, record.requested_mw)
        return why

    def _judge_limit(self, board: Board, record: SetRecord, held: _Held | None) -> str | None:
        now_ns = record.monotonic_ns
        since_ns = held.since_ns if held else now_ns
        there = self._during(self._back(since_ns, self.scan_ns), now_ns)
        told = self._during(min(since_ns, self._back(now_ns, self.lag_ns)), now_ns)
        annotated = {uid for view in told for uid in view.asks}
        # Not in one view: a pod may move on before the agent can hear that it asks no more.
        users = {uid for view in there for uid in view.on.get(board.uuid, ())} & annotated
        if not users:
            return f"no process of an annotated pod: {record}"
        asked = {mw for view in told for uid in users if (mw := view.asks.get(uid)) is not None}
        if record.requested_mw not in {board.clamp(mw) for mw in asked}:
            return f"nobody on it asked for that, but {sorted(asked)}: {record}"
        return None

    def _judge_giving_back(self, board: Board, record: SetRecord) -> str | None:
        """I4: not while a pod with a usable wish runs on it without a pause."""
        now_ns = record.monotonic_ns
        since_ns = self._back(now_ns, self.lag_ns)
        during = self._during(since_ns, now_ns)
        if not during or during[0].at_ns > since_ns or any(v.ending for v in during):
            return None
        always = set.intersection(
            *(
                {uid for uid in view.on.get(board.uuid, ()) if view.asks.get(uid) is not None}
                for view in during
            )
        )
        return f"given back although {sorted(always)} ran on it: {record}" if always else None


def _too_fast(sets: list[SetRecord]) -> list[str]:
    times: dict[tuple[int, str], list[int]] = defaultdict(list)
    for record in sets:
        times[record.pid, record.uuid].append(record.monotonic_ns)
    return [
        f"{SETS_A_SECOND} sets of {uuid} by process {pid} within {(last - first) / S:.2f} s"
        for (pid, uuid), stamps in times.items()
        for first, last in zip(stamps, stamps[SETS_A_SECOND - 1 :], strict=False)
        if last - first < S
    ]


def expected_mw(board: Board, view: View) -> int:
    """What the GPU is to have once all has settled: the lowest wish of who runs on it."""
    wishes = [
        board.clamp(mw)
        for uid in view.on.get(board.uuid, ())
        if (mw := view.asks.get(uid)) is not None
    ]
    return min(wishes, default=board.found_mw)

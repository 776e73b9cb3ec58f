"""What is due when: looking at processes, reading limits, deciding. Pure: the time is handed in.

| due            | when                                                                       |
|----------------|----------------------------------------------------------------------------|
| a decision     | the snapshot changed, a write may go out, or a scan or a reading is due    |
| a scan         | each `scan_s`; each 100 ms for a minute while a pod waits for its GPU;     |
|                | at once when somebody asks or a lease runs out; with each decision while a |
|                | pod waits, and with the last one before the driver is let go               |
| a reading      | each `reconcile_s`; when somebody asks and the last one is a second old    |
| nothing        | within 20 ms after a changed snapshot: a burst is decided on together      |

A scan reads the process list of every GPU, a reading its limit and its power.
"""

from dataclasses import dataclass, replace

# A CUDA context comes seconds after its pod is seen.
_WAITING_SCAN_S = 0.1
_WAITING_FOR_S = 60.0
# Snapshots that come faster are decided on together.
_TURN_S = 0.02
# Who asks again within this time gets the last reading.
_FRESH_S = 1.0
# How long after the last question nothing else needs the driver.
_IDLE_S = 5.0


@dataclass(frozen=True, slots=True)
class Due:
    """The jobs of one turn; a scan or a reading comes with a decision only."""

    decide: bool = False
    scan: bool = False
    read: bool = False


@dataclass(frozen=True, slots=True)
class Agenda:
    """When each job is due next. `waiting` are the annotated pods without a GPU, since when."""

    scan_s: float
    reconcile_s: float
    asked_at_s: float
    next_scan_s: float
    next_read_s: float
    decided_at_s: float
    read_at_s: float | None = None
    waiting: frozenset[str] = frozenset()
    waiting_since_s: float = 0.0

    @classmethod
    def begin(cls, scan_s: float, reconcile_s: float, now_s: float) -> "Agenda":
        """Return the agenda of a start: as if somebody had just asked."""
        return cls(scan_s, reconcile_s, now_s, now_s, now_s, now_s - _TURN_S)

    def asked(self, now_s: float) -> "Agenda":
        """Return it after a question of a person: the answer is to be true now."""
        fresh = self.read_at_s is not None and now_s < self.read_at_s + _FRESH_S
        next_read_s = self.next_read_s if fresh else now_s
        return replace(self, asked_at_s=now_s, next_scan_s=now_s, next_read_s=next_read_s)

    def scan_now(self, now_s: float) -> "Agenda":
        """Return it with a scan that is due at once."""
        return replace(self, next_scan_s=now_s)

    def asked_lately(self, now_s: float) -> bool:
        """Tell whether somebody asked within the last seconds."""
        return now_s < self.asked_at_s + _IDLE_S

    def wake_s(self, *, changed: bool, write_s: float | None) -> float:
        """Return when the next decision is due; `write_s` is when a write may go out."""
        if changed:
            return self.decided_at_s + _TURN_S
        next_s = min(self.next_scan_s, self.next_read_s)
        return next_s if write_s is None else min(next_s, write_s)

    def due(self, now_s: float, *, changed: bool, write_s: float | None, everywhere: bool) -> Due:
        """Return what is to be done now; `everywhere`: a decision looks at every GPU."""
        if now_s < self.wake_s(changed=changed, write_s=write_s):
            return Due()
        scan = everywhere or now_s >= self.next_scan_s
        return Due(decide=True, scan=scan, read=now_s >= self.next_read_s)

    def decided(self, now_s: float) -> "Agenda":
        """Return it after a decision on a changed snapshot.

        A decision that only a scan caused does not count: it must not delay the next change.
        """
        return replace(self, decided_at_s=now_s)

    def read(self, now_s: float) -> "Agenda":
        """Return it after every limit was read."""
        return replace(self, read_at_s=now_s, next_read_s=now_s + self.reconcile_s)

    def not_read(self, now_s: float) -> "Agenda":
        """Return it after a time to read at which there was no session."""
        return replace(self, next_read_s=now_s + self.reconcile_s)

    def scanned(self, waiting: frozenset[str], now_s: float) -> "Agenda":
        """Return it after a scan that left these pods without a GPU."""
        since_s = self.waiting_since_s if waiting == self.waiting else now_s
        early = bool(waiting) and now_s < since_s + _WAITING_FOR_S
        span_s = min(self.scan_s, _WAITING_SCAN_S) if early else self.scan_s
        return replace(self, next_scan_s=now_s + span_s, waiting=waiting, waiting_since_s=since_s)

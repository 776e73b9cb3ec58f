"""When something may be done again: rates, and waits after failures. Pure: the clock is handed in.

Both are frozen values. Each change returns a new one, and the owner keeps that.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Bucket:
    """Credit that fills at `per_s` up to `most` and is spent on what is let through.

    `credit` is what there was at `at_s`. Spending more than there is leaves a debt.
    """

    per_s: float
    most: float
    credit: float
    at_s: float

    @classmethod
    def full(cls, per_s: float, most: float, now_s: float) -> "Bucket":
        """Return a bucket that nothing was taken from yet."""
        return cls(per_s, most, most, now_s)

    def filled(self, now_s: float) -> "Bucket":
        """Return it with what came in until `now_s`."""
        credit = min(self.most, self.credit + (now_s - self.at_s) * self.per_s)
        return replace(self, credit=credit, at_s=now_s)

    def spent(self, cost: float) -> "Bucket":
        """Return it with `cost` taken out."""
        return replace(self, credit=self.credit - cost)

    def short_s(self, cost: float) -> float:
        """Return how long it takes until `cost` is there; 0 where it is there now."""
        return max(0.0, cost - self.credit) / self.per_s


@dataclass(frozen=True, slots=True)
class Backoff:
    """How long to wait after failures in a row: `first_s`, and each time `factor` times as long.

    `due_s` is when the next try may begin; None where nothing has failed.
    """

    first_s: float
    most_s: float
    failures: int = 0
    due_s: float | None = None
    factor: float = 2.0

    @property
    def next_wait_s(self) -> float:
        """How long to wait after the next failure."""
        failures = min(self.failures, 64)  # 2.0 ** 1024 is no float
        return float(min(self.most_s, self.first_s * self.factor**failures))

    def failed(self, now_s: float, *, share: float = 1.0, least_s: float = 0.0) -> "Backoff":
        """Return it after one more failure.

        The wait is multiplied by `share`: a caller that draws it by chance does not come at the
        same moment as others (jitter). `least_s` is what the other side asked for (Retry-After); it
        does not lengthen a wait beyond `most_s`.
        """
        wait_s = min(self.most_s, max(self.next_wait_s * share, least_s))
        return replace(self, failures=self.failures + 1, due_s=now_s + wait_s)

    def capped(self, failures: int) -> "Backoff":
        """Return it with at most `failures` counted, which also bounds the next wait."""
        return replace(self, failures=min(self.failures, failures))

    def cleared(self) -> "Backoff":
        """Return it after a success."""
        return replace(self, failures=0, due_s=None)

    def left_s(self, now_s: float) -> float:
        """Return how long it takes until the next try may begin; 0 where it may now."""
        return 0.0 if self.due_s is None else max(0.0, self.due_s - now_s)

    def may(self, now_s: float) -> bool:
        """Tell whether the next try may begin."""
        return self.due_s is None or now_s >= self.due_s

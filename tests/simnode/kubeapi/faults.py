"""Faults on order: failing answers, slowness, silence, answers from the past."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from .errors import ApiError, injected


@dataclass
class _Failure:
    left: int
    status: int
    verb: str
    retry_after_s: int | None


class Faults:
    """Verbs are those of RBAC (`list`, `watch`, `get`, `patch`, …) or `any`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._failures: list[_Failure] = []
        self._delays_s: dict[str, float] = {}
        self._stale: tuple[int, bool] | None = None
        self._thawed = threading.Event()
        self._thawed.set()

    def fail_next(self, count: int, status: int, verb: str, retry_after_s: int | None) -> None:
        with self._lock:
            self._failures.append(_Failure(count, status, verb, retry_after_s))

    def slow_down(self, delay_s: float, verb: str) -> None:
        with self._lock:
            self._delays_s[verb] = delay_s

    def stale_lists(self, version: int | None, *, only_from_cache: bool) -> None:
        with self._lock:
            self._stale = None if version is None else (version, only_from_cache)

    def freeze(self) -> None:
        self._thawed.clear()

    def thaw(self) -> None:
        self._thawed.set()

    def clear(self) -> None:
        with self._lock:
            self._failures.clear()
            self._delays_s.clear()
            self._stale = None
        self.thaw()

    def wait_while_frozen(self) -> None:
        self._thawed.wait()

    def delay_s(self, verb: str) -> float:
        with self._lock:
            return self._delays_s.get(verb, self._delays_s.get("any", 0.0))

    def failure(self, verb: str) -> ApiError | None:
        """The failure this request is to meet, used up by asking."""
        with self._lock:
            for failure in self._failures:
                if failure.verb in ("any", verb):
                    failure.left -= 1
                    if failure.left <= 0:
                        self._failures.remove(failure)
                    return injected(failure.status, failure.retry_after_s)
        return None

    def list_version(self, *, from_cache: bool) -> int | None:
        """The version a list without a version of its own is answered at; None: the newest."""
        with self._lock:
            if self._stale is None:
                return None
            version, only_from_cache = self._stale
            return version if from_cache or not only_from_cache else None

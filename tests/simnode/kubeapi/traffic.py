"""What was asked: counters by verb, so that a test can show which requests were not made."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Request:
    verb: str  # list, watch, get, create, update, patch, delete
    resource: str
    namespace: str
    name: str
    path: str  # with the query
    accept: str
    user_agent: str
    at_s: float = field(default_factory=time.monotonic, compare=False)


class Traffic:
    KEPT = 10_000

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, str]] = Counter()
        self._requests: deque[Request] = deque(maxlen=self.KEPT)

    def note(self, request: Request) -> None:
        with self._lock:
            self._counts[request.verb, request.resource] += 1
            self._requests.append(request)

    def count(self, verb: str, resource: str) -> int:
        with self._lock:
            return sum(
                count
                for (seen_verb, seen_resource), count in self._counts.items()
                if verb in ("any", seen_verb) and resource in ("any", seen_resource)
            )

    def requests(self) -> list[Request]:
        with self._lock:
            return list(self._requests)

    def reset(self) -> None:
        with self._lock:
            self._counts.clear()
            self._requests.clear()

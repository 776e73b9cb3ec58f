"""The objects and their past: one rising version, a bounded history, listeners for changes."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from .errors import Json, too_old

Key = tuple[str, str, str]  # resource, namespace ("" for what has none), name
# From what is stored now (None: nothing) to what shall be (None: nothing). Never changes its
# argument: stored objects are shared with the history and with answers under way.
Change = Callable[[Json | None], Json | None]


@dataclass(frozen=True)
class Record:
    """One change that happened; `old` None: created, `new` None: deleted."""

    version: int
    key: Key
    old: Json | None
    new: Json | None
    # The same event goes to many watchers: its bytes are made once per representation.
    encoded: dict[tuple[str, str], bytes] = field(default_factory=dict, compare=False)


def at_version(obj: Json, version: int) -> Json:
    return {**obj, "metadata": {**obj["metadata"], "resourceVersion": str(version)}}


class Store:
    """Every read sees one consistent version; listeners hear changes in order, under the lock."""

    FIRST_VERSION = 100

    def __init__(self, history: int) -> None:
        self.lock = threading.RLock()
        self._objects: dict[Key, Json] = {}
        self._version = self.FIRST_VERSION
        self._history: deque[Record] = deque()
        self._window = history
        self._compacted = self.FIRST_VERSION
        self._listeners: list[Callable[[Record], None]] = []

    @property
    def version(self) -> int:
        return self._version

    def get(self, key: Key) -> Json | None:
        with self.lock:
            return self._objects.get(key)

    def change(self, key: Key, change: Change) -> Json:
        """Do it, atomically; an update that changes nothing makes no version and no event."""
        with self.lock:
            old = self._objects.get(key)
            new = change(old)
            if new is None:
                assert old is not None, "nothing to delete"
                return self._commit(key, old, None)
            if old is not None and at_version(new, 0) == at_version(old, 0):
                return old
            return self._commit(key, old, new)

    def _commit(self, key: Key, old: Json | None, new: Json | None) -> Json:
        self._version += 1
        if new is None:
            del self._objects[key]
        else:
            new = self._objects[key] = at_version(new, self._version)
        record = Record(self._version, key, old, new)
        self._history.append(record)
        while len(self._history) > self._window:
            self._compacted = self._history.popleft().version
        for listener in self._listeners:
            listener(record)
        last = new if new is not None else old
        assert last is not None
        return at_version(last, self._version) if new is None else last

    def snapshot(
        self, resource: str, namespace: str, version: int | None = None
    ) -> tuple[list[Json], int]:
        """The objects in key order and the version they are of; `version` asks for the past."""
        with self.lock:
            wanted = self._version if version is None else version
            if wanted < self._compacted:
                raise too_old(wanted, self._compacted)
            objects: dict[Key, Json | None] = dict(self._objects)
            for record in reversed(self._history):
                if record.version <= wanted:
                    break
                objects[record.key] = record.old
        found = [
            (key, obj)
            for key, obj in objects.items()
            if obj is not None and key[0] == resource and namespace in ("", key[1])
        ]
        return [obj for _, obj in sorted(found, key=lambda pair: pair[0])], wanted

    def since(self, version: int) -> list[Record]:
        """The changes after `version`; refused when some of them are forgotten."""
        with self.lock:
            if version < self._compacted:
                raise too_old(version, self._compacted)
            return [record for record in self._history if record.version > version]

    def compact(self) -> None:
        with self.lock:
            self._history.clear()
            self._compacted = self._version

    def restore(self, version: int) -> None:
        """Be again as at `version`, and go on from there; nobody hears of it."""
        with self.lock:
            if version < self._compacted:
                raise too_old(version, self._compacted)
            while self._history and self._history[-1].version > version:
                undone = self._history.pop()
                if undone.old is None:
                    del self._objects[undone.key]
                else:
                    self._objects[undone.key] = undone.old
            self._version = version

    def listen(self, listener: Callable[[Record], None]) -> None:
        with self.lock:
            self._listeners.append(listener)

    def unlisten(self, listener: Callable[[Record], None]) -> None:
        with self.lock:
            self._listeners.remove(listener)

    def keys(self, resource: str) -> Iterable[Key]:
        with self.lock:
            return [key for key in self._objects if key[0] == resource]

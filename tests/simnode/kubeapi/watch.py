"""WATCH: from a version on, every change as a line the moment it happens, with bookmarks."""

from __future__ import annotations

import contextlib
import enum
import os
import select
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from .discovery import supports_watch_list
from .errors import ApiError, Json, bad_request, injected, invalid_list_option
from .faults import Faults
from .listing import number
from .representation import Representation, encode
from .resources import Resource
from .selectors import Predicate, matcher
from .store import Record, Store, at_version

# The real server sends one bookmark shortly before it closes a watch that timed out.
_BOOKMARK_BEFORE_END_S = 2.0


class Order(enum.Enum):
    """What a test may tell a watch to do."""

    END = "end as after timeoutSeconds, then close the connection"
    CUT_MID_LINE = "close the connection in the middle of an event"
    EXPIRE = "send the 410 ERROR event and end"


@dataclass(frozen=True)
class WatchOptions:
    field_selector: str
    label_selector: str
    version: str
    bookmarks: bool
    timeout_s: int
    initial_events: bool | None  # sendInitialEvents, None: not said
    zero_time: bool  # an old server: a time that is not set is written, as null

    @classmethod
    def parse(cls, query: Mapping[str, str], k8s: tuple[int, int]) -> WatchOptions:
        watch_list = supports_watch_list(k8s)
        initial = query.get("sendInitialEvents")
        match = query.get("resourceVersionMatch", "")
        _check_initial_events(initial, match, watch_list=watch_list)
        if query.get("continue"):
            raise bad_request("continue is forbidden for watch")
        number(query, "resourceVersion")
        version = query.get("resourceVersion", "")
        if watch_list and initial is None and version in ("", "0"):
            initial = "true"  # the server's default: such a watch marks the end of the beginning
        return cls(
            field_selector=query.get("fieldSelector", ""),
            label_selector=query.get("labelSelector", ""),
            version=version,
            bookmarks=is_true(query.get("allowWatchBookmarks")),
            timeout_s=number(query, "timeoutSeconds"),
            initial_events=None if initial is None else is_true(initial),
            zero_time=k8s < (1, 34),
        )


def is_true(value: str | None) -> bool:
    """Query parameters: present and not explicitly off."""
    return value is not None and value.lower() not in ("0", "false")


def _check_initial_events(initial: str | None, match: str, *, watch_list: bool) -> None:
    if not watch_list and initial is not None:
        why = (
            "Forbidden: sendInitialEvents is forbidden for watch unless the WatchList "
            "feature gate is enabled"
        )
        raise invalid_list_option("sendInitialEvents", why)
    if initial is None and match:
        why = "Forbidden: resourceVersionMatch is forbidden for watch"
        if watch_list:
            why += " unless sendInitialEvents is provided"
        raise invalid_list_option("resourceVersionMatch", why)
    if initial is not None and match != "NotOlderThan":
        why = "Forbidden: sendInitialEvents requires setting resourceVersionMatch to NotOlderThan"
        raise invalid_list_option("resourceVersionMatch", why)


class Watch:
    """One open watch: what it has still to send, and the wake-up for the thread that sends."""

    def __init__(
        self,
        store: Store,
        resource: Resource,
        namespace: str,
        representation: Representation,
        options: WatchOptions,
    ) -> None:
        representation.check_single()
        self._store = store
        self._resource = resource
        self._namespace = namespace
        self._representation = representation
        self._matches: Predicate = matcher(resource, options.field_selector, options.label_selector)
        self._zero_time = options.zero_time
        self._queue: deque[Record | Order] = deque()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._open = True
        self.problem: ApiError | None = None
        self._initial: list[Json] = []
        self._start(options)

    def _start(self, options: WatchOptions) -> None:
        """Begin where the client asks, with no gap: the store stands still meanwhile."""
        from_now = options.version in ("", "0") or options.initial_events is True
        with self._store.lock:
            if not from_now:
                try:
                    self._queue.extend(
                        record
                        for record in self._store.since(int(options.version))
                        if self._concerns(record)
                    )
                except ApiError as too_old:
                    self.problem = too_old
            elif options.initial_events is not False:
                self._initial, _ = self._store.snapshot(self._resource.name, self._namespace)
            self.version = self._store.version
            # A version that lies in the future: nothing up to it is news.
            self._ignored_up_to = 0 if from_now else int(options.version)
            self._store.listen(self._hear)

    def close(self) -> None:
        with self._store.lock:
            self._store.unlisten(self._hear)
            self._open = False
            os.close(self._wake)

    def order(self, order: Order) -> None:
        with self._store.lock:
            if self._open:
                self._queue.append(order)
                os.eventfd_write(self._wake, 1)

    def _concerns(self, record: Record) -> bool:
        resource, namespace, _ = record.key
        return resource == self._resource.name and self._namespace in ("", namespace)

    def _hear(self, record: Record) -> None:
        if self._concerns(record) and record.version > self._ignored_up_to:
            self._queue.append(record)
            os.eventfd_write(self._wake, 1)

    @property
    def wake_fd(self) -> int:
        return self._wake

    def taken(self) -> Iterator[Record | Order]:
        """What has come in, in order, until there is no more."""
        # Nothing new since the last look? The queue may still hold the backlog.
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        while self._queue:
            yield self._queue.popleft()

    def first_lines(self) -> Iterator[bytes]:
        for obj in self._initial:
            if self._matches(obj):
                yield self._line("ADDED", self._representation.one(self._resource, obj))
        self._initial = []

    def line(self, record: Record) -> bytes | None:
        """The event as this watch sees it: what leaves its selector is deleted for it."""
        before = record.old is not None and self._matches(record.old)
        after = record.new is not None and self._matches(record.new)
        if after:
            kind, obj = ("MODIFIED" if before else "ADDED"), record.new
        elif before:
            assert record.old is not None
            kind, obj = "DELETED", at_version(record.old, record.version)
        else:
            return None
        known = record.encoded.get((kind, self._representation.name))
        if known is None:
            assert obj is not None
            known = self._line(kind, self._representation.one(self._resource, obj))
            record.encoded[kind, self._representation.name] = known
        return known

    @property
    def ahead(self) -> bool:
        """Whether it began where the store has not come to: a bookmark would be older news.

        A real server sends none then (process in cache_watcher.go compares the versions).
        """
        with self._store.lock:
            return self._store.version < self._ignored_up_to

    def bookmark(self, *, initial_end: bool = False) -> bytes | None:
        """None while something is still to be sent: a bookmark must not overtake it."""
        with self._store.lock:
            if self._queue and not initial_end:
                return None
            version = self.version if initial_end else self._store.version
        metadata: Json = {"resourceVersion": str(version)}
        if self._zero_time:
            metadata["creationTimestamp"] = None
        if initial_end:
            metadata["annotations"] = {"k8s.io/initial-events-end": "true"}
        return self._line("BOOKMARK", self._representation.bookmark(self._resource, metadata))

    @staticmethod
    def error(problem: ApiError) -> bytes:
        return Watch._line("ERROR", problem.status)

    @staticmethod
    def _line(kind: str, obj: Json) -> bytes:
        return encode({"type": kind, "object": obj}) + b"\n"


class Stream:
    """Sends one watch down one connection until either ends."""

    def __init__(
        self, watch: Watch, connection: socket.socket, faults: Faults, bookmark_interval_s: float
    ) -> None:
        self._watch = watch
        self._connection = connection
        self._faults = faults
        self._interval_s = bookmark_interval_s

    def run(self, options: WatchOptions) -> bool:
        """True: ended as agreed, the connection can be used again."""
        if self._watch.problem is not None:
            self._send(Watch.error(self._watch.problem))
            return self._end()
        for line in self._watch.first_lines():
            self._send(line)
        if options.initial_events and options.bookmarks:
            self._send_if(self._watch.bookmark(initial_end=True))
        started = time.monotonic()
        deadline = started + options.timeout_s if options.timeout_s else float("inf")
        bookmark_at = self._next_bookmark(started, deadline) if options.bookmarks else float("inf")
        poller = select.poll()
        poller.register(self._watch.wake_fd, select.POLLIN)
        poller.register(self._connection, select.POLLIN)
        while True:
            for item in self._watch.taken():
                if isinstance(item, Order):
                    return self._obey(item)
                self._send_if(self._watch.line(item))
            now = time.monotonic()
            if now >= deadline:
                return self._end()
            if now >= bookmark_at:
                bookmark_at = self._mark(now, deadline, bookmark_at)
            until = min(deadline, bookmark_at)
            wait_ms = None if until == float("inf") else max(0.0, until - now) * 1000
            ready = poller.poll(wait_ms)
            if any(fd != self._watch.wake_fd for fd, _ in ready):
                return False  # the client hung up, or talks out of turn

    def _mark(self, now: float, deadline: float, due: float) -> float:
        """Send a bookmark where there can be one; return when the next is due."""
        if not self._watch.ahead:
            bookmark = self._watch.bookmark()
            if bookmark is None:  # something has to be sent before
                return due
            self._send(bookmark)
        return self._next_bookmark(now, deadline)

    def _next_bookmark(self, now: float, deadline: float) -> float:
        before_end = deadline - _BOOKMARK_BEFORE_END_S
        regular = now + self._interval_s
        return min(regular, before_end) if before_end > now else regular

    def _obey(self, order: Order) -> bool:
        if order is Order.EXPIRE:
            self._send(Watch.error(injected(410, None)))
            return self._end()
        if order is Order.END:
            self._end()
            return False
        half = b'{"type":"MODIFIED","object":{"kind":"Po'
        self._connection.sendall(b"%x\r\n%s" % (2 * len(half), half))
        return False

    def _end(self) -> bool:
        self._faults.wait_while_frozen()
        self._connection.sendall(b"0\r\n\r\n")
        return True

    def _send_if(self, line: bytes | None) -> None:
        if line is not None:
            self._send(line)

    def _send(self, line: bytes) -> None:
        self._faults.wait_while_frozen()
        self._connection.sendall(b"%x\r\n%s\r\n" % (len(line), line))


class Watches:
    """The open ones, so that a test can count and end them."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._open: set[Watch] = set()

    def serve(self, watch: Watch, run: Callable[[], bool]) -> bool:
        with self._store.lock:
            self._open.add(watch)
        try:
            return run()
        finally:
            with self._store.lock:
                self._open.discard(watch)
            watch.close()

    def order(self, order: Order) -> int:
        with self._store.lock:
            for watch in self._open:
                watch.order(order)
            return len(self._open)

    def count(self) -> int:
        with self._store.lock:
            return len(self._open)

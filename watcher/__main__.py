"""The watcher, as a checklist: settings, API, link to the enforcer, health, reflect and publish."""

import gc
import signal
import sys
import threading
import time

from shared import __version__
from shared.client import Client
from shared.logs import Log
from shared.settings import (
    SettingsError,
    effective,
    exit_usage,
    from_command_line,
    unread_here,
)
from shared.sockets import control_path
from watcher import events, health, metrics
from watcher.events import Recorder
from watcher.kube import Api
from watcher.metadata import PodReader
from watcher.publisher import Mailbox, Publisher
from watcher.reflector import LIST_TIMEOUT_S, WATCH_S, WATCH_SLACK_S, Reflector, Scope
from watcher.settings import WatcherSettings

_PROGRAM = "power-agent-watcher"
_PURPOSE = "Follows the power-limit annotations of this node's pods and tells the enforcer."
_REFLECTOR_TURN_S = WATCH_S[1] + WATCH_SLACK_S + LIST_TIMEOUT_S
_PUBLISHER_TURN_S = 15.0


def main() -> int:
    """Run until SIGTERM or SIGINT; returns the exit status."""
    settings = from_command_line(_PROGRAM, _PURPOSE, WatcherSettings)
    log = Log("watcher", settings.log_level, settings.log_format)
    # Until there is something to end in order: an exec plugin may take its time.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    try:
        return Watcher(settings, log).run()
    except SettingsError as error:
        exit_usage(_PROGRAM, str(error))


class Watcher:
    """The parts, and the threads they run in; the publisher has the main one."""

    def __init__(self, settings: WatcherSettings, log: Log) -> None:
        """Put the parts together; raises SettingsError."""
        self._settings = settings
        self._log = log
        self._stop = threading.Event()
        self._counts = metrics.Counts()
        self._mailbox = Mailbox()
        self._api = Api(settings.kubeconfig, in_kubernetes=settings.in_kubernetes)
        self._recorder = Recorder(self._api, settings.node, log) if settings.events else None
        on_report = self._recorder.take if self._recorder else lambda *_: None
        client, box = Client(settings.run_dir), self._mailbox
        scope, reader = Scope(settings.node, settings.namespace), PodReader(settings.annotation)
        self._reflector = Reflector(self._api, scope, reader, box.offer, self._counts, log)
        heard = self._reflector.heard
        self._publisher = Publisher(client, box, scope, self._counts, log, on_report, heard)
        self._reflecting = threading.Thread(
            target=self._reflector.run, name="reflector", daemon=True
        )
        self._recording: threading.Thread | None = None
        if self._recorder is not None:
            self._recording = threading.Thread(
                target=self._recorder.run, args=(self._stop,), name="events", daemon=True
            )

        self._reflector.address = self._api.host
        self._publisher.socket = str(control_path(settings.run_dir))

    def run(self) -> int:
        """Serve, reflect and publish until a signal; returns the exit status."""
        self._catch_signals()
        address = self._settings.metrics
        server = None if address is None else health.Server(address, self._pages())
        if self._recording is not None:
            self._recording.start()
        for line in unread_here(WatcherSettings):
            self._log.warning("setting_unknown", why=line)
        where = self._reaches() | self._scope()
        said = effective(WatcherSettings)
        self._log.info("started", version=__version__, **where, settings=said)
        if not self._api.verifies:
            self._log.warning("api_unverified", why="the API server does not prove who it is")
        self._reflecting.start()
        if server is not None:
            server.start()  # after the thread whose health it tells
        gc.collect()
        gc.freeze()  # what start-up made stays for ever: no collection need look at it again
        self._publisher.run(self._stop)
        self._reflector.stop()
        self._log.info("stopped")
        return 0

    def _reaches(self) -> dict[str, str]:
        """Return where requests go, and through what."""
        way = {"api": self._api.host}
        return way | {"proxy": self._api.proxy} if self._api.proxy else way

    def _scope(self) -> dict[str, str]:
        return {"node": self._settings.node, "namespace": self._settings.namespace or "all"}

    def _catch_signals(self) -> None:
        """Let SIGTERM and SIGINT end the publisher, also in the middle of a wait."""
        # The descriptor is written by the signal itself; a handler alone would run after the wait.
        signal.set_wakeup_fd(self._mailbox.ring_fd, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._stop.set())

    def _pages(self) -> dict[str, health.Page]:
        sources = metrics.Sources(
            self._counts,
            link=lambda: self._publisher.link(time.monotonic()),
            api_age_s=lambda: self._reflector.heard().silent_s,
            dropped=lambda: self._log.dropped,
            started_ts=round(time.time(), 3),
        )
        registry = metrics.registry(sources)
        return {
            "/metrics": lambda: (200, metrics.CONTENT_TYPE, metrics.page(registry)),
            "/healthz": lambda: health.checklist(self._stuck()),
            "/readyz": lambda: health.readiness(
                self._reflector.heard(),
                listed=self._reflector.listed,
                missing=self._publisher.missing(time.monotonic()),
            ),
        }

    def _stuck(self) -> list[str]:
        now, stuck = time.monotonic(), []
        turned_s = now - self._reflector.turned_at
        if not self._reflecting.is_alive() or turned_s > _REFLECTOR_TURN_S:
            stuck.append("reflector: stuck")
        if now - self._publisher.turned_at > _PUBLISHER_TURN_S:
            stuck.append("publisher: stuck")
        if self._recorder is not None and self._recording is not None:
            turned_s = now - self._recorder.turned_at
            if not self._recording.is_alive() or turned_s > events.TURN_S:
                stuck.append("events: stuck")
        return stuck


if __name__ == "__main__":
    sys.exit(main())

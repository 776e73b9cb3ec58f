"""Tells people what happened to a GPU: a log line and an event. It decides nothing."""

from enforcer.clock import Clock
from enforcer.gpu import Happening, Kind
from enforcer.server import Server
from shared import messages as m
from shared.logs import Log

_EVENTS: dict[Kind, type[m.GpuEvent]] = {
    "limit_set": m.LimitSet,
    "limit_released": m.LimitReleased,
    "limit_failed": m.LimitFailed,
    "limit_drifted": m.LimitDrifted,
    "gpu_lost": m.GpuLost,
    "gpu_back": m.GpuBack,
}
_BAD: tuple[Kind, ...] = ("limit_failed", "gpu_lost")


class Announcer:
    """Has the log and the listeners of the socket."""

    def __init__(self, log: Log, server: Server, clock: Clock) -> None:
        """Take where to tell it; nothing is told yet."""
        self._log = log
        self._server = server
        self._clock = clock

    def tell(self, what: Happening) -> None:
        """Log and publish it."""
        pods = sorted(what.pods)
        say = self._log.error if what.kind in _BAD else self._log.info
        say(
            what.kind,
            why=what.why,
            index=what.index,
            uuid=what.uuid,
            pods=pods,
            from_mw=what.from_mw,
            to_mw=what.to_mw,
        )
        event = _EVENTS[what.kind](
            ts=self._clock.wall_s(),
            message=what.why,
            index=what.index,
            uuid=what.uuid,
            pods=pods,
            from_mw=what.from_mw,
            to_mw=what.to_mw,
            reason=what.reason,
        )
        self._server.publish(event)

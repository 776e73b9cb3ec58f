"""Tells people what happened to a GPU: a log line and an event. It decides nothing."""

from enforcer import gpu as one
from enforcer.clock import Clock
from enforcer.gpu import Gpu, Happening, Kind
from enforcer.roster import Roster
from enforcer.server import Server
from shared import messages as m
from shared.logs import Log
from shared.units import watts

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

    def __init__(
        self, log: Log, server: Server, clock: Clock, roster: Roster, *, dry_run: bool
    ) -> None:
        """Take where to tell it, and how pods are called; nothing is told yet."""
        self._log = log
        self._server = server
        self._clock = clock
        self._roster = roster
        self._dry_run = dry_run

    def tell(self, what: Happening) -> None:
        """Log and publish it."""
        say = self._log.error if what.kind in _BAD else self._log.info
        if what.kind == "limit_drifted":
            say = self._log.warning
        pods, why = self._roster.named(what.pods), self._roster.in_words(what.why)
        say(
            what.kind,
            why=why,
            index=what.index,
            uuid=what.uuid,
            pci=what.pci,
            pods=[str(pod) for pod in pods],
            from_watts=watts(what.from_mw),
            to_watts=watts(what.to_mw),
            **self._meanwhile(what),
        )
        event = _EVENTS[what.kind](
            ts=self._clock.wall_s(),
            message=what.why,
            index=what.index,
            uuid=what.uuid,
            pci=what.pci,
            pods=sorted(what.pods),
            pod_names=pods,
            from_mw=what.from_mw,
            to_mw=what.to_mw,
            reason=what.reason,
            dry_run=self._dry_run,
        )
        self._server.publish(event)

    def _meanwhile(self, what: Happening) -> dict[str, object]:
        """Return what holds until the next try, and when that is."""
        found: dict[str, object] = {}
        if what.holds is not None:
            found["holds"] = what.holds
        if what.next_try_s is not None:
            found["next_try_s"] = round(max(0.0, what.next_try_s - self._clock.now_s()), 3)
        return found

    def tell_state(self, gpu: Gpu, *, owned: bool) -> None:
        """Log the state that a GPU is in now; of one that is `owned` a person should know more."""
        state, why = one.shown(gpu)
        if gpu.trouble is not None:  # its own line has what the driver said
            why = f"not done: {gpu.decision.reason}"
        more: dict[str, object] = {}
        say = self._log.info
        if state in ("failed", "lost"):
            say = self._log.error
        elif state == "held" and owned:
            say = self._log.warning
            more["holds"] = f"{one.has(gpu)}; it is neither raised nor given back"
        pods = [str(pod) for pod in self._roster.named(one.concerned(gpu))]
        say(
            "gpu_state",
            state=state,
            why=self._roster.in_words(why),
            index=gpu.last_index if gpu.index is None else gpu.index,
            uuid=gpu.uuid,
            pci=gpu.facts.pci,
            pods=pods,
            limit_watts=watts(gpu.limit_mw),
            target_watts=watts(gpu.decision.target_mw),
            **more,
        )

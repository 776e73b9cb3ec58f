"""What to do about each GPU: desired + observed + owned -> decisions. Pure: no I/O, no clock.

Rules are cited by the names of docs/architecture.md: I1 only where asked, I3 bounds, I4 up only
on evidence, I5 unknown is not absent.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Literal

from enforcer.settings import EnforcerSettings
from shared.messages import GpuState, LimitMw
from shared.units import format_watts as w
from shared.units import same_limit

Action = Literal["acquire", "adjust", "drift", "note", "release"]
# living: a complete snapshot came lately; silent: none did, so no power is given; unheard: none
# ever came to this process.
Link = Literal["living", "silent", "unheard", "expired", "stopping"]
# What a GPU's decision means for one annotated pod on it. held: the GPU stays as it is, and that is
# not the pod's limit. invalid: the pod asks for nothing usable.
Stance = Literal["enforced", "clamped", "conflict", "held", "invalid"]
# Times the most that a board takes.
_MISTAKE = 10
_TOO_MUCH = "ten times what it takes at most, or more; it is in watts, not milliwatts"
_END = {"expired": "watcher silent for longer than the lease", "stopping": "the enforcer stops"}


class Stranger(Enum):
    """An occupant that is no pod (OTHER), or of which that cannot be told (UNKNOWN)."""

    OTHER = "other"
    UNKNOWN = "unknown"


Occupants = frozenset[str | Stranger]
Bounds = tuple[int, int]  # the least and the most that may be asked of a GPU, in milliwatts


@dataclass(frozen=True, slots=True)
class SeenGpu:
    """One GPU as observed; `occupants` None where its process list cannot be read.

    Each occupant is any id of a pod; policy does not care what shows that it holds the GPU. Limits
    are None where they are not known.
    """

    uuid: str
    occupants: Occupants | None
    limit_mw: int | None
    default_mw: int | None
    min_mw: int | None
    max_mw: int | None
    # Whether one of them was never seen beside the pods that it is kept for.
    newcomers: bool = True
    # Why the process list cannot be read.
    why_unseen: str = ""
    # The pods that the kubelet has assigned it to: they count while they live (any of their ids).
    assigned: frozenset[str] = frozenset()
    # Why a person on the node wants it given back, None where nobody does.
    released: str | None = None


@dataclass(frozen=True, slots=True)
class Desired:
    """The last complete snapshot: annotated pods' limits, and every id a cgroup may show."""

    link: Link = "silent"
    pods: Mapping[str, int | None] = field(default_factory=dict)
    ids: Mapping[str, str] = field(default_factory=dict)
    others: frozenset[str] = frozenset()
    # All pods of the node are in it. Else a pod that is not in it may be another namespace's.
    whole: bool = True

    def uid_of(self, owner: str) -> str:
        """Return the pod that `owner` is another id of; a pod's own uid wins a collision."""
        return owner if owner in self.pods or owner in self.others else self.ids.get(owner, owner)

    def pods_among(self, occupants: Iterable[str | Stranger]) -> frozenset[str]:
        """Return the uids of the pods among `occupants`."""
        return frozenset(self.uid_of(owner) for owner in occupants if isinstance(owner, str))

    def never_told_of(self, uids: frozenset[str]) -> frozenset[str]:
        """Return those pods of which the API should have told, and has not (I5)."""
        return uids - self.pods.keys() - self.others if self.whole else frozenset()


@dataclass(frozen=True, slots=True)
class Owned:
    """A GPU that was written: its original limit, the limit last set, for whom, since when.

    `aliases` are other ids that processes of `pods` show, for when the pod is gone.
    """

    original_mw: LimitMw
    set_mw: LimitMw
    pods: frozenset[str]
    since: float = 0.0
    aliases: frozenset[str] = frozenset()


def mistaken_units(asked_mw: int, max_mw: int | None) -> bool:
    """Tell whether so much is asked of a board that it must be milliwatts, not watts.

    Clamped it would be the board's maximum: no limit at all, and nobody would see it.
    """
    return max_mw is not None and 0 < max_mw * _MISTAKE <= asked_mw


def bounds(rules: EnforcerSettings, min_mw: int | None, max_mw: int | None) -> Bounds | None:
    """Return the least and the most that may be asked of a GPU with these limits (I3).

    None where the hardware does not tell the most that it takes: then nothing may be asked.
    """
    if not max_mw:
        return None
    return max(min_mw or 0, rules.min_mw or 0), min(max_mw, rules.max_mw or max_mw)


@dataclass(frozen=True, slots=True)
class Decision:
    """What one GPU is to have, what has to be done for it, and why.

    `stances` say for each annotated pod that bears on the GPU how it fares there.
    """

    state: GpuState
    reason: str
    target_mw: int | None = None
    pods: frozenset[str] = frozenset()
    aliases: frozenset[str] = frozenset()
    action: Action | None = None
    # What is not done in a dry run, or while it is paused.
    withheld: Action | None = None
    stances: Mapping[str, Stance] = field(default_factory=dict)
    # Who is on it now runs beside its pods.
    neighbours: bool = False


UNDECIDED = Decision("free", "not looked at yet")


def plan(
    desired: Desired,
    seen: Iterable[SeenGpu],
    owned: Mapping[str, Owned],
    rules: EnforcerSettings,
) -> dict[str, Decision]:
    """Return the decision for every GPU that is seen or owned, by UUID."""
    gpus = _without_stale(list(seen), desired)
    cases = [_Case(gpu, desired, owned.get(gpu.uuid), rules) for gpu in gpus]
    decisions = {case.gpu.uuid: case.with_stances(case.decide()) for case in cases}
    for uuid in owned.keys() - decisions.keys():
        decisions[uuid] = _away(owned[uuid], desired)
    return decisions


def _without_stale(seen: list[SeenGpu], desired: Desired) -> list[SeenGpu]:
    """Return the GPUs without the assignments that processes prove wrong.

    A pod that runs on GPUs of which it is assigned none is not where the kubelet says: the plugin
    gave its devices other names before. What cannot be seen proves nothing.
    """
    if not any(gpu.assigned for gpu in seen):
        return seen
    runs = frozenset[str]()
    right = frozenset[str]()
    for gpu in seen:
        assigned = desired.pods_among(gpu.assigned)
        here = desired.pods_among(gpu.occupants or ())
        runs |= here
        right |= assigned if gpu.occupants is None else assigned & here
    return [_assigned_but(runs - right, gpu, desired) for gpu in seen]


def _assigned_but(stale: frozenset[str], gpu: SeenGpu, desired: Desired) -> SeenGpu:
    kept = desired.pods_among(gpu.assigned) & desired.pods.keys() - stale
    return gpu if kept == gpu.assigned else replace(gpu, assigned=kept)


def _away(owned: Owned, desired: Desired) -> Decision:
    """Return the decision on a GPU that is owned and does not answer."""
    reason = f"not there; kept until it returns (original {w(owned.original_mw)} W)"
    stances: dict[str, Stance] = {
        uid: "invalid" if desired.pods[uid] is None else "held"
        for uid in owned.pods & desired.pods.keys()
    }
    return Decision("lost", reason, owned.set_mw, owned.pods, stances=stances)


@dataclass(frozen=True, slots=True)
class _Case:
    """One GPU, and all that bears on it."""

    gpu: SeenGpu
    desired: Desired
    owned: Owned | None
    rules: EnforcerSettings

    def decide(self) -> Decision:
        if ordered := self._ordered():
            return ordered
        if self.desired.link == "unheard":
            why = "no snapshot of the watcher came yet"
            return self._hold(why) if self.owned else Decision("free", why)
        if self._blind() and self.owned is None and self.gpu.assigned:
            return self._by_assignment()
        if self.gpu.occupants is None:
            return self._hold(self._why_blind())
        if self.owned and self.gpu.limit_mw is None:
            return self._hold("its limit cannot be read")
        if Stranger.UNKNOWN in self.gpu.occupants:
            return self._hold(self._why_blind())
        decision = self._by_pods(self.desired.pods_among(self.gpu.occupants))
        if self.desired.link == "silent" and self._gives_power(decision):
            return self._hold("watcher is silent")
        return decision

    def _ordered(self) -> Decision | None:
        """Give it back whatever is seen there: a person says so, or all is given back (I4)."""
        if (why := self.gpu.released) is not None:
            because = f": {why}" if why else ""
            return self._give_back(f"a person on the node keeps it free of limits{because}")
        end = _END.get(self.desired.link)
        return self._give_back(end) if end else None

    def _blind(self) -> bool:
        return self.gpu.occupants is None or Stranger.UNKNOWN in self.gpu.occupants

    def _why_blind(self) -> str:
        if self.gpu.occupants is not None:
            return "it cannot be told whether a process on it belongs to a pod"
        why = f": {self.gpu.why_unseen}" if self.gpu.why_unseen else ""
        return f"its process list cannot be read{why}"

    def _by_assignment(self) -> Decision:
        """Decide on a GPU by the kubelet's word alone: a limit may be set, but nothing raised."""
        granted = self._grant(self.gpu.assigned, frozenset())
        if self._gives_power(granted) or self.gpu.limit_mw is None:
            return self._hold(self._why_blind())
        return granted

    def with_stances(self, decision: Decision) -> Decision:
        """Return the decision with what it means for each annotated pod."""
        here = self.desired.pods_among(self.gpu.occupants or ()) | decision.pods
        here |= self.gpu.assigned
        concerned = here & self.desired.pods.keys()
        if not concerned:
            return decision
        return replace(decision, stances={uid: self._stance(uid, decision) for uid in concerned})

    def _stance(self, uid: str, decision: Decision) -> Stance:
        asked_mw = self._usable(uid)
        if asked_mw is None:
            return "invalid"
        may = bounds(self.rules, self.gpu.min_mw, self.gpu.max_mw)
        has_mw = asked_mw if may is None else _clamped(asked_mw, may)
        if decision.target_mw is None:
            return "held"
        if decision.target_mw != has_mw:
            return "held" if decision.state == "held" else "conflict"
        return "enforced" if has_mw == asked_mw else "clamped"

    def _usable(self, uid: str) -> int | None:
        """Return what a pod asks of this board, None where that is nothing usable."""
        asked_mw = self.desired.pods[uid]
        if asked_mw is None or mistaken_units(asked_mw, self.gpu.max_mw):
            return None
        return asked_mw

    def _by_pods(self, uids: frozenset[str]) -> Decision:
        occupied, wanted, others = self.gpu.occupants, self.desired.pods.keys(), self.desired.others
        mine = self.owned.pods if self.owned else frozenset()
        ghosts = (uids & self._ids()) - wanted - others  # deleted by force, or an API in error
        unknown = self.desired.never_told_of(uids - self._ids())
        resting = frozenset() if occupied and self.gpu.newcomers else mine & wanted
        if asking := (uids & wanted) | self.gpu.assigned:
            # Who ends a pod's rest is new until that is written: else the rest would begin again.
            stays = mine & wanted <= asking | resting
            granted = replace(self._grant(asking | resting, ghosts), neighbours=stays)
            # The unknown pod may ask for less, so only its coming to light raises the limit.
            raises = bool(unknown) and self._gives_power(granted)
            return self._hold(_never_told(unknown)) if raises else granted
        if ghosts:
            return self._hold(_still_runs(ghosts))
        if unknown:
            why = _never_told(unknown)
            return self._hold(why) if self.owned else Decision("free", f"left alone: {why}")
        if resting:
            return self._rest(resting)
        if occupied and not uids & mine & others:
            return self._give_back("only processes that ask for nothing run on it")
        if mine & others:
            return self._give_back("its pod no longer carries the annotation")
        return self._give_back("its pod is gone" if self.owned else "nobody uses it")

    def _rest(self, resting: frozenset[str]) -> Decision:
        """Keep what a pod has that still exists: its worker restarts, and nobody took the GPU."""
        kept = self._grant(resting, frozenset())
        why = "kept while its pod has no process"
        if self.gpu.occupants:
            why += ", and only those run on it that ran beside"
        return replace(kept, reason=f"{kept.reason}; {why}", neighbours=True)

    def _grant(self, asking: frozenset[str], ghosts: frozenset[str]) -> Decision:
        """Decide on the limit for the annotated pods `asking`; `ghosts` hold what they had."""
        may = bounds(self.rules, self.gpu.min_mw, self.gpu.max_mw)
        if may is None:
            return self._impossible("it takes no power limit, or does not tell which")
        low, high = may
        if low > high:
            least, most = f"at least {w(low)} W", f"at most {w(high)} W"
            return self._impossible(f"the bounds leave nothing: {least}, {most}")
        asked = [mw for uid in asking if (mw := self._usable(uid)) is not None]
        limits = {_clamped(mw, may) for mw in asked}
        disagree = len(limits) > 1 and self.rules.conflict != "lowest"
        if limits and not disagree:
            target_mw, why = _lowest(limits, asked, asking, may)
            return self._beside(ghosts, asking, may, target_mw, why)
        return self._by_default(asking, ghosts, may, "pods disagree" if disagree else "")

    def _by_default(
        self, asking: frozenset[str], ghosts: frozenset[str], may: Bounds, disagree: str
    ) -> Decision:
        """Decide where no single wish counts: none is usable, or they `disagree`."""
        unusable = "annotation unusable"
        default = self.rules.safe_default
        if not disagree and self.owned and self.owned.pods & asking:
            why = f"{unusable}, the limit it has is kept"
            return self._beside(ghosts, asking, may, self.owned.set_mw, why)
        if default:
            default_mw = default.for_gpu(self.gpu.default_mw)
            if default_mw is None:
                return self._impossible(f"{default.percent}% of its default, which is not known")
            if mistaken_units(default_mw, self.gpu.max_mw):
                return self._impossible(f"the safe default of {w(default_mw)} W: {_TOO_MUCH}")
            why = f"safe default, {disagree or unusable}"
            return self._beside(ghosts, asking, may, default_mw, why)
        if ghosts:
            return self._hold(_still_runs(ghosts))
        return self._give_back(f"the annotation of pod {_names(asking)} is unusable")

    def _beside(
        self, ghosts: frozenset[str], asking: frozenset[str], may: Bounds, target_mw: int, why: str
    ) -> Decision:
        """Keep at `target_mw`, or at what `ghosts` have on it where that is less (I4)."""
        low, _ = may
        if ghosts and self.owned and self.owned.set_mw < max(low, target_mw):
            target_mw, why = self.owned.set_mw, _still_runs(ghosts)
            if target_mw < low:
                return self._hold(why)
        return self._keep(_clamped(target_mw, may), asking | ghosts, why)

    def _impossible(self, why: str) -> Decision:
        return replace(self._hold(why), state="failed")

    def _ids(self) -> frozenset[str]:
        return self.owned.pods | self.owned.aliases if self.owned else frozenset()

    def _keep(self, target_mw: int, pods: frozenset[str], why: str) -> Decision:
        action: Action | None = None
        if self.owned is None:
            action = "acquire"
        elif target_mw != self.owned.set_mw or not self.owned.pods:  # it was being given back
            action = "adjust"
        elif self.gpu.limit_mw is not None and not same_limit(self.gpu.limit_mw, target_mw):
            action = "drift"
        elif pods != self.owned.pods:
            action = "note"
        # Only what its processes show: the ledger must not grow by what was only sent.
        shown = self.desired.ids.keys() & (self.gpu.occupants or ())
        aliases = {alias for alias in shown if self.desired.uid_of(alias) in pods}
        if self.owned and pods & self._ids():
            aliases |= self.owned.aliases
        reason = f"{w(target_mw)} W: {why}"
        return Decision("managed", reason, target_mw, pods, frozenset(aliases), action)

    def _hold(self, why: str) -> Decision:
        if self.owned is None:
            return Decision("held", f"left alone: {why}")
        kept = replace(self._keep(self.owned.set_mw, self.owned.pods, why), state="held")
        limits = bounds(self.rules, self.gpu.min_mw, self.gpu.max_mw)
        inside = limits is not None and limits[0] <= self.owned.set_mw <= limits[1]
        # Without pods it was being given back when the enforcer was killed: it may be a stranger's.
        may_write = self.owned.pods and inside and not self._taken() and not self._raises(kept)
        return kept if may_write else replace(kept, action=None)

    def _raises(self, kept: Decision) -> bool:
        """Tell whether to mend a drift would raise power: that takes evidence (I4)."""
        limit_mw = self.gpu.limit_mw
        return kept.action == "drift" and limit_mw is not None and limit_mw < (kept.target_mw or 0)

    def _taken(self) -> bool:
        """Tell whether surely none but strangers run on it (I1)."""
        who = self.gpu.occupants
        if not who or Stranger.UNKNOWN in who:
            return False
        uids = self.desired.pods_among(who)
        if uids & (self._ids() | self.desired.pods.keys()) or self.desired.never_told_of(uids):
            return False
        # Who ran beside its pods has not taken it.
        return self.gpu.newcomers

    def _give_back(self, why: str) -> Decision:
        if self.owned is None:
            return Decision("free", why)
        found_mw = self.owned.original_mw
        if self.rules.release_to == "default" and self.gpu.default_mw:
            found_mw = self.gpu.default_mw
        # As found, even outside the administrator's bounds: those bind what is asked for.
        target = _clamped(found_mw, (self.gpu.min_mw or 0, self.gpu.max_mw or found_mw))
        return Decision("free", f"given back at {w(target)} W: {why}", target, action="release")

    def _gives_power(self, decision: Decision) -> bool:
        """Tell whether it is given back, or raised above what it has and what it was to have."""
        if decision.action is None:
            return False
        if decision.action == "release" or decision.target_mw is None:
            return True
        has_mw = self.gpu.limit_mw
        # Without pods it is being given back, which may not have reached the hardware.
        if self.owned and self.owned.pods:
            has_mw = min(self.owned.set_mw, has_mw or 0)
        return has_mw is None or decision.target_mw > has_mw


def _clamped(limit_mw: int, may: Bounds) -> int:
    low, high = may
    return max(low, min(high, limit_mw))


def _lowest(
    limits: set[int], asked: list[int], asking: Iterable[str], may: Bounds
) -> tuple[int, str]:
    """Return the lowest of the limits and why: a limit is an upper bound, so it honours all."""
    target, why = min(limits), f"asked by pod {_names(asking)}"
    if len(limits) > 1:
        return target, f"lowest of {len(limits)} limits {why}"
    if target not in asked:
        return target, f"{why}, clamped to {w(may[0])}..{w(may[1])} W"
    return target, why


def _names(uids: Iterable[str]) -> str:
    return ", ".join(sorted(uids))


def _still_runs(ghosts: Iterable[str]) -> str:
    return f"pod {_names(ghosts)} is gone but its processes still run"


def _never_told(uids: Iterable[str]) -> str:
    return (
        f"the API never told of pod {_names(uids)}, which runs on it: it may ask for a limit, so "
        "nothing is raised or given back before the API tells of it or it ends"
    )

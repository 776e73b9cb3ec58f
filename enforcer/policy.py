"""What to do about each GPU: desired + observed + owned -> decisions. Pure: no I/O, no clock.

Rules are cited by the names of docs/architecture.md: I1 only where asked, I3 bounds, I4 up only
on evidence, I5 unknown is not absent.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Literal

from shared.settings import SafeDefault
from shared.units import MILLIWATTS_PER_WATT
from shared.units import format_watts as w

Action = Literal["acquire", "adjust", "drift", "note", "release"]
State = Literal["free", "managed", "held", "failed", "lost"]
# living: a complete snapshot came lately; silent: none did, so nothing is given back.
Link = Literal["living", "silent", "expired", "stopping"]
_END = {"expired": "watcher silent for longer than the lease", "stopping": "the enforcer stops"}


class Stranger(Enum):
    """An occupant that is no pod: surely none, or not to be told."""

    OTHER = "other"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Occupant:
    """Who holds a GPU, by any id of his pod, and what shows it."""

    owner: str | Stranger
    evidence: str = ""


@dataclass(frozen=True, slots=True)
class SeenGpu:
    """One GPU as observed; `occupants` None where its process list cannot be read."""

    uuid: str
    occupants: frozenset[Occupant] | None
    limit_mw: int | None
    default_mw: int
    min_mw: int
    max_mw: int


@dataclass(frozen=True, slots=True)
class Desired:
    """The last complete snapshot: annotated pods' limits, and every id a cgroup may show."""

    link: Link = "silent"
    pods: Mapping[str, int | None] = field(default_factory=dict)
    ids: Mapping[str, str] = field(default_factory=dict)
    others: frozenset[str] = frozenset()

    def uid_of(self, owner: str) -> str:
        """Return the pod that `owner` is another id of; a pod's own uid wins a collision."""
        return owner if owner in self.pods or owner in self.others else self.ids.get(owner, owner)


@dataclass(frozen=True, slots=True)
class Owned:
    """A GPU that was written: its original limit, the limit last set, and for whom."""

    original_mw: int
    set_mw: int
    pods: frozenset[str]
    since: float = 0.0


@dataclass(frozen=True, slots=True)
class Rules:
    """The administrator's settings that bear on decisions."""

    min_mw: int | None = None
    max_mw: int | None = None
    safe_default: SafeDefault | None = None
    conflict: Literal["lowest", "safe-default"] = "lowest"
    release_to: Literal["original", "default"] = "original"


@dataclass(frozen=True, slots=True)
class Decision:
    """What one GPU is to have, what has to be done for it, and why."""

    state: State
    reason: str
    target_mw: int | None = None
    pods: frozenset[str] = frozenset()
    action: Action | None = None


def bounds(gpu: SeenGpu, rules: Rules) -> tuple[int, int]:
    """Return the lowest and highest limit in mW that may be asked of `gpu` (I3)."""
    low = max(gpu.min_mw, rules.min_mw or 0)
    return low, min(gpu.max_mw, rules.max_mw or gpu.max_mw)


def clamp(limit_mw: int, gpu: SeenGpu, rules: Rules) -> int:
    """Return `limit_mw` inside the bounds of `gpu` (I3)."""
    low, high = bounds(gpu, rules)
    return max(low, min(high, limit_mw))


def same_limit(one_mw: int, other_mw: int) -> bool:
    """Tell whether two limits are the same to hardware that may keep whole watts only."""
    return abs(one_mw - other_mw) < MILLIWATTS_PER_WATT


def plan(
    desired: Desired, seen: Iterable[SeenGpu], owned: Mapping[str, Owned], rules: Rules
) -> dict[str, Decision]:
    """Return the decision for every GPU that is seen or owned, by UUID."""
    decisions = {gpu.uuid: _decide(gpu, desired, owned.get(gpu.uuid), rules) for gpu in seen}
    for uuid in owned.keys() - decisions.keys():
        text = f"GPU is not there; kept until it returns (original {w(owned[uuid].original_mw)} W)"
        decisions[uuid] = Decision("lost", text, owned[uuid].set_mw, owned[uuid].pods)
    return decisions


def _decide(gpu: SeenGpu, desired: Desired, owned: Owned | None, rules: Rules) -> Decision:
    if end := _END.get(desired.link):
        return _give_back(gpu, owned, rules, end)
    if gpu.occupants is None:
        return _hold(gpu, owned, "its process list cannot be read")
    owners = {
        desired.uid_of(o.owner) if isinstance(o.owner, str) else o.owner for o in gpu.occupants
    }
    if Stranger.UNKNOWN in owners:
        return _hold(gpu, owned, "a process on it cannot be told to be a pod's or not")
    uids = {owner for owner in owners if isinstance(owner, str)}
    decision = _by_owners(gpu, uids, bool(owners), desired, owned, rules)
    if desired.link == "silent" and _gives_power(decision, gpu, owned):
        return _hold(gpu, owned, "watcher is silent")
    return decision


def _by_owners(
    gpu: SeenGpu,
    uids: set[str],
    occupied: bool,
    desired: Desired,
    owned: Owned | None,
    rules: Rules,
) -> Decision:
    asking = uids & desired.pods.keys()
    mine = owned.pods if owned else frozenset()
    # Deleted by force, or an API server that is wrong: its processes still run.
    ghosts = (uids & mine) - desired.pods.keys() - desired.others
    if asking:
        return _for_pods(gpu, asking, ghosts, desired, owned, rules)
    if ghosts:
        return _hold(gpu, owned, f"pod {_names(ghosts)} is gone but its processes still run")
    if uids & mine & desired.others:
        return _give_back(gpu, owned, rules, "its pod no longer carries the annotation")
    if occupied:
        return _give_back(gpu, owned, rules, "only processes that ask for nothing run on it")
    if resting := mine & desired.pods.keys():
        kept = _for_pods(gpu, set(resting), set(), desired, owned, rules)
        return replace(kept, reason=f"{kept.reason}; no process now, kept for its pod")
    if mine & desired.others:
        return _give_back(gpu, owned, rules, "its pod no longer carries the annotation")
    return _give_back(gpu, owned, rules, "its pod is gone" if owned else "nobody uses it")


def _for_pods(
    gpu: SeenGpu,
    asking: set[str],
    ghosts: set[str],
    desired: Desired,
    owned: Owned | None,
    rules: Rules,
) -> Decision:
    """Decide for a GPU whose annotated pods are `asking`, with `ghosts` of pods that are gone."""
    low, high = bounds(gpu, rules)
    if low > high:
        text = f"the bounds leave nothing: at least {w(low)} W, at most {w(high)} W"
        return replace(_hold(gpu, owned, text), state="failed")
    asked = {mw for uid in asking if (mw := desired.pods[uid]) is not None}
    wanted = {clamp(mw, gpu, rules) for mw in asked}
    if not wanted and owned and owned.pods & asking:
        target, why = clamp(owned.set_mw, gpu, rules), "annotation unusable, its limit is kept"
    elif rules.safe_default and (
        not wanted or (len(wanted) > 1 and rules.conflict == "safe-default")
    ):
        target = clamp(rules.safe_default.for_gpu(gpu.default_mw), gpu, rules)
        why = f"safe default: {'pods disagree' if wanted else 'annotation unusable'}"
    elif not wanted:
        return _give_back(gpu, owned, rules, f"annotation of pod {_names(asking)} is unusable")
    else:
        target, why = min(wanted), f"asked by pod {_names(asking)}"
        if len(wanted) > 1:
            why = f"lowest of {len(wanted)} limits {why}"
        elif target not in asked:
            why += f", clamped to {w(low)}..{w(high)} W"
    if ghosts and owned and owned.set_mw < target:
        target, why = owned.set_mw, f"pod {_names(ghosts)} is gone but its processes still run"
    return _keep(gpu, owned, target, frozenset(asking | ghosts), why)


def _keep(
    gpu: SeenGpu, owned: Owned | None, target_mw: int, pods: frozenset[str], why: str
) -> Decision:
    action: Action | None = None
    if owned is None:
        action = "acquire"
    elif target_mw != owned.set_mw:
        action = "adjust"
    elif gpu.limit_mw is not None and not same_limit(gpu.limit_mw, target_mw):
        action = "drift"
    elif pods != owned.pods:
        action = "note"
    return Decision("managed", f"{w(target_mw)} W: {why}", target_mw, pods, action)


def _hold(gpu: SeenGpu, owned: Owned | None, why: str) -> Decision:
    if owned is None:
        return Decision("held", f"left alone: {why}")
    kept = _keep(gpu, owned, owned.set_mw, owned.pods, f"held: {why}")
    return replace(kept, state="held")


def _give_back(gpu: SeenGpu, owned: Owned | None, rules: Rules, why: str) -> Decision:
    if owned is None:
        return Decision("free", why)
    target = owned.original_mw if rules.release_to == "original" else gpu.default_mw
    # What was found is given back even outside the administrator's bounds, which bind requests.
    target = max(gpu.min_mw, min(gpu.max_mw, target))
    return Decision("free", f"given back at {w(target)} W: {why}", target, action="release")


def _gives_power(decision: Decision, gpu: SeenGpu, owned: Owned | None) -> bool:
    if decision.action == "release":
        return True
    now_mw = owned.set_mw if owned else gpu.limit_mw
    return (
        decision.action in ("acquire", "adjust")
        and decision.target_mw is not None
        and (now_mw is None or decision.target_mw > now_mw)
    )


def _names(uids: Iterable[str]) -> str:
    return ", ".join(sorted(uids))

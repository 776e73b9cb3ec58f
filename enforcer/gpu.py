"""One GPU as a value, and everything that can happen to it. Pure: no I/O, the time is handed in.

Where it is:

| it is    | and then              | it is    | told                                       |
|----------|-----------------------|----------|--------------------------------------------|
| unseen   | it answers            | present  |                                            |
| unseen   | it does not           | lost     | gpu_lost                                   |
| present  | it answers anew       | present  |                                            |
| present  | it does not           | lost     | gpu_lost                                   |
| lost     | it answers            | present  | gpu_back                                   |
| lost     | it does not           | lost     |                                            |

It does not answer where it says so (it is lost, or needs a reset), and where reading its limit gave
no better reason than UNKNOWN for three minutes. Then its handle may be worthless.

What became of a write (`after`):

| the write             | was to    | what it is then           | told                             |
|-----------------------|-----------|---------------------------|----------------------------------|
| held                  | acquire   | managed                   | limit_set |
| held                  | adjust    | managed                   | limit_set |
| held                  | drift     | managed, one drift more   | limit_drifted, once for a value |
| held                  | release   | free                      | limit_released |
| held                  | note      | managed                   | |
| was not needed        | release   | free                      | limit_released |
| was not needed        | any other | managed                   | |
| was refused           | any       | failed, and waits         | limit_failed, once for a reason |
| was refused as lost   | any       | lost                      | limit_failed, gpu_lost |
| did not hold          | any       | failed, and waits         | limit_failed, once for a reason |
| was not entered       | acquire   | failed, and waits         | limit_failed, once for a reason |

A write that failed is tried again as what it was: a refused release is no drift, and a refused
first set counts as the first. Its wait does not delay another target.

It is not needed where the hardware has the target already.

A limit that the driver or the board forgot is no drift but an adjustment: nobody else has changed
it. That is so where a new session finds the board at its default, and persistence mode is off or
the board was lost before: then it was reset. Nor is one a drift that never stood: its write was
refused or cut short, perhaps before this start.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from enforcer.device import UNKNOWN, UNREAD, Board, DeviceError, Facts, Reading
from enforcer.policy import UNDECIDED, Decision, Desired, Occupants, Owned, SeenGpu
from enforcer.sources import Sighting, Tenants
from shared.messages import GpuState
from shared.pace import Backoff
from shared.units import format_watts as w
from shared.units import same_limit

# Frequent writes disturb collective operations on the GPU.
WRITE_GAP_S = 0.1
_AGAIN = Backoff(first_s=1.0, most_s=32.0)
_CUT_OFF_S = 180.0
# In a reason: another one each second, where a list that is not believed has garbage for pids.
_NUMBER = re.compile("[0-9]+")
_NEVER_STOOD = "nobody else changed it: when it was last set, that was refused or cut short"
_FORGOTTEN = "the driver had forgotten it while NVML was closed, since persistence mode is off"
_RESET = "nobody else changed it: it was lost, and is back at its default"
# A GPU that is lost again and again is searched for ever more seldom.
_LOST = Backoff(first_s=1.0, most_s=600.0)
# More than ran at one time: then those that run now are remembered.
_NEIGHBOURS = 1024

Kind = Literal[
    "limit_set", "limit_released", "limit_failed", "limit_drifted", "gpu_lost", "gpu_back"
]


@dataclass(frozen=True, slots=True)
class Unseen:
    """It is owned since before this start, and the driver was not asked yet."""


@dataclass(frozen=True, slots=True)
class Lost:
    """It does not answer. `session` is the one in which its handle became worthless, if any."""

    why: str
    session: int | None


@dataclass(frozen=True, slots=True)
class Present:
    """It answers: its board, and what was last read and seen of it in this session.

    `is_default`: in this session no reading showed another limit than the board's default.
    `was_lost`: it is back, and all readings since then showed that default.
    `cut_off_s`: since when every reading was refused as where a new session may help.
    """

    board: Board
    session: int
    since_s: float
    reading: Reading = UNREAD
    sighting: Sighting | None = None
    is_default: bool = True
    was_lost: bool = False
    cut_off_s: float | None = None


UNSEEN = Unseen()


@dataclass(frozen=True, slots=True)
class Trouble:
    """What could not be done last: the decision, the driver's error, and when to try again."""

    decision: Decision
    error: str
    why: str
    again: Backoff


@dataclass(frozen=True, slots=True)
class Lead:
    """One pod here: since when its limit stands, and by how much that was before its first process.

    In seconds since the boot. `lead_s` is None until a process of it was seen, and negative where
    that began first.
    """

    stands_s: float
    lead_s: float | None = None


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU between turns. What the ledger has of it is the ledger's alone."""

    uuid: str
    where: Unseen | Lost | Present = UNSEEN
    facts: Facts = UNKNOWN
    # Who was seen on it together with the pods that it is kept for: they have not taken it.
    beside: Tenants = frozenset()
    decision: Decision = UNDECIDED
    # Its state as it was last told: where it is held with the reason, in a dry run with the limit
    # that it would have.
    said: str = UNDECIDED.state
    # The pods that it has a limit for, or had one for until it is given back.
    kept_for: frozenset[str] = frozenset()
    # The limit that was set last and stood: it was read back.
    stood_mw: int | None = None
    last_index: int | None = None
    trouble: Trouble | None = None
    losses: Backoff = _LOST
    wrote_s: float | None = None
    drifted_to_mw: int | None = None
    drifts: int = 0
    writes: Mapping[str, int] = field(default_factory=dict)
    failures: Mapping[str, int] = field(default_factory=dict)
    leads: Mapping[str, Lead] = field(default_factory=dict)

    @property
    def limit_mw(self) -> int | None:
        """The limit as last read."""
        return self.where.reading.limit_mw if isinstance(self.where, Present) else None

    @property
    def index(self) -> int | None:
        """Its number for the driver, which changes when another GPU comes or goes."""
        return self.where.board.index if isinstance(self.where, Present) else None


@dataclass(frozen=True, slots=True)
class Happening:
    """What is told to people of one GPU; limits in milliwatts."""

    kind: Kind
    index: int | None
    uuid: str
    pods: frozenset[str]
    from_mw: int | None
    to_mw: int | None
    reason: str
    why: str
    pci: str | None = None
    # What is so until the next try, and when that comes; None where none is needed.
    holds: str | None = None
    next_try_s: float | None = None


# What became of a write. `reading` is what was read after it.


@dataclass(frozen=True, slots=True)
class Wrote:
    """The hardware took the target, or had it already (`before_mw`): see what is read of it."""

    before_mw: int
    reading: Reading


Call = Literal["read before", "set", "read after"]


@dataclass(frozen=True, slots=True)
class Refused:
    """A call was refused: reading before the set, the set itself, or reading after it was taken."""

    error: DeviceError
    call: Call


@dataclass(frozen=True, slots=True)
class Noted:
    """The ledger has it, and nothing has to be written to the hardware."""


@dataclass(frozen=True, slots=True)
class NotEntered:
    """The ledger could not take the original limit, so nothing was written (I2)."""

    error: Literal["LEDGER", "UNREADABLE"]
    why: str


Outcome = Wrote | Refused | Noted | NotEntered


def adopted(uuid: str, owned: Owned, beside: Tenants, stood_mw: int | None) -> Gpu:
    """Return a GPU that is owned since before this start; `beside` ran there with its pods."""
    return Gpu(uuid, beside=beside, kept_for=owned.pods, stood_mw=stood_mw)


def concerned(gpu: Gpu) -> frozenset[str]:
    """Return the pods whom it concerns what happens to it."""
    return (gpu.decision.pods | gpu.decision.stances.keys()) or gpu.kept_for


# ---- where it is ----


def found(gpu: Gpu, board: Board, session: int, now_s: float) -> tuple[Gpu, list[Happening]]:
    """Return the GPU after it answered in that session."""
    facts = board.facts.or_else(gpu.facts)
    where = Present(board, session, now_s, was_lost=isinstance(gpu.where, Lost))
    if isinstance(gpu.where, Present):
        where = replace(where, since_s=gpu.where.since_s, was_lost=gpu.where.was_lost)
    if isinstance(gpu.where, Present) and gpu.where.session == session:
        before = gpu.where
        where = replace(where, is_default=before.is_default, cut_off_s=before.cut_off_s)
    here = replace(gpu, facts=facts, where=where, last_index=board.index)
    if not isinstance(gpu.where, Lost):
        return here, []
    return here, [_told(here, "gpu_back", None, f"it answers again, as GPU {board.index}")]


def lost(
    gpu: Gpu, why: str, now_s: float, next_try_s: float | None = None
) -> tuple[Gpu, list[Happening]]:
    """Return the GPU after it did not answer; what was decided about it holds no longer.

    `losses` say when a search for it may begin, unless the next try is at `next_try_s`.
    """
    if isinstance(gpu.where, Lost):
        return replace(gpu, where=replace(gpu.where, why=why)), []
    session, losses = None, gpu.losses
    if isinstance(gpu.where, Present):
        session = gpu.where.session
        losses = _losses(gpu.losses, gpu.where, now_s).failed(now_s)
    # Its pods are kept, so that they are shown as failed.
    decision = replace(UNDECIDED, state="lost", reason=why, stances=gpu.decision.stances)
    gone = replace(gpu, where=Lost(why, session), decision=decision, trouble=None, losses=losses)
    last_mw = gpu.stood_mw if gpu.limit_mw is None else gpu.limit_mw
    told = _told(gone, "gpu_lost", last_mw, why)
    had = "" if last_mw is None else f" (it was {w(last_mw)} W)"
    holds = f"its limit{had} can be neither read nor set; other GPUs are served as before"
    if next_try_s is None and isinstance(gpu.where, Present):
        next_try_s = search_s(gpu, now_s)
    return gone, [replace(told, pods=concerned(gpu), holds=holds, next_try_s=next_try_s)]


def _losses(losses: Backoff, here: Present, now_s: float) -> Backoff:
    """Return the losses that still count: none, if all was well for more than ten minutes."""
    return losses.cleared() if now_s - here.since_s > losses.most_s else losses


def search_s(gpu: Gpu, now_s: float) -> float:
    """Return when a search for a GPU that is lost now may begin."""
    if not isinstance(gpu.where, Present):
        return now_s
    due_s = _losses(gpu.losses, gpu.where, now_s).due_s
    return now_s if due_s is None else max(now_s, due_s)


def may_be_back(gpu: Gpu, session: int, now_s: float) -> bool:
    """Tell whether to try a listed GPU again: one that was lost in this session waits for that."""
    if not isinstance(gpu.where, Lost) or gpu.where.session != session:
        return True
    return gpu.losses.may(now_s)


def shut(gpu: Gpu) -> Gpu:
    """Return the GPU after the driver was let go: what was read of it holds no longer."""
    if not isinstance(gpu.where, Present):
        return gpu
    return replace(gpu, where=replace(gpu.where, reading=UNREAD))


def was_read(gpu: Gpu, reading: Reading) -> Gpu:
    """Return the GPU with a new reading."""
    if not isinstance(gpu.where, Present):
        return gpu
    here = replace(gpu.where, reading=reading)
    if reading.limit_mw is not None:
        is_default = here.is_default and reading.limit_mw == gpu.facts.default_mw
        was_lost = here.was_lost and is_default
        here = replace(here, is_default=is_default, was_lost=was_lost, cut_off_s=None)
    return gpu if here == gpu.where else replace(gpu, where=here)


def was_not_read(gpu: Gpu, now_s: float, *, cut_off: bool) -> Gpu:
    """Return the GPU after a reading that was refused; `cut_off`: a new session may help."""
    gpu = was_read(gpu, UNREAD)
    if not isinstance(gpu.where, Present):
        return gpu
    since_s = (gpu.where.cut_off_s or now_s) if cut_off else None
    return replace(gpu, where=replace(gpu.where, cut_off_s=since_s))


def is_cut_off(gpu: Gpu, now_s: float) -> bool:
    """Tell whether its handle may be worthless, since reading it was refused for minutes."""
    if not isinstance(gpu.where, Present) or gpu.where.cut_off_s is None:
        return False
    return now_s >= gpu.where.cut_off_s + _CUT_OFF_S


def _forgotten(gpu: Gpu) -> str:
    """Return how its limit was forgotten, if it is not the one that it should be; else nothing."""
    here = gpu.where
    if gpu.limit_mw is None or not isinstance(here, Present) or not here.is_default:
        return ""
    if here.was_lost:
        return _RESET
    return _FORGOTTEN if gpu.facts.persistence is False else ""


def was_seen(gpu: Gpu, sighting: Sighting) -> Gpu:
    """Return the GPU with a new look at who holds it.

    A process that has gone is no neighbour any more: its pid may come back as another's.
    """
    here = gpu.where
    if not isinstance(here, Present) or here.sighting == sighting:
        return gpu
    beside = gpu.beside
    if sighting.occupants is not None:
        pods = frozenset(each for each in beside if isinstance(each, str))
        beside = pods | (beside & sighting.tenants)
    return replace(gpu, where=replace(here, sighting=sighting), beside=beside)


def _with_neighbours(gpu: Gpu, decision: Decision) -> Gpu:
    """Remember who runs on it beside the pods that it is kept for, as long as it is kept."""
    here = gpu.where
    if not isinstance(here, Present) or here.sighting is None:
        return gpu
    beside = gpu.beside
    if decision.neighbours:
        beside = beside | here.sighting.tenants
        if len(beside) > _NEIGHBOURS:
            beside = here.sighting.tenants
    elif decision.state == "free":
        beside = frozenset()
    return gpu if beside == gpu.beside else replace(gpu, beside=beside)


def _newcomers(here: Present, beside: Tenants) -> bool:
    """Tell whether one runs on it that was never seen beside the pods that it is kept for."""
    return here.sighting is None or bool(here.sighting.tenants - beside)


def owners(gpu: Gpu) -> Occupants | None:
    """Return who holds it, None where that is not known."""
    if not isinstance(gpu.where, Present) or gpu.where.sighting is None:
        return None
    return gpu.where.sighting.owners


def assigned(gpu: Gpu) -> frozenset[str]:
    """Return the pods that the kubelet has assigned it to, by any of their ids."""
    if not isinstance(gpu.where, Present) or gpu.where.sighting is None:
        return frozenset()
    return frozenset(each.pod for each in gpu.where.sighting.assigned)


def is_used(gpu: Gpu, desired: Desired, owned: bool) -> bool:
    """Tell whether it answers and is owned, or a pod's that asks for something."""
    if not isinstance(gpu.where, Present):
        return False
    here = (owners(gpu) or frozenset()) | assigned(gpu)
    return owned or bool(desired.pods_among(here) & desired.pods.keys())


def view_of(gpu: Gpu, released: Mapping[str, str]) -> SeenGpu | None:
    """Return what policy needs to know of it, None while it does not answer.

    `released` says why a person wants some GPUs given back, by UUID.
    """
    if not isinstance(gpu.where, Present):
        return None
    facts = gpu.facts
    return SeenGpu(
        uuid=gpu.uuid,
        occupants=owners(gpu),
        newcomers=_newcomers(gpu.where, gpu.beside),
        assigned=assigned(gpu),
        released=released.get(gpu.uuid),
        why_unseen=gpu.where.sighting.why if gpu.where.sighting else "",
        limit_mw=gpu.limit_mw,
        default_mw=facts.default_mw,
        min_mw=facts.min_mw,
        max_mw=facts.max_mw,
    )


# ---- what it is to have ----


def decided(gpu: Gpu, decision: Decision, *, mute: str = "") -> Gpu:
    """Return the GPU with a decision; where nothing is to be done, no trouble is left.

    `mute` is why nothing may be written now, empty where it may.
    """
    gpu = _with_neighbours(_with_what_stood(gpu, decision), decision)
    if gpu.trouble and decision.action == "drift":
        decision = replace(decision, action=gpu.trouble.decision.action)
    elif decision.action == "drift" and (why := _no_drift(gpu, decision)):
        decision = replace(decision, action="adjust", reason=f"{decision.reason}; {why}")
    # What could not be written before is no less wrong while nothing may be written.
    trouble = gpu.trouble if decision.action else None
    if mute and decision.action:
        decision = _muted(decision, mute)
    if (decision, trouble) == (gpu.decision, gpu.trouble):
        return gpu
    return replace(gpu, decision=decision, trouble=trouble)


def _with_what_stood(gpu: Gpu, decision: Decision) -> Gpu:
    """Remember for whom it is kept, and that the limit that it is to have was read there."""
    is_free = decision.state == "free" and decision.action is None and decision is not UNDECIDED
    kept_for = frozenset[str]() if is_free else decision.pods or gpu.kept_for
    stood_mw, limit_mw, target_mw = gpu.stood_mw, gpu.limit_mw, decision.target_mw
    if limit_mw is not None and target_mw is not None and same_limit(limit_mw, target_mw):
        stood_mw = target_mw if decision.action in (None, "note") else stood_mw
    if (kept_for, stood_mw) == (gpu.kept_for, gpu.stood_mw):
        return gpu
    return replace(gpu, kept_for=kept_for, stood_mw=stood_mw)


def _no_drift(gpu: Gpu, decision: Decision) -> str:
    """Return why a limit that is not as it should be was changed by nobody; empty if it was."""
    if forgotten := _forgotten(gpu):
        return forgotten
    return "" if gpu.stood_mw == decision.target_mw else _NEVER_STOOD


# ---- what is shown and told of it ----


def shown(gpu: Gpu) -> tuple[GpuState, str]:
    """Return its state and why; what failed last outranks what was decided."""
    match gpu.where:
        case Unseen():
            return "held", "owned since before this start, not seen yet"
        case Lost(why=why):
            return "lost", why
        case Present():
            if gpu.trouble is not None:
                return "failed", gpu.trouble.why
            return gpu.decision.state, gpu.decision.reason


def news(gpu: Gpu) -> Gpu:
    """Return the GPU with its state as told, which is another one where there is news.

    What it is held for is news too, save for numbers in it: no other line tells of it. So is, in a
    dry run or while it is paused, another limit that it would have.
    """
    if gpu.decision is UNDECIDED or isinstance(gpu.where, Unseen):
        return gpu
    state, why = shown(gpu)
    said = f"{state}: {_NUMBER.sub('0', why)}" if state == "held" else state
    if gpu.decision.withheld:
        said = f"{said}, {gpu.decision.withheld} {gpu.decision.target_mw}"
    return gpu if said == gpu.said else replace(gpu, said=said)


def _muted(decision: Decision, mute: str) -> Decision:
    """Return the decision without what it was to do; what is not given back is not free."""
    reason = f"{mute}, nothing is written; would be: {decision.reason}"
    state = "held" if decision.action == "release" else decision.state
    return replace(decision, action=None, withheld=decision.action, reason=reason, state=state)


def may_write_s(gpu: Gpu) -> float | None:
    """Return from when on its write may go out, None where there is none to do."""
    if gpu.decision.action is None:
        return None
    paced_s = 0.0 if gpu.wrote_s is None else gpu.wrote_s + WRITE_GAP_S
    trouble = gpu.trouble
    if trouble is None or trouble.decision.target_mw != gpu.decision.target_mw:
        return paced_s
    return max(paced_s, trouble.again.due_s or 0.0)


def is_ready(gpu: Gpu, now_s: float) -> bool:
    """Tell whether its write may go out now."""
    due_s = may_write_s(gpu)
    return due_s is not None and now_s >= due_s


def at_once(gpu: Gpu) -> Gpu:
    """Return the GPU without any wait: this is the last chance."""
    trouble = gpu.trouble and replace(gpu.trouble, again=_AGAIN)
    return replace(gpu, wrote_s=None, trouble=trouble)


# ---- what became of a write ----


def after(gpu: Gpu, outcome: Outcome, now_s: float) -> tuple[Gpu, list[Happening]]:
    """Return the GPU after a try to carry out its decision, and what is to be told of it."""
    match outcome:
        case Noted():
            return _done(gpu), []
        case NotEntered():
            return _failed(gpu, outcome.error, outcome.why, now_s)
        case Refused():
            return _refused(gpu, outcome, now_s)
        case Wrote():
            return _wrote(gpu, outcome, now_s)


def _refused(gpu: Gpu, outcome: Refused, now_s: float) -> tuple[Gpu, list[Happening]]:
    if outcome.call != "read before":
        gpu = replace(gpu, wrote_s=now_s)
    if outcome.call == "read after":
        gpu = was_read(_counted(gpu), UNREAD)
    why = str(outcome.error)
    gpu, told = _failed(gpu, outcome.error.name, why, now_s)
    if not outcome.error.stale:
        return gpu, told
    gpu, more = lost(gpu, why, now_s)
    return gpu, told + more


def _wrote(gpu: Gpu, outcome: Wrote, now_s: float) -> tuple[Gpu, list[Happening]]:
    target_mw, reads_mw = gpu.decision.target_mw, outcome.reading.limit_mw
    if outcome.before_mw != target_mw:
        gpu = replace(_counted(gpu), wrote_s=now_s)
    gpu = was_read(gpu, outcome.reading)
    if target_mw is None or reads_mw is None or not same_limit(reads_mw, target_mw):
        reads = "cannot be read" if reads_mw is None else f"reads {w(reads_mw)} W"
        why = f"set to {w(target_mw)} W without an error, yet it {reads}"
        return _failed(gpu, "NOT_HELD", why, now_s)
    return _held(gpu, outcome.before_mw)


def _counted(gpu: Gpu) -> Gpu:
    """Count a set that the hardware took."""
    return replace(gpu, writes=_one_more(gpu.writes, str(gpu.decision.action)))


def _held(gpu: Gpu, before_mw: int) -> tuple[Gpu, list[Happening]]:
    action, why = gpu.decision.action, gpu.decision.reason
    settled = replace(_done(gpu), drifted_to_mw=None, stood_mw=gpu.decision.target_mw)
    if action == "release":
        settled = replace(settled, kept_for=frozenset(), stood_mw=None)
        return settled, [_told(gpu, "limit_released", before_mw, why)]
    if before_mw == gpu.decision.target_mw:
        return settled, []
    if action != "drift":
        return settled, [_told(gpu, "limit_set", before_mw, why)]
    settled = replace(settled, drifts=gpu.drifts + 1, drifted_to_mw=before_mw)
    if gpu.drifted_to_mw == before_mw:  # told once for a value: it may come every second
        return settled, []
    why = f"somebody else had changed it; again {why}"
    return settled, [_told(gpu, "limit_drifted", before_mw, why)]


def _done(gpu: Gpu) -> Gpu:
    return replace(gpu, decision=replace(gpu.decision, action=None), trouble=None)


def _failed(gpu: Gpu, error: str, why: str, now_s: float) -> tuple[Gpu, list[Happening]]:
    """Count the failure, tell it once, and let the next try wait for longer."""
    gpu = replace(gpu, failures=_one_more(gpu.failures, error))
    known, again = gpu.trouble, _AGAIN
    same = known is not None and known.why == why and _same_write(known.decision, gpu.decision)
    if known is not None and same:
        again = known.again
    trouble = Trouble(gpu.decision, error, why, again.failed(now_s))
    gpu = replace(gpu, trouble=trouble)
    if same:
        return gpu, []
    told = _told(gpu, "limit_failed", gpu.limit_mw, why)
    return gpu, [replace(told, holds=has(gpu), next_try_s=trouble.again.due_s)]


def has(gpu: Gpu) -> str:
    """Return what its limit is until something can be done about it."""
    if gpu.limit_mw is None:
        return "what limit it has cannot be read now"
    return f"its limit is {w(gpu.limit_mw)} W meanwhile"


def _same_write(one: Decision, other: Decision) -> bool:
    """Tell whether both are to write the same for the same pods, for whatever reason."""
    return (one.action, one.target_mw, one.pods) == (other.action, other.target_mw, other.pods)


def _one_more(counts: Mapping[str, int], name: str) -> dict[str, int]:
    return {**counts, name: counts.get(name, 0) + 1}


def _told(gpu: Gpu, kind: Kind, from_mw: int | None, why: str) -> Happening:
    decision = gpu.decision
    return Happening(
        kind=kind,
        index=gpu.last_index if gpu.index is None else gpu.index,
        uuid=gpu.uuid,
        pci=gpu.facts.pci,
        pods=concerned(gpu),
        from_mw=from_mw,
        to_mw=decision.target_mw,
        reason=decision.action or decision.state,
        why=why,
    )

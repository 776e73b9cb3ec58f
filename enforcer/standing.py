"""How each annotated pod stands, from what was decided on its GPUs. Pure: no I/O."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from enforcer.policy import Stance
from shared import messages as m
from shared.units import MILLIWATTS_PER_WATT, meant_mw, same_limit
from shared.units import format_watts as w

_SHOWN = 300  # characters of NVML's faults


@dataclass(frozen=True, slots=True)
class Share:
    """One of the GPUs that a pod uses: its record, and how the pod fares on it."""

    gpu: m.Gpu
    stance: Stance

    def __str__(self) -> str:
        """Return which GPU it is, and what is said of it."""
        name = self.gpu.uuid if self.gpu.index is None else self.gpu.index
        return f"GPU {name}: {self.gpu.reason}"


def pods(
    asked: Iterable[m.DesiredPod],
    gpus: Iterable[m.Gpu],
    stances: Mapping[str, Mapping[str, Stance]],
    faults: str = "ok",
) -> list[m.Pod]:
    """Return what each pod asked for and what it has.

    `stances` have for each GPU's UUID how each annotated pod on it fares there. `faults` are
    NVML's, or ok.
    """
    shares: dict[str, list[Share]] = {}
    gpus = list(gpus)
    for gpu in gpus:
        for uid, stance in stances[gpu.uuid].items():
            shares.setdefault(uid, []).append(Share(gpu, stance))
    unseen = _unseen(gpus, faults)
    return [_pod(pod, shares.get(pod.uid, []), unseen) for pod in asked]


def _unseen(gpus: Iterable[m.Gpu], faults: str) -> str:
    """Return why processes may be there that nobody sees; empty where there is no reason.

    It is said to every pod that waits, so of several lists that cannot be read it has one reason.
    """
    blind = [gpu for gpu in gpus if gpu.unread is not None]
    if blind:
        names = ", ".join(gpu.uuid if gpu.index is None else str(gpu.index) for gpu in blind)
        return f"; the process list of GPU {names} cannot be read: {blind[0].unread}"
    return "" if faults == "ok" else f"; NVML: {faults[:_SHOWN]}"


def _pod(asked: m.DesiredPod, mine: list[Share], unseen: str) -> m.Pod:
    state, reason = _state(asked, mine)
    if state == "waiting" and not mine:
        reason += unseen
    limits_mw = [share.gpu.limit_mw for share in mine if share.gpu.limit_mw is not None]
    return m.Pod(
        uid=asked.uid,
        namespace=asked.namespace,
        name=asked.name,
        raw=asked.raw,
        requested_mw=asked.limit_mw,
        effective_mw=min(limits_mw, default=None),
        gpus=[share.gpu.uuid for share in mine],
        state=state,
        reason=reason,
    )


def _state(asked: m.DesiredPod, mine: list[Share]) -> tuple[m.PodState, str]:
    broken = [share for share in mine if share.gpu.state in ("failed", "lost")]
    if broken:
        return "failed", str(broken[0])
    if asked.limit_mw is None:
        does = f"; {mine[0]}" if mine else ""
        want = "decimal watts such as 350, above 0 and at most 100000"
        meant = _meant(meant_mw(asked.raw), mine[0].gpu) if mine else ""
        return "invalid", f"{asked.raw!r} is no limit: write {want}{meant}{does}"
    if not mine:
        return "waiting", "no process of it is seen on a GPU yet"
    for share in mine:
        if share.stance == "invalid":
            return "invalid", _mistaken(asked.limit_mw, share)
    for share in mine:
        if unsettled := _unsettled(share):
            return unsettled
    return _settled(asked.limit_mw, mine)


def _unsettled(share: Share) -> tuple[m.PodState, str] | None:
    """Return the state of a pod if this GPU of it does not have its target yet."""
    gpu = share.gpu
    if gpu.target_mw is None:
        # Managed without being owned: decided on in a dry run.
        return "waiting" if gpu.state == "managed" else "failed", str(share)
    if gpu.limit_mw is None:
        return "failed", str(share)
    if not same_limit(gpu.limit_mw, gpu.target_mw):
        return "waiting", f"it has {w(gpu.limit_mw)} W; {share}"
    return None


def _settled(asked_mw: int, mine: list[Share]) -> tuple[m.PodState, str]:
    """Return the state of a pod whose GPUs all have what they are to have: its worst share's."""
    held = [share for share in mine if share.stance == "held"]
    if held:
        return "failed", str(_least(held))
    others = [share for share in mine if share.stance == "conflict"]
    if others:
        return "conflict", str(_least(others))
    for share in mine:
        if share.stance == "clamped":
            return "clamped", f"asked {w(asked_mw)} W; {share}"
    return "enforced", f"{w(asked_mw)} W on {len(mine)} GPU"


def _least(shares: list[Share]) -> Share:
    return min(shares, key=lambda share: share.gpu.target_mw or 0)


def _mistaken(asked_mw: int, share: Share) -> str:
    """Return why so many watts are none, and what was meant if the board could have that."""
    most = f"{w(asked_mw)} W is at least ten times what this GPU takes at most"
    text = f"{most} ({w(share.gpu.max_mw)} W); the value is in watts"
    return f"{text}{_meant(asked_mw // MILLIWATTS_PER_WATT, share.gpu)}; {share}"


def _meant(mw: int | None, gpu: m.Gpu) -> str:
    """Return what a value in milliwatts was to be, empty where that is no limit of this board."""
    if mw is None or not (gpu.min_mw or 1) <= mw <= (gpu.max_mw or 0):
        return ""
    return f", not milliwatts: did you mean {w(mw)}?"

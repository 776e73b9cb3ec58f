"""How each annotated pod stands, from the GPUs as they stand. Pure: no I/O."""

from collections.abc import Callable, Iterable

from shared import messages as m
from shared.units import format_watts as w
from shared.units import same_limit

Clamp = Callable[[int, m.Gpu], int]  # a limit inside the bounds of a GPU, in milliwatts


def pods(asked: Iterable[m.DesiredPod], gpus: list[m.Gpu], clamp: Clamp) -> list[m.Pod]:
    """Return what each pod asked for and what it has on the GPUs that its processes use."""
    users: dict[str, list[m.Gpu]] = {}
    for gpu in gpus:
        for uid in {*gpu.pods, *(process.owner for process in gpu.processes)}:
            users.setdefault(uid, []).append(gpu)
    return [_pod(pod, users.get(pod.uid, []), clamp) for pod in asked]


def _pod(asked: m.DesiredPod, mine: list[m.Gpu], clamp: Clamp) -> m.Pod:
    state, reason = _state(asked, mine, clamp)
    return m.Pod(
        uid=asked.uid,
        namespace=asked.namespace,
        name=asked.name,
        raw=asked.raw,
        requested_mw=asked.limit_mw,
        effective_mw=min((g.limit_mw for g in mine if g.limit_mw is not None), default=None),
        gpus=[g.uuid for g in mine],
        state=state,
        reason=reason,
    )


def _state(asked: m.DesiredPod, mine: list[m.Gpu], clamp: Clamp) -> tuple[m.PodState, str]:
    broken = [gpu for gpu in mine if gpu.state in ("failed", "lost")]
    if broken:
        return "failed", _of(broken[0])
    if asked.limit_mw is None:
        does = f"; {_of(mine[0])}" if mine else ""
        return "invalid", f"{asked.raw!r} is not decimal watts such as 350{does}"
    if not mine:
        return "waiting", "no process of it is seen on a GPU yet"
    for gpu in mine:
        if gpu.target_mw is None:  # held, or decided on in a dry run
            return "waiting" if gpu.state == "managed" else "failed", _of(gpu)
        if gpu.limit_mw is None:
            return "failed", _of(gpu)
        if not same_limit(gpu.limit_mw, gpu.target_mw):
            return "waiting", f"it has {w(gpu.limit_mw)} W; {_of(gpu)}"
    return _settled(asked.limit_mw, mine, clamp)


def _settled(asked_mw: int, mine: list[m.Gpu], clamp: Clamp) -> tuple[m.PodState, str]:
    """Return how a pod stands whose GPUs all have what they are to have."""
    others = [gpu for gpu in mine if gpu.target_mw != clamp(asked_mw, gpu)]
    if others:
        worst = min(others, key=lambda gpu: (gpu.state != "held", gpu.target_mw or 0))
        return "failed" if worst.state == "held" else "conflict", _of(worst)
    for gpu in mine:
        if gpu.target_mw != asked_mw:
            return "clamped", f"asked {w(asked_mw)} W; {_of(gpu)}"
    return "enforced", f"{w(asked_mw)} W on {len(mine)} GPU"


def _of(gpu: m.Gpu) -> str:
    return f"GPU {gpu.uuid if gpu.index is None else gpu.index}: {gpu.reason}"

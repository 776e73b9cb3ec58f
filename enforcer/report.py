"""How each annotated pod stands, from the GPUs as they stand. Pure: no I/O."""

from collections.abc import Iterable

from enforcer.policy import Rules, same_limit
from shared import messages as m
from shared.units import format_watts as w


def pods(asked: Iterable[m.DesiredPod], gpus: list[m.Gpu], rules: Rules) -> list[m.Pod]:
    """Return what each pod asked for and what it has on the GPUs that its processes use."""
    users: dict[str, list[m.Gpu]] = {}
    for gpu in gpus:
        for uid in {*gpu.pods, *(process.owner for process in gpu.processes)}:
            users.setdefault(uid, []).append(gpu)
    return [_pod(pod, users.get(pod.uid, []), rules) for pod in asked]


def _pod(asked: m.DesiredPod, mine: list[m.Gpu], rules: Rules) -> m.Pod:
    state, reason = _state(asked, mine, rules)
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


def _state(asked: m.DesiredPod, mine: list[m.Gpu], rules: Rules) -> tuple[m.PodState, str]:
    broken = [g for g in mine if g.state in ("failed", "lost")]
    if broken:
        return "failed", f"GPU {broken[0].index}: {broken[0].reason}"
    if asked.limit_mw is None:
        does = f"; GPU {mine[0].index}: {mine[0].reason}" if mine else ""
        return "invalid", f"{asked.raw!r} is not decimal watts such as 350{does}"
    if not mine:
        return "waiting", "no process of it runs on a GPU yet"
    unset = [g for g in mine if g.target_mw is not None and g.limit_mw != g.target_mw]
    if unset and not all(same_limit(g.limit_mw or 0, g.target_mw or 0) for g in unset):
        return "waiting", f"GPU {unset[0].index}: about to be written: {unset[0].reason}"
    worst = min(mine, key=lambda g: g.target_mw or 0)
    if worst.target_mw is None:
        return (
            "waiting" if worst.state == "managed" else "failed",
            f"GPU {worst.index}: {worst.reason}",
        )
    low, high = rules.bounds(worst.min_mw or 0, worst.max_mw or asked.limit_mw)
    wanted = max(low, min(high, asked.limit_mw))
    if worst.target_mw != wanted:
        return "conflict", f"GPU {worst.index}: {worst.reason}"
    if wanted != asked.limit_mw:
        return "clamped", f"asked {w(asked.limit_mw)} W; GPU {worst.index}: {worst.reason}"
    return "enforced", f"{w(wanted)} W on {len(mine)} GPU"

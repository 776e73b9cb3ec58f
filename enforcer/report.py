"""What holds, in the words of shared/messages.py. Pure: no I/O."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from enforcer.policy import Owned, Rules
from shared import messages as m
from shared.units import format_watts as w

if TYPE_CHECKING:
    from enforcer.agent import Gpu


def gpu(seen: Gpu, owned: Owned | None, nvml_open: bool) -> m.Gpu:
    """Return one GPU's state; what failed last outranks what was decided."""
    device, decision = seen.device, seen.decision
    state, reason = decision.state, decision.reason
    if not seen.here:
        state, reason = "lost", "the GPU does not answer; looked for again and again"
    elif seen.fault is not None:
        state, reason = "failed", seen.fault
    return m.Gpu(
        index=device.index if seen.here else None,
        uuid=device.uuid,
        name=device.name,
        limit_mw=seen.reading.limit_mw,
        enforced_mw=seen.reading.enforced_mw,
        default_mw=device.default_mw,
        min_mw=device.min_mw,
        max_mw=device.max_mw,
        power_mw=seen.reading.power_mw,
        managed=owned is not None,
        original_mw=owned.original_mw if owned else None,
        target_mw=decision.target_mw if owned else None,
        pods=sorted(decision.pods),
        state=state,
        reason=reason,
        processes=seen.processes,
        writes=dict(seen.writes),
        write_failures=dict(seen.failures),
    )


def absent_gpu(uuid: str, owned: Owned, why: str) -> m.Gpu:
    """Return a GPU that the ledger knows and NVML has not shown since the start."""
    return m.Gpu(
        index=None,
        uuid=uuid,
        name=None,
        limit_mw=None,
        enforced_mw=None,
        default_mw=None,
        min_mw=None,
        max_mw=None,
        power_mw=None,
        managed=True,
        original_mw=owned.original_mw,
        target_mw=owned.set_mw,
        pods=sorted(owned.pods),
        state="lost",
        reason=f"not seen since the start, kept until it returns; NVML: {why}",
        processes=[],
        writes={},
        write_failures={},
    )


def pod(asked: m.DesiredPod, gpus: list[m.Gpu], rules: Rules) -> m.Pod:
    """Return what `asked` has on the GPUs that its processes use."""
    mine = [
        g for g in gpus if asked.uid in g.pods or any(p.owner == asked.uid for p in g.processes)
    ]
    limits = [g.limit_mw for g in mine if g.limit_mw is not None]
    state, reason = _pod_state(asked, mine, rules)
    return m.Pod(
        uid=asked.uid,
        namespace=asked.namespace,
        name=asked.name,
        raw=asked.raw,
        requested_mw=asked.limit_mw,
        effective_mw=min(limits, default=None),
        gpus=[g.uuid for g in mine],
        state=state,
        reason=reason,
    )


def _pod_state(asked: m.DesiredPod, mine: list[m.Gpu], rules: Rules) -> tuple[m.PodState, str]:
    for g in mine:
        if g.state in ("failed", "lost"):
            return "failed", f"GPU {g.uuid}: {g.reason}"
    if asked.limit_mw is None:
        does = mine[0].reason if mine else "no process of it runs on a GPU"
        return "invalid", f"annotation {asked.raw!r} is not decimal watts such as 350; {does}"
    if not mine:
        return "waiting", "no process of it runs on a GPU yet"
    for g in mine:
        if g.target_mw is None:
            return "waiting" if g.state == "managed" else "failed", f"GPU {g.uuid}: {g.reason}"
    worst = min(mine, key=lambda g: g.target_mw or 0)
    wanted = clamped(asked.limit_mw, worst, rules)
    if worst.target_mw is not None and worst.target_mw != wanted:
        return "conflict", f"GPU {worst.uuid}: {worst.reason}"
    if wanted != asked.limit_mw:
        return "clamped", f"asked {w(asked.limit_mw)} W, GPU {worst.uuid}: {worst.reason}"
    return "enforced", f"{w(wanted)} W on {len(mine)} GPU"


def clamped(limit_mw: int, gpu: m.Gpu, rules: Rules) -> int:
    low = max(gpu.min_mw or 0, rules.min_mw or 0)
    high = min(gpu.max_mw or limit_mw, rules.max_mw or limit_mw)
    return max(low, min(high, limit_mw))

"""By how much a limit stood before the first process of a pod. Pure: no I/O, the time is handed in.

Times are seconds since the boot, for that is how the kernel says when a process began.
"""

from dataclasses import replace

from enforcer.gpu import Gpu, Lead, Present
from enforcer.policy import Desired
from shared.units import same_limit

# Of the other stances a pod has no limit of its own there.
_LIMITED = ("enforced", "clamped", "conflict")


def followed(gpu: Gpu, desired: Desired, now_s: float) -> Gpu:
    """Return the GPU after it was decided on and written, with what is known of its pods."""
    leads = {uid: lead for uid, lead in gpu.leads.items() if uid in desired.pods}
    if _stands(gpu):
        limited = [uid for uid, stance in gpu.decision.stances.items() if stance in _LIMITED]
        leads = {uid: Lead(now_s) for uid in limited} | leads
    waiting = {uid for uid, lead in leads.items() if lead.lead_s is None}
    began_s = _first_processes(gpu, desired) if waiting else {}
    for uid in waiting & began_s.keys():
        leads[uid] = replace(leads[uid], lead_s=began_s[uid] - leads[uid].stands_s)
    return gpu if leads == gpu.leads else replace(gpu, leads=leads)


def _stands(gpu: Gpu) -> bool:
    target_mw = gpu.decision.target_mw
    if target_mw is None or gpu.limit_mw is None:
        return False
    return same_limit(gpu.limit_mw, target_mw)


def _first_processes(gpu: Gpu, desired: Desired) -> dict[str, float]:
    """Return when the oldest process of each pod began that is seen on the GPU."""
    if not isinstance(gpu.where, Present) or gpu.where.sighting is None:
        return {}
    began_s: dict[str, float] = {}
    for occupant in gpu.where.sighting.occupants or ():
        if isinstance(occupant.owner, str) and occupant.started_s is not None:
            uid = desired.uid_of(occupant.owner)
            began_s[uid] = min(occupant.started_s, began_s.get(uid, occupant.started_s))
    return began_s

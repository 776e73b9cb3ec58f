"""What goes over the socket about this node: built here, from values, and nowhere else. Pure."""

import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec

from enforcer import gpu as one
from enforcer import standing
from enforcer.desk import Tally
from enforcer.driver import Open, Refused
from enforcer.gpu import Gpu, Present
from enforcer.policy import Desired, Owned
from enforcer.roster import Roster
from enforcer.settings import EnforcerSettings
from enforcer.sources import Sighting
from shared import __version__
from shared import messages as m

_SHOWN = 32  # processes that a GPU shows in an answer


def about(config: EnforcerSettings, cgroup_roots: Iterable[str], ledger: Path) -> m.EnforcerStatus:
    """Return what is said of the enforcer itself, as of its start."""
    return m.EnforcerStatus(
        version=__version__,
        pid=os.getpid(),
        started_ts=round(time.time(), 3),
        dry_run=config.dry_run,
        min_mw=config.min_mw,
        max_mw=config.max_mw,
        conflict=config.conflict,
        cgroup_roots=list(cgroup_roots),
        ledger=str(ledger),
    )


def nvml_state(driver: Open | Refused, gpus: Iterable[Gpu]) -> tuple[m.NvmlState, str]:
    """Return how NVML does and why.

    It is `ok` while one GPU can be used; the message names a broken one.
    """
    if isinstance(driver, Refused):
        return ("absent" if driver.absent else "failing"), driver.why
    usable = any(isinstance(gpu.where, Present) and gpu.facts.max_mw for gpu in gpus)
    state: m.NvmlState = "ok" if usable or not driver.faults else "failing"
    return state, "; ".join(driver.faults) or "ok"


def records(gpus: Iterable[Gpu], owned: Mapping[str, Owned], desired: Desired) -> list[m.Gpu]:
    """Return the record of each GPU, in the driver's order, those that do not answer last."""
    found = [record(gpu, owned.get(gpu.uuid), desired) for gpu in gpus]
    return sorted(found, key=lambda gpu: (gpu.index is None, gpu.index, gpu.uuid))


def with_names(gpus: Iterable[m.Gpu], roster: Roster) -> list[m.Gpu]:
    """Return the records with how their pods are called, also of those that are gone."""
    return [msgspec.structs.replace(gpu, pod_names=roster.named(gpu.pods)) for gpu in gpus]


def record(gpu: Gpu, owned: Owned | None, desired: Desired) -> m.Gpu:
    """Return what is shown of one GPU; `owned` is what the ledger has of it."""
    decision, facts = gpu.decision, gpu.facts
    state, reason = one.shown(gpu)
    pods = decision.pods
    target_mw = None
    if owned is not None:
        pods = pods or owned.pods
        target_mw = decision.target_mw or owned.set_mw
    here = gpu.where if isinstance(gpu.where, Present) else None
    reading = here.reading if here else None
    return m.Gpu(
        index=gpu.index,
        uuid=gpu.uuid,
        pci=facts.pci,
        name=facts.name,
        limit_mw=reading.limit_mw if reading else None,
        enforced_mw=reading.enforced_mw if reading else None,
        default_mw=facts.default_mw,
        min_mw=facts.min_mw,
        max_mw=facts.max_mw,
        power_mw=reading.power_mw if reading else None,
        persistence=facts.persistence,
        managed=owned is not None,
        original_mw=owned.original_mw if owned else None,
        target_mw=target_mw,
        wanted_mw=target_mw or decision.target_mw,
        pods=sorted(pods),
        state=state,
        reason=reason,
        processes=_processes(here.sighting, desired) if here else [],
        assigned=_assigned(here.sighting, desired) if here else [],
        writes=dict(gpu.writes),
        write_failures=dict(gpu.failures),
    )


def _processes(sighting: Sighting | None, desired: Desired) -> list[m.Process]:
    """Return the processes on a GPU, those of pods that ask for something first."""
    if sighting is None:
        return []
    if sighting.occupants is None:
        return [m.Process(pid=0, owner="unknown", evidence=sighting.why)]
    shown = []
    for occupant in sighting.occupants:
        owner = occupant.owner
        name = desired.uid_of(owner) if isinstance(owner, str) else owner.value
        shown.append(m.Process(pid=occupant.pid, owner=name, evidence=occupant.evidence))
    shown.sort(key=lambda process: process.owner not in desired.pods)
    return shown[:_SHOWN]


def _assigned(sighting: Sighting | None, desired: Desired) -> list[m.Assigned]:
    """Return the annotated pods that live and that the kubelet has assigned a GPU to."""
    found = [] if sighting is None else list(sighting.assigned)
    named = [(desired.uid_of(each.pod), each.evidence) for each in found]
    shown = [m.Assigned(owner=uid, evidence=why) for uid, why in named if uid in desired.pods]
    return shown[:_SHOWN]


def answer(request: m.Request, status: m.StatusReply) -> m.Reply:
    """Return the answer to `request`: all of the status, or what the watcher needs of it."""
    if not isinstance(request, m.Snapshot | m.Unlisted):
        return status
    return m.Report(
        session=request.session,
        revision=request.revision if isinstance(request, m.Snapshot) else 0,
        nvml=status.enforcer.nvml,
        nvml_message=status.enforcer.nvml_message,
        gpus=status.gpus,
        pods=status.pods,
        counters=status.counters,
        enforcer=status.enforcer,
    )


def pods(
    asked: Iterable[m.DesiredPod], gpus: Iterable[Gpu], shown: Iterable[m.Gpu], faults: str
) -> list[m.Pod]:
    """Return how each annotated pod stands on the GPUs of `shown`; `faults` are NVML's, or ok."""
    known = list(gpus)
    stances = {gpu.uuid: gpu.decision.stances for gpu in known}
    leads_s = _leads_s(known)
    found = standing.pods(asked, shown, stances, faults)
    return [msgspec.structs.replace(pod, lead_s=leads_s.get(pod.uid)) for pod in found]


def _leads_s(gpus: Iterable[Gpu]) -> dict[str, float]:
    """Return by how much the limit of each pod was early; of several GPUs the latest counts."""
    leads_s: dict[str, float] = {}
    for gpu in gpus:
        for uid, lead in gpu.leads.items():
            if lead.lead_s is not None:
                leads_s[uid] = round(min(lead.lead_s, leads_s.get(uid, lead.lead_s)), 3)
    return leads_s


def counters(gpus: Iterable[Gpu], tally: Tally, dropped_log_lines: int) -> m.Counters:
    """Return the totals since the start."""
    known = list(gpus)
    return m.Counters(
        limit_writes=sum(sum(gpu.writes.values()) for gpu in known),
        limit_write_failures=sum(sum(gpu.failures.values()) for gpu in known),
        drifts=sum(gpu.drifts for gpu in known),
        snapshots=tally.snapshots,
        denied=tally.denied,
        refused_connections=tally.refused_connections,
        malformed=tally.malformed,
        stale=tally.stale,
        dropped_log_lines=dropped_log_lines,
    )

"""The whole chain behind one pod or GPU in plain words: pure, from one status reply."""

from dataclasses import dataclass

import msgspec

from shared import messages
from shared.powerctl.layout import WIDTH, wrapped
from shared.powerctl.missing import LEAST_HEAD
from shared.powerctl.tables import (
    cgroup_lines,
    duration,
    escape,
    gpu_label,
    holds,
    named,
    pod_names,
    short_pci,
    watts,
)
from shared.powerctl.verdict import api_trouble

_LABEL = 12
# Processes of others that are shown for a pod that waits.
_CANDIDATES = 8


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """What is known about a subject: the records it touches and the text about them."""

    subject: str
    pods: list[messages.Pod]
    gpus: list[messages.Gpu]
    enforcer: messages.EnforcerStatus
    watcher: messages.WatcherStatus
    text: list[str]


@dataclass(frozen=True, slots=True)
class _Page:
    """How it is written: how wide, and whether with the lines that are proof for experts."""

    width: int
    verbose: bool

    def field(self, label: str, text: str) -> list[str]:
        return wrapped(text, self.width, f"  {label:{_LABEL}}")


def explain(
    reply: messages.StatusReply, subject: str, width: int = WIDTH, *, verbose: bool = False
) -> Explanation | None:
    """Return what is known about a pod or GPU, or None where there is no such thing.

    A pod is called namespace/name or uid, a GPU by index, uuid or PCI address, ids by their head.
    """
    pods, gpus = _pods_called(reply, subject), _gpus_called(reply, subject)
    if not pods and not gpus:
        return None
    about_pods = bool(pods)
    if about_pods:
        held = {uuid for pod in pods for uuid in pod.gpus}
        uids = {pod.uid for pod in pods}
        gpus = [gpu for gpu in reply.gpus if gpu.uuid in held or uids & set(_occupants(gpu))]
    else:
        uids = {uid for gpu in gpus for uid in _occupants(gpu)}
        pods = [pod for pod in reply.pods if pod.uid in uids]
    page = _Page(width, verbose)
    blocks = [[_pod(pod, reply, page) for pod in pods], [_gpu(gpu, reply, page) for gpu in gpus]]
    text: list[str] = []
    for block in blocks[0] + blocks[1] if about_pods else blocks[1] + blocks[0]:
        text += [*block, ""]
    return Explanation(
        subject=subject,
        pods=pods,
        gpus=gpus,
        enforcer=reply.enforcer,
        watcher=reply.watcher,
        text=[*text, *wrapped(_source(reply), width)],
    )


def _pods_called(reply: messages.StatusReply, subject: str) -> list[messages.Pod]:
    exact = [pod for pod in reply.pods if subject in (pod.uid, f"{pod.namespace}/{pod.name}")]
    heads = [pod for pod in reply.pods if pod.uid.startswith(subject)]
    return exact or (heads if len(subject) >= LEAST_HEAD and len(heads) == 1 else [])


def _gpus_called(reply: messages.StatusReply, subject: str) -> list[messages.Gpu]:
    exact = [gpu for gpu in reply.gpus if subject in (gpu.uuid, str(gpu.index))]
    at = [gpu for gpu in reply.gpus if _is_at(gpu.pci, subject)]
    heads = [gpu for gpu in reply.gpus if gpu.uuid.startswith(subject)]
    return exact or at or (heads if len(subject) >= LEAST_HEAD and len(heads) == 1 else [])


def _is_at(pci: str | None, subject: str) -> bool:
    return pci is not None and subject.lower() in (pci.lower(), short_pci(pci))


def _occupants(gpu: messages.Gpu) -> list[str]:
    assigned = (each.owner for each in gpu.assigned)
    return [*gpu.pods, *(process.owner for process in gpu.processes), *assigned]


def _state(state: str, reason: str, names: dict[str, str], page: _Page) -> list[str]:
    return page.field("state", named(f"{state}: {reason}" if reason else state, names))


def _pod(pod: messages.Pod, reply: messages.StatusReply, page: _Page) -> list[str]:
    labels = {gpu.uuid: f"GPU {gpu_label(gpu)}" for gpu in reply.gpus}
    if pod.requested_mw is None:
        meaning = "which is no usable limit (decimal watts such as 350 or 48.75 are)"
    else:
        meaning = f"read as {watts(pod.requested_mw)}"
    gpus = ", ".join(labels.get(uuid, escape(uuid)) for uuid in pod.gpus)
    held_mw = holds(pod, reply.gpus)
    return [
        *wrapped(escape(f"pod {pod.namespace}/{pod.name}, uid {pod.uid}"), page.width, "", "  "),
        *_state(pod.state, pod.reason, pod_names(reply), page),
        *page.field("annotation", f'"{escape(pod.raw)}", {meaning}'),
        *page.field("runs on", gpus or "no GPU: none of its processes was found on one"),
        *_candidates(pod, reply, page),
        *page.field("holds", "nothing" if held_mw is None else watts(held_mw)),
        *_lead(pod, page),
    ]


def _lead(pod: messages.Pod, page: _Page) -> list[str]:
    """Return whether the limit stood before the pod's first process, once that is known."""
    if pod.lead_s is None:
        return []
    by_s = abs(pod.lead_s)
    span = f"{round(by_s * 1000)} ms" if by_s < 1 else duration(by_s)
    side = "after" if pod.lead_s < 0 else "before"
    return page.field("limit stood", f"{span} {side} its first process on a GPU began")


def _candidates(pod: messages.Pod, reply: messages.StatusReply, page: _Page) -> list[str]:
    """Return the processes of others of which one may be the pod's, in another pod's cgroup.

    A restored worker (CRIU) and Docker in a pod are such. It is not guessed which.
    """
    if pod.gpus:
        return []
    annotated = {known.uid for known in reply.pods}
    names = pod_names(reply)
    found = [
        f"GPU {gpu_label(gpu)}: {_process(process, names, page)}"
        for gpu in reply.gpus
        for process in gpu.processes
        if process.pid and process.owner not in annotated
    ]
    if not found:
        return []
    lines = page.field("candidates", "of others on this node's GPUs, in case one is the pod's:")
    for text in found[:_CANDIDATES]:
        lines += page.field("", escape(text))
    left = len(found) - _CANDIDATES
    return lines + (page.field("", f"and {left} more") if left > 0 else [])


def _gpu(gpu: messages.Gpu, reply: messages.StatusReply, page: _Page) -> list[str]:
    names = pod_names(reply)
    model = f", {gpu.name}" if gpu.name else ""
    index = "without an index now" if gpu.index is None else str(gpu.index)
    pci = f", PCI {gpu.pci}" if gpu.pci else ""
    return [
        *wrapped(escape(f"GPU {index}, {gpu.uuid}{pci}{model}"), page.width, "", "  "),
        *_state(gpu.state, gpu.reason, names, page),
        *_processes(gpu, names, page),
        *_assigned(gpu, names, page),
        *_asked(gpu, reply, page),
        *_bounds(gpu, reply.enforcer, page),
        *page.field("target", _target(gpu)),
        *_written(gpu, reply.enforcer, page),
        *_read_back(gpu, page),
        *_found(gpu, page),
    ]


def _target(gpu: messages.Gpu) -> str:
    if gpu.target_mw is not None:
        return watts(gpu.target_mw)
    would_be = "" if gpu.wanted_mw is None else f"; would be {watts(gpu.wanted_mw)}"
    return f"none: left as it is{would_be}"


def _processes(gpu: messages.Gpu, names: dict[str, str], page: _Page) -> list[str]:
    if not gpu.processes:
        return page.field("processes", "none")
    lines = []
    for number, process in enumerate(gpu.processes):
        lines += page.field("" if number else "processes", escape(_process(process, names, page)))
    return lines


def _assigned(gpu: messages.Gpu, names: dict[str, str], page: _Page) -> list[str]:
    lines = []
    for number, each in enumerate(gpu.assigned):
        owner = names.get(each.owner) or f"pod {each.owner}"
        text = f"to {owner} by the kubelet: {each.evidence}"
        lines += page.field("" if number else "assigned", escape(text))
    return lines


def _process(process: messages.Process, names: dict[str, str], page: _Page) -> str:
    if not process.pid:
        return f"the list cannot be read: {process.evidence}"
    owner = {"other": "no known pod", "unknown": "an owner unknown"}.get(process.owner)
    owner = owner or names.get(process.owner) or f"pod {process.owner}, not annotated"
    text = f"pid {process.pid} of {owner}"
    if page.verbose:
        return f"{text}, by {cgroup_lines(process.evidence) or 'no evidence'}"
    return f"{text} (-v shows its cgroup)" if process.owner == "unknown" else text


def _asked(gpu: messages.Gpu, reply: messages.StatusReply, page: _Page) -> list[str]:
    occupants = set(_occupants(gpu))
    asking = [pod for pod in reply.pods if pod.uid in occupants]
    if len(asking) < 2:
        return []
    names = pod_names(reply)
    wishes = ", ".join(f"{names[pod.uid]} {watts(pod.requested_mw)}" for pod in asking)
    rule = "the lowest holds, which honours every upper bound"
    if reply.enforcer.conflict != "lowest":
        rule = "the safe default holds where they differ"
    return page.field("conflict", f"{wishes}; rule `{escape(reply.enforcer.conflict)}`: {rule}")


def _range(low_mw: int | None, high_mw: int | None) -> str:
    if low_mw is None and high_mw is None:
        return "none"
    if low_mw is None:
        return f"at most {watts(high_mw)}"
    return (
        f"at least {watts(low_mw)}" if high_mw is None else f"{watts(low_mw)} to {watts(high_mw)}"
    )


def _bounds(gpu: messages.Gpu, enforcer: messages.EnforcerStatus, page: _Page) -> list[str]:
    hardware = "unknown" if gpu.min_mw is None else _range(gpu.min_mw, gpu.max_mw)
    administrator = _range(enforcer.min_mw, enforcer.max_mw)
    lows = [limit for limit in (gpu.min_mw, enforcer.min_mw) if limit is not None]
    highs = [limit for limit in (gpu.max_mw, enforcer.max_mw) if limit is not None]
    both = _range(max(lows, default=None), min(highs, default=None))
    text = f"hardware {hardware}, administrator {administrator}"
    return page.field("bounds", text if administrator == "none" else f"{text}, together {both}")


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{escape(what)} {count}" for what, count in sorted(counts.items()) if count)


def _written(gpu: messages.Gpu, enforcer: messages.EnforcerStatus, page: _Page) -> list[str]:
    done = _counts(gpu.writes) or "nothing"
    failed = _counts(gpu.write_failures)
    text = f"{done} since the enforcer started" + (f"; failed: {failed}" if failed else "")
    text += "; dry run: no limit is written" if enforcer.dry_run else ""
    return page.field("written", text)


def _read_back(gpu: messages.Gpu, page: _Page) -> list[str]:
    text = f"limit {watts(gpu.limit_mw)}, enforced {watts(gpu.enforced_mw)}"
    if gpu.limit_mw is not None:
        if gpu.target_mw is not None and gpu.limit_mw != gpu.target_mw:
            text += f"; not the target of {watts(gpu.target_mw)}"
        if gpu.enforced_mw is not None and gpu.enforced_mw < gpu.limit_mw:
            limiters = "thermal, power supply, the module's, out-of-band"
            text += f"; another limiter ({limiters}) is stronger"
    return page.field("read back", text)


def _found(gpu: messages.Gpu, page: _Page) -> list[str]:
    default = f"factory default {watts(gpu.default_mw)}"
    if gpu.original_mw is not None:
        return page.field("found", f"{watts(gpu.original_mw)} at first touch; {default}")
    found = "given back" if any(gpu.writes.values()) else "never touched"
    return page.field("found", f"{found}; {default}")


def _source(reply: messages.StatusReply) -> str:
    watcher = reply.watcher
    trouble = escape(api_trouble(watcher))
    if watcher.age_s is None:
        text = "the watcher has never been heard: no annotation is known"
        return f"{text}; {trouble}" if trouble else text
    link = "connected" if watcher.connected else "NOT connected"
    age = f"{duration(watcher.age_s)} ago"
    text = f"watcher heard {age} ({link}, revision {watcher.revision})"
    return f"{text}; {trouble}" if trouble else text

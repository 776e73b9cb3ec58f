"""The whole chain behind one pod or GPU in plain words: pure, from one status reply."""

import difflib
import textwrap

import msgspec

from shared import messages
from shared.powerctl.tables import (
    cgroup_lines,
    duration,
    escape,
    gpu_label,
    named,
    pod_names,
    watts,
)

_LABEL = 12
_WIDTH = 100
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


def explain(reply: messages.StatusReply, subject: str) -> Explanation | None:
    """Return what is known about a pod (namespace/name, uid) or GPU (index, uuid), or None."""
    pods = [pod for pod in reply.pods if subject in (pod.uid, f"{pod.namespace}/{pod.name}")]
    gpus = [gpu for gpu in reply.gpus if subject in (gpu.uuid, str(gpu.index))]
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
    blocks = [[_pod(pod, reply) for pod in pods], [_gpu(gpu, reply) for gpu in gpus]]
    text: list[str] = []
    for block in blocks[0] + blocks[1] if about_pods else blocks[1] + blocks[0]:
        text += [*block, ""]
    return Explanation(
        subject=subject,
        pods=pods,
        gpus=gpus,
        enforcer=reply.enforcer,
        watcher=reply.watcher,
        text=[*text, *_source(reply)],
    )


def near(reply: messages.StatusReply, subject: str) -> list[str]:
    """Return known subjects that resemble `subject`, the likeliest first."""
    known = [f"{pod.namespace}/{pod.name}" for pod in reply.pods]
    known += [pod.uid for pod in reply.pods] + [gpu.uuid for gpu in reply.gpus]
    known += [str(gpu.index) for gpu in reply.gpus if gpu.index is not None]
    within = [name for name in known if subject and subject.lower() in name.lower()]
    close = difflib.get_close_matches(subject, known, n=5, cutoff=0.6)
    return list(dict.fromkeys(within + close))[:5]


def _occupants(gpu: messages.Gpu) -> list[str]:
    assigned = (each.owner for each in gpu.assigned)
    return [*gpu.pods, *(process.owner for process in gpu.processes), *assigned]


def _field(label: str, text: str) -> list[str]:
    head = f"  {label:{_LABEL}}"
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=head,
        subsequent_indent=" " * len(head),
        break_long_words=False,
        break_on_hyphens=False,
    ) or [head.rstrip()]


def _state(state: str, reason: str, names: dict[str, str]) -> list[str]:
    return _field("state", named(f"{state}: {reason}" if reason else state, names))


def _pod(pod: messages.Pod, reply: messages.StatusReply) -> list[str]:
    labels = {gpu.uuid: f"GPU {gpu_label(gpu)}" for gpu in reply.gpus}
    if pod.requested_mw is None:
        meaning = "which is no usable limit (decimal watts such as 350 or 48.75 are)"
    else:
        meaning = f"read as {watts(pod.requested_mw)}"
    gpus = ", ".join(labels.get(uuid, escape(uuid)) for uuid in pod.gpus)
    return [
        escape(f"pod {pod.namespace}/{pod.name}, uid {pod.uid}"),
        *_state(pod.state, pod.reason, pod_names(reply)),
        *_field("annotation", f'"{escape(pod.raw)}", {meaning}'),
        *_field("runs on", gpus or "no GPU: none of its processes was found on one"),
        *_candidates(pod, reply),
        *_field("holds", "nothing" if pod.effective_mw is None else watts(pod.effective_mw)),
    ]


def _candidates(pod: messages.Pod, reply: messages.StatusReply) -> list[str]:
    """Return the processes of others of which one may be the pod's, in another pod's cgroup.

    A restored worker (CRIU) and Docker in a pod are such. It is not guessed which.
    """
    if pod.gpus:
        return []
    annotated = {known.uid for known in reply.pods}
    names = pod_names(reply)
    found = [
        f"GPU {gpu_label(gpu)}: {_process(process, names)}"
        for gpu in reply.gpus
        for process in gpu.processes
        if process.pid and process.owner not in annotated
    ]
    if not found:
        return []
    lines = _field("candidates", "of others on this node's GPUs, in case one is the pod's:")
    for text in found[:_CANDIDATES]:
        lines += _field("", escape(text))
    left = len(found) - _CANDIDATES
    return lines + (_field("", f"and {left} more") if left > 0 else [])


def _gpu(gpu: messages.Gpu, reply: messages.StatusReply) -> list[str]:
    names = pod_names(reply)
    model = f", {gpu.name}" if gpu.name else ""
    title = f"GPU {gpu_label(gpu)}" if gpu.index is None else f"GPU {gpu.index}, {gpu.uuid}"
    return [
        escape(title + model),
        *_state(gpu.state, gpu.reason, names),
        *_processes(gpu, names),
        *_assigned(gpu, names),
        *_asked(gpu, reply),
        *_bounds(gpu, reply.enforcer),
        *_field("target", "none: left as it is" if gpu.target_mw is None else watts(gpu.target_mw)),
        *_written(gpu, reply.enforcer),
        *_read_back(gpu),
        *_found(gpu),
    ]


def _processes(gpu: messages.Gpu, names: dict[str, str]) -> list[str]:
    if not gpu.processes:
        return _field("processes", "none")
    lines = []
    for number, process in enumerate(gpu.processes):
        lines += _field("" if number else "processes", escape(_process(process, names)))
    return lines


def _assigned(gpu: messages.Gpu, names: dict[str, str]) -> list[str]:
    lines = []
    for number, each in enumerate(gpu.assigned):
        owner = names.get(each.owner) or f"pod {each.owner}"
        text = f"to {owner} by the kubelet: {each.evidence}"
        lines += _field("" if number else "assigned", escape(text))
    return lines


def _process(process: messages.Process, names: dict[str, str]) -> str:
    if not process.pid:
        return f"the list cannot be read: {process.evidence}"
    owner = {"other": "no known pod", "unknown": "an owner unknown"}.get(process.owner)
    owner = owner or names.get(process.owner) or f"pod {process.owner}, not annotated"
    return f"pid {process.pid} of {owner}, by {cgroup_lines(process.evidence) or 'no evidence'}"


def _asked(gpu: messages.Gpu, reply: messages.StatusReply) -> list[str]:
    occupants = set(_occupants(gpu))
    asking = [pod for pod in reply.pods if pod.uid in occupants]
    if len(asking) < 2:
        return []
    names = pod_names(reply)
    wishes = ", ".join(f"{names[pod.uid]} {watts(pod.requested_mw)}" for pod in asking)
    rule = "the lowest holds, which honours every upper bound"
    if reply.enforcer.conflict != "lowest":
        rule = "the safe default holds where they differ"
    return _field("conflict", f"{wishes}; rule `{escape(reply.enforcer.conflict)}`: {rule}")


def _range(low_mw: int | None, high_mw: int | None) -> str:
    if low_mw is None and high_mw is None:
        return "none"
    if low_mw is None:
        return f"at most {watts(high_mw)}"
    return (
        f"at least {watts(low_mw)}" if high_mw is None else f"{watts(low_mw)} to {watts(high_mw)}"
    )


def _bounds(gpu: messages.Gpu, enforcer: messages.EnforcerStatus) -> list[str]:
    hardware = "unknown" if gpu.min_mw is None else _range(gpu.min_mw, gpu.max_mw)
    administrator = _range(enforcer.min_mw, enforcer.max_mw)
    lows = [limit for limit in (gpu.min_mw, enforcer.min_mw) if limit is not None]
    highs = [limit for limit in (gpu.max_mw, enforcer.max_mw) if limit is not None]
    both = _range(max(lows, default=None), min(highs, default=None))
    text = f"hardware {hardware}, administrator {administrator}"
    return _field("bounds", text if administrator == "none" else f"{text}, together {both}")


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{escape(what)} {count}" for what, count in sorted(counts.items()) if count)


def _written(gpu: messages.Gpu, enforcer: messages.EnforcerStatus) -> list[str]:
    done = _counts(gpu.writes) or "nothing"
    failed = _counts(gpu.write_failures)
    text = f"{done} since the enforcer started" + (f"; failed: {failed}" if failed else "")
    return _field("written", f"{text}; dry run: no limit is written" if enforcer.dry_run else text)


def _read_back(gpu: messages.Gpu) -> list[str]:
    text = f"limit {watts(gpu.limit_mw)}, enforced {watts(gpu.enforced_mw)}"
    if gpu.limit_mw is not None:
        if gpu.target_mw is not None and gpu.limit_mw != gpu.target_mw:
            text += f"; not the target of {watts(gpu.target_mw)}"
        if gpu.enforced_mw is not None and gpu.enforced_mw < gpu.limit_mw:
            limiters = "thermal, power supply, the module's, out-of-band"
            text += f"; another limiter ({limiters}) is stronger"
    return _field("read back", text)


def _found(gpu: messages.Gpu) -> list[str]:
    found = (
        "never touched" if gpu.original_mw is None else f"{watts(gpu.original_mw)} at first touch"
    )
    return _field("found", f"{found}; factory default {watts(gpu.default_mw)}")


def _source(reply: messages.StatusReply) -> list[str]:
    watcher = reply.watcher
    if watcher.age_s is None:
        return ["the watcher has never been heard: no annotation is known"]
    link = "connected" if watcher.connected else "NOT connected"
    age = f"{duration(watcher.age_s)} ago"
    return [f"watcher heard {age} ({link}, revision {watcher.revision})"]

"""What is not as it should be on a node, and all of it in one sentence: pure, from one reply."""

from collections.abc import Iterable

from shared import messages
from shared.powerctl.tables import (
    duration,
    gpu_label,
    gpu_order,
    named,
    plural,
    pod_names,
    pod_order,
)

_BAD_GPU = ("held", "failed", "lost")
# The worst first, as they are named.
_UNMET: tuple[messages.PodState, ...] = ("failed", "invalid", "conflict", "clamped", "waiting")
_BAD_POD = ("failed", "invalid")
_NAMED = 3
# A watch brings an event or a bookmark each minute, and is asked for anew after each failure.
API_SILENT_S = 180.0


def verdict(reply: messages.StatusReply) -> str:
    """Return how the node does in one sentence: what its pods have, and what is wrong."""
    parts = [_pods(reply), *_gpus(reply.gpus)]
    if reply.enforcer.nvml != "ok":
        parts.append(f"NVML is {reply.enforcer.nvml}")
    if not reply.watcher.connected and reply.watcher.age_s is not None:
        parts.append(f"the watcher is silent for {duration(reply.watcher.age_s)}")
    if api_trouble(reply.watcher):
        parts.append("the API does not answer the watcher")
    if reply.enforcer.dry_run:
        parts.append("DRY RUN: no limit is written")
    return named("; ".join(parts), pod_names(reply))


def _pods(reply: messages.StatusReply) -> str:
    if not reply.pods:
        if reply.watcher.age_s is None:
            return "no pod is known: the watcher has not told of any yet"
        return "no pod of this node asks for a limit"
    unmet = {state: [pod for pod in reply.pods if pod.state == state] for state in _UNMET}
    has = len(reply.pods) - sum(map(len, unmet.values()))
    have = "pod has what it" if len(reply.pods) == 1 else "pods have what they"
    head = f"{has} of {len(reply.pods)} {have} asked for"
    return "; ".join([head, *_some(unmet)])


def _some(unmet: dict[messages.PodState, list[messages.Pod]]) -> list[str]:
    """Return the pods that have not what they asked for, the worst first, and how many more."""
    named_ = [
        f"{pod.namespace}/{pod.name}: {state}"
        for state, pods in unmet.items()
        for pod in sorted(pods, key=pod_order)
    ]
    left = len(named_) - _NAMED
    return named_[:_NAMED] + ([f"and {left} more"] if left > 0 else [])


def _gpus(gpus: Iterable[messages.Gpu]) -> list[str]:
    bad = [gpu for gpu in sorted(gpus, key=gpu_order) if gpu.state in _BAD_GPU]
    found = [f"GPU {gpu_label(gpu)}: {gpu.state}" for gpu in bad[:_NAMED]]
    left = len(bad) - _NAMED
    return found + ([f"and {plural(left, 'more GPU')}"] if left > 0 else [])


def api_trouble(watcher: messages.WatcherStatus) -> str:
    """Return what is wrong between the watcher and the API server, empty where all is well."""
    age_s = watcher.api_age_s
    since = "" if age_s is None else f"; its last word came {duration(age_s)} ago"
    if watcher.api_error:
        return f"the API does not answer the watcher: {watcher.api_error}{since}"
    if age_s is not None and age_s > API_SILENT_S:
        return f"the API does not answer the watcher{since}"
    return ""


def problems(reply: messages.StatusReply) -> list[str]:
    """Return what is not as it should be, one line each."""
    found = []
    # `ok` with another message: some GPUs can be used and others not.
    if (reply.enforcer.nvml, reply.enforcer.nvml_message) != ("ok", "ok"):
        found.append(f"NVML is {reply.enforcer.nvml}: {reply.enforcer.nvml_message}")
    if not reply.watcher.connected:
        age_s = reply.watcher.age_s
        heard = "never" if age_s is None else f"{duration(age_s)} ago"
        found.append(f"watcher is not connected, last heard: {heard}")
    if trouble := api_trouble(reply.watcher):
        found.append(trouble)
    if (why := reply.enforcer.paused) is not None:
        found.append(f"paused{why and f' ({why})'}: no limit of this node is written")
    names = pod_names(reply)
    return [named(line, names) for line in found + faults(reply.gpus, reply.pods)]


def faults(gpus: Iterable[messages.Gpu], pods: Iterable[messages.Pod]) -> list[str]:
    """Return which of these is not as it should be, one line each, as the enforcer words it."""
    found = [
        f"GPU {gpu_label(gpu)} is {gpu.state}: {gpu.reason}"
        for gpu in sorted(gpus, key=gpu_order)
        if gpu.state in _BAD_GPU
    ]
    found += [
        f"pod {pod.namespace}/{pod.name} is {pod.state}: {pod.reason}"
        for pod in sorted(pods, key=pod_order)
        if pod.state in _BAD_POD
    ]
    return found

"""Why a subject is not known, as far as that can be told, and what is near it: pure."""

import re

from shared import messages
from shared.powerctl.layout import ranges
from shared.powerctl.tables import duration, gone_names, gpu_label
from shared.powerctl.verdict import api_trouble

_TYPOS = 2
_SHORT = 4  # in a name of so many characters only one may be wrong
_SHOWN = 3
# A uid, also a static pod's, which is a hash.
_UID = re.compile(r"[0-9a-f]{8}-?([0-9a-f]{4}-?){3}[0-9a-f]{12}")
_GPU = re.compile(r"(GPU|MIG)-.*|[0-9a-f]{4,8}:[0-9a-f]{2}:.*", re.IGNORECASE)
# A head of an id that is shorter may be anybody's.
LEAST_HEAD = 8


def why(reply: messages.StatusReply, subject: str) -> str:
    """Return in words why nothing is known of `subject`, with the next command."""
    if subject.isdecimal():
        text = _no_index(reply, subject)
    elif _GPU.fullmatch(subject):
        text = f"no GPU of this node is called {subject!r}; powerctl status lists them"
    elif "/" in subject or _UID.fullmatch(subject):
        text = _no_pod(reply, subject)
    else:
        text = f"nothing is called {subject!r}: pods are NAMESPACE/NAME or a uid, GPUs an index, "
        text += "a UUID or a PCI address; powerctl status lists what is known"
    likely = near(reply, subject)
    return f"{text}; did you mean {' or '.join(likely)}?" if likely else text


def _no_index(reply: messages.StatusReply, subject: str) -> str:
    here = ranges(gpu.index for gpu in reply.gpus if gpu.index is not None)
    away = [f"{gpu_label(gpu)} ({gpu.state})" for gpu in reply.gpus if gpu.index is None]
    text = f"this node has no GPU {subject}: it has {f'GPU {here}' if here else 'none'}"
    return f"{text}, and without an index {', '.join(away)}" if away else text


def _no_pod(reply: messages.StatusReply, subject: str) -> str:
    if gone := [uid for uid, name in gone_names(reply).items() if subject in (uid, name)]:
        return _gone(reply, subject, gone)
    if found := [gpu for gpu in reply.gpus if subject in {each.owner for each in gpu.processes}]:
        labels = ", ".join(gpu_label(gpu) for gpu in found)
        return (
            f"pod {subject} runs on GPU {labels} of this node and has no annotation: it asks for "
            f"nothing, and nothing is limited for it; powerctl explain {gpu_label(found[0])}"
        )
    if reply.watcher.age_s is None:
        return f"no pod is known: {_unheard(reply)}; powerctl doctor looks for the cause"
    node = reply.enforcer.node or "this node"
    text = f"no annotated pod of {node} is called {subject!r}"
    trouble = api_trouble(reply.watcher)
    if not reply.watcher.connected:
        trouble = f"the watcher is silent for {duration(reply.watcher.age_s)}"
    if trouble:
        text += f" as far as is known ({trouble})"
    return f"{text}: it has no annotation, is on another node, or is not there; {_command(subject)}"


def _command(subject: str) -> str:
    namespace, slash, name = subject.partition("/")
    if not slash:
        get = "kubectl get pods -A -o custom-columns=U:.metadata.uid,NS:.metadata.namespace,"
        return f"{get}N:.metadata.name,NODE:.spec.nodeName tells which"
    return f"kubectl get pod {name} -n {namespace} -o yaml tells which (annotations, nodeName)"


def _gone(reply: messages.StatusReply, subject: str, uids: list[str]) -> str:
    kept = [gpu for gpu in reply.gpus if set(uids) & set(gpu.pods)]
    labels = ", ".join(gpu_label(gpu) for gpu in kept)
    text, still = f"pod {subject} has gone", "still has its limit"
    if reply.watcher.age_s is None:
        # The name is the ledger's, and nobody has told yet which pods there are.
        text = f"whether pod {subject} is still there is not known: {_unheard(reply)}"
        still = "is kept for it"
    if not kept:
        return text
    return f"{text}; GPU {labels} {still}: powerctl explain {gpu_label(kept[0])}"


def _unheard(reply: messages.StatusReply) -> str:
    return api_trouble(reply.watcher) or "the watcher has not told of any pod yet"


def near(reply: messages.StatusReply, subject: str) -> list[str]:
    """Return the known subjects of which `subject` may be a slip, the likeliest first."""
    text = subject.lower()
    names = [f"{pod.namespace}/{pod.name}" for pod in reply.pods]
    ids = [pod.uid for pod in reply.pods] + [gpu.uuid for gpu in reply.gpus]
    namespace, _, name = text.rpartition("/")
    elsewhere = [each for each in names if each.partition("/")[2] == name]
    slips = [each for each in names if _slip(text if namespace else name, each, bool(namespace))]
    slips += [each for each in ids if len(text) > LEAST_HEAD and _is_within(text, each, _TYPOS)]
    heads = [each for each in ids if len(text) >= LEAST_HEAD and each.lower().startswith(text)]
    return list(dict.fromkeys([*elsewhere, *heads, *slips]))[:_SHOWN]


def _slip(text: str, known: str, with_namespace: bool) -> bool:
    return _is_slip(text, known if with_namespace else known.partition("/")[2])


def _is_slip(text: str, known: str) -> bool:
    """Tell whether a typing error makes the one of the other: another number is another pod."""
    if re.sub(r"[0-9]+", "0", text) == re.sub(r"[0-9]+", "0", known):
        return False
    return _is_within(text, known, 1 if len(known.rpartition("/")[2]) <= _SHORT else _TYPOS)


def _is_within(text: str, known: str, most: int) -> bool:
    """Tell whether at most so many typing errors lie between them."""
    return abs(len(text) - len(known)) <= most and _distance(text, known.lower()) <= most


def _distance(one: str, other: str) -> int:
    """Return how many characters are missing, too many, wrong, or in the place of the next."""
    before: list[int] = []
    row = list(range(len(other) + 1))
    for i, a in enumerate(one):
        last, row, earlier = row, [i + 1], before
        for j, b in enumerate(other):
            cost = min(last[j + 1] + 1, row[j] + 1, last[j] + (a != b))
            if i and j and (a, one[i - 1]) == (other[j - 1], b):
                cost = min(cost, earlier[j - 1] + 1)
            row.append(cost)
        before = last
    return row[-1]

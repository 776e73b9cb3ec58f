"""Status and events as text for people. Pure; all that came over the socket is escaped."""

import re
from collections.abc import Iterable
from datetime import UTC, datetime

from shared import messages
from shared.powerctl.layout import STICKY, WIDTH, Column, Paint, plain, ranges, table, wrapped
from shared.units import format_watts

# Real uids have 36 characters, or 32 (static pods). A made-up short one such as `a` would be
# replaced in the middle of words.
_UID_CHARS = 32
# What is left of a uid and of a GPU's UUID in a table: eight hexadecimal digits tell them apart.
_UID_SHOWN = 8
_UUID_SHOWN = len("GPU-") + 8
# An answer shows no more of a GPU's processes.
_MOST_PROCESSES = 32
# Printable ASCII only: escape sequences, bidirectional overrides and look-alike letters of other
# scripts become visible, and every character is one column wide.
_UNPRINTABLE = re.compile(r"[^ -~]")


def escape(text: str) -> str:
    """Return `text` with everything but printable ASCII written as Python writes it."""
    return _UNPRINTABLE.sub(lambda match: ascii(match.group())[1:-1], text)


def watts(limit_mw: int | None) -> str:
    """Return a limit with its unit, `-` where it is not known."""
    return "-" if limit_mw is None else f"{format_watts(limit_mw)} W"


def duration(seconds: float) -> str:
    """Return a length of time in its two largest units."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, hours, days = int(seconds) // 60, int(seconds) // 3600, int(seconds) // 86400
    if not hours:
        return f"{minutes} min {int(seconds) % 60} s"
    return f"{hours} h {minutes % 60} min" if not days else f"{days} d {hours % 24} h"


def pod_names(reply: messages.StatusReply) -> dict[str, str]:
    """Return namespace/name by uid, also of pods that have gone and are still spoken of."""
    now = {pod.uid: escape(f"{pod.namespace}/{pod.name}") for pod in reply.pods}
    return gone_names(reply) | now


def gone_names(reply: messages.StatusReply) -> dict[str, str]:
    """Return namespace/name by uid of pods that are not there any more, but a GPU is kept for."""
    here = {pod.uid for pod in reply.pods}
    told = [pod for gpu in reply.gpus for pod in gpu.pod_names if pod.name and pod.uid not in here]
    return {pod.uid: escape(f"{pod.namespace}/{pod.name}") for pod in told}


def event_names(event: messages.GpuEvent) -> dict[str, str]:
    """Return namespace/name by uid of those pods of an event that it names."""
    named = [pod for pod in event.pod_names if pod.name is not None]
    return {pod.uid: escape(f"{pod.namespace}/{pod.name}") for pod in named}


def named(text: str, names: dict[str, str]) -> str:
    """Return `text`, safe for a terminal, with the names of pods in place of their uids."""
    text = escape(text)
    for uid, name in names.items():
        if len(uid) >= _UID_CHARS:
            text = text.replace(uid, name)
    return text


def cgroup_lines(evidence: str) -> str:
    """Return the lines of one cgroup file, those that repeat a path or name the root left out.

    A v1 host shows a dozen hierarchies, nearly always with the same path. Whoever names a cgroup
    may use any character but the newline, also those that splitlines() takes for one.
    """
    found = evidence.removesuffix("\n").split("\n")
    lines = {line.split(":", 2)[-1]: line for line in reversed(found)}
    telling = [line for path, line in reversed(lines.items()) if path != "/"]
    return "; ".join(telling or list(lines.values())[:1])


def gpu_label(gpu: messages.Gpu) -> str:
    """Return how one names this GPU in short: its index, or while it has none its uuid's head."""
    return escape(gpu.uuid)[:_UUID_SHOWN] if gpu.index is None else str(gpu.index)


def short_pci(pci: str | None) -> str:
    """Return a PCI address as lspci and the kernel's log write it, with a domain of four digits."""
    return "-" if pci is None else escape(pci).removeprefix("0000").lower()


def plural(count: int, noun: str) -> str:
    """Return so many of them in words."""
    if count == 1:
        return f"1 {noun}"
    return f"{count} {noun}es" if noun.endswith("s") else f"{count} {noun}s"


def gpu_order(gpu: messages.Gpu) -> tuple[bool, int, str]:
    """Sort GPUs by index, those without one last."""
    return (gpu.index is None, gpu.index or 0, gpu.uuid)


def pod_order(pod: messages.Pod) -> tuple[str, str, str]:
    """Sort pods by name."""
    return (pod.namespace, pod.name, pod.uid)


def users(gpu: messages.Gpu, names: dict[str, str]) -> list[str]:
    """Return who is on a GPU: pods by name, and how many processes of others."""
    owners = {process.owner for process in gpu.processes}
    pods = [*gpu.pods, *sorted(owners & names.keys() - set(gpu.pods))]
    found = [names.get(uid, f"pod {escape(uid)[:_UID_SHOWN]}") for uid in pods]
    others = sum(1 for each in gpu.processes if each.pid and each.owner not in pods)
    if others:
        text = plural(others, "other process")
        found.append(f"{text} or more" if len(gpu.processes) >= _MOST_PROCESSES else text)
    if gpu.unread is not None:
        found.append("processes unknown")
    return found


def holds(pod: messages.Pod, gpus: Iterable[messages.Gpu]) -> int | None:
    """Return the lowest limit that is held for a pod, None where none is."""
    mine = [gpu.limit_mw for gpu in gpus if gpu.uuid in pod.gpus and _is_held(gpu)]
    return min((limit for limit in mine if limit is not None), default=None)


def _is_held(gpu: messages.Gpu) -> bool:
    """Tell whether a GPU has a limit of ours: entered is not yet set, where that is refused."""
    return gpu.managed and (gpu.limit_mw != gpu.original_mw or gpu.limit_mw == gpu.target_mw)


def event(message: messages.Event, names: dict[str, str]) -> str:
    """Return one decision as one line; `names` says how the pods are called."""
    when = datetime.fromtimestamp(message.ts, UTC).isoformat(timespec="milliseconds")
    head = f"{when.replace('+00:00', 'Z')}  {messages.name_of(message):17}"
    if isinstance(message, messages.SnapshotAccepted):
        what = f"revision {message.revision}"
    elif isinstance(message, messages.MessageDenied):
        uid = "without a proven uid" if message.uid is None else f"from uid {message.uid}"
        what = f"{message.code} {uid}"
    else:
        what = _change(message)
    return named(f"{head} {what}" + (f": {message.message}" if message.message else ""), names)


def _change(message: messages.GpuEvent) -> str:
    text = f"GPU {message.uuid if message.index is None else message.index}"
    if message.index is not None and message.pci:
        text += f" ({message.pci})"
    text += ", dry run," if message.dry_run else ""
    if not isinstance(message, messages.GpuLost | messages.GpuBack):
        text += f" {watts(message.from_mw)} -> {watts(message.to_mw)}"
        text += f" ({message.reason})" if message.reason else ""
    return text + (f" for {', '.join(message.pods)}" if message.pods else "")


def header(reply: messages.StatusReply) -> str:
    """Return which agent answers, where, and to whom it is linked, to be wrapped between parts."""
    enforcer, watcher = reply.enforcer, reply.watcher
    heard = "never heard" if watcher.age_s is None else f"{duration(watcher.age_s)} ago"
    parts = [
        f"power-agent {enforcer.version} on {enforcer.node or 'a node not yet named'}",
        f"NVML {enforcer.nvml}, driver {enforcer.driver_version or 'unknown'}",
        f"watcher {'linked' if watcher.connected else 'NOT LINKED'}, {heard}",
        f"up {duration(enforcer.uptime_s)}",
    ]
    if watcher.api_age_s is not None:
        parts.insert(3, f"API heard {duration(watcher.api_age_s)} ago")
    return " | ".join(escape(part).replace(" ", STICKY) for part in parts)


_GPU_COLUMNS = (
    Column("GPU"),
    Column("PCI", keep=3),
    Column("STATE"),
    Column("LIMIT", right=True),
    Column("ENFORCED", right=True, keep=6),
    Column("DRAW", right=True, keep=5),
    Column("RANGE", keep=2),
    Column("FOUND", right=True, keep=4),
    Column("MODEL", keep=1),
    Column("PODS"),
)


def gpu_table(reply: messages.StatusReply, paint: Paint = plain, width: int = WIDTH) -> list[str]:
    """Return the lines of the GPUs' table."""
    if not reply.gpus:
        return ["no GPU is known"]
    names = pod_names(reply)
    rows = [_gpu_row(gpu, names) for gpu in sorted(reply.gpus, key=gpu_order)]
    columns = list(_GPU_COLUMNS)
    if all(gpu.pci is None for gpu in reply.gpus):  # an enforcer that does not tell
        del columns[1]
        rows = [[row[0], *row[2:]] for row in rows]
    state = [column.heading for column in columns].index("STATE")
    made = table(columns, rows, state, paint, width)
    lines = [line for row in made.rows for line in row]
    if made.left_out:
        where = "a wider terminal or powerctl explain shows them"
        lines += wrapped(f"left out: {', '.join(made.left_out)}; {where}", width)
    return lines


def _gpu_row(gpu: messages.Gpu, names: dict[str, str]) -> list[str]:
    bounds = f"{format_watts(gpu.min_mw)}-{format_watts(gpu.max_mw)}"
    known = gpu.min_mw is not None and gpu.max_mw is not None
    # `free` is free of the agent. A reader takes it for idle.
    used = gpu.state == "free" and bool(gpu.processes)
    return [
        gpu_label(gpu),
        short_pci(gpu.pci),
        "in use" if used else gpu.state,
        watts(gpu.limit_mw),
        watts(gpu.enforced_mw),
        "-" if gpu.power_mw is None else f"{gpu.power_mw / 1000:.0f} W",
        bounds if known else "-",
        watts(gpu.original_mw),
        escape((gpu.name or "-").removeprefix("NVIDIA "))[:20],
        ", ".join(each.replace(" ", STICKY) for each in users(gpu, names)) or "-",
    ]


_POD_COLUMNS = (
    Column("STATE"),
    Column("ASKED", right=True),
    Column("HOLDS", right=True),
    Column("GPUS", keep=1),
    Column("POD"),
)


def pod_table(
    reply: messages.StatusReply,
    paint: Paint = plain,
    width: int = WIDTH,
    told: Iterable[str] = (),
) -> list[str]:
    """Return the lines of the pods' table, with reasons but for pods in a state of `told`."""
    if not reply.pods:
        unheard = reply.watcher.age_s is None
        return ["no pod is known" if unheard else "no annotated pod on this node"]
    pods = sorted(reply.pods, key=pod_order)
    names = pod_names(reply)
    made = table(_POD_COLUMNS, [_pod_row(pod, reply) for pod in pods], 0, paint, width)
    heading, *body = made.rows
    lines = list(heading)
    for pod, row in zip(pods, body, strict=True):
        lines += row
        if pod.state not in told and pod.reason:
            lines += wrapped(named(pod.reason, names), width, " " * 10, " " * 12)
    return lines


def _pod_row(pod: messages.Pod, reply: messages.StatusReply) -> list[str]:
    asked = watts(pod.requested_mw)
    if pod.requested_mw is None:
        asked = f'"{escape(pod.raw)}"'
        asked = asked if len(asked) <= 14 else f'{asked[:11]}.."'
    held_mw = holds(pod, reply.gpus)
    name = escape(f"{pod.namespace}/{pod.name}")
    return [pod.state, asked, "" if held_mw is None else watts(held_mw), _gpus_of(pod, reply), name]


def _gpus_of(pod: messages.Pod, reply: messages.StatusReply) -> str:
    mine = [gpu for gpu in reply.gpus if gpu.uuid in pod.gpus]
    text = [ranges(gpu.index for gpu in mine if gpu.index is not None)]
    text += [gpu_label(gpu) for gpu in mine if gpu.index is None]
    return ",".join(filter(None, text)) or "-"

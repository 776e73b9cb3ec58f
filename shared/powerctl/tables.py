"""Status and events as text for people. Pure; all that came over the socket is escaped."""

import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime

from shared import messages
from shared.units import format_watts

Paint = Callable[[str, str], str]

WIDTH = 100
# Real uids have 36 characters, or 32 (static pods). A made-up short one such as `a` would be
# replaced in the middle of words.
_UID_CHARS = 32
_BAD_GPU = ("held", "failed", "lost")
_COLOURS = {
    "managed": "32",
    "enforced": "32",
    "ok": "32",
    "clamped": "33",
    "conflict": "33",
    "waiting": "33",
    "invalid": "33",
    "warn": "33",
    "held": "1;33",
    "failed": "1;31",
    "lost": "1;31",
    "fail": "1;31",
}
# Printable ASCII only: escape sequences, bidirectional overrides and look-alike letters of other
# scripts become visible, and every character is one column wide.
_UNPRINTABLE = re.compile(r"[^ -~]")


def plain(text: str, _state: str) -> str:
    """Return `text` as it is."""
    return text


def coloured(text: str, state: str) -> str:
    """Return `text` in the colour of `state`, for terminals."""
    colour = _COLOURS.get(state)
    return f"\x1b[{colour}m{text}\x1b[0m" if colour else text


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
    """Return namespace/name by uid."""
    return {pod.uid: escape(f"{pod.namespace}/{pod.name}") for pod in reply.pods}


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
    """Return how one names this GPU: its index, or its uuid while it has none."""
    return escape(gpu.uuid) if gpu.index is None else str(gpu.index)


def problems(reply: messages.StatusReply) -> list[str]:
    """Return what is not as it should be, one line each."""
    found = []
    # `ok` with another message: some GPUs can be used and others not.
    if (reply.enforcer.nvml, reply.enforcer.nvml_message) != ("ok", "ok"):
        found.append(f"NVML is {reply.enforcer.nvml}: {reply.enforcer.nvml_message}")
    if not reply.watcher.connected:
        found.append(f"watcher is not connected, last heard: {_heard(reply.watcher)}")
    if (why := reply.enforcer.paused) is not None:
        found.append(f"paused{why and f' ({why})'}: no limit of this node is written")
    names = pod_names(reply)
    return [named(line, names) for line in found + faults(reply.gpus, reply.pods)]


def faults(gpus: Iterable[messages.Gpu], pods: Iterable[messages.Pod]) -> list[str]:
    """Return which of these is not as it should be, one line each, as the enforcer words it."""
    found = [
        f"GPU {gpu_label(gpu)} is {gpu.state}: {gpu.reason}"
        for gpu in sorted(gpus, key=_gpu_order)
        if gpu.state in _BAD_GPU
    ]
    found += [
        f"pod {pod.namespace}/{pod.name} is failed: {pod.reason}"
        for pod in sorted(pods, key=_pod_order)
        if pod.state == "failed"
    ]
    return found


def status(reply: messages.StatusReply, paint: Paint = plain) -> list[str]:
    """Return the lines of `powerctl status`."""
    lines = [*_header(reply), "", *_gpus(reply, paint), "", *_pods(reply, paint)]
    wrong = problems(reply)
    if wrong:
        lines += ["", paint("not as it should be:", "fail")]
        for problem in wrong:
            lines += _note(problem, 2)
    return lines


def table(
    rows: Sequence[Sequence[str]], right: Iterable[int], state: int, paint: Paint
) -> list[str]:
    """Return `rows` (the first is the heading) aligned; the last column is not padded."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        cells[-1] = row[-1]
        cells[state] = paint(cells[state], row[state])
        lines.append("  ".join(cells).rstrip())
    return lines


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


def _heard(watcher: messages.WatcherStatus) -> str:
    return "never" if watcher.age_s is None else f"{duration(watcher.age_s)} ago"


def _header(reply: messages.StatusReply) -> list[str]:
    enforcer, watcher = reply.enforcer, reply.watcher
    parts = [
        f"power-agent {enforcer.version} on {enforcer.node or 'a node not yet named'}",
        f"NVML {enforcer.nvml}, driver {enforcer.driver_version or 'unknown'}",
        f"watcher {'linked' if watcher.connected else 'NOT LINKED'}, {_heard(watcher)}",
        f"up {duration(enforcer.uptime_s)}",
    ]
    lines = [escape(" | ".join(parts))]
    if enforcer.dry_run:
        lines.append("DRY RUN: limits are decided and reported, never written")
    return lines


def _note(text: str, indent: int) -> list[str]:
    blank = " " * indent
    return textwrap.wrap(
        text, WIDTH, initial_indent=blank, subsequent_indent=blank + "  ", break_on_hyphens=False
    )


def _gpu_order(gpu: messages.Gpu) -> tuple[bool, int, str]:
    return (gpu.index is None, gpu.index or 0, gpu.uuid)


def _pod_order(pod: messages.Pod) -> tuple[str, str, str]:
    return (pod.namespace, pod.name, pod.uid)


def _gpus(reply: messages.StatusReply, paint: Paint) -> list[str]:
    if not reply.gpus:
        return ["no GPU is known"]
    names = pod_names(reply)
    rows = [["GPU", "STATE", "LIMIT", "ENFORCED", "DRAW", "RANGE", "FOUND", "MODEL", "PODS"]]
    for gpu in sorted(reply.gpus, key=_gpu_order):
        draw = "-" if gpu.power_mw is None else f"{gpu.power_mw / 1000:.0f} W"
        bounds = f"{format_watts(gpu.min_mw)}-{format_watts(gpu.max_mw)}"
        known = gpu.min_mw is not None and gpu.max_mw is not None
        rows.append(
            [
                gpu_label(gpu),
                gpu.state,
                watts(gpu.limit_mw),
                watts(gpu.enforced_mw),
                draw,
                bounds if known else "-",
                watts(gpu.original_mw),
                escape((gpu.name or "-").removeprefix("NVIDIA "))[:20],
                ", ".join(names.get(uid, escape(uid)) for uid in gpu.pods) or "-",
            ]
        )
    return table(rows, right=(2, 3, 4, 6), state=1, paint=paint)


def _pods(reply: messages.StatusReply, paint: Paint) -> list[str]:
    if not reply.pods:
        return ["no annotated pod on this node"]
    pods = sorted(reply.pods, key=_pod_order)
    labels, names = {gpu.uuid: gpu_label(gpu) for gpu in reply.gpus}, pod_names(reply)
    rows = [["STATE", "ASKED", "HOLDS", "GPUS", "POD"]]
    for pod in pods:
        asked = watts(pod.requested_mw)
        if pod.requested_mw is None:
            asked = f'"{escape(pod.raw)}"'
            asked = asked if len(asked) <= 14 else f'{asked[:11]}.."'
        gpus = ",".join(labels.get(uuid, escape(uuid)) for uuid in pod.gpus) or "-"
        rows.append([pod.state, asked, watts(pod.effective_mw), gpus, names[pod.uid]])
    heading, *body = table(rows, right=(1, 2), state=0, paint=paint)
    lines = [heading]
    for pod, line in zip(pods, body, strict=True):
        lines.append(line)
        # A failed pod's reason stands below the tables, an enforced one's in `explain`.
        if pod.state not in ("enforced", "failed") and pod.reason:
            lines += _note(named(pod.reason, names), 10)
    return lines

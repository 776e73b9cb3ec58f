"""The doctor's checks of what the enforcer says: pure, from one status reply."""

import posixpath
import re
from collections.abc import Iterator

from shared import messages
from shared.nodes import LOST
from shared.powerctl import watcher_checks
from shared.powerctl.check import Check, fail, warn
from shared.powerctl.tables import cgroup_lines, gpu_label, plural, watts

_SAMPLES = 5
_XID = "nvidia-smi and dmesg (Xid) on the node"
_PERMISSION = "NO_PERMISSION"
_ABOVE = "{}, above, has the cause and the remedy"
# What the reason of a held or failed GPU means for whoever repairs it: the first that is in it.
# The words are those of policy.py, gpu.py and NVML.
_REMEDIES = (
    ("process list", _ABOVE.format("`process lists`")),
    ("belongs to a pod", _ABOVE.format("`unknown owners`")),
    ("watcher", _ABOVE.format("`watcher`")),
    ("no snapshot", _ABOVE.format("`watcher`")),
    (_PERMISSION, _ABOVE.format("`NVML permission`")),
    ("not taken:", _ABOVE.format("`ledger`")),
    ("takes no power limit", "keep annotated pods off this board: it has no limit to set"),
    ("NOT_SUPPORTED", "keep annotated pods off this board: its driver or model takes no limit"),
    ("yet it reads", "another program or the board sets it back: nvidia-smi -q -d POWER, the BMC"),
    ("safe default", "give POWER_AGENT_SAFE_DEFAULT watts that this board takes, or a share of it"),
)
_MEANWHILE = (
    "meanwhile these GPUs are held, and a pod gets its limit there only by the kubelet's "
    "assignment (POWER_AGENT_KUBELET_DIR)"
)


def from_reply(
    reply: messages.StatusReply,
    sys_admin: bool | None = None,
    watchers: watcher_checks.Sight = watcher_checks.NOTHING,
) -> list[Check]:
    """Return the checks of the answer; the rest is what `node_checks` and the like saw."""
    return [
        nvml(reply.enforcer),
        permission(reply, sys_admin),
        watcher_checks.link(reply.watcher, reply.counters, watchers),
        watcher_checks.api(reply.watcher, watchers),
        cgroup_driver(reply),
        kubelet(reply),
        process_lists(reply),
        *owners(reply),
        *gpus(reply),
        persistence(reply),
        dry_run(reply.enforcer),
        brake(reply),
        denied(reply.counters),
    ]


def nvml(enforcer: messages.EnforcerStatus) -> Check:
    """Check that the GPUs can be reached, every one of them."""
    name, seen = "NVML", f"{enforcer.nvml}, driver {enforcer.driver_version or 'unknown'}"
    if (enforcer.nvml, enforcer.nvml_message) == ("ok", "ok"):
        return Check(name=name, seen=seen)
    seen += f": {enforcer.nvml_message}"
    if enforcer.nvml == "absent":
        remedy = "install the driver and give the enforcer libnvidia-ml.so.1 and /dev/nvidiactl"
        return fail(name, seen, remedy + " (runtimeClassName: nvidia, or a driver mount)")
    if "VERSION_MISMATCH" in enforcer.nvml_message:
        return fail(name, seen, "the driver was upgraded: restart the enforcer's container")
    if "NO_PERMISSION" in enforcer.nvml_message:
        return fail(name, seen, "`device nodes`, above, tells modes from what else may refuse it")
    if "UNKNOWN" in enforcer.nvml_message:
        return fail(name, seen, f"if it has worked before, {LOST}; else {_XID}")
    return fail(name, seen, _XID)


def permission(reply: messages.StatusReply, sys_admin: bool | None) -> Check:
    """Check that NVML lets the enforcer write limits: the driver asks for CAP_SYS_ADMIN."""
    name, written = "NVML permission", reply.counters.limit_writes
    remedy = (
        "CAP_SYS_ADMIN in the node's first user namespace: securityContext privileged: true "
        "or capabilities add SYS_ADMIN, and no hostUsers: false"
    )
    refused = sum(
        count
        for gpu in reply.gpus
        for error, count in gpu.write_failures.items()
        if "permission" in error.lower()
    )
    # A count is of all time. What matters is whether the last try of a GPU was refused.
    now = [gpu for gpu in reply.gpus if gpu.state == "failed" and _PERMISSION in gpu.reason]
    if now or (refused and not written):
        labels = ", ".join(gpu_label(gpu) for gpu in now)
        seen = f"GPU {labels}: the last write was refused" if now else f"{refused} were refused"
        if sys_admin:
            remedy = (
                "CAP_SYS_ADMIN is held, but not in the node's first user namespace, where it "
                "counts: no hostUsers: false; else `device nodes`, above"
            )
        return fail(name, f"{seen} for lack of permission, {written} limits written", remedy)
    if sys_admin is False and not written:
        return fail(name, "the enforcer runs without CAP_SYS_ADMIN", remedy)
    if sys_admin is None and not written:
        seen = "no limit was written yet, and the enforcer's capabilities cannot be seen from here"
        return warn(name, seen, "run powerctl doctor in the enforcer's container")
    held = "CAP_SYS_ADMIN is there, " if sys_admin else ""
    past = f"{refused} refused before, none of them the last" if refused else "none refused"
    return Check(name=name, seen=f"{held}{written} limits written, {past}")


def cgroup_driver(reply: messages.StatusReply) -> Check:
    """Say which cgroup driver the pods' processes show; two at once hint at a mismatch."""
    name, roots = "cgroup driver", ", ".join(reply.enforcer.cgroup_roots) or "none"
    shown = [p.evidence for gpu in reply.gpus for p in gpu.processes if "kubepods" in p.evidence]
    drivers = sorted({_driver(line) for line in shown})
    if len(drivers) > 1:
        remedy = (
            "give kubelet and container runtime the same cgroup driver (SystemdCgroup of each "
            "runtime handler): limits of memory and processors miss pods that are elsewhere"
        )
        return warn(name, f"{' and '.join(drivers)} side by side; roots {roots}", remedy)
    seen = drivers.pop() if drivers else "not seen yet: no pod's process on a GPU"
    return Check(name=name, seen=f"{seen}; pods are looked for below {roots}")


def _driver(line: str) -> str:
    if re.search(r"kubepods[^/]*\.slice:", line):
        return "cgroupfs under a kubelet on systemd"
    return "systemd" if re.search(r"kubepods[^/]*\.slice", line) else "cgroupfs"


def kubelet(reply: messages.StatusReply) -> Check:
    """Check that limits can stand before a pod's containers start."""
    name, state = "kubelet's assignments", reply.enforcer.kubelet
    if state == "off":
        seen = "not read: a limit follows a pod's first process, about 0.1 s later"
        return Check(name=name, seen=seen)
    if state == "ok":
        return Check(name=name, seen="read: a limit stands when a pod is assigned its GPU")
    if state == "not read yet" and reply.enforcer.nvml != "ok":
        return Check(name=name, seen="not read yet: it is with the first GPU that NVML shows")
    if "not a checkpoint" in state:
        remedy = (
            "the kubelet's version may write what is not known here (`Tested on` in README.md); a "
            "file that is damaged it writes anew when it next assigns a device"
        )
    else:
        remedy = (
            "mount device-plugins of the kubelet's root into the enforcer, read-only, and name "
            "that root in POWER_AGENT_KUBELET_DIR"
        )
    return warn(name, state, f"{remedy}; until then a limit follows a pod's first process")


def process_lists(reply: messages.StatusReply) -> Check:
    """Check that it can be seen who runs on each GPU; what cannot be read is shown as pid 0."""
    name = "process lists"
    found = [
        (gpu_label(gpu), process.evidence)
        for gpu in reply.gpus
        for process in gpu.processes
        if not process.pid
    ]
    if not found:
        return Check(name=name, seen="none that cannot be read")
    reasons = "; ".join(why for _, why in found)
    if "update the driver" in reasons:
        remedy = "update the driver as it says"
    elif "NOT_SUPPORTED" in reasons:
        remedy = "this board (a virtual GPU, for instance) does not tell its processes"
    elif "NO_PERMISSION" in reasons:
        remedy = "`device nodes`, above, tells modes from what else may refuse it"
    else:
        remedy = f"if it lasts: {_XID}"
    seen = "; ".join(f"GPU {label}: {why}" for label, why in found[:_SAMPLES])
    more = f"; and {len(found) - _SAMPLES} more" if len(found) > _SAMPLES else ""
    return fail(name, f"unreadable: {seen}{more}", f"{remedy}; {_MEANWHILE}")


def owners(reply: messages.StatusReply) -> Iterator[Check]:
    """Show samples of processes that belong to no known pod."""
    for owner, name in (("unknown", "unknown owners"), ("other", "other owners")):
        found = [
            (p.pid, p.evidence)
            for gpu in reply.gpus
            for p in gpu.processes
            if p.owner == owner and p.pid
        ]
        samples = "; ".join(
            f"pid {pid}: {cgroup_lines(line) or 'no line'}" for pid, line in found[:_SAMPLES]
        )
        astray = owner == "other" and any("kubepods" in line for _, line in found)
        if not found:
            yield Check(name=name, seen="none")
        elif owner == "unknown":
            remedy = (
                "their GPUs are held as they are until these end; where they are pods, "
                " POWER_AGENT_PROC_ROOT must be the host's proc, mounted without hidepid"
            )
            yield warn(name, f"{len(found)} on GPUs: {samples}", remedy)
        elif astray:
            roots = ", ".join(reply.enforcer.cgroup_roots) or "none"
            remedy = (
                f"if these are pods: POWER_AGENT_CGROUP_ROOT is the parent of kubepods, not {roots}"
            )
            yield warn(name, f"{len(found)} on GPUs: {samples}", remedy)
        else:
            yield Check(name=name, seen=f"{len(found)} on GPUs, left alone: {samples}")


def gpus(reply: messages.StatusReply) -> Iterator[Check]:
    """Check each GPU's state, and that what was set is what holds."""
    wrong = [gpu for gpu in reply.gpus if gpu.state in ("held", "failed", "lost")]
    for gpu in wrong:
        paused = gpu.reason.startswith("paused")
        remedy = "`brake`, below" if paused else _remedy(gpu, reply.enforcer.nvml)
        yield fail(f"GPU {gpu_label(gpu)}", f"{gpu.state}: {gpu.reason}", remedy)
    if not wrong:
        yield Check(name="GPUs", seen=f"{len(reply.gpus)} known, none failed, lost or held")
    for gpu in reply.gpus:
        limit, enforced = gpu.limit_mw, gpu.enforced_mw
        if limit is not None and enforced is not None and enforced < limit:
            yield warn(
                f"GPU {gpu_label(gpu)}",
                f"limit {watts(limit)}, but {watts(enforced)} is enforced",
                "a stronger limiter acts (thermal, power supply, the module's, out-of-band): "
                "nvidia-smi -q -d POWER,PERFORMANCE and the BMC's settings",
            )


def _remedy(gpu: messages.Gpu, nvml: messages.NvmlState) -> str:
    if gpu.state == "lost" and nvml != "ok":
        return _ABOVE.format("`NVML`")
    found = [remedy for words, remedy in _REMEDIES if words in gpu.reason]
    if found and gpu.state != "lost":
        return found[0]
    return f"{_XID}; powerctl explain {gpu_label(gpu)} shows what holds meanwhile"


def persistence(reply: messages.StatusReply) -> Check:
    """Warn where the driver forgets limits as soon as nobody uses a GPU."""
    name = "persistence mode"
    off = [gpu_label(gpu) for gpu in reply.gpus if gpu.persistence is False]
    if off:
        remedy = (
            "nvidia-smi -pm 1 on the node, or nvidia-persistenced: without it a limit is forgotten "
            "when the last program that has the GPU open ends (also when this agent restarts), and "
            "opening NVML takes up to half a minute, in which the enforcer answers nobody"
        )
        return warn(name, f"off on GPU {', '.join(off)}", remedy)
    known = [gpu for gpu in reply.gpus if gpu.persistence]
    return Check(name=name, seen=f"on for {len(known)} of {len(reply.gpus)} GPUs, off for none")


def dry_run(enforcer: messages.EnforcerStatus) -> Check:
    """Warn where nothing is written."""
    if enforcer.dry_run:
        return warn("dry run", "on: no limit is written", "unset POWER_AGENT_DRY_RUN")
    return Check(name="dry run", seen="off")


def brake(reply: messages.StatusReply) -> Check:
    """Warn where a person has stopped all writing, or keeps a GPU free of limits."""
    name, folder = "brake", posixpath.dirname(reply.enforcer.ledger)
    paused, released = reply.enforcer.paused, reply.enforcer.released
    here = {gpu.uuid for gpu in reply.gpus}
    seen, remedies = [], []
    if paused is not None:
        seen.append(f"paused{paused and f' ({paused})'}: no limit is written, at a stop neither")
        remedies.append(f"when that is over: rm {folder}/pause")
    if strange := [each for each in released if each not in here]:
        seen.append(f"{folder}/release names no GPU of this node: {', '.join(strange)}")
        remedies.append("each line begins with a UUID as powerctl status has it")
    if free := [each for each in released if each in here]:
        seen.append(f"a person keeps these free of limits: {', '.join(free)}")
        remedies.append(f"when that is over: rm {folder}/release")
    if seen:
        return warn(name, "; ".join(seen), "; ".join(remedies))
    return Check(name=name, seen="off: nothing is paused, and no GPU is kept free by hand")


def denied(counters: messages.Counters) -> Check:
    """Warn where somebody was refused since the start."""
    name, refused = "refused messages", counters.refused_connections
    seen = f"{counters.denied} denied, {counters.malformed} malformed, {counters.stale} stale"
    seen += f", {plural(refused, 'connection')} closed, since the enforcer started"
    if not (counters.denied or counters.malformed or refused):
        return Check(name=name, seen=seen)
    if counters.malformed:
        return warn(name, seen, "run both containers from the same image; powerctl events: whose")
    return warn(
        name,
        seen,
        "powerctl events shows whose, as they come; nothing comes: it is over. One program that "
        "keeps trying counts about ten a second (powerctl: two seconds). Whoever should be "
        "heard: POWER_AGENT_WATCHER_UID is the watcher's, POWER_AGENT_READER_UIDS are readers'",
    )

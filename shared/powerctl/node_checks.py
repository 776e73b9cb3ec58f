"""The doctor's checks of what can be seen from here: directory, sockets, pids, nodes, ledger."""

import contextlib
import ipaddress
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from shared import messages
from shared.modes import READ_AND_WRITE, lets_in
from shared.nodes import CAP_DAC_OVERRIDE, DENIED, DEV, LOST, described, device_nodes
from shared.powerctl.check import PROCESS, Check, fail, warn
from shared.settings import without_password
from shared.sockets import PULSE_OLDEST_S, control_path, events_path, pulse_path

# PROC_PID_INIT_INO of the kernel's include/linux/proc_ns.h: the first pid namespace's inode.
_FIRST_PID_NAMESPACE = "pid:[4026531836]"
_CAP_SYS_ADMIN = 21  # linux/capability.h


def directory(run_dir: Path) -> Check:
    """Check that only root can replace a socket."""
    name = "socket directory"
    try:
        found = run_dir.stat()
    except OSError as error:
        return fail(
            name,
            f"{run_dir}: {error.strerror}",
            "the enforcer makes it; name another with --socket or POWER_AGENT_RUN_DIR; " + PROCESS,
        )
    mode = stat.S_IMODE(found.st_mode)
    seen = f"{run_dir}, owner uid {found.st_uid}, mode {mode:o}"
    if not stat.S_ISDIR(found.st_mode):
        return fail(name, f"{run_dir} is no directory", "name another with POWER_AGENT_RUN_DIR")
    if mode & 0o022:
        remedy = f"whoever writes here can pose as the enforcer: chmod 755 {run_dir}"
        return fail(name, seen, remedy)
    if found.st_uid != 0:
        return warn(name, seen, f"on a real node root owns it: chown root {run_dir}")
    return Check(name=name, seen=seen)


def sockets(run_dir: Path) -> Iterator[Check]:
    """Check that both sockets are there."""
    for path in (control_path(run_dir), events_path(run_dir)):
        try:
            is_socket = stat.S_ISSOCK(path.stat().st_mode)
        except OSError as error:
            yield fail(path.name, f"{path}: {error.strerror}", "the enforcer makes it; " + PROCESS)
            continue
        if is_socket:
            yield Check(name=path.name, seen="there")
        else:
            yield fail(path.name, f"{path} is no socket", "restart the enforcer, it replaces it")


def pulse(run_dir: Path, uptime_s: float) -> Check:
    """Check that probes find the sign of an enforcer that has just answered."""
    name, path = "pulse", pulse_path(run_dir)
    costs = "probes ask with powerctl instead, which costs each of them a tenth of a second"
    try:
        age_s = int(uptime_s) - int(path.read_bytes())
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "holds no time"
        return warn(name, f"{path}: {why}", f"{costs}: remove what lies there, free {run_dir}")
    if not 0 <= age_s <= PULSE_OLDEST_S:
        return warn(name, f"{path} says {age_s} s ago", f"{costs}: free {run_dir}")
    return Check(name=name, seen=f"the loop turned {age_s} s ago")


def host_pids(proc: Path, listener: int, enforcer: int) -> Check:
    """Check that NVML's process lists can name every process of the node.

    `listener` is the enforcer's pid as the kernel tells it here, `enforcer` as it calls itself:
    where they differ, this program lives in another pid namespace than the enforcer.
    """
    name = "host pids"
    missing = "the enforcer's pod needs `hostPID: true` (a plain container: --pid=host)"
    namespace, first = _first_process(proc)
    if listener != enforcer and namespace == _FIRST_PID_NAMESPACE and listener:
        seen = f"the enforcer is pid {listener} on this host but calls itself {enforcer}"
        return fail(name, seen, missing)
    if listener != enforcer:
        return warn(
            name,
            "this is not the enforcer's pid namespace: cannot tell from here",
            "run powerctl doctor in the enforcer's container",
        )
    if enforcer == 1 or "kubepods" in first:
        seen = f"pid 1 is {'the enforcer itself' if enforcer == 1 else f'in a pod: {first}'}"
        return fail(name, seen, missing)
    if namespace == _FIRST_PID_NAMESPACE:
        return Check(name=name, seen="the enforcer sees the host's pids")
    return warn(
        name,
        f"the enforcer's pid namespace is not the machine's first; its pid 1 is in {first or '?'}",
        f"right for a node that is itself a container; otherwise {missing}",
    )


def sys_admin(proc: Path, listener: int) -> bool | None:
    """Tell whether the enforcer holds CAP_SYS_ADMIN; None where it cannot be seen from here."""
    return _holds(_CAP_SYS_ADMIN, _read(proc / str(listener) / "status")) if listener else None


def _holds(capability: int, status: str) -> bool | None:
    found = re.search(r"^CapEff:\s*([0-9a-f]+)$", status, re.M)
    return bool(int(found[1], 16) >> capability & 1) if found else None


def nodes(proc: Path, listener: int, dev: Path = DEV) -> Check:
    """Check that the enforcer may open the driver's device nodes, by their modes.

    Where this program has that file system for its own, it also sees what a mode does not tell.
    """
    name, status = "device nodes", _read(proc / str(listener) / "status")
    inside = proc / str(listener) / "root" / dev.relative_to(dev.anchor)
    known = device_nodes(inside) if listener else []
    uid = re.search(r"^Uid:\s*\d+\s+(\d+)", status, re.M)
    groups = re.findall(r"\d+", "".join(re.findall(r"^(?:Gid|Groups):(.*)$", status, re.M)))
    if not known or uid is None:
        return Check(name=name, seen="no /dev/nvidia* of the enforcer's can be seen from here")
    for node in known:
        found, shown = node.stat(), dev / node.name
        by_mode = lets_in(found, int(uid[1]), {int(group) for group in groups}, READ_AND_WRITE)
        if not by_mode and not _holds(CAP_DAC_OVERRIDE, status):
            return fail(name, described(shown, found), DENIED)
        if _is_refused(shown, proc):
            return fail(name, f"{described(shown, found)} may not be opened from here", LOST)
    return Check(name=name, seen=f"{len(known)} of them, and the enforcer may open them")


def _is_refused(node: Path, proc: Path) -> bool:
    """Tell whether not even one whom no mode keeps out may open it: its devices are taken away."""
    any_mode = _holds(CAP_DAC_OVERRIDE, _read(proc / "self/status"))
    return bool(any_mode) and node.exists() and not os.access(node, os.R_OK | os.W_OK)


def _first_process(proc: Path) -> tuple[str, str]:
    """Return the pid namespace of this process and the cgroup of its pid 1."""
    try:
        namespace = str((proc / "self/ns/pid").readlink())
    except OSError:
        namespace = ""
    lines_of_first = _read(proc / "1/cgroup").splitlines()
    kubepods = [line for line in lines_of_first if "kubepods" in line]
    return namespace, (kubepods or lines_of_first[-1:] or [""])[0]


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="backslashreplace")
    except OSError:
        return ""


def cgroup_version(proc: Path) -> Check:
    """Say which hierarchies the kernel shows; all are supported."""
    hierarchies = [line.split(":", 2) for line in _read(proc / "self/cgroup").splitlines()]
    unified = any(parts[0] == "0" for parts in hierarchies)
    legacy = any(parts[0] != "0" for parts in hierarchies)
    if not unified and not legacy:
        remedy = "mount proc, or run powerctl on the node"
        return warn("cgroup version", f"{proc}/self/cgroup cannot be read", remedy)
    seen = "hybrid (v1 and v2)" if unified and legacy else "v2" if unified else "v1"
    return Check(name="cgroup version", seen=seen)


def ledger(reply: messages.StatusReply, proc: Path, listener: int, *, as_root: bool) -> Check:
    """Check that what must outlive the enforcer is on disk."""
    name, path = "ledger", Path(reply.enforcer.ledger)
    if fault := reply.enforcer.ledger_fault:
        return fail(name, fault, "free or repair that disk; no new GPU is taken")
    if not as_root:
        return Check(name=name, seen=f"{path}: only root can look")
    managed = sum(gpu.managed for gpu in reply.gpus)
    # The enforcer's own root first: outside its container the same path is another file.
    inside = proc / str(listener) / "root" / path.relative_to(path.anchor)
    candidates = [inside, path] if listener else [path]
    for candidate in candidates:
        try:
            text = candidate.read_bytes()
        except OSError:
            continue
        try:
            json.loads(text)
        except ValueError:
            return fail(
                name,
                f"{path} is no JSON",
                "somebody else wrote it: the enforcer writes it anew with its next change; one "
                "that starts before moves it aside and takes the generation before it",
            )
        seen = f"{path}, {len(text)} bytes, {managed} GPUs managed"
        return _damaged(name, candidates) or Check(name=name, seen=seen)
    if managed and not reply.enforcer.dry_run:
        return fail(
            name,
            f"{path} cannot be read, and {managed} GPUs are managed",
            "mount a writable host directory at POWER_AGENT_STATE_DIR; or run doctor there",
        )
    seen = f"{path}: not there, and no GPU is managed"
    return _damaged(name, candidates) or Check(name=name, seen=seen)


def _damaged(name: str, candidates: list[Path]) -> Check | None:
    """Warn of files that were moved aside; the last candidate is the path as the enforcer has it.

    They lie beside the ledger, also where that is not there any more.
    """
    path = candidates[-1]
    found = [sorted(each.parent.glob(f"{path.stem}*.damaged-*")) for each in candidates]
    aside = next((files for files in found if files), [])
    if not aside:
        return None
    files = " ".join(str(path.with_name(each.name)) for each in aside)
    return warn(
        name,
        f"moved aside as damaged: {files}",
        "a GPU that had a limit then may be given back at that limit: where FOUND of powerctl "
        "status is not what it should be, nvidia-smi -i UUID -pl WATTS when its pod has gone; "
        f"then rm {files}",
    )


def proxy(environment: Mapping[str, str]) -> Iterator[Check]:
    """Check that no proxy stands between this node and its API server by mistake.

    Where a cluster puts HTTPS_PROXY into every pod, the watcher has it too, and the client that it
    uses honours it (urllib.request, getproxies_environment: lower case wins).
    """
    found = _set(environment, "https_proxy") or _set(environment, "all_proxy")
    server = environment.get("KUBERNETES_SERVICE_HOST")
    if not found or server is None:
        return
    shown = without_password(environment[found])
    excepted = environment.get(_set(environment, "no_proxy"), "")
    if _is_excepted(server, environment.get("KUBERNETES_SERVICE_PORT", "443"), excepted):
        yield Check(name="proxy", seen=f"{found}={shown} does not bear on {server} (NO_PROXY)")
        return
    seen = f"{found}={shown} in this container; the watcher reaches the API server through it"
    yield warn("proxy", seen, f"unless that is meant, add {server} to NO_PROXY of the pod")


def _set(environment: Mapping[str, str], name: str) -> str:
    """Return which of `name` and its upper case counts, empty where that is empty or not set."""
    counts = name if name in environment else name.upper()
    return counts if environment.get(counts) else ""


def _is_excepted(server: str, port: str, excepted: str) -> bool:
    address = f"[{server}]:{port}" if ":" in server else f"{server}:{port}"
    for entry in (part.strip() for part in excepted.split(",")):
        if entry in ("*", server, address):
            return True
        with contextlib.suppress(ValueError):
            network = ipaddress.ip_network(entry, strict=False)
            if ipaddress.ip_address(server) in network:
                return True
    return False

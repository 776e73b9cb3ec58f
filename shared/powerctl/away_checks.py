"""The doctor's checks where nobody answers: what the enforcer's process does, and what hinders it.

They are made from this program's own place, which in the enforcer's container is the enforcer's.
"""

import errno
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from shared.confinement import label, may_join, who_refused
from shared.powerctl import node_checks
from shared.powerctl.check import Check, fail, warn
from shared.powerctl.processes import Running, holder, running, text
from shared.settings import DEFAULT_RUN_DIR

# Where the manifests put it.
_NAMESPACE = "dynamo-system"
_STATE_DIR = "/var/lib/power-agent"
_XID = "dmesg on the node (Xid, NVRM)"


def logs(
    environment: Mapping[str, str],
    host: str,
    container: str,
    resolv: Path = Path("/etc/resolv.conf"),
) -> str:
    """Return the command that shows a container's last lines; `host` is the pod's name in one."""
    if "KUBERNETES_SERVICE_HOST" not in environment:
        return f"the {container}'s last log lines (journalctl, or where its output goes)"
    command = f"kubectl logs -n {_namespace(resolv)} {host} -c {container} --tail=20"
    return f"{command} (with --previous where it has just been restarted)"


def _namespace(resolv: Path) -> str:
    """Return the pod's namespace: the kubelet lets names of its services be looked up first."""
    found = re.search(r"^search\s+([a-z0-9-]+)\.svc\.", text(resolv), re.MULTILINE)
    return found[1] if found else _NAMESPACE


def checks(run_dir: Path, proc: Path, environment: Mapping[str, str], host: str) -> Iterator[Check]:
    """Return what can be found out about an enforcer that gives no answer."""
    found = [each for each in running(proc, "enforcer") if _serves(each, run_dir)]
    yield process(found, proc, logs(environment, host, "enforcer"))
    me = found[0].pid if found else 0
    if "KUBERNETES_SERVICE_HOST" in environment:
        yield node_checks.host_pids(proc, me, me)
        yield cgroup_namespace(proc)


def _serves(each: Running, run_dir: Path) -> bool:
    """Tell whether it may be the one that should answer here: where that is not seen, it may."""
    if not each.environment:
        return True
    return each.setting("POWER_AGENT_RUN_DIR", DEFAULT_RUN_DIR) == str(run_dir)


def process(found: list[Running], proc: Path, last_lines: str) -> Check:
    """Say what the enforcer's process does, if there is one."""
    name = "enforcer process"
    if not found:
        seen = "none runs, as far as is seen from here"
        ended = "the last line before it ended names what to change"
        return fail(name, seen, f"start the enforcer; if it ends at once, {ended}: {last_lines}")
    one = found[0]
    if one.state in ("T", "t"):
        return fail(name, f"pid {one.pid} is stopped", f"kill -CONT {one.pid}")
    if one.state == "D":
        seen = f"pid {one.pid} waits in the kernel, as a driver that hangs makes it"
        return fail(name, seen, f"{_XID}; where it stays so, only a reboot helps; limits stay")
    if one.state == "Z":
        return fail(
            name, f"pid {one.pid} has ended", f"its last line names the cause: {last_lines}"
        )
    lock = Path(one.setting("POWER_AGENT_STATE_DIR", _STATE_DIR)) / "lock"
    owner = holder(proc, proc / str(one.pid) / "root" / lock.relative_to("/")) or holder(proc, lock)
    if owner is not None and owner != one.pid:
        seen = f"pid {one.pid} waits for pid {owner}, which holds {lock}: {_named(proc, owner)}"
        remedy = "one agent serves a node: end the other (kubectl get pods -A -l app=power-agent "
        return fail(name, seen, f"{remedy}-o wide); this one goes on by itself then")
    if one.state == "R":
        seen = f"pid {one.pid} is busy and does not answer"
        return fail(name, seen, f"if that lasts, restart it: kill {one.pid}; limits stay")
    seen = f"pid {one.pid} runs, has just been started, waits for the disk or NVML, or hangs"
    remedy = f"{last_lines}; if that lasts, restart it: kill {one.pid}; limits stay"
    return fail(name, seen, remedy)


def _named(proc: Path, pid: int) -> str:
    return (
        text(proc / str(pid) / "cmdline").replace("\0", " ").strip()[:100] or "not seen from here"
    )


def _opened(path: Path) -> None:
    path.open("rb").close()


def cgroup_namespace(proc: Path, opened: Callable[[Path], None] = _opened) -> Check:
    """Check that the host's cgroup namespace may be joined, without which it does not start."""
    name, path = "cgroup namespace", proc / "1/ns/cgroup"
    try:
        opened(path)
    except OSError as error:
        seen = f"{path}: {error.strerror}"
        if error.errno not in (errno.EACCES, errno.EPERM):
            return warn(name, seen, "run powerctl doctor in the enforcer's container")
        if not may_join(proc / "self"):
            remedy = "run the enforcer privileged, or grant CAP_SYS_ADMIN and CAP_SYS_PTRACE"
            return fail(name, f"{seen}, without CAP_SYS_PTRACE and CAP_SYS_ADMIN", remedy)
        by, remedy = who_refused(error, label(proc / "self"))
        return fail(name, f"{seen}, though CAP_SYS_PTRACE and CAP_SYS_ADMIN are held: {by}", remedy)
    return Check(name=name, seen="the host's may be opened from here")

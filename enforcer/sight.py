"""The checks at start that this is the host's view: its processes and its cgroups.

It knows no GPU. A view that is not the host's is refused: processes of others would be missing in
silence, and every GPU would look idle (I5).
"""

import ctypes
import errno
import os
from pathlib import Path

from enforcer import cgroups
from shared.confinement import label, may_join, who_refused

_CLONE_NEWCGROUP = 0x02000000  # linux/sched.h
_SHOWN_CHARS = 200
_SELF = Path("/proc/self")
_GENERATIONS = 64  # from this process up to the one that pid 1 has taken over
_NO_POD = "the own cgroup shows no pod, so this is not the host's view"


class BlindError(Exception):
    """The enforcer cannot see the host's processes or cgroups; the text names the remedy."""


def check_sight(proc_root: Path) -> None:
    """Raise BlindError where processes of others are hidden: all would look as if they had ended.

    Call this after privileges are dropped: what hidepid (proc(5)) hides depends on them.
    """
    try:
        if "self" in os.listdir(proc_root):  # noqa: PTH208 - else no kernel's, and not complete
            (proc_root / "1/cgroup").read_bytes()
    except OSError as error:
        why = f"POWER_AGENT_PROC_ROOT='{proc_root}': {error.strerror} on looking for process 1"
        raise BlindError(f"{why}; name the host's proc, mounted without hidepid") from error


def cgroup_roots(setting: str, proc_root: Path, in_kubernetes: bool) -> tuple[str, ...]:
    """Return the cgroups that may hold `kubepods`; raises BlindError where we would be blind.

    `setting` is `auto` or paths, comma separated. Paths in a private cgroup namespace are relative
    and can be mimicked. So in Kubernetes pid 1's is joined, and the own path must show
    a place then.
    """
    named = () if setting == "auto" else tuple(setting.split(","))
    if not in_kubernetes or proc_root != Path("/proc"):
        return named or cgroups.usual_roots()
    hindrance = _join_the_hosts_cgroups()
    own, first = Path("/proc/self/cgroup").read_bytes(), _first(hindrance)
    # NVML leaves out processes of other pid namespaces in silence: every GPU would look idle.
    if cgroups.root_above(first) is not None or (first == own and not _shows_nothing(own)):
        raise BlindError("pid 1 is in a pod, so this is not the host's view: set hostPID: true")
    beside = cgroups.roots_beside(own, first, _runtime())
    if not beside and _shows_nothing(own):
        raise BlindError(f"{_NO_POD}: {_remedy(hindrance)}")
    if not (named or beside):
        raise BlindError(_why_no_pod(own))
    return named or beside


def _first(hindrance: OSError | None) -> bytes:
    try:
        return Path("/proc/1/cgroup").read_bytes()
    except OSError as error:
        why = f"/proc/1/cgroup cannot be read ({error.strerror}), so this is not the host's view"
        raise BlindError(f"{why}: {_remedy(hindrance or error)}") from error


def _runtime() -> bytes:
    """Return the cgroup text of what started this container, nothing where that is not seen.

    A runtime's shim outlives the runtime, so pid 1 is its parent, and it is in the runtime's own
    cgroup. So is what a runtime puts there in spite of a kubelet on systemd.
    """
    pid = os.getpid()
    try:
        for _ in range(_GENERATIONS):
            # Field 4 of stat is the parent; the name before it may hold anything (proc(5)).
            stat = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2]
            parent = int(stat.split()[1])
            if parent <= 1:
                break
            pid = parent
        return Path(f"/proc/{pid}/cgroup").read_bytes()
    except (OSError, ValueError, IndexError):
        return b""


def _join_the_hosts_cgroups() -> OSError | None:
    """Enter the cgroup namespace of pid 1; return what hindered it.

    The own path may outweigh that. Python has os.setns from 3.12 on.
    """
    try:
        with open("/proc/1/ns/cgroup", "rb") as file:  # noqa: PTH123 - as short
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.setns(file.fileno(), _CLONE_NEWCGROUP) == 0:
                return None
            return OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    except OSError as error:
        return error


def _shows_nothing(own: bytes) -> bool:
    """Tell whether the own path is the root of what is seen, or relative to it."""
    paths = {line.partition(b":")[2].partition(b":")[2] for line in own.splitlines()}
    return all(path == b"/" or path.startswith(b"/..") for path in paths)


def _remedy(hindrance: OSError | None) -> str:
    """Return what to do where pid 1's cgroup namespace could not be joined, by what refused it."""
    refused = hindrance is not None and hindrance.errno in (errno.EACCES, errno.EPERM)
    if hindrance is None or not refused or not may_join(_SELF):
        return "set hostPID: true, and run privileged, or grant CAP_SYS_ADMIN and CAP_SYS_PTRACE"
    by, remedy = who_refused(hindrance, label(_SELF))
    held = "CAP_SYS_PTRACE and CAP_SYS_ADMIN are held"
    return f"the host's cgroup namespace is refused though {held}, by {by}: {remedy}"


def _why_no_pod(own: bytes) -> str:
    lines = {line.decode("utf-8", "replace").split(":", 2)[-1] for line in own.splitlines()}
    shown = ", ".join(sorted(lines - {"/"}))[:_SHOWN_CHARS]
    why = f"the own cgroup names no pod below a kubepods ('{shown}')"
    cause = "a kubelet with --cgroups-per-qos=false gives pods none, and they cannot be told apart"
    remedy = "set that to true, or name the parents of kubepods in POWER_AGENT_CGROUP_ROOT"
    return f"{why}: {cause}; {remedy}; and set hostPID: true"

"""What keeps a process from joining the host's cgroup namespace, and the remedy.

The enforcer says it when it refuses to start, powerctl doctor when nobody answers.
"""

import errno
import re
from pathlib import Path

# Opening pid 1's namespace takes the first (ptrace(2), PTRACE_MODE_READ), entering it the second.
_SYS_PTRACE, _SYS_ADMIN = 19, 21  # linux/capability.h
# user:role:type:level, and a level may have categories. AppArmor's namespaces have colons too.
_SELINUX = re.compile(r"[^:()]+:[^:()]+:[^:()]+:s[0-9].*")


def may_join(process: Path) -> bool:
    """Tell whether the process of this folder in proc has both capabilities that joining takes."""
    for line in (process / "status").read_text().splitlines():
        if line.startswith("CapEff:"):
            held = int(line.split()[1], 16)
            return bool(held >> _SYS_PTRACE & 1 and held >> _SYS_ADMIN & 1)
    return False


def label(process: Path) -> str:
    """Return the label that AppArmor or SELinux gave a process, nothing where there is none."""
    try:
        return (process / "attr/current").read_text().strip("\0\n ")
    except (OSError, UnicodeDecodeError):
        return ""


def who_refused(hindrance: OSError, label: str) -> tuple[str, str]:
    """Return what refused it, and the remedy; `label` is what AppArmor or SELinux calls us."""
    if hindrance.errno == errno.EPERM:  # not from opening but from setns: a filter (seccomp(2))
        return "seccomp", "set seccompProfile: RuntimeDefault, or allow setns in the profile"
    if label == "unconfined":
        return "a user namespace", "set hostUsers: true, and run the node itself outside of one"
    if _SELINUX.fullmatch(label):
        return f"SELinux ({label})", "set seLinuxOptions {type: spc_t, level: s0} for the enforcer"
    by = f"AppArmor ({label})" if label else "AppArmor or SELinux (no label)"
    field = "its securityContext: appArmorProfile {type: Unconfined}"
    return by, f"set appArmorProfile: Unconfined for the enforcer ({field})"

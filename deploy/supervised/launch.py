"""Starts one of the two programs in its place: as its user, with only what it may see."""

import ctypes
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

HOME = Path(__file__).resolve().parents[2]
DEFAULT_WATCHER_UID = "65532"
# linux/prctl.h
PR_SET_PDEATHSIG = 1
PR_SET_NO_NEW_PRIVS = 38

# All that the watcher reads, its libraries included.
WATCHER_READS = {
    "HTTPS_PROXY", "HTTP_PROXY", "KUBECONFIG", "KUBERNETES_SERVICE_HOST",
    "KUBERNETES_SERVICE_PORT", "LANG", "LC_ALL", "NODE_NAME", "NO_PROXY", "PATH",
    "SSL_CERT_DIR", "SSL_CERT_FILE", "TZ", "WATCH_NAMESPACE",
    "http_proxy", "https_proxy", "no_proxy",
}  # fmt: skip
# What the program that runs as root must not see: credentials and ways to the API, another
# program's settings, and hooks into Python. The rest stays: the driver's library reads variables
# that are documented nowhere, and KUBERNETES_SERVICE_HOST tells the enforcer where it runs.
ENFORCER_MUST_NOT_SEE = (
    "HTTP",
    "KUBECONFIG",
    "NO_PROXY",
    "PYTHON",
    "SUPERVISOR_",
    "WATCH_NAMESPACE",
)


def environment(program: str, inherited: Mapping[str, str]) -> dict[str, str]:
    """Return what `program` may see of the inherited environment."""
    if program == "watcher":
        kept = {
            key: value
            for key, value in inherited.items()
            if key in WATCHER_READS or key.startswith("POWER_AGENT_")
        }
    else:
        kept = {
            key: value
            for key, value in inherited.items()
            if not key.upper().startswith(ENFORCER_MUST_NOT_SEE)
        }
        kept["POWER_AGENT_SUPERVISED"] = "true"  # says why root can read the watcher's token
    return kept | {"HOME": "/"}


def interpreter(program: str) -> str:
    """Return the interpreter of the program's own environment, or of the one shared by all."""
    own = HOME / program / "bin" / "python"
    return str(own) if own.exists() else sys.executable


def become(uid: int) -> None:
    """Give up root for good."""
    os.setgroups([])
    os.setgid(uid)
    os.setuid(uid)
    prctl(PR_SET_NO_NEW_PRIVS, 1)


def prctl(option: int, value: int) -> None:
    """Call prctl(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, ctypes.c_ulong(value), *[ctypes.c_ulong(0)] * 3):
        raise OSError(ctypes.get_errno(), f"prctl({option})")


def main() -> None:
    """Start the program named on the command line, in place of this one."""
    program = sys.argv[1]
    if program == "watcher" and os.geteuid() == 0:
        text = os.environ.get("POWER_AGENT_WATCHER_UID") or DEFAULT_WATCHER_UID
        if not (text.isascii() and text.isdigit() and 0 < int(text) < 2**32 - 1):
            sys.exit(
                f"launch: POWER_AGENT_WATCHER_UID={text!r} is not the number of a user without "
                "privileges; set it to one, or unset it"
            )
        become(int(text))
    # If supervisord is not process 1 and dies suddenly, both programs must end too: a second
    # enforcer could not take over. (Set last: a change of user clears it.)
    prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    python = interpreter(program)
    arguments = [python, "-I", "-m", program]
    os.execve(python, arguments, environment(program, os.environ))  # noqa: S606 - its job


if __name__ == "__main__":
    main()

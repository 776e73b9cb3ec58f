"""Where the enforcer's sockets and its pulse lie, and the few facts that both ends need."""

import errno
import os
import socket
import stat
import struct
from pathlib import Path

from shared.modes import WRITE, lets_in

PULSE_OLDEST_S = 5  # of a loop that turns; deploy/probe says so too


class TransportError(Exception):
    """The socket directory cannot be used, or nobody answers there; the text names the remedy."""


def control_path(run_dir: Path) -> Path:
    """Return where requests are answered."""
    return run_dir / "control.sock"


def events_path(run_dir: Path) -> Path:
    """Return where decisions are published."""
    return run_dir / "events.sock"


def pulse_path(run_dir: Path) -> Path:
    """Return the file in which the enforcer says when its loop last turned."""
    return run_dir / "pulse"


def connection_event(frame: bytes) -> int:
    """Return what happened to a connection, from the first frame that a monitor sends.

    zmq_socket_monitor(3): 16 bits event, 32 bits value. pyzmq's own helper for this imports
    asyncio and with it 6 MB.
    """
    event: int = struct.unpack_from("=H", frame)[0]
    return event


def open_control(run_dir: Path, timeout_s: float = 0.5) -> socket.socket:
    """Return a plain connection to the control socket; raises OSError.

    libzmq tries again and again without a word, so this shows what hinders it.
    """
    plain = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        plain.settimeout(timeout_s)
        plain.connect(str(control_path(run_dir)))
    except OSError:
        plain.close()
        raise
    return plain


def why_refused(path: Path) -> tuple[str, str]:
    """Return why the kernel refuses to connect to `path` (EACCES, EPERM), and the remedy.

    Connecting takes search permission on each folder and write permission on the socket file
    (unix(7)). Where these are given, a security module refuses.
    """
    uid = os.geteuid()
    for folder in reversed(path.parents):
        if not os.access(folder, os.X_OK):
            remedy = f"make {folder} searchable for it (mode 755)"
            return f"uid {uid} may not search {folder}", remedy
    try:
        found = path.stat()
    except OSError as error:
        return f"uid {uid} may not see {path}: {error.strerror}", _SECURITY
    # The mode alone, without what a security module may add: root needs none.
    by_mode = uid == 0 or lets_in(found, uid, {os.getegid(), *os.getgroups()}, WRITE)
    if not os.access(path, os.W_OK) and not by_mode:
        mode = f"owner uid {found.st_uid}, mode {stat.S_IMODE(found.st_mode):o}"
        remedy = f"run as root, or add {uid} to the enforcer's POWER_AGENT_READER_UIDS"
        return f"uid {uid} may not write {path} ({mode})", remedy
    return f"uid {uid} may not connect to {path} though its mode lets it", _SECURITY


_SECURITY = (
    "a security module refuses it: with SELinux (`ausearch -m avc` shows it) give the watcher "
    "seLinuxOptions {type: spc_t, level: s0}, with AppArmor see the kernel's log"
)


def hindrance(path: Path, error: OSError) -> tuple[str, str]:
    """Return what a failed connection to `path` means, and the remedy."""
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return f"no socket at {path}", _START
    if error.errno == errno.ECONNREFUSED:
        return f"nobody listens at {path}", "the enforcer has ended: start it"
    if error.errno in (errno.EACCES, errno.EPERM):
        return why_refused(path)
    return f"{path}: {error.strerror or error}", "look at the enforcer's log"


_START = "start the enforcer; both need the same POWER_AGENT_RUN_DIR"

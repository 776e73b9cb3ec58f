"""Asking the enforcer, and finding out why there is no answer."""

import errno
import os
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from shared import messages
from shared.client import Client
from shared.sockets import TransportError, control_path, hindrance, open_control

R = TypeVar("R", bound=messages.Reply)


@dataclass(frozen=True, slots=True)
class Patience:
    """How much longer to wait for an enforcer that is there but busy, and whom to tell of it."""

    busy_s: float
    say: Callable[[str], None]


class UnreachableError(Exception):
    """The enforcer gives no usable answer; `remedy` is what helps. `busy`: it is there.

    `unclear`: the cause is not in the reason, and the doctor can find it.
    """

    def __init__(
        self, reason: str, remedy: str, *, busy: bool = False, unclear: bool = False
    ) -> None:
        super().__init__(f"{reason}; {remedy}" + ("; powerctl doctor finds out" if unclear else ""))
        self.reason = reason
        self.remedy = remedy
        self.busy = busy
        self.unclear = unclear


def ask(
    run_dir: Path,
    request: messages.Request,
    expected: type[R],
    timeout_s: float,
    patience: Patience | None = None,
) -> R:
    """Return the answer to `request`; raises UnreachableError.

    Each question has a connection of its own, so that no late answer is taken for a fresh one.
    """
    client = Client(run_dir)
    try:
        reply = _answer(client, run_dir, request, timeout_s, patience)
    except msgspec.DecodeError as error:
        raise _foreign(str(error)) from error
    finally:
        client.close()
    if isinstance(reply, messages.Error):
        raise _refused(reply)
    if not isinstance(reply, expected):
        raise _foreign(f"a {type(reply).__name__}")
    return reply


def _answer(
    client: Client,
    run_dir: Path,
    request: messages.Request,
    timeout_s: float,
    patience: Patience | None,
) -> messages.Reply:
    """Ask, and where the enforcer is there but does not answer, ask once more and wait longer."""
    try:
        return client.request(request, timeout_s)
    except TransportError as error:
        why = _why_unanswered(run_dir, timeout_s)
        if not why.busy or patience is None:
            raise why from error
    patience.say(
        "the enforcer is there but busy: it may be opening NVML, which takes half a minute where "
        f"persistence mode is off; waiting {patience.busy_s:g} s more"
    )
    try:
        return client.request(request, patience.busy_s)
    except TransportError as error:
        raise _why_unanswered(run_dir, timeout_s + patience.busy_s) from error


def listener_pid(run_dir: Path) -> int:
    """Return the pid of whoever listens, in this process's own view; 0 where it has none."""
    with open_control(run_dir) as sock:
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid: int = struct.unpack("3i", credentials)[0]
    return pid


def _why_unanswered(run_dir: Path, timeout_s: float) -> UnreachableError:
    path = control_path(run_dir)
    try:
        # libzmq sends a greeting at once to a uid that it admits, and hangs up on any other.
        with open_control(run_dir) as sock:
            greeting = sock.recv(1)
    except TimeoutError:
        return UnreachableError(
            f"no answer at {path} within {timeout_s:g} s",
            "the enforcer is stopped or overloaded: restart it",
            unclear=True,
        )
    except OSError as error:
        return _no_connection(path, error)
    if greeting:
        return UnreachableError(
            f"{path} is open but gave no answer within {timeout_s:g} s",
            "the enforcer is busy or hangs: try a longer --timeout, or restart it",
            busy=True,
            unclear=True,
        )
    uid = os.geteuid()
    return UnreachableError(
        f"uid {uid} is not admitted at {path}",
        f"run as root, or add {uid} to the enforcer's POWER_AGENT_READER_UIDS",
    )


def _no_connection(path: Path, error: OSError) -> UnreachableError:
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return UnreachableError(
            f"no socket at {path}",
            "start the enforcer, or name its directory with --socket or POWER_AGENT_RUN_DIR",
            unclear=True,
        )
    why, remedy = hindrance(path, error)
    return UnreachableError(why, remedy, unclear=error.errno == errno.ECONNREFUSED)


def _refused(reply: messages.Error) -> UnreachableError:
    reason = f"the enforcer refused the question ({reply.code}: {reply.message})"
    if reply.code == "denied":
        return UnreachableError(
            reason, f"run as root, or add {os.geteuid()} to POWER_AGENT_READER_UIDS"
        )
    return UnreachableError(reason, "use the powerctl of the enforcer's own version")


def _foreign(what: str) -> UnreachableError:
    return UnreachableError(
        f"the answer is not one this powerctl knows ({what})",
        "use the powerctl of the enforcer's own version",
    )

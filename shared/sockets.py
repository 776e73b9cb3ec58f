"""Where the enforcer's sockets and its pulse lie, and the few facts that both ends need."""

import struct
from pathlib import Path

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

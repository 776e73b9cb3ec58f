"""Why this process may not open the driver's device nodes, as the kernel tells it.

It knows no NVML: NVML's own names for it (NO_PERMISSION, UNKNOWN) say nothing of the cause.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from shared.modes import READ_AND_WRITE, lets_in
from shared.nodes import DENIED, DEV, LOST, described, device_nodes


@dataclass(frozen=True, slots=True)
class Obstacle:
    """What keeps this process from a node; `lost`: the container has lost its devices."""

    why: str
    lost: bool


def obstacle(dev: Path = DEV) -> Obstacle | None:
    """Return what keeps this process from a device node, None where nothing is seen to.

    Boards are not opened: that alone may wake one, which takes seconds. access(2) asks the file
    system, and the device cgroup as well (fs/namei.c, inode_permission).
    """
    for node in device_nodes(dev):
        if not os.access(node, os.R_OK | os.W_OK):
            return _obstacle(node)
    return None


def _obstacle(node: Path) -> Obstacle | None:
    try:
        found = node.stat()
    except OSError:  # it has just gone
        return None
    if lets_in(found, os.geteuid(), {os.getegid(), *os.getgroups()}, READ_AND_WRITE):
        why = f"{described(node, found)} may not be opened though its mode allows it: {LOST}"
        return Obstacle(why, lost=True)
    return Obstacle(f"{described(node, found)}: {DENIED}", lost=False)

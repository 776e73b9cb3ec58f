"""The driver's device nodes: which they are, and whom their mode lets in. It knows no NVML.

The enforcer says why NVML refuses it, powerctl looks at the same nodes from outside.
"""

import os
import stat
from pathlib import Path

DEV = Path("/dev")
# What keeps a mode from holding for root (capabilities(7)).
CAP_DAC_OVERRIDE = 1
DENIED = (
    "the enforcer may not open it: it is root without CAP_DAC_OVERRIDE; let everybody read and "
    "write it (module parameters NVreg_DeviceFileMode=0666 and NVreg_DeviceFileUID=0, or the udev "
    "rule that changes it)"
)
LOST = (
    "the container has lost its devices (systemctl daemon-reload and the static CPU manager do "
    "that), and only a new container gets them back: delete the pod; docs/operations.md says what "
    "keeps devices"
)


def device_nodes(dev: Path) -> list[Path]:
    """Return the nodes that NVML opens: the driver's, and one of each board."""
    nodes = [dev / "nvidiactl", *sorted(dev.glob("nvidia[0-9]*"))]
    return [node for node in nodes if node.exists()]


def described(node: Path, found: os.stat_result) -> str:
    """Return what a node is called and whose it is."""
    mode = stat.S_IMODE(found.st_mode)
    return f"{node} (uid {found.st_uid}, gid {found.st_gid}, mode {mode:04o})"

"""Builds device_plugin.go against the kubelet's published API; kept beside the kubelet's binary."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from pathlib import Path

from tests.kube import assets
from tests.kube.go_command import Go, locked, missing

SOURCE = Path(__file__).with_suffix(".go")
# What containers find their GPU's state below (see Allocate), and the resources it offers.
IN_CONTAINER = "/gpus"
WHOLE, SHARED = "nvidia.com/gpu", "nvidia.com/gpu.shared"
REPLICAS = 4


def find() -> Path | None:
    """The binary of exactly this source, where it was built before."""
    folder, name = assets.cache_folder(), _name()
    return None if missing(folder, [name]) else folder / name


def obtain() -> Path:
    """The same, building it where it is missing."""
    if path := find():
        return path
    go = Go("leave out what needs a device plugin")
    folder = assets.cache_folder()
    with locked(folder), tempfile.TemporaryDirectory(prefix=".build-", dir=folder) as scratch:
        module = Path(scratch)
        shutil.copy(SOURCE, module / "main.go")
        go.run(["mod", "init", "device-plugin.test"], module)
        kubelet = f"k8s.io/kubelet@v0.{assets.KUBERNETES.partition('.')[2]}"
        go.run(["mod", "edit", f"-require={kubelet}"], module)
        go.build(module, ".", folder / _name())
    return folder / _name()


def services(binary: Path) -> dict[str, list[str]]:
    """One plugin for whole GPUs and one for replicas of the same: a test uses one of the two."""
    return {
        "device-plugin": [str(binary), WHOLE, "0"],
        "device-plugin-shared": [str(binary), SHARED, str(REPLICAS)],
    }


def _name() -> str:
    return f"device-plugin-{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]}"

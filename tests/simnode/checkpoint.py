"""The kubelet's device checkpoint, and its state of claims (DRA): written as the kubelet writes
them, stale entries included.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from enforcer.dra import STATE
from enforcer.kubelet import CHECKPOINT

RESOURCE = "nvidia.com/gpu"


@dataclass
class Checkpoint:
    """What the kubelet has allocated below its root; `write` makes it so on disk."""

    root: Path
    entries: list[dict[str, Any]] = field(default_factory=list)
    registered: dict[str, list[str]] = field(default_factory=dict)

    def assign(
        self, pod: str, *ids: str, container: str = "main", resource: str = RESOURCE, numa: int = -1
    ) -> None:
        """As Allocate does at a pod's admission."""
        self.entries.append(
            {
                "PodUID": pod,
                "ContainerName": container,
                "ResourceName": resource,
                "DeviceIDs": {str(numa): list(ids)},
                "AllocResp": base64.b64encode(b"envs").decode(),
            }
        )
        self.write()

    def forget(self, pods: Iterable[str]) -> None:
        """As the next allocation does, for pods that are no longer active."""
        gone = set(pods)
        self.entries = [entry for entry in self.entries if entry["PodUID"] not in gone]
        self.write()

    @property
    def path(self) -> Path:
        """Where the kubelet has it."""
        return self.root / CHECKPOINT

    def text(self) -> str:
        """The file's content; the checksum is Go's, and nobody else computes it."""
        data = {"PodDeviceEntries": self.entries or None, "RegisteredDevices": self.registered}
        return json.dumps({"Data": data, "Checksum": 2_885_110_893})

    def write(self) -> None:
        """Make it so on disk."""
        _replace(self.path, self.text())


def _replace(path: Path, text: str) -> None:
    """By a rename in the same folder (pkg/kubelet/util/store, filestore.go)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    temporary.rename(path)


@dataclass
class Claims:
    """What the kubelet has prepared by DRA, with NVIDIA's driver of 25.12.0 or later."""

    root: Path
    claims: list[dict[str, Any]] = field(default_factory=list)

    def prepare(self, *pods: str, devices: Iterable[str], name: str = "worker-gpu") -> None:
        """As for pods that share a claim, once the driver has answered."""
        uid = f"0d7a9c52-6b1e-4f3d-8c2a-{len(self.claims):012}"
        prepared = [
            {
                "PoolName": "node-1",
                "DeviceName": device,
                "ShareID": None,
                "RequestNames": ["gpu"],
                "CDIDeviceIDs": [f"k8s.gpu.nvidia.com/claim={uid}-{device}"],
            }
            for device in devices
        ]
        self.claims.append(
            {
                "ClaimUID": uid,
                "ClaimName": name,
                "Namespace": "default",
                "PodUIDs": {pod: {} for pod in pods},
                "DriverState": {"gpu.nvidia.com": {"Devices": prepared or None}},
            }
        )
        self.write()

    @property
    def path(self) -> Path:
        """Where the kubelet has it: in its root itself."""
        return self.root / STATE

    def write(self) -> None:
        """Make it so on disk."""
        claims = {
            "kind": "DRACheckpoint",
            "apiVersion": "checkpoint.dra.kubelet.k8s.io/v1",
            "ClaimInfoStateList": self.claims or None,
        }
        _replace(self.path, state_of_claims(json.dumps(claims)))


def state_of_claims(data: str) -> str:
    """The file around the text of the claims."""
    return json.dumps({"Data": data, "Checksum": zlib.crc32(data.encode())})

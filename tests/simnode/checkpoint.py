"""The kubelet's device checkpoint: written as the kubelet writes it, stale entries included."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
        """By a rename in the same folder (pkg/kubelet/util/store, filestore.go)."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(".kubelet_internal_checkpoint.tmp")
        temporary.write_text(self.text())
        temporary.rename(self.path)

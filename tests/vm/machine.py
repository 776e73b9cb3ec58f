"""A virtual machine as a cluster's node, and the control plane outside of it.

Both run in a box (tests/cluster/box.py): they end with their maker, and its network is theirs. The
emulated network's host is 10.0.0.1, the box's own loopback; that is also where the cluster's
services are, so the node and its pods reach the API server without a proxy.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.cluster.box import Box
from tests.cluster.certificates import ClusterCertificates
from tests.cluster.control_plane import SERVICE_ADDRESS, control_plane
from tests.vm.debian import Disk, make_filesystem
from tests.vm.guest import LABEL, NODE, NODE_ADDRESS, kubelet_config
from tests.waiting import NotInTimeError, until

# For a hang: an emulated start takes two to four minutes.
READY_TIMEOUT_S = 900.0
_MEMORY_MIB = 3072
# The API server reaches the kubelet at the node's address, which qemu listens on. What comes from
# 127.0.0.1 it hands on as coming from the network's host; with an address of its own on lo it would
# seem to come from the node itself, whose kernel drops that.
_ROUTE_AND_START = 'ip route replace local "$0" dev lo src 127.0.0.1 && exec "$@"'
_NODES_OWN = ("ca.crt", "kubelet.crt", "kubelet.key", "kubelet.kubeconfig", "kubelet-server.crt",
              "kubelet-server.key")  # fmt: skip


class Machine:
    """`with Machine(...) as machine`: its node is Ready and has the images."""

    def __init__(
        self, disk: Disk, assets: Path, images: Sequence[Path], *, accel: str, kernel: str
    ) -> None:
        self._disk, self._assets, self._images = disk, assets, images
        self._accel, self._kernel_arguments = accel, kernel
        self.box = Box()

    def __enter__(self) -> Machine:
        self.box.__enter__()
        try:
            self._configure()
            self.box.start()
            self._wait_until_ready()
        except BaseException:
            self.box.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.box.__exit__(None, None, None)

    @property
    def kubeconfig(self) -> Path:
        return self._certificates.kubeconfig("admin")

    @property
    def console(self) -> Path:
        """What the machine wrote to its first serial line."""
        return self.box.folder / "console.log"

    def kubectl(self, *arguments: str) -> str:
        command: list[str | Path] = [self._assets / "kubectl", *arguments]
        done = subprocess.run(
            self.box.in_network([*command, f"--kubeconfig={self.kubeconfig}"]),
            capture_output=True,
            text=True,
            check=False,
        )
        return done.stdout

    def _wait_until_ready(self) -> None:
        condition = "-o=jsonpath={.status.conditions[?(@.type=='Ready')].status}"

        def ready() -> bool:
            return (
                self.kubectl("get", "node", NODE, condition) == "True"
                and self.kubectl("get", "serviceaccount", "default") != ""
            )

        try:
            until(ready, "the node", deadline_s=READY_TIMEOUT_S, poll_s=5.0)
        except NotInTimeError as error:
            raise NotInTimeError(f"{error}\n{self.box.log_tails(40)}") from None

    # ------------------------------------------------------------------ making

    def _configure(self) -> None:
        folder = self.box.folder
        self._certificates = ClusterCertificates(
            folder / "certificates",
            node=NODE,
            addresses=["127.0.0.1", SERVICE_ADDRESS, NODE_ADDRESS],
            server=f"https://{SERVICE_ADDRESS}:443",
        )
        self._make_second_disk(folder / "node.ext4")
        self.box.addresses = {"lo": [f"{SERVICE_ADDRESS}/32"]}
        self.box.services = {
            **control_plane(self._assets, self._certificates, NODE_ADDRESS),
            "qemu": self._qemu(),
        }

    def _make_second_disk(self, file: Path) -> None:
        """What differs from run to run: certificates, the kubelet's configuration, images."""
        content = self.box.folder / "node"
        (content / "certificates").mkdir(parents=True)
        for name in _NODES_OWN:
            shutil.copy(self._certificates.path(name), content / "certificates")
        (content / "kubelet.json").write_text(json.dumps(kubelet_config()))
        (content / "images").mkdir()
        for image in self._images:
            os.link(image, content / "images" / image.name)
        make_filesystem(content, file, "1G", LABEL)
        shutil.rmtree(content)

    def _qemu(self) -> list[str]:
        arguments = (
            # Nobody attacks it, and the guards cost an emulated processor most.
            "mitigations=off root=/dev/vda rw console=ttyS0 net.ifnames=0 panic=-1 "
            f"{self._kernel_arguments}"
        )
        forwarded = f"hostfwd=tcp:{NODE_ADDRESS}:10250-{NODE_ADDRESS}:10250"
        return [
            *("/bin/sh", "-c", _ROUTE_AND_START, NODE_ADDRESS),
            *("env", f"TMPDIR={self.box.folder}", "nice", "-n", "10", "qemu-system-x86_64"),
            *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"),
            *("-accel", self._accel, "-cpu", "max", "-smp", "2", "-m", str(_MEMORY_MIB)),
            *("-kernel", str(self._disk.kernel), "-initrd", str(self._disk.initrd)),
            # A file: as its standard output it would mix with what qemu itself says.
            *("-append", arguments, "-serial", f"file:{self.console}"),
            # Writes go to a file without a name, so each run finds the disk as it was made.
            *("-drive", f"file={self._disk.root},if=virtio,format=raw,snapshot=on"),
            *("-drive", f"file={self.box.folder}/node.ext4,if=virtio,format=raw,readonly=on"),
            *("-netdev", f"user,id=net,net=10.0.0.0/24,host={SERVICE_ADDRESS},{forwarded}"),
            *("-device", "virtio-net-pci,netdev=net", "-device", "virtio-rng-pci"),
        ]

"""A cluster of one node in a box: the real control plane, kubelet, containerd and runc."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

from tests.cluster import device_plugin, simulator
from tests.cluster.box import Box
from tests.cluster.certificates import ClusterCertificates
from tests.cluster.control_plane import SERVICE_ADDRESS, control_plane
from tests.waiting import until

NODE = "node-1"
NODE_ADDRESS = "10.1.0.1"
READY_TIMEOUT_S = 90.0
CONTAINERD = "/run/containerd/containerd.sock"
PAUSE_IMAGE = "localhost/power-agent-test-pause:1"
STATIC_PODS = "/var/lib/kubelet/static-pods"
# The second runtime of containerd: as runc, in a cgroup namespace of its own (see below).
PRIVATE_CGROUPS_RUNTIME = "private-cgroups"

_CNI = {
    "cniVersion": "0.4.0",
    "name": "box",
    "plugins": [
        {
            "type": "bridge",
            "bridge": "pods0",
            "isGateway": True,
            "ipam": {
                "type": "host-local",
                "ranges": [[{"subnet": "10.2.0.0/16"}]],
                "routes": [{"dst": "0.0.0.0/0"}],
            },
        }
    ],
}

_CONTAINERD = """\
version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
[grpc]
  address = "{socket}"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause}"
  # Lowering it takes CAP_SYS_RESOURCE, which not every machine grants.
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{cni_plugins}"
    conf_dir = "{folder}/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        SystemdCgroup = false
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.{private}]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.{private}.options]
        SystemdCgroup = false
        BinaryName = "{folder}/runc-private-cgroups"
"""


class Node:
    """`with Node(assets, cni_plugins) as node`: the node is Ready, images can be imported."""

    def __init__(self, assets: Path, cni_plugins: Path) -> None:
        self._assets, self._cni_plugins = assets, cni_plugins
        self.box = Box()

    def __enter__(self) -> Node:
        self.box.__enter__()
        try:
            self._configure()
            self.box.start()
            # From outside, too, through the box's own root: no socket leaves it.
            until(
                lambda: self.box.path(CONTAINERD).exists(),
                "containerd",
                deadline_s=READY_TIMEOUT_S,
                explain=self.box.log_tails,
            )
        except BaseException:
            self.box.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.box.__exit__(None, None, None)

    # ------------------------------------------------------------------ use

    @property
    def simulated_gpus(self) -> Path:
        """The folder of this machine that the simulator sees as the node's."""
        return self.box.folder / "simulated-gpus"

    @property
    def kubeconfig(self) -> Path:
        return self._certificates.kubeconfig("admin")

    def kubectl_command(self, *arguments: str) -> list[str]:
        """kubectl runs in the box's network, with this machine's files."""
        return self.box.in_network([self._assets / "kubectl", *arguments])

    def import_image(self, archive: Path) -> None:
        """Load an image (docker archive or OCI layout, as a tar file) into containerd."""
        self._ctr("import", archive)

    def tag_image(self, image: str, also: str) -> None:
        """A release under another name."""
        self._ctr("tag", image, also)

    def _ctr(self, *arguments: str | Path) -> None:
        self.box.run("ctr", f"--address={CONTAINERD}", "-n=k8s.io", "images", *arguments)

    def wait_until_ready(self) -> None:
        def ready() -> bool:
            status = self._kubectl(
                "get", "node", NODE, "-o=jsonpath={.status.conditions[?(@.type=='Ready')].status}"
            )
            account = self._kubectl("get", "serviceaccount", "default")
            return status == "True" and account != ""

        until(ready, "the node", deadline_s=READY_TIMEOUT_S, explain=self.box.log_tails)

    def _kubectl(self, *arguments: str) -> str:
        done = subprocess.run(
            self.kubectl_command(f"--kubeconfig={self.kubeconfig}", *arguments),
            capture_output=True,
            text=True,
            check=False,
        )
        return done.stdout

    # ------------------------------------------------------------------ making

    def _configure(self) -> None:
        folder = self.box.folder
        self._certificates = ClusterCertificates(
            folder / "certificates",
            node=NODE,
            addresses=["127.0.0.1", SERVICE_ADDRESS, NODE_ADDRESS],
            server=f"https://{SERVICE_ADDRESS}:443",
        )
        (folder / "cni").mkdir()
        (folder / "cni/box.conflist").write_text(json.dumps(_CNI))
        (folder / "containerd.toml").write_text(
            _CONTAINERD.format(
                socket=CONTAINERD,
                pause=PAUSE_IMAGE,
                cni_plugins=self._cni_plugins,
                folder=folder,
                private=PRIVATE_CGROUPS_RUNTIME,
            )
        )
        wrapper = folder / "runc-private-cgroups"
        shutil.copy(Path(__file__).with_name("runc_private_cgroups.py"), wrapper)
        wrapper.chmod(0o755)
        (folder / "static-pods").mkdir()
        self.box.binds[STATIC_PODS] = str(folder / "static-pods")
        self.simulated_gpus.mkdir()
        self.box.binds[simulator.PLACE] = str(self.simulated_gpus)
        (folder / "kubelet.json").write_text(json.dumps(self._kubelet_config()))
        self.box.addresses = {
            "lo": [f"{SERVICE_ADDRESS}/32"],
            "node0": [f"{NODE_ADDRESS}/24"],
        }
        self.box.services = {
            **control_plane(self._assets, self._certificates, NODE_ADDRESS),
            "containerd": ["containerd", "--config", str(folder / "containerd.toml")],
            "kubelet": self._kubelet(),
            **device_plugin.services(device_plugin.obtain()),
        }

    def _kubelet(self) -> list[str]:
        return [
            str(self._assets / "kubelet"),
            f"--config={self.box.folder / 'kubelet.json'}",
            f"--kubeconfig={self._certificates.kubeconfig('kubelet')}",
            f"--hostname-override={NODE}",
            f"--node-ip={NODE_ADDRESS}",
            "--node-labels=nvidia.com/gpu.present=true",
            "--root-dir=/var/lib/kubelet",
        ]

    def _kubelet_config(self) -> dict[str, object]:
        path = self._certificates.path
        return {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "containerRuntimeEndpoint": f"unix://{CONTAINERD}",
            "staticPodPath": STATIC_PODS,
            "address": NODE_ADDRESS,
            "tlsCertFile": str(path("kubelet-server.crt")),
            "tlsPrivateKeyFile": str(path("kubelet-server.key")),
            "authentication": {
                "anonymous": {"enabled": False},
                "x509": {"clientCAFile": str(path("ca.crt"))},
            },
            "cgroupDriver": "cgroupfs",
            "failCgroupV1": False,
            "failSwapOn": False,
            "enforceNodeAllocatable": [],
            "makeIPTablesUtilChains": False,
            "maxOpenFiles": 10_000,
            "oomScoreAdj": 0,
            "resolvConf": "",
            # The machine's disk may be as full as it likes.
            "evictionHard": {"memory.available": "1Mi"},
            "imageGCHighThresholdPercent": 100,
            "syncFrequency": "10s",
            "nodeStatusUpdateFrequency": "4s",
            "shutdownGracePeriod": "0s",
        }

"""The files that make a Debian a node of a cluster whose control plane is outside."""

from __future__ import annotations

import json

from tests.cluster.node import PAUSE_IMAGE

NODE = "node-1"
NODE_ADDRESS = "10.0.0.15"
# Where the second disk is mounted, and its label.
PLACE, LABEL = "/node", "node"
STATIC_PODS = "/var/lib/kubelet/static-pods"

_FSTAB = f"""\
LABEL={LABEL} {PLACE} ext4 ro,nofail 0 0
"""

_NETWORK = f"""\
[Match]
Name=eth0
[Network]
Address={NODE_ADDRESS}/24
Gateway=10.0.0.1
LinkLocalAddressing=no
"""

_CNI = {
    "cniVersion": "0.4.0",
    "name": "pods",
    "plugins": [
        {
            "type": "bridge",
            "bridge": "pods0",
            "isGateway": True,
            # The emulated network knows only the node's own address.
            "ipMasq": True,
            "ipam": {
                "type": "host-local",
                "ranges": [[{"subnet": "10.2.0.0/16"}]],
                "routes": [{"dst": "0.0.0.0/0"}],
            },
        }
    ],
}

_CONTAINERD = f"""\
version = 2
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE_IMAGE}"
  enable_selinux = %s
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/opt/cni/bin"
    conf_dir = "/etc/cni/net.d"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      SystemdCgroup = true
[plugins."io.containerd.internal.v1.opt"]
  path = "/var/lib/containerd/opt"
"""

_KUBELET = f"""\
[Unit]
After=containerd.service network-online.target
Wants=containerd.service network-online.target
RequiresMountsFor={PLACE}
[Service]
ExecStartPre=/bin/mkdir -p {STATIC_PODS}
ExecStartPre=/bin/sh -c 'for f in {PLACE}/images/*.tar; do ctr -n k8s.io images import "$f"; done'
ExecStart=/usr/bin/kubelet --config={PLACE}/kubelet.json \\
    --kubeconfig={PLACE}/certificates/kubelet.kubeconfig \\
    --hostname-override={NODE} --node-ip={NODE_ADDRESS} \\
    --node-labels=nvidia.com/gpu.present=true
TimeoutStartSec=infinity
Restart=always
RestartSec=2
StandardOutput=journal+console
StandardError=journal+console
[Install]
WantedBy=multi-user.target
"""

FILES = {
    "/etc/hostname": NODE + "\n",
    "/etc/machine-id": "0123456789abcdef0123456789abcdef\n",
    "/etc/fstab": _FSTAB,
    "/etc/resolv.conf": "",
    "/etc/systemd/network/eth0.network": _NETWORK,
    "/etc/systemd/system/kubelet.service": _KUBELET,
    "/etc/cni/net.d/pods.conflist": json.dumps(_CNI),
    "/etc/containerd/config.toml": _CONTAINERD % "false",
    # Only what it takes to reach the disk: less to unpack at each start.
    "/etc/initramfs-tools/conf.d/vm": "MODULES=list\nCOMPRESS=zstd\n",
    "/etc/initramfs-tools/modules": "virtio_pci\nvirtio_blk\next4\n",
}

SELINUX_FILES = {
    "/etc/containerd/config.toml": _CONTAINERD % "true",
    "/etc/selinux/config": "SELINUX=enforcing\nSELINUXTYPE=default\n",
}

# Debian's rules for what a node itself runs are not complete: they forbid what every pod takes, as
# mounting its token. What containers (container_t, spc_t) may do is enforced all the same.
_PERMISSIVE = ("kubelet_t", "dockerd_t", "container_engine_t", "mount_t", "iptables_t")
SELINUX_POLICY = {
    "/etc/selinux/node.cil": "".join(f"(typepermissive {each})\n" for each in _PERMISSIVE)
}


def kubelet_config() -> dict[str, object]:
    """Its defaults but for these: certificates of the test's own cluster, and patience."""
    certificates = f"{PLACE}/certificates"
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
        "cgroupDriver": "systemd",
        "staticPodPath": STATIC_PODS,
        "tlsCertFile": f"{certificates}/kubelet-server.crt",
        "tlsPrivateKeyFile": f"{certificates}/kubelet-server.key",
        "authentication": {
            "anonymous": {"enabled": False},
            "x509": {"clientCAFile": f"{certificates}/ca.crt"},
        },
        "resolvConf": "",
        "runtimeRequestTimeout": "10m",
        "shutdownGracePeriod": "0s",
    }

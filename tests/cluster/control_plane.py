"""The commands of a real control plane in a box: etcd, API server, controllers, scheduler."""

from __future__ import annotations

from pathlib import Path

from tests.cluster.certificates import ClusterCertificates
from tests.simnode.controlplane import etcd_command

# Where pods reach the API server. It is an address of the box itself, so no kube-proxy is needed.
SERVICE_ADDRESS = "10.0.0.1"


def control_plane(
    assets: Path, certificates: ClusterCertificates, advertised: str
) -> dict[str, list[str]]:
    """Name -> command, as a box takes them."""
    return {
        "etcd": etcd_command(assets / "etcd", Path("/var/lib/etcd"), [2379, 2380]),
        "kube-apiserver": _apiserver(assets, certificates, advertised),
        "kube-controller-manager": _controller_manager(assets, certificates),
        "kube-scheduler": [
            str(assets / "kube-scheduler"),
            f"--kubeconfig={certificates.kubeconfig('kube-scheduler')}",
            "--leader-elect=false",
        ],
    }


def _apiserver(assets: Path, certificates: ClusterCertificates, advertised: str) -> list[str]:
    path = certificates.path
    return [
        str(assets / "kube-apiserver"),
        f"--advertise-address={advertised}",
        "--secure-port=443",
        "--etcd-servers=http://127.0.0.1:2379",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        f"--client-ca-file={path('ca.crt')}",
        f"--tls-cert-file={path('server.crt')}",
        f"--tls-private-key-file={path('server.key')}",
        f"--kubelet-client-certificate={path('apiserver-to-kubelet.crt')}",
        f"--kubelet-client-key={path('apiserver-to-kubelet.key')}",
        f"--kubelet-certificate-authority={path('ca.crt')}",
        "--kubelet-preferred-address-types=InternalIP",
        "--service-account-issuer=https://kubernetes.default.svc",
        f"--service-account-key-file={path('service-account.key')}",
        f"--service-account-signing-key-file={path('service-account.key')}",
        "--service-cluster-ip-range=10.0.0.0/24",
        "--endpoint-reconciler-type=none",
        "--allow-privileged=true",
    ]


def _controller_manager(assets: Path, certificates: ClusterCertificates) -> list[str]:
    return [
        str(assets / "kube-controller-manager"),
        f"--kubeconfig={certificates.kubeconfig('kube-controller-manager')}",
        f"--service-account-private-key-file={certificates.path('service-account.key')}",
        f"--root-ca-file={certificates.path('ca.crt')}",
        "--use-service-account-credentials=true",
        "--leader-elect=false",
    ]

"""Makes the certificates of a cluster with a node: its own authority, one client for each part."""

from __future__ import annotations

import ipaddress
import json
from pathlib import Path

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

# The short-lived authority of the control plane without a node; it has no public form.
from tests.simnode.controlplane_certs import _Authority, _name, _new_key, _write_key

# Who the parts are to the API server: common name, and organization as the group.
CLIENTS = {
    "admin": ("admin", "system:masters"),
    "kube-controller-manager": ("system:kube-controller-manager", None),
    "kube-scheduler": ("system:kube-scheduler", None),
    "apiserver-to-kubelet": ("kube-apiserver", "system:masters"),
}


class ClusterCertificates:
    """PEM files in one folder, by the names of their owners."""

    def __init__(self, folder: Path, *, node: str, addresses: list[str], server: str) -> None:
        folder.mkdir(mode=0o700)
        self.folder, self._server = folder, server
        self._authority = _Authority()
        (folder / "ca.crt").write_bytes(self._authority.pem)
        _write_key(folder / "service-account.key", _new_key())
        serving = x509.SubjectAlternativeName(
            [
                *(x509.IPAddress(ipaddress.ip_address(address)) for address in addresses),
                *(x509.DNSName(name) for name in ("localhost", "kubernetes.default.svc", node)),
            ]
        )
        self._issue("server", _name("kube-apiserver"), ExtendedKeyUsageOID.SERVER_AUTH, serving)
        self._issue("kubelet-server", _name(node), ExtendedKeyUsageOID.SERVER_AUTH, serving)
        clients = CLIENTS | {"kubelet": (f"system:node:{node}", "system:nodes")}
        for name, (user, group) in clients.items():
            subject = _name(user, organization=group)
            self._issue(name, subject, ExtendedKeyUsageOID.CLIENT_AUTH, None)
            self._write_kubeconfig(name)

    def _issue(
        self,
        name: str,
        subject: x509.Name,
        purpose: x509.ObjectIdentifier,
        names: x509.SubjectAlternativeName | None,
    ) -> None:
        key = _new_key()
        certificate = self._authority.issue(subject, key, purpose, names)
        self.path(f"{name}.crt").write_bytes(certificate)
        _write_key(self.path(f"{name}.key"), key)

    def path(self, file: str) -> Path:
        return self.folder / file

    def kubeconfig(self, name: str) -> Path:
        return self.path(f"{name}.kubeconfig")

    def _write_kubeconfig(self, name: str) -> None:
        user = {
            "client-certificate": f"{name}.crt",
            "client-key": f"{name}.key",
        }
        # Relative to the file itself, so that the folder may be copied to another machine.
        cluster = {"server": self._server, "certificate-authority": "ca.crt"}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "box",
            "clusters": [{"name": "box", "cluster": cluster}],
            "users": [{"name": name, "user": user}],
            "contexts": [{"name": "box", "context": {"cluster": "box", "user": name}}],
        }
        # Every JSON document is a YAML document.
        self.kubeconfig(name).write_text(json.dumps(config))

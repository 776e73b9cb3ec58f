"""The parts of the real control plane that need no server: certificates, ports, counting."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from pathlib import Path

import pytest

from tests.simnode.controlplane import (
    ControlPlane,
    ControlPlaneError,
    apiserver_command,
    parse_request_counts,
)
from tests.simnode.controlplane_certs import make_certificates
from tests.simnode.controlplane_process import Spawner, folder_that_vanishes, free_ports

METRICS = """\
# TYPE apiserver_request_total counter
apiserver_request_total{code="200",component="apiserver",resource="pods",scope="cluster",verb="LIST"} 3
apiserver_request_total{code="410",component="apiserver",resource="pods",scope="cluster",verb="LIST"} 1
apiserver_request_total{code="200",component="apiserver",resource="nodes",scope="cluster",verb="LIST"} 7
apiserver_request_total{code="0",component="a\\"b",resource="pods",scope="cluster",verb="WATCH"} 1e+03
apiserver_request_duration_seconds_count{resource="pods",verb="LIST"} 99
"""  # noqa: E501


def test_request_counts_add_up_over_every_other_label() -> None:
    assert parse_request_counts(METRICS) == {
        ("LIST", "pods"): 4,
        ("LIST", "nodes"): 7,
        ("WATCH", "pods"): 1000,
    }


def test_the_server_checks_roles_and_listens_here_only(tmp_path: Path) -> None:
    certificates = make_certificates(tmp_path / "certificates")
    command = apiserver_command(
        Path("kube-apiserver"), certificates, 12345, etcd_url="http://127.0.0.1:23456"
    )
    assert "--authorization-mode=RBAC" in command
    assert {"--bind-address=127.0.0.1", "--secure-port=12345"} < set(command)


def test_the_certificates_hold_under_strict_verification(tmp_path: Path) -> None:
    """Both sides verify each other as Python 3.13 does by default."""
    paths = make_certificates(tmp_path / "certificates")
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=paths.ca)
    server.load_cert_chain(paths.server, paths.server_key)
    server.verify_mode = ssl.CERT_REQUIRED
    client = ssl.create_default_context(cafile=paths.ca)
    client.load_cert_chain(paths.admin, paths.admin_key)
    for context in (server, client):
        context.verify_flags |= ssl.VERIFY_X509_STRICT

    ours, theirs = socket.socketpair()
    subject: list[object] = []

    def accept() -> None:
        with server.wrap_socket(theirs, server_side=True) as accepted:
            certificate = accepted.getpeercert()
            assert certificate
            subject.append(certificate["subject"])

    thread = threading.Thread(target=accept)
    thread.start()
    with client.wrap_socket(ours, server_hostname="127.0.0.1") as connected:
        connected.recv(1)
    thread.join()
    assert subject == [
        ((("commonName", "admin"),), (("organizationName", "system:masters"),)),
    ]


def test_no_private_key_is_readable_by_others(tmp_path: Path) -> None:
    make_certificates(tmp_path / "certificates")
    keys = list((tmp_path / "certificates").glob("*.key"))
    assert len(keys) == 3
    assert {key.stat().st_mode & 0o777 for key in keys} == {0o600}


def test_ports_lie_outside_the_range_of_outgoing_connections() -> None:
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    ports = free_ports(3)
    assert len(set(ports)) == 3
    assert all(10_000 <= port < max(first, 11_000) for port in ports)


def test_a_folder_without_binaries_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ControlPlaneError, match="lacks etcd, kube-apiserver, kubectl"):
        ControlPlane(tmp_path)


def test_the_folder_and_the_processes_end_with_the_block(tmp_path: Path) -> None:
    with contextlib.ExitStack() as undo:
        folder = folder_that_vanishes(undo)
        process = Spawner(undo).process(["/bin/sh", "-c", "echo up; sleep 60"], tmp_path / "log")
        process.start()
        assert folder.is_dir()
        assert process.alive()
    assert not process.alive()
    assert not folder.exists()

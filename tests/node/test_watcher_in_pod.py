"""The watcher as in a pod: the service account's files where the kubelet puts them, and TLS."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.node.watcher_harness import WatcherNode
from tests.relay import relay
from tests.simnode.controlplane_certs import make_certificates
from tests.simnode.kubeapi import KubeApi
from tests.waiting import ended, until

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: mounts over /run, for itself only"),
]

# Nobody else sees these mounts, and they are gone with the process.
_MOUNTS = """\
mount -t tmpfs tmpfs /run && mkdir -p /run/secrets/kubernetes.io/serviceaccount &&
mount --bind "$0" /run/secrets/kubernetes.io/serviceaccount && exec "$@"
"""
_UNSHARE = ("unshare", "--mount", "sh", "-c", _MOUNTS)


class TlsFront:
    """Carries TLS connections to the embedded API, which speaks plain HTTP."""

    def __init__(self, api: KubeApi, certificate: Path, key: Path) -> None:
        self._api = api
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(certificate, key)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                plain, _ = self._listener.accept()
                threading.Thread(target=self._carry, args=(plain,), daemon=True).start()

    def _carry(self, plain: socket.socket) -> None:
        with contextlib.ExitStack() as stack:
            stack.enter_context(plain)
            stack.enter_context(contextlib.suppress(OSError))  # a client that trusts another
            client = stack.enter_context(self._context.wrap_socket(plain, server_side=True))
            server = stack.enter_context(socket.create_connection(("127.0.0.1", self._api.port)))
            relay(client, server)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[WatcherNode]:
    """A node whose watcher finds `account` as its service account."""
    if subprocess.run([*_UNSHARE, tmp_path, "true"], check=False, capture_output=True).returncode:
        pytest.skip("mounts are not allowed here")
    certificates = make_certificates(tmp_path / "certificates")
    api = KubeApi(tokens={"first": "agent"})
    front = TlsFront(api, certificates.server, certificates.server_key)
    account(tmp_path).mkdir()
    (account(tmp_path) / "token").write_text("first")
    shutil.copy(certificates.ca, account(tmp_path) / "ca.crt")
    with WatcherNode(api=api) as made:
        del made.environment["KUBECONFIG"]
        made.environment["KUBERNETES_SERVICE_HOST"] = "127.0.0.1"
        made.environment["KUBERNETES_SERVICE_PORT"] = str(front.port)
        yield made
    front.close()
    shutil.rmtree(made.folder)


def account(tmp_path: Path) -> Path:
    return tmp_path / "account"


def start(node: WatcherNode, tmp_path: Path) -> None:
    node.start(*_UNSHARE, str(account(tmp_path)))


def test_the_service_account_is_used_and_its_token_read_again(
    node: WatcherNode, tmp_path: Path
) -> None:
    node.pod("a", "300")
    start(node, tmp_path)
    node.wait_for(a=300_000)
    node.annotate("a", "310")
    node.wait_for(a=310_000)
    assert node.logs("api_unverified") == []
    node.api.rotate_token("first", "second")
    (account(tmp_path) / "token").write_text("second")
    node.api.cut_watches()  # the next one meets a 401, sooner than the library's minute
    node.annotate("a", "320")
    node.wait_for(a=320_000)
    assert node.api.count("list") == 1
    assert all("401" not in line["message"] for line in node.logs("kubernetes_failing"))
    assert node.stop() == 0


def test_the_service_account_comes_before_a_kubeconfig(node: WatcherNode, tmp_path: Path) -> None:
    node.environment["KUBECONFIG"] = str(tmp_path / "not-there")
    start(node, tmp_path)
    node.wait_for()


def test_a_server_of_another_authority_is_told_nothing(node: WatcherNode, tmp_path: Path) -> None:
    other = make_certificates(tmp_path / "other")
    shutil.copy(other.ca, account(tmp_path) / "ca.crt")
    start(node, tmp_path)
    until(lambda: node.logs("kubernetes_failing"), "the refusal")
    assert "CERTIFICATE_VERIFY_FAILED" in node.logs("kubernetes_failing")[0]["message"]
    assert node.api.count() == 0
    assert node.sent() == []


def test_without_a_token_it_says_what_to_do(node: WatcherNode, tmp_path: Path) -> None:
    (account(tmp_path) / "token").unlink()
    start(node, tmp_path)
    assert node.process
    assert ended(node.process) == 2
    (line,) = node.errors.splitlines()
    assert "token" in line
    assert "KUBECONFIG is not set" in line

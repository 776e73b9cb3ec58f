"""A simulated node of a shared real cluster, and what the API server saw of its watcher."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

from tests.simnode.controlplane import ControlPlane
from tests.simnode.controlplane_rest import Object
from tests.simnode.kubelet import Kubelet
from tests.simnode.node import SimNode
from tests.waiting import HANG_S

NAMESPACE, ACCOUNT = "dynamo-system", "power-agent"
_AUDIT_POLICY = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    # Administrator and API server itself ask a lot that is of no interest here.
    "rules": [
        {"level": "Metadata", "userGroups": ["system:serviceaccounts"]},
        {"level": "None"},
    ],
}


class KubeNode(SimNode):
    """Its watcher has a service account's real token, in a file as in a pod."""

    def __init__(
        self,
        cluster: ControlPlane,
        *,
        account: tuple[str, str] = (NAMESPACE, ACCOUNT),
        wire: bool = False,
        kubelet: bool = True,
        **options: Any,  # noqa: ANN401 - SimNode's own
    ) -> None:
        """`wire`: the watcher reaches the API server through one that the test holds.

        Without `kubelet` nobody but the watcher asks for this node's pods.
        """
        super().__init__(real_api=True, **options)
        self.cluster, self._account = cluster, account
        self._through_wire, self._has_kubelet = wire, kubelet

    @property
    def user(self) -> str:
        """The watcher, as the API server knows it."""
        return f"system:serviceaccount:{':'.join(self._account)}"

    def _make_api(self, undo: contextlib.ExitStack) -> None:
        self.api = self.cluster
        self.cluster.create_node(self.name)
        undo.callback(self._delete_pods)
        self.kubeconfig = self.cluster.admin_kubeconfig
        self.token_file = self.folder / "token"
        self.renew_token()
        self.watcher_kubeconfig = self.cluster.write_kubeconfig(
            self.folder / "watcher", token_file=self.token_file
        )
        if self._through_wire:
            self.wire = undo.enter_context(Wire(self.cluster))
            text = self.watcher_kubeconfig.read_text()
            self.watcher_kubeconfig.write_text(text.replace(self.cluster.url, self.wire.url))
        os.chown(self.watcher_kubeconfig, self.watcher_uid, -1)
        if self._has_kubelet:
            undo.enter_context(Kubelet(self.cluster, self.name, self._end_pod))

    def renew_token(self) -> None:
        """Another token in the watcher's file, at one stroke as the kubelet does it."""
        fresh = self.folder / "token.new"
        fresh.touch(mode=0o600)
        fresh.write_text(self.cluster.service_account_token(*self._account))
        os.chown(fresh, self.watcher_uid, -1)
        fresh.rename(self.token_file)

    def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        """What the administrator's kubectl prints."""
        return self.cluster.kubectl(*arguments, stdin=stdin).stdout

    def _delete_pods(self) -> None:
        with self.cluster.rest_client() as rest:
            path = f"/api/v1/pods?fieldSelector=spec.nodeName={self.name}"
            for pod in rest.json("GET", path)["items"] or ():
                name, namespace = pod["metadata"]["name"], pod["metadata"]["namespace"]
                self.cluster.finish_deletion(namespace, name)


class Wire:
    """Carries the watcher's connections to the API server; keeps every byte, can be cut."""

    def __init__(self, cluster: ControlPlane) -> None:
        self._port = cluster.port
        self._tls = ssl.create_default_context(cafile=cluster.certificates.ca)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: set[socket.socket] = set()
        self._threads = [threading.Thread(target=self._accept, name="wire")]
        self._through = threading.Event()
        self._through.set()
        self._ended = False
        self.sent, self.received = bytearray(), bytearray()

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        self._listener.close()
        self.drop()
        for thread in self._threads:
            thread.join()

    @property
    def url(self) -> str:
        """Plain http: the bytes are to be seen."""
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def drop(self) -> None:
        """Break what is open; new connections are carried."""
        for client in list(self._open):
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)

    @contextlib.contextmanager
    def cut(self) -> Iterator[None]:
        """For so long nothing gets through, and neither side is told; then everything breaks."""
        self._through.clear()
        try:
            yield
        finally:
            self.drop()
            self._through.set()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self._ended:
                client.close()
                continue
            self._open.add(client)
            self._threads.append(threading.Thread(target=self._carry, args=[client], name="wire"))
            self._threads[-1].start()

    def _carry(self, client: socket.socket) -> None:
        """Ends with either side."""
        with client, contextlib.suppress(OSError):
            plain = socket.create_connection(("127.0.0.1", self._port), timeout=HANG_S)
            with self._tls.wrap_socket(plain, server_hostname="127.0.0.1") as server:
                # A readable TLS socket may have nothing for its reader yet (session tickets).
                server.setblocking(False)
                while self._step(client, server):
                    pass
        self._open.discard(client)

    def _step(self, client: socket.socket, server: ssl.SSLSocket) -> bool:
        readable, _, _ = select.select([client, server], [], [])
        self._through.wait()
        for source, target, kept in (
            (client, server, self.sent),
            (server, client, self.received),
        ):
            if source not in readable:
                continue
            # A whole TLS record is at most 16 KiB, so this leaves nothing that select cannot see.
            with contextlib.suppress(ssl.SSLWantReadError):
                data = source.recv(65536)
                kept.extend(data)
                target.sendall(data)
                if not data:
                    return False
        return True


class Audit:
    """What service accounts asked of the API server, as it wrote it down itself."""

    def __init__(self, folder: Path) -> None:
        self._policy, self._log = folder / "policy.json", folder / "audit.log"
        self._policy.write_text(json.dumps(_AUDIT_POLICY))

    def flags(self) -> list[str]:
        """Of the API server, to make it write."""
        return [f"--audit-policy-file={self._policy}", f"--audit-log-path={self._log}"]

    def entries(self) -> list[Object]:
        """One for each stage of each request, oldest first."""
        if not self._log.exists():
            return []
        whole, _, _ = self._log.read_text().rpartition("\n")
        return [json.loads(line) for line in whole.splitlines()]

    def requests(self, user: str, node: str | None = None) -> list[Object]:
        """Of a user, about one node's pods or about anything."""
        return [
            entry
            for entry in self.entries()
            if entry["stage"] == "RequestReceived" and entry["user"]["username"] == user
            if node is None or _node(entry) == node
        ]

    def count(self, verb: str, node: str) -> int:
        """Requests for a node's pods, `list` or `watch`, of whom the server knew."""
        return sum(
            entry["stage"] == "RequestReceived" and entry["verb"] == verb and _node(entry) == node
            for entry in self.entries()
        )

    def is_watching(self, node: str) -> bool:
        """Whether the newest request for a node's pods is a watch that began and did not end."""
        mine = [entry for entry in self.entries() if _node(entry) == node]
        newest = mine[-1]["auditID"] if mine else None
        stages = [entry["stage"] for entry in mine if entry["auditID"] == newest]
        return stages == ["RequestReceived", "ResponseStarted"] and mine[-1]["verb"] == "watch"


def _node(entry: Object) -> str | None:
    query = parse_qs(urlsplit(entry["requestURI"]).query)
    for requirement in query.get("fieldSelector", [""])[0].split(","):
        key, _, value = requirement.partition("=")
        if key == "spec.nodeName":
            return value
    return None

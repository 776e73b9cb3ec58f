"""Runs a real etcd and kube-apiserver on this machine, for as long as a caller needs them."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import signal
import ssl
import subprocess
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.kube import assets
from tests.simnode.controlplane_certs import Certificates, make_certificates
from tests.simnode.controlplane_objects import Objects
from tests.simnode.controlplane_process import Spawner, folder_that_vanishes, free_ports
from tests.simnode.controlplane_rest import ApiError, Object, RestClient
from tests.simnode.exposition import samples_of
from tests.waiting import HANG_S

READY_TIMEOUT_S = 60.0
_POLL_S = 0.05


class ControlPlaneError(Exception):
    """A part of the control plane did not start or did not answer."""


class ControlPlane(Objects):
    """A cluster without nodes of its own: `with ControlPlane(assets) as kube: ...`."""

    def __init__(self, folder: Path, *, extra_flags: Sequence[str] = ()) -> None:
        if lacking := assets.missing(folder):
            raise ControlPlaneError(f"{folder} lacks {', '.join(lacking)}")
        super().__init__()
        self._binaries = folder
        self._extra_flags = tuple(extra_flags)
        self._undo = contextlib.ExitStack()

    # ------------------------------------------------------------------ life

    def __enter__(self) -> ControlPlane:
        with contextlib.ExitStack() as undo:
            self.folder = folder_that_vanishes(undo)
            self.certificates = make_certificates(self.folder / "certificates")
            self.port, *etcd_ports = free_ports(3)
            self._etcd_url = f"http://127.0.0.1:{etcd_ports[0]}"
            spawner = Spawner(undo)
            self._etcd = spawner.process(
                etcd_command(self._binaries / "etcd", self.folder / "etcd", etcd_ports),
                self.folder / "etcd.log",
            )
            self._apiserver = spawner.process(
                apiserver_command(
                    self._binaries / "kube-apiserver",
                    self.certificates,
                    self.port,
                    etcd_url=self._etcd_url,
                )
                + list(self._extra_flags),
                self.folder / "kube-apiserver.log",
            )
            self._rest = undo.enter_context(self.rest_client())
            self.admin_kubeconfig = self.write_kubeconfig(self.folder / "admin.kubeconfig")
            self._etcd.start()
            self.start_apiserver()
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def stop_apiserver(self) -> None:
        """An outage: connections break, the port refuses; etcd keeps what was stored."""
        self._apiserver.kill()
        self._rest.close()

    def start_apiserver(self, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Returns when the server, on the port it always had, is ready for clients."""
        self._apiserver.start()
        deadline = time.monotonic() + timeout_s
        # The first turns green slightly before the second exists.
        for path in ("/readyz", "/api/v1/namespaces/default"):
            self._wait_for_200(path, deadline)

    def go_down(self) -> None:
        """The embedded API's name for the same."""
        self.stop_apiserver()

    def come_back(self) -> None:
        """The embedded API's name for the same."""
        self.start_apiserver()

    def freeze(self) -> None:
        """Half-open: connections are accepted, nothing is answered, open watches say nothing."""
        os.kill(self._apiserver.pid, signal.SIGSTOP)
        # Its threads stop one after the other, each when it next enters the kernel.
        tasks = Path(f"/proc/{self._apiserver.pid}/task")
        deadline = time.monotonic() + 10
        while any(b") T " not in (task / "stat").read_bytes() for task in tasks.iterdir()):
            if time.monotonic() > deadline:
                raise ControlPlaneError("the API server does not stop for SIGSTOP")
            time.sleep(0.001)

    def thaw(self) -> None:
        os.kill(self._apiserver.pid, signal.SIGCONT)

    def _wait_for_200(self, path: str, deadline: float) -> None:
        last = "no answer"
        while True:
            with contextlib.suppress(OSError):  # refused, or reset while it starts
                status, last = self._rest.raw("GET", path)
                if status == 200:
                    return
            for process in (self._etcd, self._apiserver):
                if not process.alive():
                    raise ControlPlaneError(f"{process.name} ended:\n{process.log_tail()}")
            if time.monotonic() > deadline:
                raise ControlPlaneError(f"{path} was not good in time: {last}\n{self.log_tails()}")
            time.sleep(_POLL_S)

    def compact(self) -> None:
        """Older versions leave etcd, as they do every few minutes in a real cluster.

        What the API server has in its cache it can still tell, until it is started again.
        """
        # Any read tells etcd's revision; a resource version is nothing else.
        revision = self._ask_etcd("/v3/kv/range", {"key": "AA=="})["header"]
        self._ask_etcd("/v3/kv/compaction", {"revision": revision["revision"]})

    def back_up(self) -> None:
        """Keep what etcd holds now; the API server is away meanwhile."""
        with self._down():
            shutil.rmtree(self.folder / "backup", ignore_errors=True)
            shutil.copytree(self.folder / "etcd", self.folder / "backup")

    def restore(self) -> None:
        """Start both servers with what was kept: objects are as they were, and so are versions."""
        with self._down():
            shutil.rmtree(self.folder / "etcd")
            shutil.copytree(self.folder / "backup", self.folder / "etcd")
        self._made.clear()

    @contextlib.contextmanager
    def _down(self) -> Iterator[None]:
        self.stop_apiserver()
        self._etcd.kill()
        yield
        self._etcd.start()
        self.start_apiserver()

    def _ask_etcd(self, path: str, body: Object) -> Object:
        request = urllib.request.Request(self._etcd_url + path, json.dumps(body).encode())
        with urllib.request.urlopen(request, timeout=HANG_S) as response:
            answer: Object = json.load(response)
        return answer

    def pids(self) -> list[int]:
        """Of etcd and of the API server."""
        return [self._etcd.pid, self._apiserver.pid]

    def log_tails(self) -> str:
        """The ends of both logs, for a failed test's report."""
        return f"{self._etcd.log_tail()}\n{self._apiserver.log_tail()}"

    # ------------------------------------------------------------------ access

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    @property
    def version(self) -> str:
        version: str = self._rest.json("GET", "/version")["gitVersion"]
        return version

    def rest_client(self, token: str | None = None) -> RestClient:
        """A connection of the cluster's administrator, or of the token's owner."""
        tls = ssl.create_default_context(cafile=self.certificates.ca)
        if token is None:
            tls.load_cert_chain(self.certificates.admin, self.certificates.admin_key)
        return RestClient(self.port, tls, token)

    def write_kubeconfig(
        self,
        path: str | Path,
        token: str | None = None,
        *,
        token_file: str | Path | None = None,
        user: str = "test",
    ) -> Path:
        """For the token's owner, or for the cluster's administrator where no token is given."""
        path = Path(path)
        credentials: Object
        if token_file is not None:
            credentials = {"tokenFile": str(token_file)}
        elif token is not None:
            credentials = {"token": token}
        else:
            credentials = {
                "client-certificate-data": _base64(self.certificates.admin),
                "client-key-data": _base64(self.certificates.admin_key),
            }
        cluster = {
            "server": self.url,
            "certificate-authority-data": _base64(self.certificates.ca),
        }
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": user, "user": credentials}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": user}}],
        }
        path.touch(mode=0o600)
        path.write_text(json.dumps(config, indent=2))  # every JSON document is a YAML document
        return path

    def kubeconfig_for_token(self, token: str, path: Path) -> Path:
        return self.write_kubeconfig(path, token)

    def service_account_token(self, namespace: str, name: str, *, duration_s: int = 3600) -> str:
        """A real bound token (TokenRequest) of a service account that exists; 600 s at least."""
        answer = self._rest.json(
            "POST",
            f"/api/v1/namespaces/{namespace}/serviceaccounts/{name}/token",
            {"spec": {"expirationSeconds": duration_s}},
        )
        token: str = answer["status"]["token"]
        return token

    def kubectl(
        self,
        *arguments: str,
        check: bool = True,
        stdin: str | None = None,
        kubeconfig: Path | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """The real client, as the administrator unless another kubeconfig is given."""
        done = subprocess.run(
            [self._binaries / "kubectl", *arguments],
            env=os.environ
            | {
                "KUBECONFIG": str(kubeconfig or self.admin_kubeconfig),
                "KUBECACHEDIR": str(self.folder / "kubectl-cache"),
            },
            input="" if stdin is None else stdin,
            capture_output=True,
            text=True,
            timeout=HANG_S,
            check=False,
        )
        if check and done.returncode != 0:
            raise ControlPlaneError(
                f"kubectl {' '.join(arguments)}: exit status {done.returncode}\n{done.stderr}"
            )
        return done

    def request_counts(self) -> Counter[tuple[str, str]]:
        """(verb, resource) -> requests answered since the API server's start, everybody's.

        A WATCH is counted when it ends, whichever way; one that still runs is not in here.
        """
        status, text = self._rest.raw("GET", "/metrics", Accept="text/plain")
        if status != 200:
            raise ApiError(status, "GET /metrics", text)
        return parse_request_counts(text)


# ---------------------------------------------------------------------- pure parts


def etcd_command(binary: Path, data: Path, ports: Sequence[int]) -> list[str]:
    client, peer = (f"http://127.0.0.1:{port}" for port in ports)
    return [
        str(binary),
        "--name=test",
        f"--data-dir={data}",
        f"--listen-client-urls={client}",
        f"--advertise-client-urls={client}",
        f"--listen-peer-urls={peer}",
        f"--initial-advertise-peer-urls={peer}",
        f"--initial-cluster=test={peer}",
        "--unsafe-no-fsync",  # the data never outlives the process
        "--log-level=warn",
    ]


def apiserver_command(
    binary: Path, certificates: Certificates, port: int, *, etcd_url: str
) -> list[str]:
    return [
        str(binary),
        "--bind-address=127.0.0.1",
        f"--secure-port={port}",
        f"--etcd-servers={etcd_url}",
        "--authorization-mode=RBAC",
        f"--client-ca-file={certificates.ca}",
        f"--tls-cert-file={certificates.server}",
        f"--tls-private-key-file={certificates.server_key}",
        "--service-account-issuer=https://kubernetes.default.svc",
        f"--service-account-key-file={certificates.service_account_key}",
        f"--service-account-signing-key-file={certificates.service_account_key}",
        "--service-cluster-ip-range=10.0.0.0/24",
        # The address of the machine is nobody's business, and needs a route that may be missing.
        "--endpoint-reconciler-type=none",
        # It would wait for a service account `default` that no controller creates here.
        "--disable-admission-plugins=ServiceAccount",
        "--allow-privileged=true",
    ]


def parse_request_counts(metrics: str) -> Counter[tuple[str, str]]:
    """Sums `apiserver_request_total` over everything but verb and resource."""
    counts: Counter[tuple[str, str]] = Counter()
    for labels, count in samples_of(metrics, "apiserver_request_total"):
        counts[labels["verb"], labels["resource"]] += int(count)
    return counts


def _base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()

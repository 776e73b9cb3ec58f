"""Credentials and raw answers: every kind of configuration, whole and broken, over real TLS."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from shared.settings import SettingsError
from tests.simnode.controlplane_certs import Certificates, make_certificates
from tests.simnode.kubeapi import KubeApi
from tests.waiting import HANG_S, joined
from watcher import kube
from watcher.kube import Api, ApiError

ROOT = Path(__file__).parents[2]
Json = dict[str, Any]


class Mirror(ThreadingHTTPServer):
    """A TLS server that answers with what it saw: client certificate, credentials, path."""

    daemon_threads = True

    def __init__(self, certificates: Certificates) -> None:
        super().__init__(("127.0.0.1", 0), _Reflection)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificates.server, certificates.server_key)
        context.load_verify_locations(certificates.ca)
        context.verify_mode = ssl.CERT_OPTIONAL
        self.socket = context.wrap_socket(self.socket, server_side=True)
        self.url = f"https://127.0.0.1:{self.server_port}"
        self.accepted: set[str | None] | None = None  # Authorization headers; None: any
        self.seen: list[str | None] = []
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that does not trust this side hangs up: that is the test."""


class _Reflection(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        assert isinstance(self.server, Mirror)
        assert isinstance(self.connection, ssl.SSLSocket)
        given = self.headers.get("Authorization")
        self.server.seen.append(given)
        known = self.server.accepted is None or given in self.server.accepted
        peer: Any = self.connection.getpeercert() or {}
        names = [value for ((key, value), *_) in peer.get("subject", ()) if key == "commonName"]
        answer = {"authorization": given, "peer": names, "path": self.path}
        body = json.dumps(answer if known else {"message": "Unauthorized"}).encode()
        self.send_response(200 if known else 401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@dataclass
class World:
    """A folder with certificates and the server that they belong to."""

    folder: Path
    certificates: Certificates
    mirror: Mirror

    def kubeconfig(
        self, user: Json | None = None, cluster: Json | None = None, name: str = "kubeconfig"
    ) -> Path:
        place = {"server": self.mirror.url, "certificate-authority": str(self.certificates.ca)}
        path = self.folder / name
        path.write_text(yaml.safe_dump(config(user or {}, place | (cluster or {}))))
        return path

    @property
    def client_files(self) -> Json:
        return {
            "client-certificate": str(self.certificates.admin),
            "client-key": str(self.certificates.admin_key),
        }


def config(user: Json, cluster: Json) -> Json:
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "contexts": [{"name": "here", "context": {"cluster": "c", "user": "u"}}],
        "clusters": [{"name": "c", "cluster": cluster}],
        "users": [{"name": "u", "user": user}],
    }


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("tls") / "certificates")


@pytest.fixture(scope="module")
def mirror(certificates: Certificates) -> Iterator[Mirror]:
    made = Mirror(certificates)
    yield made
    made.shutdown()
    made.server_close()


@pytest.fixture
def world(tmp_path: Path, certificates: Certificates, mirror: Mirror) -> World:
    mirror.accepted, mirror.seen = None, []
    return World(tmp_path, certificates, mirror)


@contextlib.contextmanager
def opened(kubeconfig: Path | str) -> Iterator[Api]:
    api = Api(str(kubeconfig), in_kubernetes=False)
    try:
        yield api
    finally:
        api.close()


def ask(api: Api, path: str = "/x", query: dict[str, str] | None = None) -> Json:
    answer = api.get(path, query or {}, accept="application/json", read_timeout_s=HANG_S)
    found: Json = json.loads(answer.read_all(100_000))
    return found


def asked_with(kubeconfig: Path | str) -> Json:
    with opened(kubeconfig) as api:
        return ask(api)


def inline(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def plugin(world: World, script: str, **more: Any) -> Json:  # noqa: ANN401
    path = world.folder / "plugin"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    version = "client.authentication.k8s.io/v1"
    return {"exec": {"apiVersion": version, "command": str(path)} | more}


def credential(**status: str) -> str:
    version = "client.authentication.k8s.io/v1"
    return json.dumps({"apiVersion": version, "kind": "ExecCredential", "status": status})


# ---------------------------------------------------------------------- kubeconfig that works


def test_token(world: World) -> None:
    assert asked_with(world.kubeconfig({"token": "secret"}))["authorization"] == "Bearer secret"


def test_token_file_beside_the_kubeconfig(world: World) -> None:
    (world.folder / "token").write_text("secret\n")
    found = asked_with(world.kubeconfig({"tokenFile": "token"}))
    assert found["authorization"] == "Bearer secret"


@pytest.mark.parametrize("kind", ["files", "data"])
def test_client_certificate(world: World, kind: str) -> None:
    user, cluster = world.client_files, {}
    if kind == "data":
        user = {f"{key}-data": inline(Path(path)) for key, path in user.items()}
        cluster = {"certificate-authority-data": inline(world.certificates.ca)}
    found = asked_with(world.kubeconfig(user, cluster))
    assert (found["peer"], found["authorization"]) == (["admin"], None)


def test_name_and_password(world: World) -> None:
    found = asked_with(world.kubeconfig({"username": "me", "password": "pass"}))
    assert found["authorization"] == "Basic " + base64.b64encode(b"me:pass").decode()


def test_exec_plugin_gives_a_token(world: World) -> None:
    user = plugin(
        world,
        f'[ "$1" = for-me ] && [ "$MORE" = yes ] && echo \'{credential(token="secret")}\'',
        args=["for-me"],
        env=[{"name": "MORE", "value": "yes"}],
    )
    assert asked_with(world.kubeconfig(user))["authorization"] == "Bearer secret"


def test_exec_plugin_that_works_is_run_once(world: World) -> None:
    runs = world.folder / "runs"
    user = plugin(world, f"echo run >>{runs}; echo '{credential(token='secret')}'")
    asked_with(world.kubeconfig(user))
    assert runs.read_text() == "run\n"


def test_exec_plugin_gives_a_certificate(world: World) -> None:
    given = credential(
        clientCertificateData=world.certificates.admin.read_text(),
        clientKeyData=world.certificates.admin_key.read_text(),
    )
    (world.folder / "given").write_text(given)
    user = plugin(world, f"cat {world.folder / 'given'}")
    assert asked_with(world.kubeconfig(user))["peer"] == ["admin"]


def test_a_server_below_a_path(world: World) -> None:
    path = world.kubeconfig({}, {"server": f"{world.mirror.url}/k8s/clusters/c/"})
    assert asked_with(path)["path"].startswith("/k8s/clusters/c/x")


def test_a_query_is_encoded(world: World) -> None:
    with opened(world.kubeconfig()) as api:
        path = ask(api, "/x", {"fieldSelector": "a!=b,c=d e&f"})["path"]
    assert path == "/x?fieldSelector=a%21%3Db%2Cc%3Dd+e%26f"


def test_two_files_are_merged(world: World) -> None:
    first, second = (config({"token": "secret"}, {"server": world.mirror.url}) for _ in range(2))
    del first["users"], second["clusters"]
    first["clusters"][0]["cluster"]["certificate-authority"] = str(world.certificates.ca)
    for name, part in (("one", first), ("two", second)):
        (world.folder / name).write_text(yaml.safe_dump(part))
    found = asked_with(f"{world.folder / 'one'}:{world.folder / 'two'}")
    assert found["authorization"] == "Bearer secret"


def test_an_unverified_server_is_allowed_and_known_to_be_so(world: World) -> None:
    path = written(
        world, config({}, {"server": world.mirror.url, "insecure-skip-tls-verify": True})
    )
    with opened(path) as api:
        assert ask(api)["path"] == "/x?"
        assert not api.verifies
    with opened(world.kubeconfig()) as api:
        assert api.verifies


def test_a_server_that_another_authority_vouches_for_is_refused(
    world: World, tmp_path: Path
) -> None:
    other = make_certificates(tmp_path / "other")
    with (
        opened(world.kubeconfig({}, {"certificate-authority": str(other.ca)})) as api,
        pytest.raises(ApiError, match="CERTIFICATE_VERIFY_FAILED"),
    ):
        ask(api)
    assert world.mirror.seen == []  # no token was shown to it


def test_a_server_of_another_name_is_refused_unless_it_is_named(world: World) -> None:
    with (
        opened(world.kubeconfig({}, {"tls-server-name": "another"})) as api,
        pytest.raises(ApiError, match="CERTIFICATE_VERIFY_FAILED"),
    ):
        ask(api)
    found = asked_with(world.kubeconfig({}, {"tls-server-name": "kubernetes.default.svc"}))
    assert found["path"] == "/x?"


# ---------------------------------------------------------------------- kubeconfig that does not


def written(world: World, content: bytes | Json) -> Path:
    path = world.folder / "kubeconfig"
    path.write_bytes(content if isinstance(content, bytes) else yaml.safe_dump(content).encode())
    return path


def garbage(world: World) -> str:
    (world.folder / "garbage").write_text("no certificate")
    return str(world.folder / "garbage")


def with_certificate(world: World, **files: str) -> Path:
    changed = {f"client-{kind}": path for kind, path in files.items()}
    return world.kubeconfig(world.client_files | changed)


WHOLE = config({}, {"server": "https://127.0.0.1:1"})
# What KUBECONFIG is set to, and what has to be said of it.
BROKEN: dict[str, tuple[Callable[[World], object], str]] = {
    "missing": (lambda w: w.folder / "nowhere", "No such file"),
    "one of two missing": (lambda w: f"{w.kubeconfig()}:{w.folder}/nowhere", "No such file"),
    "a folder": (lambda w: w.folder, "Is a directory"),
    "nothing named": (lambda _: ":", "No configuration found"),
    "empty": (lambda w: written(w, b""), "empty"),
    "binary": (lambda w: written(w, bytes(range(256)) * 4), "decode"),
    "no YAML": (lambda w: written(w, b"a: b: c: ["), "mapping values"),
    "a list": (lambda w: written(w, b"- 1"), ""),
    "a word": (lambda w: written(w, b"word"), ""),
    "no context": (lambda w: written(w, WHOLE | {"current-context": None}), "current-context"),
    "unknown context": (lambda w: written(w, WHOLE | {"current-context": "abroad"}), "abroad"),
    "unknown cluster": (lambda w: written(w, WHOLE | {"clusters": []}), "object with name c"),
    "no server": (lambda w: written(w, config({}, {})), "no https:// address"),
    "server without https": (
        lambda w: w.kubeconfig({}, {"server": "127.0.0.1:6443"}),
        "no https:// address",
    ),
    "server of another kind": (
        lambda w: w.kubeconfig({}, {"server": "ftp://127.0.0.1"}),
        "no https:// address",
    ),
    "server that is a number": (lambda w: w.kubeconfig({}, {"server": 42}), ""),
    "no token file": (lambda w: w.kubeconfig({"tokenFile": "nowhere"}), "No such file"),
    "token of two lines": (lambda w: w.kubeconfig({"token": "two\nlines"}), "token"),
    "no authority": (
        lambda w: w.kubeconfig({}, {"certificate-authority": "nowhere"}),
        "does not exist",
    ),
    "broken authority": (
        lambda w: w.kubeconfig({}, {"certificate-authority": garbage(w)}),
        "certificate authority",
    ),
    "authority that is no base64": (
        lambda w: w.kubeconfig({}, {"certificate-authority-data": "%%%"}),
        "certificate authority",
    ),
    "no client certificate": (lambda w: with_certificate(w, certificate="no"), "does not exist"),
    "broken client key": (lambda w: with_certificate(w, key=garbage(w)), "client certificate"),
    "client key of another": (
        lambda w: with_certificate(w, key=str(w.certificates.server_key)),
        "client certificate",
    ),
    "no plugin": (
        lambda w: w.kubeconfig({"exec": {"apiVersion": "v1", "command": "no-such-plugin"}}),
        "no-such-plugin",
    ),
    "plugin that fails": (
        lambda w: w.kubeconfig(plugin(w, "echo login first >&2; exit 3")),
        "login first",
    ),
    "plugin that prints garbage": (lambda w: w.kubeconfig(plugin(w, "echo garbage")), "decode"),
    "plugin without a token": (
        lambda w: w.kubeconfig(plugin(w, f"echo '{credential()}'")),
        "missing token",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_configuration_is_one_line_with_value_reason_and_remedy(
    world: World, what: str, capfd: pytest.CaptureFixture[str]
) -> None:
    make, said = BROKEN[what]
    value = str(make(world))
    with pytest.raises(SettingsError) as refused:
        Api(value, in_kubernetes=False)
    text = str(refused.value)
    assert text.startswith(f"KUBECONFIG={value!r}: ")
    assert said in text
    assert text.endswith("; name a kubeconfig file that works with kubectl")
    assert text.isprintable()
    assert "two lines" not in text  # a token is nobody's business
    assert capfd.readouterr() == ("", "")


def test_an_encrypted_client_key_is_refused_and_nobody_asked_for_its_password(
    world: World,
) -> None:
    """OpenSSL would ask on the terminal, and wait."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl here")
    key = world.folder / "encrypted"
    command = [openssl, "ec", "-aes256", "-passout", "pass:x", "-out", str(key)]
    subprocess.run(
        [*command, "-in", str(world.certificates.admin_key)], check=True, capture_output=True
    )
    with pytest.raises(SettingsError, match="client certificate"):
        Api(
            str(world.kubeconfig(world.client_files | {"client-key": str(key)})),
            in_kubernetes=False,
        )


def test_neither_pod_nor_kubeconfig_is_told_with_the_remedy() -> None:
    with pytest.raises(SettingsError, match=r"^KUBECONFIG is not set and .*no pod.*: set it"):
        Api(None, in_kubernetes=False)


# ---------------------------------------------------------------------- in a pod


@pytest.fixture
def pod(world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    """This process is in a pod; the library's places of token and authority are moved."""
    with opened(world.kubeconfig()):
        pass  # now the library is loaded
    incluster = sys.modules["kubernetes.config.incluster_config"]
    (world.folder / "token").write_text("first\n")
    shutil.copy(world.certificates.ca, world.folder / "ca.crt")
    monkeypatch.setattr(incluster, "SERVICE_TOKEN_FILENAME", str(world.folder / "token"))
    monkeypatch.setattr(incluster, "SERVICE_CERT_FILENAME", str(world.folder / "ca.crt"))
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(world.mirror.server_port))
    return world


@contextlib.contextmanager
def opened_in_pod(kubeconfig: str | None = None) -> Iterator[Api]:
    api = Api(kubeconfig, in_kubernetes=True)
    try:
        yield api
    finally:
        api.close()


def test_the_pods_own_account_comes_first(pod: World) -> None:
    with opened_in_pod(str(pod.kubeconfig({"token": "other"}))) as api:
        assert api.host == pod.mirror.url
        assert api.verifies
        assert ask(api)["authorization"] == "bearer first"


def test_without_an_account_the_kubeconfig_is_used(pod: World) -> None:
    (pod.folder / "token").unlink()
    with opened_in_pod(str(pod.kubeconfig({"token": "other"}))) as api:
        assert ask(api)["authorization"] == "Bearer other"


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("token", None, "token file does not exist"),
        ("token", b"", "empty"),
        ("token", b"\xff\xfe\x00", "decode"),
        ("token", b"two\nlines", "token"),
        ("ca.crt", None, "does not exist"),
        ("ca.crt", b"", "empty"),
        ("ca.crt", b"garbage", "certificate authority"),
        ("ca.crt", b"\xff\xfe\x00", "decode"),
    ],
)
def test_a_broken_account_is_one_line(
    pod: World, file: str, content: bytes | None, said: str
) -> None:
    (pod.folder / file).unlink()
    if content is not None:
        (pod.folder / file).write_bytes(content)
    with pytest.raises(SettingsError, match="service account cannot be used") as refused:
        Api(None, in_kubernetes=True)
    assert said in str(refused.value)
    assert str(refused.value).isprintable()
    assert "lines" not in str(refused.value)


def test_a_rotated_token_is_read_at_the_first_401(pod: World) -> None:
    """The library reads its file once a minute; until then only the server knows better."""
    with opened_in_pod() as api:
        pod.mirror.accepted = {"bearer first"}
        assert ask(api)["authorization"] == "bearer first"
        pod.mirror.accepted = {"bearer second"}
        (pod.folder / "token").write_text("second")
        assert ask(api)["authorization"] == "bearer second"
        assert pod.mirror.seen == ["bearer first", "bearer first", "bearer second"]


def test_a_rotated_token_file_of_a_kubeconfig_too(world: World) -> None:
    (world.folder / "token").write_text("first")
    world.mirror.accepted = {"Bearer first"}
    with opened(world.kubeconfig({"tokenFile": "token"})) as api:
        ask(api)
        world.mirror.accepted = {"Bearer second"}
        (world.folder / "token").write_text("second\n")
        assert ask(api)["authorization"] == "Bearer second"


def test_a_plugin_is_asked_again_at_401(world: World) -> None:
    user = plugin(world, f"cat {world.folder / 'given'}")
    (world.folder / "given").write_text(credential(token="first"))
    world.mirror.accepted = {"Bearer first"}
    with opened(world.kubeconfig(user)) as api:
        ask(api)
        world.mirror.accepted = {"Bearer second"}
        (world.folder / "given").write_text(credential(token="second"))
        assert ask(api)["authorization"] == "Bearer second"


def test_a_plugin_that_fails_at_401_says_why_and_the_old_token_stays(world: World) -> None:
    user = plugin(world, f"cat {world.folder / 'given'}")
    (world.folder / "given").write_text(credential(token="first"))
    with opened(world.kubeconfig(user)) as api:
        world.mirror.accepted = set()
        (world.folder / "given").unlink()
        with pytest.raises(ApiError, match=r"read the credentials again.*No such file"):
            ask(api)
        world.mirror.accepted = {"Bearer first"}
        assert ask(api)["authorization"] == "Bearer first"


def test_a_token_that_stays_wrong_is_an_error_and_each_request_tries_anew(pod: World) -> None:
    with opened_in_pod() as api:
        pod.mirror.accepted = {"bearer third"}
        for _ in range(2):
            with pytest.raises(ApiError, match="status 401: Unauthorized") as refused:
                ask(api)
            assert refused.value.status == 401
        assert len(pod.mirror.seen) == 4
        (pod.folder / "token").write_text("third")
        assert ask(api)["authorization"] == "bearer third"


def test_credentials_that_cannot_be_read_again_keep_the_old_ones(pod: World) -> None:
    with opened_in_pod() as api:
        pod.mirror.accepted = set()
        (pod.folder / "token").unlink()
        with pytest.raises(ApiError, match="cannot read the credentials again"):
            ask(api)
        pod.mirror.accepted = {"bearer first"}
        assert ask(api)["authorization"] == "bearer first"


def test_a_token_that_cannot_be_a_header_is_not_shown(pod: World) -> None:
    """http.client would print it in its error."""
    with opened_in_pod() as api:
        pod.mirror.accepted = set()
        (pod.folder / "token").write_text("se\ncret")
        with pytest.raises(ApiError) as refused:
            ask(api)
        assert "cret" not in str(refused.value)


def test_many_threads_may_meet_a_401_at_once(pod: World) -> None:
    """Watch and Events have a thread each, and both reload."""
    failures: list[BaseException] = []

    def try_often() -> None:
        try:
            for _ in range(4):
                with contextlib.suppress(ApiError):
                    ask(api)
        except BaseException as error:  # noqa: BLE001
            failures.append(error)

    with opened_in_pod() as api:
        pod.mirror.accepted = set()
        threads = [threading.Thread(target=try_often) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []


# ---------------------------------------------------------------------- answers


class Script(threading.Thread):
    """Says the same bytes to everyone, then waits or closes."""

    def __init__(self, said: bytes, *, stay: bool = False) -> None:
        super().__init__(daemon=True)
        self.said, self.stay = said, stay
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.start()

    def run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                with connection:
                    connection.recv(65536)
                    connection.sendall(self.said)
                    if self.stay:
                        connection.recv(1)

    def __enter__(self) -> Script:
        return self

    def __exit__(self, *_: object) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        joined(self)


def plain(folder: Path, port: int) -> Path:
    path = folder / "plain"
    path.write_text(yaml.safe_dump(config({}, {"server": f"http://127.0.0.1:{port}"})))
    return path


HEAD = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"\x00" * 100,
        b"SSH-2.0-OpenSSH_9.2\r\n",
        HEAD + b"Content-Length: 100\r\n\r\n{",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nabc",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nabc",
        HEAD + b"X: " + b"y" * 100_000 + b"\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 500 \x1b[31m\r\nContent-Length: 2\r\n\r\n\xff\xfe",
        b"HTTP/1.1 503 x\r\nContent-Length: 999999\r\n\r\n{",
    ],
)
def test_any_nonsense_is_an_api_error_of_one_short_line(tmp_path: Path, said: bytes) -> None:
    with (
        Script(said) as server,
        opened(plain(tmp_path, server.port)) as api,
        pytest.raises(ApiError) as failed,
    ):
        ask(api)
    text = str(failed.value)
    assert text.strip()
    assert "\n" not in text
    assert " at 0x" not in text  # a text that changes each time would be logged each time
    assert len(text) < 400


def test_a_refused_connection_says_so(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with opened(plain(tmp_path, port)) as api, pytest.raises(ApiError) as failed:
        ask(api)
    assert str(failed.value) == "[Errno 111] Connection refused"  # not wrapped in urllib3's words


def test_a_name_that_nobody_knows_says_so(tmp_path: Path) -> None:
    path = tmp_path / "kubeconfig"
    path.write_text(yaml.safe_dump(config({}, {"server": "https://no-such-host.invalid:6443"})))
    with opened(path) as api, pytest.raises(ApiError, match=r"(?i)name|resol|host"):
        ask(api)


def test_silence_ends_with_the_read_timeout(tmp_path: Path) -> None:
    with (
        Script(b"", stay=True) as server,
        opened(plain(tmp_path, server.port)) as api,
        pytest.raises(ApiError, match=r"the API server is silent: .*timed out") as caught,
    ):
        api.get("/x", {}, accept="*/*", read_timeout_s=0.2)
    assert caught.value.silent


@pytest.mark.parametrize("more", [b"", b"Connection: close\r\n"])
def test_the_head_of_a_watch_is_not_waited_for_as_long_as_its_events(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: bytes
) -> None:
    monkeypatch.setattr(kube, "_HEAD_S", 0.2)
    with (
        Script(b"", stay=True) as server,
        opened(plain(tmp_path, server.port)) as api,
        pytest.raises(ApiError, match="timed out"),
    ):
        api.get("/x", {}, accept="*/*", read_timeout_s=300)
    said = HEAD + more + b"Transfer-Encoding: chunked\r\n\r\n"
    with Script(said, stay=True) as server, opened(plain(tmp_path, server.port)) as api:
        answer = api.get("/x", {}, accept="*/*", read_timeout_s=300)
        found: Any = answer._response
        assert found._fp.fp.raw._sock.gettimeout() == 300
        answer.close()


def test_bytes_come_as_soon_as_they_are_there(tmp_path: Path) -> None:
    said = HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nfirst\r\n"
    with Script(said, stay=True) as server, opened(plain(tmp_path, server.port)) as api:
        answer = api.get("/x", {}, accept="*/*", read_timeout_s=300)
        assert answer.read() == b"first"
        threading.Timer(0.05, answer.interrupt).start()
        with contextlib.suppress(ApiError):
            assert answer.read() == b""
        answer.close()


def test_too_long_a_body_is_refused(tmp_path: Path) -> None:
    said = HEAD + b"Content-Length: 1000\r\n\r\n" + b"x" * 1000
    with Script(said) as server, opened(plain(tmp_path, server.port)) as api:
        whole = api.get("/x", {}, accept="*/*", read_timeout_s=HANG_S).read_all(1000)
        assert whole == b"x" * 1000
        with pytest.raises(ApiError, match="longer than 999 bytes"):
            api.get("/x", {}, accept="*/*", read_timeout_s=HANG_S).read_all(999)


@pytest.mark.parametrize(
    ("after", "seconds"),
    [(b"7", 7.0), (b"0", 0.0), (b"-1", 0.0), (b"soon", 0.0), (b"9" * 400, float("inf"))],
)
def test_retry_after_is_read(tmp_path: Path, after: bytes, seconds: float) -> None:
    said = b"HTTP/1.1 429 Busy\r\nRetry-After: " + after + b"\r\nContent-Length: 0\r\n\r\n"
    with (
        Script(said) as server,
        opened(plain(tmp_path, server.port)) as api,
        pytest.raises(ApiError, match="status 429: Busy") as failed,
    ):
        ask(api)
    assert (failed.value.status, failed.value.retry_after_s) == (429, seconds)


CAUSE = b'{"causes":[{"reason":"ResourceVersionTooLarge"}]}'


@pytest.mark.parametrize(
    "details", [b"[]", b"null", b'"words"', b'{"causes":null}', b'{"causes":[{"reason":1}]}', CAUSE]
)
def test_what_a_refusal_says_is_kept_whatever_its_details(tmp_path: Path, details: bytes) -> None:
    """A proxy before the server has errors of another shape."""
    body = b'{"message":"it is full","details":' + details + b"}"
    said = b"HTTP/1.1 504 Away\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    with (
        Script(said) as server,
        opened(plain(tmp_path, server.port)) as api,
        pytest.raises(ApiError, match="status 504: it is full") as failed,
    ):
        ask(api)
    assert failed.value.too_large == (details == CAUSE)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://user:s3cret@127.0.0.1:1", "http://127.0.0.1:1"),
        ("http://user:s3c@ret@127.0.0.1:1", "http://127.0.0.1:1"),
        ("http://user:s3c%2Fret@127.0.0.1:1", "http://127.0.0.1:1"),
        ("https://user:s3cret@127.0.0.1:1", "https://127.0.0.1:1"),
        ("http://user:s3c/ret@127.0.0.1:1", None),
        ("http://user:s3c/r@et@127.0.0.1:1", None),
        ("http://user:s3c?ret@127.0.0.1:1", None),
        ("http://user:s3c#ret@127.0.0.1:1", None),
        ("http://user:s3c://ret@127.0.0.1:1", None),
        ("user:s3cret@127.0.0.1:1", None),
        ("s3c:ret@127.0.0.1:1", None),
    ],
)
def test_a_proxys_password_is_in_nothing_that_is_said(
    tmp_path: Path, url: str, shown: str | None
) -> None:
    path = tmp_path / "config"
    path.write_text(yaml.safe_dump(config({}, {"server": "http://10.0.0.1", "proxy-url": url})))
    if shown is None:
        with pytest.raises(SettingsError, match=r"127\.0.*:1.*http://host") as refused:
            Api(str(path), in_kubernetes=False)
        assert "s3c" not in str(refused.value)
        return
    with opened(path) as api, pytest.raises(ApiError, match=f"through the proxy {shown}") as failed:
        ask(api)
    assert api.proxy == shown
    assert "s3c" not in str(failed.value)


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_a_proxy_of_the_environment_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv(variable, "http://user:s3cret@127.0.0.1:1")
    path = tmp_path / "config"
    path.write_text(yaml.safe_dump(config({}, {"server": "http://10.0.0.1"})))
    with opened(path) as api:
        assert api.proxy == "http://127.0.0.1:1"


def test_half_open_connections_are_noticed_by_the_kernel(tmp_path: Path) -> None:
    """Keepalive as set on the real socket: a vanished peer is dropped after about 25 s."""
    with (
        Script(HEAD + b"Transfer-Encoding: chunked\r\n\r\n", stay=True) as server,
        opened(plain(tmp_path, server.port)) as api,
    ):
        answer = api.get("/x", {}, accept="*/*", read_timeout_s=HANG_S)
        found: Any = answer._response
        used: socket.socket = found._connection.sock
        assert used.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert used.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
        idle, interval, count = (
            used.getsockopt(socket.IPPROTO_TCP, option)
            for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
        )
        assert idle + interval * count <= 30
        assert used.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) <= 30_000
        answer.close()


# ---------------------------------------------------------------------- the library


def in_a_fresh_process(code: str, *arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        timeout=HANG_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


_OPEN = "import sys; from watcher.kube import Api; api = Api(sys.argv[1], in_kubernetes=False)\n"


def test_models_and_apis_of_the_library_stay_out_of_memory(tmp_path: Path) -> None:
    """It loads them when they are first asked for: half as much memory again."""
    code = _OPEN + "print(*sys.modules, sep='\\n')"
    loaded = in_a_fresh_process(code, str(plain(tmp_path, 1))).split()
    assert "kubernetes.client.rest" in loaded
    lazy = ("kubernetes.client.models.", "kubernetes.client.api.", "kubernetes.aio", "aiohttp")
    assert [name for name in loaded if name.startswith(lazy)] == []


class _Issuer(BaseHTTPRequestHandler):
    """An OpenID provider that has one new token to give."""

    def do_GET(self) -> None:
        assert isinstance(self.server, ThreadingHTTPServer)
        self._answer({"token_endpoint": f"http://127.0.0.1:{self.server.server_port}/token"})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._answer({"id_token": "new.id.token", "refresh_token": "r", "access_token": "a"})

    def _answer(self, body: Json) -> None:
        raw = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *_: object) -> None:
        """Quiet."""


def test_an_expired_oidc_token_is_refreshed(tmp_path: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Issuer) as issuer:
        threading.Thread(target=issuer.serve_forever, args=(0.02,), daemon=True).start()
        claims = base64.urlsafe_b64encode(json.dumps({"exp": 1}).encode()).decode().rstrip("=")
        provider = {
            "idp-issuer-url": f"http://127.0.0.1:{issuer.server_port}",
            "client-id": "id",
            "client-secret": "s",
            "id-token": f"a.{claims}.b",
            "refresh-token": "r",
        }
        user = {"auth-provider": {"name": "oidc", "config": provider}}
        path = tmp_path / "kubeconfig"
        path.write_text(yaml.safe_dump(config(user, {"server": "http://127.0.0.1:1"})))
        code = _OPEN + "from watcher import kube; print(kube._credentials(api._configuration))"
        said = in_a_fresh_process(code, str(path), OAUTHLIB_INSECURE_TRANSPORT="1")
        issuer.shutdown()
    assert "Bearer new.id.token" in said


def test_the_embedded_api_is_asked_like_a_real_one(tmp_path: Path) -> None:
    with KubeApi(tokens={"first": "watcher"}) as api:
        (tmp_path / "token").write_text("first")
        path = api.write_kubeconfig(tmp_path / "kubeconfig", token_file=tmp_path / "token")
        with opened(path) as client:
            assert ask(client, "/api/v1/pods")["kind"] == "PodList"
            api.rotate_token("first", "second")
            (tmp_path / "token").write_text("second")
            assert ask(client, "/api/v1/pods")["kind"] == "PodList"
            agents = {request.user_agent for request in api.requests()}
        assert all(agent.startswith("power-agent/") for agent in agents)

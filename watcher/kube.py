"""The Kubernetes API as the watcher needs it: credentials and raw answers, nothing about pods.

The only file that imports the client library: it brings configuration, TLS, tokens, exec plugins,
proxies and the connection pool. Its API classes, models and watch helpers are not used. The library
loads those when they are first asked for, which would cost 22 MiB more (kubernetes 37.0.2).
"""

import contextlib
import http.client
import logging
import os
import socket
import ssl
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import urlencode, urlsplit

import msgspec
import urllib3
from kubernetes.client.configuration import Configuration
from kubernetes.client.rest import RESTClientObject
from kubernetes.config import ConfigException, load_incluster_config, load_kube_config
from kubernetes.config.exec_provider import ExecProvider
from kubernetes.config.kube_config import KubeConfigMerger
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HTTPError, InsecureRequestWarning, ProtocolError
from urllib3.poolmanager import pool_classes_by_scheme

from shared import __version__
from shared.settings import SettingsError, without_password

_CONNECT_S = 5.0
# An answer that may take longer is a watch: its head comes at once, or the server hangs.
_PROMPT_S = 60.0
_HEAD_S = 20.0
_CHUNK_BYTES = 64 * 1024
_STATUS_BYTES = 16 * 1024  # of an error's body, whose `message` says what was wrong
# A peer that disappears (node replaced, NAT entry lost) is noticed after about 25 s,
# also (the last one) while something that was sent is not acknowledged.
_KEEPALIVE = [
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 25_000),
]


class ApiError(Exception):
    """The API server did not do what it was asked; `status` None where it did not answer.

    `too_large`: it has not come as far as the resource version that it was asked for. `silent`: it
    said nothing for as long as was waited for it, and the connection is there.
    """

    def __init__(
        self,
        message: str,
        status: int | None = None,
        retry_after_s: float = 0,
        *,
        too_large: bool = False,
        silent: bool = False,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after_s = retry_after_s
        self.too_large = too_large
        self.silent = silent


class Answer:
    """A successful answer as it comes in: bytes, in whatever pieces the server sends."""

    def __init__(self, response: urllib3.BaseHTTPResponse) -> None:
        self._response = response

    def read(self) -> bytes:
        """Return the next bytes as soon as there are some, empty at the end; raises ApiError."""
        with _mapped_errors():
            return self._response.read1(_CHUNK_BYTES)

    def read_all(self, limit_bytes: int) -> bytes:
        """Return the whole body; raises ApiError, also when it is longer than `limit_bytes`."""
        pieces: list[bytes] = []
        left = limit_bytes
        while piece := self.read():
            left -= len(piece)
            if left < 0:
                self.close()
                raise ApiError(f"the answer is longer than {limit_bytes} bytes")
            pieces.append(piece)
        return b"".join(pieces)

    def interrupt(self) -> None:
        """Let a `read` that another thread waits in return."""
        with contextlib.suppress(OSError, ValueError, RuntimeError):  # already at its end
            self._response.shutdown()

    def close(self) -> None:
        """Drop the connection, whatever is still to come."""
        self._response.close()


class Api:
    """Sends requests with the credentials of this pod, or of a kubeconfig outside a cluster."""

    def __init__(self, kubeconfig: str | None, *, in_kubernetes: bool) -> None:
        """Read the configuration, in a pod the pod's own first; raises SettingsError."""
        # The library logs with the root logger, which prints to stderr where nobody has set it up.
        logging.basicConfig(handlers=[logging.NullHandler()])
        urllib3.disable_warnings(InsecureRequestWarning)
        self._kubeconfig = kubeconfig
        self._in_kubernetes = in_kubernetes
        self._configuration, self._pool = self._open()

    @property
    def host(self) -> str:
        """Where requests go."""
        return str(self._configuration.host)

    @property
    def proxy(self) -> str:
        """The proxy that requests go through, without its password; empty where there is none."""
        pool = self._pool
        url = getattr(pool, "proxy", None) or getattr(pool, "proxy_url", None)
        return without_password(str(url)) if url else ""

    @property
    def verifies(self) -> bool:
        """Whether the server has to prove who it is."""
        return bool(self._configuration.verify_ssl) and self.host.startswith("https://")

    def _open(self) -> tuple[Configuration, urllib3.PoolManager]:
        configuration = _configuration(self._kubeconfig, self._in_kubernetes)
        configuration.socket_options = [*HTTPConnection.default_socket_options, *_KEEPALIVE]
        try:
            manager = RESTClientObject(configuration).pool_manager
        except (HTTPError, ImportError) as error:  # all else was tried before; for SOCKS: PySocks
            scheme, proxy = urlsplit(configuration.host).scheme.upper(), str(configuration.proxy)
            raise SettingsError(
                f"{scheme}_PROXY, ALL_PROXY or the kubeconfig's "
                f"proxy-url={without_password(proxy)!r}: {_why_no_proxy(proxy, error)}; "
                "write it as http://host:port or unset it"
            ) from error
        # A SOCKS proxy has pools of its own. There a head is waited for as long as a body.
        if manager.pool_classes_by_scheme is pool_classes_by_scheme:
            manager.pool_classes_by_scheme = {"http": _Pool, "https": _TlsPool}
        return configuration, manager

    def _reload(self) -> None:
        """Read tokens and certificates again; keep the old ones where that fails."""
        try:
            configuration, pool = self._open()
        except SettingsError as error:
            raise ApiError(f"cannot read the credentials again: {error}", 401) from error
        self.close()
        self._configuration = configuration
        self._pool = pool

    def close(self) -> None:
        """Close the connections that nobody uses just now."""
        self._pool.clear()

    def get(
        self, path: str, query: Mapping[str, str], *, accept: str, read_timeout_s: float
    ) -> Answer:
        """Return the answer once its head is there; raises ApiError."""
        url = f"{path}?{urlencode(query)}"
        return self._request("GET", url, {"Accept": accept}, None, read_timeout_s)

    def post(self, path: str, body: bytes, *, read_timeout_s: float) -> None:
        """Create an object; raises ApiError."""
        headers = {"Accept": "application/json", "Content-Type": "application/json"}
        self._request("POST", path, headers, body, read_timeout_s).close()

    def _request(
        self, method: str, url: str, headers: dict[str, str], body: bytes | None, timeout_s: float
    ) -> Answer:
        try:
            response = self._send(method, url, headers, body, timeout_s)
        except ApiError as error:
            # A kept connection that the server was just closing (RFC 9112, 9.3.1): ask once more.
            closed = isinstance(_root(error), ConnectionResetError | BrokenPipeError)
            if method != "GET" or not closed:
                raise
            response = self._send(method, url, headers, body, timeout_s)
        if response.status == 401:  # a rotated token: read it again and try once more
            response.close()
            self._reload()
            response = self._send(method, url, headers, body, timeout_s)
        if not 200 <= response.status < 300:
            raise _refusal(response)
        return Answer(response)

    def _send(
        self, method: str, url: str, headers: dict[str, str], body: bytes | None, timeout_s: float
    ) -> urllib3.BaseHTTPResponse:
        with _mapped_errors(self.proxy):
            return self._pool.urlopen(
                method,
                self.host + url,
                headers=headers
                | {"User-Agent": f"power-agent/{__version__}"}
                | _credentials(self._configuration),
                body=body,
                timeout=urllib3.Timeout(connect=_CONNECT_S, read=timeout_s),
                retries=False,
                redirect=False,
                preload_content=False,
                decode_content=False,
            )


class _Connection(HTTPConnection):
    """Waits for the head of a watch no longer than `_HEAD_S`: urllib3 has one timeout for all.

    The socket is taken hold of before: an answer with `Connection: close` takes it away.
    """

    def getresponse(self) -> urllib3.HTTPResponse:  # type: ignore[override]  # as urllib3 does
        sock, body_s = self.sock, self.timeout
        self.timeout = _HEAD_S if body_s and body_s > _PROMPT_S else body_s
        response = super().getresponse()
        with contextlib.suppress(OSError):  # closed: there was nothing but the head
            sock.settimeout(body_s)
        return response


class _TlsConnection(_Connection, HTTPSConnection):
    pass


class _Pool(urllib3.HTTPConnectionPool):
    ConnectionCls = _Connection


class _TlsPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _TlsConnection


def _credentials(configuration: Configuration) -> dict[str, str]:
    """Return the header with the token; the library reads its file again every minute."""
    try:
        setting = configuration.auth_settings().get("BearerToken")
    # Reading it again runs whatever refreshes it: files, plugins and servers fail in any way.
    except Exception as error:
        raise ApiError(f"cannot read the token: {_one_line(error)}") from error
    if setting is None or not setting["value"]:
        return {}
    value = setting["value"].strip()
    # http.client would refuse it too, but with the token in the error's text.
    if not (value.isascii() and value.isprintable()):
        raise ApiError("cannot use the token: it is not one line of plain text")
    return {setting["key"]: value}


def _configuration(kubeconfig: str | None, in_kubernetes: bool) -> Configuration:
    """Return the library's configuration: this pod's, else the kubeconfig's."""
    problem = "this is no pod with a service account"
    if in_kubernetes:
        configuration = Configuration()
        try:
            load_incluster_config(configuration)  # type: ignore[no-untyped-call]
            _check(configuration)
        except (ConfigException, ApiError, OSError, ValueError) as error:
            problem = f"this pod's service account cannot be used ({_one_line(error)})"
        else:
            return configuration
    if kubeconfig is None:
        raise SettingsError(
            f"KUBECONFIG is not set and {problem}: "
            "set it to a kubeconfig file, or mount a service account's token"
        )
    configuration = Configuration(host="")  # the library's own default is http://localhost
    _load_kubeconfig(configuration, kubeconfig)
    return configuration


def _load_kubeconfig(configuration: Configuration, kubeconfig: str) -> None:
    remedy = "name a kubeconfig file that works with kubectl"
    try:
        for path in filter(None, kubeconfig.split(os.pathsep)):
            # The library would take an unreadable one for no file at all.
            Path(path).expanduser().open("rb").close()
        load_kube_config(  # type: ignore[no-untyped-call]
            kubeconfig, client_configuration=configuration, persist_config=False
        )
        if not (configuration.api_key or configuration.cert_file):
            _ask_plugin(kubeconfig)
        _check(configuration)
    # Whatever a file of any content makes YAML, base64 and the library raise.
    except Exception as error:
        raise SettingsError(f"KUBECONFIG={kubeconfig!r}: {_one_line(error)}; {remedy}") from error


def _ask_plugin(kubeconfig: str) -> None:
    """Where the user of `kubeconfig` has an exec plugin, raise why it gave no credentials.

    The library only logs the reason and goes on without (_load_from_exec_plugin of kube_config.py).
    So the plugin is run once more, by the library's own class, which raises it.
    """
    merged = KubeConfigMerger(kubeconfig).config  # type: ignore[no-untyped-call]
    context = merged["contexts"].get_with_name(merged["current-context"])["context"]
    if not context.safe_get("user") or not merged.safe_get("users"):
        return
    user = merged["users"].get_with_name(context["user"], safe=True)
    if not user or "exec" not in user["user"]:
        return
    cluster = merged["clusters"].get_with_name(context["cluster"])["cluster"]
    folder = str(Path(cluster.path).absolute().parent)
    ExecProvider(user["user"]["exec"], folder, cluster).run()  # type: ignore[no-untyped-call]
    raise ApiError("exec: missing token, or certificate and key, in the plugin's output")


def _check(configuration: Configuration) -> None:
    """Refuse a configuration with which no request could succeed; raises ApiError."""
    host = str(configuration.host)
    if not urlsplit(host).hostname or not host.startswith(("https://", "http://")):
        raise ApiError(f"the server {host!r} is no https:// address")
    _credentials(configuration)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        if configuration.verify_ssl and configuration.ssl_ca_cert:
            context.load_verify_locations(configuration.ssl_ca_cert)
    except OSError as error:
        raise ApiError(f"the certificate authority cannot be used: {error}") from error
    try:
        if configuration.cert_file:
            # No password: else OpenSSL asks for it on the terminal.
            chain = configuration.cert_file, configuration.key_file
            context.load_cert_chain(*chain, password=lambda: b"")
    except OSError as error:
        raise ApiError(f"the client certificate cannot be used: {error}") from error


def _why_no_proxy(proxy: str, error: Exception) -> str:
    """Return why a proxy's address is not taken; urllib3's text may hold a part of its password."""
    if "@" not in proxy or isinstance(error, ImportError):
        return _one_line(error)
    return "no address (in a password / ? # : @ are written as %2F %3F %23 %3A %40)"


@contextlib.contextmanager
def _mapped_errors(proxy: str = "") -> Iterator[None]:
    try:
        yield
    except (HTTPError, http.client.HTTPException, OSError, ValueError) as error:
        root = _root(error)
        torn = isinstance(error, ProtocolError) and not isinstance(root, OSError)
        why = "the connection broke in the middle of an answer" if torn else _one_line(root)
        # With a number it is the kernel's word that the peer has gone (ETIMEDOUT).
        silent = isinstance(root, TimeoutError) and root.errno is None
        if silent:
            why = f"the API server is silent: {why}"
        text = f"{why} (through the proxy {proxy})" if proxy else why
        raise ApiError(text, silent=silent) from error


def _root(error: BaseException) -> BaseException:
    """Return the first cause: urllib3 wraps it in texts that hold memory addresses."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    return error


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    named = f"{type(error).__name__}: {text}".rstrip(": ")
    return (text if text and isinstance(error, OSError | ApiError) else named)[:300]


class _Cause(msgspec.Struct, frozen=True):
    reason: str = ""


class _Details(msgspec.Struct, frozen=True):
    causes: tuple[_Cause, ...] = ()


class _Status(msgspec.Struct, frozen=True):
    message: str = ""
    details: msgspec.Raw = msgspec.Raw(b"{}")  # a proxy's error has anything there


def _refusal(response: urllib3.BaseHTTPResponse) -> ApiError:
    """Return what an answer that is no success means."""
    body = b""
    with contextlib.suppress(ApiError), _mapped_errors():
        while len(body) < _STATUS_BYTES and (piece := response.read1(_STATUS_BYTES)):
            body += piece
    response.close()
    status, causes = _Status(), tuple[_Cause, ...]()
    with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError):
        status = msgspec.json.decode(body, type=_Status)
        causes = msgspec.json.decode(status.details, type=_Details).causes
    after = response.headers.get("Retry-After", "")
    retry_after_s = float(after) if after.isascii() and after.isdigit() else 0.0
    said = " ".join(status.message.split())[:300] or response.reason or "no reason given"
    return ApiError(
        f"status {response.status}: {said}",
        response.status,
        retry_after_s,
        too_large=any(cause.reason == "ResourceVersionTooLarge" for cause in causes),
    )

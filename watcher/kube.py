"""The Kubernetes API as the watcher needs it: credentials and raw answers, nothing about pods.

The only file that imports the client library: it brings configuration, TLS, tokens, exec plugins,
proxies and the connection pool. Its API classes, models and watch helpers are left out.
"""

import contextlib
import functools
import http.client
import importlib
import importlib.util
import logging
import os
import socket
import ssl
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import msgspec
import urllib3
from urllib3.connection import HTTPConnection
from urllib3.exceptions import HTTPError, InsecureRequestWarning, ProtocolError

from shared import __version__
from shared.settings import SettingsError

_CONNECT_S = 5.0
# An answer that may take longer is a watch: its head comes at once, or the server hangs.
_PROMPT_S, _HEAD_S = 60.0, 30.0
_CHUNK_BYTES = 64 * 1024
_STATUS_BYTES = 16 * 1024  # of an error's body, whose `message` says what was wrong
# A peer that is gone without a word (node replaced, NAT entry lost) is noticed after about 25 s,
# also (the last one) while something that was sent is not acknowledged.
_KEEPALIVE = [
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 25_000),
]
# A module that is taken out of sys.modules by one thread must not be missed by another.
_importing = threading.RLock()


class ApiError(Exception):
    """The API server did not do what it was asked; `status` None where it did not answer.

    `too_large`: it has not come as far as the resource version that it was asked for.
    """

    def __init__(
        self,
        message: str,
        status: int | None = None,
        retry_after_s: float = 0,
        *,
        too_large: bool = False,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after_s = retry_after_s
        self.too_large = too_large


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
        logging.getLogger().addHandler(logging.NullHandler())  # else logging prints to stderr
        urllib3.disable_warnings(InsecureRequestWarning)
        self._kubeconfig, self._in_kubernetes = kubeconfig, in_kubernetes
        self._configuration, self._pool = self._open()

    @property
    def host(self) -> str:
        """Where requests go."""
        return str(self._configuration.host)

    @property
    def verifies(self) -> bool:
        """Whether the server has to prove who it is."""
        return bool(self._configuration.verify_ssl) and self.host.startswith("https://")

    def _open(self) -> tuple[Any, urllib3.PoolManager]:
        with _bare_packages():
            from kubernetes.client.rest import RESTClientObject  # noqa: PLC0415

        configuration = _configuration(self._kubeconfig, self._in_kubernetes)
        configuration.socket_options = [*HTTPConnection.default_socket_options, *_KEEPALIVE]
        try:
            manager = RESTClientObject(configuration).pool_manager
        except (HTTPError, ImportError) as error:  # all else was tried before; for SOCKS: PySocks
            scheme = urlsplit(configuration.host).scheme.upper()
            proxy = str(configuration.proxy).rpartition("@")[2]  # without its password
            raise SettingsError(
                f"{scheme}_PROXY, ALL_PROXY or the kubeconfig's proxy-url={proxy!r}: "
                f"{_one_line(error)}; write it as http://host:port or unset it"
            ) from error
        pools = manager.pool_classes_by_scheme
        manager.pool_classes_by_scheme = {name: _impatient(kind) for name, kind in pools.items()}
        return configuration, manager

    def _reload(self) -> None:
        """Read tokens and certificates again; keep the old ones where that fails."""
        try:
            configuration, pool = self._open()
        except SettingsError as error:
            raise ApiError(f"cannot read the credentials again: {error}", 401) from error
        self.close()
        self._configuration, self._pool = configuration, pool

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
        with _mapped_errors():
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


@functools.cache
def _impatient(pools: Any) -> Any:  # noqa: ANN401
    """Return that class of connection pools with `_HEAD_S`, for which urllib3 has no setting."""

    class Connection(pools.ConnectionCls):  # type: ignore[misc]
        timeout: float

        def getresponse(self) -> urllib3.HTTPResponse:
            sock, timeout_s = self.sock, self.timeout
            self.timeout = _HEAD_S if timeout_s > _PROMPT_S else timeout_s
            response: urllib3.HTTPResponse = super().getresponse()
            with contextlib.suppress(OSError):  # closed: there was nothing but the head
                sock.settimeout(timeout_s)
            return response

    return type("Pool", (pools,), {"ConnectionCls": Connection})


def _credentials(configuration: Any) -> dict[str, str]:  # noqa: ANN401
    """Return the header with the token; the library reads its file again every minute."""
    try:
        settings = configuration.auth_settings().values()
    # The library's own ConfigException has no base of its own.
    except Exception as error:
        raise ApiError(f"cannot read the token: {_one_line(error)}") from error
    headers = {s["key"]: s["value"].strip() for s in settings if s["value"]}
    # http.client would refuse it too, but with the token in the error's text.
    if not all(value.isascii() and value.isprintable() for value in headers.values()):
        raise ApiError("cannot use the token: it is not one line of plain text")
    return headers


def _configuration(kubeconfig: str | None, in_kubernetes: bool) -> Any:  # noqa: ANN401
    """Return the library's configuration: this pod's, else the kubeconfig's."""
    with _bare_packages():
        from kubernetes.client.configuration import Configuration  # noqa: PLC0415
        from kubernetes.config import config_exception, incluster_config  # noqa: PLC0415

    problem = "this is no pod with a service account"
    if in_kubernetes:
        configuration: Any = Configuration()
        try:
            incluster_config.load_incluster_config(configuration)  # type: ignore[no-untyped-call]
            _check(configuration)
        except (config_exception.ConfigException, ApiError, OSError, ValueError) as error:
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


def _load_kubeconfig(configuration: Any, kubeconfig: str) -> None:  # noqa: ANN401
    with _bare_packages():
        # The loader wants ApiClient for refreshing OIDC tokens only; it brings 11 MB of pydantic.
        importlib.import_module("kubernetes.client").ApiClient = _api_client  # type: ignore[attr-defined]
        from kubernetes.config import kube_config  # noqa: PLC0415
    remedy = "name a kubeconfig file that works with kubectl"
    paths = [path for path in kubeconfig.split(os.pathsep) if path]
    complaints = _Complaints()
    logging.getLogger().addHandler(complaints)
    try:
        for path in paths:  # the library would take an unreadable one for no file at all
            Path(path).expanduser().open("rb").close()
        kube_config.load_kube_config(  # type: ignore[no-untyped-call]
            kubeconfig, client_configuration=configuration, persist_config=False
        )
        if complaints.texts:
            raise ApiError(complaints.texts[0])
        _check(configuration)
    # Whatever a file of any content makes YAML, base64 and the library raise.
    except Exception as error:
        raise SettingsError(f"KUBECONFIG={kubeconfig!r}: {_one_line(error)}; {remedy}") from error
    finally:
        logging.getLogger().removeHandler(complaints)


class _Complaints(logging.Handler):
    """Keeps the errors that the library logs: an exec plugin that fails is no more to it."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def _check(configuration: Any) -> None:  # noqa: ANN401
    """Refuse what no request could succeed with; raises ApiError."""
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


def _api_client(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
    from kubernetes.client.api_client import ApiClient  # noqa: PLC0415

    return ApiClient(*args, **kwargs)


@contextlib.contextmanager
def _bare_packages() -> Iterator[None]:
    """Let single files of the client library be imported without its packages' `__init__`.

    Those import everything there is, models and informers included: 45 MB resident where the
    files that are used here need 27 (kubernetes 37.0.2, Python 3.11).
    """
    made: list[str] = []
    with _importing:
        try:
            for name in ("kubernetes", "kubernetes.config", "kubernetes.utils"):
                if name not in sys.modules:
                    spec = importlib.util.find_spec(name)
                    if spec is None:
                        raise ModuleNotFoundError(f"no module named {name!r}", name=name)
                    sys.modules[name] = importlib.util.module_from_spec(spec)
                    made.append(name)
            yield
        finally:
            for name in made:
                del sys.modules[name]


@contextlib.contextmanager
def _mapped_errors() -> Iterator[None]:
    try:
        yield
    except (HTTPError, http.client.HTTPException, OSError, ValueError) as error:
        root = _root(error)
        torn = isinstance(error, ProtocolError) and not isinstance(root, OSError)
        why = "the connection broke in the middle of an answer" if torn else _one_line(root)
        raise ApiError(why) from error


def _root(error: BaseException) -> BaseException:
    """Return what lies at the bottom: urllib3 wraps it in texts that hold memory addresses."""
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

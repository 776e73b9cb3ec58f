"""The small HTTP server: /metrics for Prometheus, /healthz and /readyz for the kubelet."""

import contextlib
import errno
import socket
import socketserver
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from http.server import BaseHTTPRequestHandler

from shared.settings import SettingsError
from watcher.reflector import Heard
from watcher.settings import Address

# A path's page: status, content type, body.
Page = Callable[[], tuple[int, str, str]]

_TEXT = "text/plain; charset=utf-8"
# The kernel has no IPv6, or no interface has it (net.ipv6.conf.*.disable_ipv6).
_NO_IPV6 = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)
# A bookmark comes each minute, so longer than this without a word is worth a note.
SUSPECT_S = 75.0
# No word for so long is no restart of the API server, and the agent does not see what is wanted.
UNREADY_S = 300.0
_READ_S = 5.0
_CONNECTIONS = 8
_OLD_S = 2.0  # where all are alike, a full house drops the oldest, if it had time enough


def checklist(missing: list[str], notes: Sequence[str] = ()) -> tuple[int, str, str]:
    """Return the page of a check: 200, or 503 and what is missing; `notes` are said in any case."""
    lines = [*(missing or ["ok"]), *notes]
    return 503 if missing else 200, _TEXT, "\n".join(lines) + "\n"


def readiness(heard: Heard, *, listed: bool, missing: list[str]) -> tuple[int, str, str]:
    """Return the page of /readyz: whether the agent can do its work on this node.

    Without a list it cannot. Later the API may fail for a while: what was last wanted is enforced,
    and one restart of the API must not make all nodes of a cluster unready. So its trouble is only
    noted at first.
    """
    if not listed:
        return checklist([f"pods: not listed yet: {heard.error or 'asking'}", *missing])
    said = f"the API server last said something {heard.silent_s:.0f} s ago"
    if heard.error:
        said += f": {heard.error}"
    if heard.silent_s > UNREADY_S:
        return checklist([f"api: {said}; the limits of before hold", *missing])
    troubled = heard.error or heard.silent_s > SUSPECT_S
    return checklist(missing, [f"api: {said}"] if troubled else [])


class Server(socketserver.ThreadingTCPServer):
    """Answers GET for a few fixed paths, each connection once, with bounded time and number."""

    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 16

    def __init__(self, address: Address, pages: Mapping[str, Page]) -> None:
        """Listen; raises SettingsError."""
        self.pages = pages
        self._lock = threading.Lock()
        self._open: dict[socket.socket, tuple[float, str]] = {}  # since when, whose; oldest first
        try:
            self._listen(address)
        except (OSError, OverflowError) as error:
            raise SettingsError(
                f"POWER_AGENT_METRICS_ADDR='{address}': {error}; "
                "choose an address that is free on this node, or off"
            ) from error

    def _listen(self, address: Address) -> None:
        """Bind the address; without a host every one of both families, or of IPv4 alone."""
        self.address_family = socket.AF_INET
        if not address.host or ":" in address.host:
            self.address_family = socket.AF_INET6
        try:
            super().__init__((address.host, address.port), _Handler)
        except OSError as error:
            if address.host or error.errno not in _NO_IPV6:
                raise
            self.address_family = socket.AF_INET
            super().__init__(("", address.port), _Handler)

    def server_bind(self) -> None:
        """Bind; an address of all of IPv6 serves IPv4 too, whatever the node's sysctl says."""
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()

    @property
    def port(self) -> int:
        """The port that was bound, also where any was asked for."""
        return int(self.server_address[1])

    def start(self) -> None:
        """Serve from a thread of its own until the process ends."""
        # Nobody calls shutdown(), so nothing has to be polled for.
        serve = threading.Thread(target=self.serve_forever, args=(3600.0,), daemon=True)
        serve.name = "health"
        serve.start()

    def verify_request(self, request: object, client_address: tuple[str, int]) -> bool:
        """Keep the number of connections bounded."""
        assert isinstance(request, socket.socket)
        now, peer = time.monotonic(), client_address[0]
        with self._lock:
            if len(self._open) >= _CONNECTIONS:
                leaving = self._leaving(now, peer)
                if leaving is None:
                    return False
                del self._open[leaving]
                _hang_up(leaving)
            self._open[request] = now, peer
        return True

    def _leaving(self, now: float, newcomer: str) -> socket.socket | None:
        """Return the connection to drop for one of `newcomer`, None where that one has to go.

        Fair by address: one pod that connects again and again never shuts the kubelet out.
        """
        held = Counter(peer for _, peer in self._open.values())
        ((greediest, most),) = held.most_common(1)
        if held[newcomer] + 1 < most:
            return next(c for c, (_, peer) in self._open.items() if peer == greediest)
        oldest, (since, _) = next(iter(self._open.items()))
        return oldest if now - since >= _OLD_S else None

    def close_request(self, request: object) -> None:
        """Forget a connection that has ended."""
        assert isinstance(request, socket.socket)
        with self._lock:
            self._open.pop(request, None)
        request.close()

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: a client that hangs up is no fault of this side."""


def _hang_up(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it has just ended by itself
        connection.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    timeout = _READ_S
    server_version = "power-agent"
    sys_version = ""

    def do_GET(self) -> None:
        assert isinstance(self.server, Server)
        page = self.server.pages.get(self.path.partition("?")[0])
        self._answer(*(page() if page else (404, _TEXT, "not here\n")))

    do_HEAD = do_GET  # noqa: N815

    def _answer(self, status: int, kind: str, text: str) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Log nothing: probes come every few seconds."""

"""HTTP: a path to an operation, an answer to bytes; the listener that can go away and return."""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from . import discovery
from .access import Access
from .errors import (
    ApiError,
    Json,
    method_not_allowed,
    no_such_path,
    too_large_body,
    unsupported_media_type,
)
from .faults import Faults
from .listing import ListOptions, list_objects
from .operations import Operations, Target
from .patch import JSON_PATCH
from .pods import parse_object
from .representation import Representation, choose, encode
from .resources import RESOURCES
from .store import Store
from .traffic import Request, Traffic
from .watch import Stream, Watch, Watches, WatchOptions, is_true

_MAX_BODY_BYTES = 3 * 1024 * 1024
_TEXT = "text/plain; charset=utf-8"
_VERBS = {"GET": "get", "POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}


class Context:
    """What every request works with."""

    def __init__(
        self, store: Store, access: Access, version: tuple[int, int], bookmark_interval_s: float
    ) -> None:
        self.store = store
        self.access = access
        self.version = version
        self.bookmark_interval_s = bookmark_interval_s
        self.operations = Operations(store)
        self.faults = Faults()
        self.traffic = Traffic()
        self.watches = Watches(store)


def parse_path(path: str) -> Target | None:
    """None: not below /api/v1."""
    parts = [unquote(part) for part in path.strip("/").split("/")]
    if parts[:2] != ["api", "v1"] or len(parts) < 3:
        return None
    namespace = ""
    if parts[2] == "namespaces" and len(parts) >= 5 and parts[4] in RESOURCES:
        namespace, parts = parts[3], [*parts[:2], *parts[4:]]
    resource = RESOURCES.get(parts[2])
    name = parts[3] if len(parts) > 3 else ""
    subresource = parts[4] if len(parts) > 4 else ""
    if resource is None or len(parts) > 5 or subresource not in ("", "status"):
        raise no_such_path()
    if subresource and not resource.has_status:
        raise no_such_path()
    if bool(namespace) is not resource.namespaced and (name or namespace):
        raise no_such_path()
    return Target(resource, namespace, name, subresource)


class Handler(BaseHTTPRequestHandler):
    """One connection; requests follow each other on it."""

    protocol_version = "HTTP/1.1"
    server_version = "kubeapi"
    disable_nagle_algorithm = True
    server: Listener

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002, ANN401
        """Quiet: tests look at the counters."""

    def do_GET(self) -> None:
        self._serve()

    do_POST = do_PUT = do_PATCH = do_DELETE = do_GET  # noqa: N815

    def _serve(self) -> None:
        self._context = self.server.context
        split = urlsplit(self.path)
        self._query = dict(parse_qsl(split.query, keep_blank_values=True))
        try:
            body = self._read_body()
            self._context.faults.wait_while_frozen()
            self._route(split.path, body)
        except ApiError as problem:
            self._refuse(problem)
        except (ConnectionError, TimeoutError, BrokenPipeError):
            self.close_connection = True

    def _read_body(self) -> bytes:
        length = int(self.headers.get("Content-Length") or 0)
        if length > _MAX_BODY_BYTES:
            self.close_connection = True  # the body is not read, so nothing can follow it
            raise too_large_body()
        return self.rfile.read(length)

    def _route(self, path: str, body: bytes) -> None:
        target = parse_path(path)
        if target is None:
            self._serve_discovery(path)
            return
        verb = self._verb(target)
        self._note(verb, target)
        if delay_s := self._context.faults.delay_s(verb):
            time.sleep(delay_s)
        if failure := self._context.faults.failure(verb):
            raise failure
        user = self._context.access.authenticate(self.headers.get("Authorization"))
        resource = target.resource.name
        if target.subresource:
            resource += f"/{target.subresource}"
        self._context.access.authorize(user, verb, resource, target.namespace, target.name)
        if verb == "list":
            self._list(target)
        elif verb == "watch":
            self._watch(target)
        else:
            self._single(verb, target, body)

    def _verb(self, target: Target) -> str:
        verb = _VERBS[self.command]
        if (verb in ("create",)) is bool(target.name) and verb != "get":
            raise method_not_allowed()
        if verb != "get" or target.name:
            return verb
        return "watch" if is_true(self._query.get("watch")) else "list"

    def _note(self, verb: str, target: Target) -> None:
        self._context.traffic.note(
            Request(
                verb=verb,
                resource=target.resource.name,
                namespace=target.namespace,
                name=target.name,
                path=self.path,
                accept=self.headers.get("Accept", ""),
                user_agent=self.headers.get("User-Agent", ""),
            )
        )

    # ------------------------------------------------------------------------ resources

    def _representation(self) -> Representation:
        accept, include = self.headers.get("Accept", ""), self._query.get("includeObject")
        return choose(accept, include or "Metadata")

    def _list(self, target: Target) -> None:
        representation = self._representation()
        context = self._context
        options = ListOptions.parse(self._query)
        objects, metadata = list_objects(
            context.store, context.faults, target.resource, target.namespace, options
        )
        self._answer(200, representation.many(target.resource, objects, metadata))

    def _watch(self, target: Target) -> None:
        context = self._context
        options = WatchOptions.parse(self._query, context.version)
        watch = Watch(
            context.store, target.resource, target.namespace, self._representation(), options
        )
        stream = Stream(watch, self.connection, context.faults, context.bookmark_interval_s)

        def run() -> bool:
            head = self._head(200, "application/json", {"Transfer-Encoding": "chunked"})
            self.connection.sendall(head)
            return stream.run(options)

        if not context.watches.serve(watch, run):
            self.close_connection = True

    def _single(self, verb: str, target: Target, body: bytes) -> None:
        representation = self._representation()
        representation.check_single()
        operations, dry_run = self._context.operations, bool(self._query.get("dryRun"))
        if verb == "get":
            obj = operations.get(target)
        elif verb == "create":
            obj = operations.create(target, self._json(body), dry_run=dry_run)
        elif verb == "update":
            obj = operations.update(target, self._json(body), dry_run=dry_run)
        elif verb == "patch":
            content_type = self._content_type()
            # An apply patch is YAML and refused by its type; the others are JSON.
            patch = parse_object(body) if content_type.endswith("json") else None
            obj = operations.patch(target, content_type, patch, dry_run=dry_run)
        else:
            options = self._json(body) if body else {}
            if "gracePeriodSeconds" in self._query:
                options = {"gracePeriodSeconds": int(self._query["gracePeriodSeconds"]), **options}
            obj = operations.delete(target, options, dry_run=dry_run)
        if obj["kind"] != "Status":
            obj = representation.one(target.resource, obj)
        self._answer(201 if verb == "create" else 200, obj)

    def _content_type(self) -> str:
        return (self.headers.get("Content-Type") or "").split(";")[0].strip()

    def _json(self, body: bytes) -> Any:  # noqa: ANN401
        if self._content_type() not in ("", "application/json", JSON_PATCH):
            raise unsupported_media_type("application/json")
        return parse_object(body)

    # ------------------------------------------------------------------------ discovery

    def _serve_discovery(self, path: str) -> None:
        self._context.access.authenticate(self.headers.get("Authorization"))
        version, accept = self._context.version, self.headers.get("Accept", "")
        aggregated = discovery.aggregated_type(version, accept)
        path = path.rstrip("/")
        if path in ("/api", "/apis") and aggregated:
            body = encode(discovery.aggregated(aggregated, core=path == "/api"))
            self._answer_bytes(200, aggregated, body)
            return
        if path in ("/healthz", "/livez", "/readyz"):
            self._answer_bytes(200, _TEXT, b"ok")
            return
        if path == "/openapi/v2":
            self._answer_bytes(200, discovery.OPENAPI_V2_TYPE, discovery.OPENAPI_V2_PROTOBUF)
            return
        documents: dict[str, Callable[[], Json]] = {
            "/version": lambda: discovery.version_info(version),
            "/api": lambda: discovery.core_versions(self.headers.get("Host", "")),
            "/apis": discovery.no_groups,
            "/api/v1": discovery.resource_list,
            "/openapi/v3": discovery.openapi_v3_index,
            "/openapi/v3/api/v1": lambda: discovery.openapi_v3_core(version),
        }
        if path not in documents:
            self._answer_bytes(404, _TEXT, b"404 page not found\n")
            return
        self._answer(200, documents[path]())

    # ------------------------------------------------------------------------ answers

    def _answer(self, code: int, obj: Json) -> None:
        self._answer_bytes(code, "application/json", encode(obj))

    def _refuse(self, problem: ApiError) -> None:
        media, body = "application/json", encode(problem.status)
        if problem.code == HTTPStatus.TOO_MANY_REQUESTS:
            # The real server's limiter answers before anything that could write a Status.
            media, body = _TEXT, f"{problem}\n".encode()
        self._answer_bytes(problem.code, media, body, problem.headers)

    def _head(self, code: int, media: str, headers: Mapping[str, str]) -> bytes:
        lines = {
            "Content-Type": media,
            "Cache-Control": "no-cache, private",
            "Date": self.date_time_string(),
            **headers,
            **({"Connection": "close"} if self.close_connection else {}),
        }
        text = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        return f"HTTP/1.1 {code} {HTTPStatus(code).phrase}\r\n{text}\r\n".encode("latin-1")

    def _answer_bytes(
        self, code: int, media: str, body: bytes, headers: Mapping[str, str] | None = None
    ) -> None:
        head = self._head(code, media, {"Content-Length": str(len(body)), **(headers or {})})
        self.connection.sendall(head + body)


class Listener(ThreadingHTTPServer):
    """Accepts on a port it is given as a bound socket, and knows its open connections."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, bound: socket.socket, context: Context) -> None:
        super().__init__(bound.getsockname(), Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = bound
        self.context = context
        self._closing = False
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        self.server_activate()
        self._thread = threading.Thread(target=self._accept_all, name="kubeapi", daemon=True)
        self._thread.start()

    def _accept_all(self) -> None:
        while not self._closing:
            self.handle_request()

    def close(self) -> None:
        """No new connections, and an abrupt end for the open ones."""
        self._closing = True
        self.socket.shutdown(socket.SHUT_RDWR)  # wakes the accepting thread
        self._thread.join()
        self.server_close()
        self.cut_connections()

    def cut_connections(self) -> None:
        with self._lock:
            for connection in self._connections:
                with contextlib.suppress(OSError):  # the client was faster
                    connection.shutdown(socket.SHUT_RDWR)

    def process_request(self, request: Any, client_address: Any) -> None:  # noqa: ANN401
        with self._lock:
            self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:  # noqa: ANN401
        with self._lock:
            self._connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ANN401
        """A client that vanished is no news; anything else shall be seen."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def bind(port: int, host: str = "127.0.0.1") -> socket.socket:
    """Bound but not listening: connections are refused, and nobody else gets the port."""
    bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Lets the next socket take the port before the listening one lets go of it.
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    bound.bind((host, port))
    return bound

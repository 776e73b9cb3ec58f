"""Speaks JSON with an API server over one connection that is kept alive: a request takes 1-2 ms."""

from __future__ import annotations

import contextlib
import http.client
import json
import ssl
import threading
from collections.abc import Iterator
from typing import Any

from tests.waiting import HANG_S

TIMEOUT_S = HANG_S
# How a connection shows that the server has ended it. In the middle of the handshake it is an error
# of TLS: a server that has just begun to listen, or to stop.
_ENDED = (
    http.client.RemoteDisconnected,
    BrokenPipeError,
    ConnectionResetError,
    ssl.SSLEOFError,
    ssl.SSLZeroReturnError,
)
MERGE_PATCH = "application/merge-patch+json"

Object = dict[str, Any]


class ApiError(Exception):
    """The API server said no."""

    def __init__(self, status: int, request: str, body: str) -> None:
        super().__init__(f"{request}: {status} {body[:500]}")
        self.status = status
        self.body = body


class RestClient:
    """Usable from several threads, one request at a time."""

    def __init__(self, port: int, tls: ssl.SSLContext, token: str | None = None) -> None:
        self._port = port
        self._tls = tls
        self._connection = self._new_connection()
        self._headers = {"Accept": "application/json", "User-Agent": "power-agent-tests"}
        if token is not None:
            self._headers["Authorization"] = f"Bearer {token}"
        self._lock = threading.Lock()

    def __enter__(self) -> RestClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._connection.close()

    def json(self, method: str, path: str, body: Object | None = None, **headers: str) -> Object:
        """The answer of a request that must succeed."""
        status, text = self.raw(method, path, body, **headers)
        if status >= 400:
            raise ApiError(status, f"{method} {path}", text)
        answer: Object = json.loads(text)
        return answer

    def patch(self, path: str, body: Object) -> Object:
        return self.json("PATCH", path, body, **{"Content-Type": MERGE_PATCH})

    def raw(
        self, method: str, path: str, body: Object | None = None, **headers: str
    ) -> tuple[int, str]:
        """Status and text of any answer."""
        payload = None if body is None else json.dumps(body).encode()
        merged = self._headers | {"Content-Type": "application/json"} | headers
        with self._lock:
            try:
                return self._exchange(method, path, payload, merged)
            except _ENDED:  # while it was idle or began: the server never saw this request
                self._connection.close()
                return self._exchange(method, path, payload, merged)

    def watch(self, path: str, **headers: str) -> Iterator[Object]:
        """The events of a watch, on a connection of its own, until the server ends it."""
        with contextlib.closing(self._new_connection()) as connection:
            connection.request("GET", path, headers=self._headers | headers)
            with connection.getresponse() as response:
                if response.status != 200:
                    raise ApiError(response.status, f"GET {path}", response.read().decode())
                for line in response:
                    event: Object = json.loads(line)
                    yield event

    def _new_connection(self) -> http.client.HTTPSConnection:
        return http.client.HTTPSConnection(
            "127.0.0.1", self._port, context=self._tls, timeout=TIMEOUT_S
        )

    def _exchange(
        self, method: str, path: str, payload: bytes | None, headers: dict[str, str]
    ) -> tuple[int, str]:
        try:
            self._connection.request(method, path, payload, headers)
            with self._connection.getresponse() as response:
                return response.status, response.read().decode()
        except (OSError, http.client.HTTPException):
            self._connection.close()  # half an exchange leaves nothing that can be used again
            raise

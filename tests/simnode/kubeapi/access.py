"""Who may do what: bearer tokens and their users, and what a test takes away from a user."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping

from .errors import forbidden, unauthorized

ANONYMOUS = "system:anonymous"


class Access:
    def __init__(self, tokens: Mapping[str, str] | None) -> None:
        self._lock = threading.Lock()
        self._tokens = None if tokens is None else dict(tokens)
        self._denied: set[tuple[str, str, str]] = set()  # user, verb, resource

    def set_tokens(self, tokens: Mapping[str, str] | None) -> None:
        """None: nobody is asked who he is."""
        with self._lock:
            self._tokens = None if tokens is None else dict(tokens)

    def rotate(self, old: str, new: str) -> None:
        """`new` is the same user; `old` is worth nothing from now on."""
        with self._lock:
            if self._tokens is None or old not in self._tokens:
                raise ValueError("the token to rotate is not an accepted one")
            self._tokens[new] = self._tokens.pop(old)

    def deny(self, user: str, verbs: Iterable[str], resource: str) -> None:
        with self._lock:
            self._denied |= {(user, verb, resource) for verb in verbs}

    def allow_all(self) -> None:
        with self._lock:
            self._denied.clear()

    def authenticate(self, authorization: str | None) -> str:
        """The user behind an Authorization header."""
        with self._lock:
            if self._tokens is None:
                return ANONYMOUS
            scheme, _, token = (authorization or "").partition(" ")
            user = self._tokens.get(token.strip())
            if scheme.lower() != "bearer" or user is None:
                raise unauthorized()
            return user

    def authorize(self, user: str, verb: str, resource: str, namespace: str, name: str) -> None:
        with self._lock:
            denied = {(user, verb, resource), (user, "*", resource)} & self._denied
        if denied:
            raise forbidden(user, verb, resource, namespace, name)

"""LIST: which version it is answered at, and how it is cut into chunks."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass

from .errors import (
    ApiError,
    Json,
    bad_request,
    continue_expired,
    invalid_list_option,
    version_too_large,
)
from .faults import Faults
from .resources import Resource
from .selectors import matcher
from .store import Store

_MATCHES = ("", "Exact", "NotOlderThan")


@dataclass(frozen=True)
class ListOptions:
    field_selector: str
    label_selector: str
    limit: int
    token: str  # `continue` is a keyword of Python
    version: str
    match: str

    @classmethod
    def parse(cls, query: Mapping[str, str]) -> ListOptions:
        options = cls(
            field_selector=query.get("fieldSelector", ""),
            label_selector=query.get("labelSelector", ""),
            limit=number(query, "limit"),
            token=query.get("continue", ""),
            version=query.get("resourceVersion", ""),
            match=query.get("resourceVersionMatch", ""),
        )
        options._check()
        return options

    def _check(self) -> None:
        if self.match not in _MATCHES:
            why = (
                f'Unsupported value: "{self.match}": supported values: "Exact", "NotOlderThan", ""'
            )
            raise invalid_list_option("resourceVersionMatch", why)
        if self.match and not self.version:
            why = "Forbidden: resourceVersionMatch is forbidden unless resourceVersion is provided"
            raise invalid_list_option("resourceVersionMatch", why)
        if self.match and self.token:
            why = "Forbidden: resourceVersionMatch is forbidden when continue is provided"
            raise invalid_list_option("resourceVersionMatch", why)
        if self.match == "Exact" and self.version == "0":
            why = 'Forbidden: resourceVersionMatch "exact" is forbidden for resourceVersion "0"'
            raise invalid_list_option("resourceVersionMatch", why)
        if self.token and self.version not in ("", "0"):
            raise bad_request("specifying resource version is not allowed when using continue")


def number(query: Mapping[str, str], key: str) -> int:
    value = query.get(key, "")
    if not value:
        return 0
    if not value.isascii() or not value.isdigit():
        why = (
            f'{key}: Invalid value: "{value}": strconv.ParseUint: parsing "{value}": invalid syntax'
        )
        raise bad_request(why)
    return int(value)


def list_objects(
    store: Store, faults: Faults, resource: Resource, namespace: str, options: ListOptions
) -> tuple[list[Json], Json]:
    """The objects of this answer and its list metadata."""
    version, start = _where(store, faults, options)
    try:
        objects, version = store.snapshot(resource.name, namespace, version)
    except ApiError as problem:
        if options.token:
            raise continue_expired(_token(None, start)) from problem
        raise
    matches = matcher(resource, options.field_selector, options.label_selector)
    found = [obj for obj in objects if _position(obj) > start and matches(obj)]
    metadata: Json = {"resourceVersion": str(version)}
    # The real server's cache answers version "0" and knows no chunks.
    if options.limit and options.version != "0" and len(found) > options.limit:
        rest = len(found) - options.limit
        found = found[: options.limit]
        metadata["continue"] = _token(version, _position(found[-1]))
        if not options.field_selector and not options.label_selector:
            metadata["remainingItemCount"] = rest
    return found, metadata


def _where(store: Store, faults: Faults, options: ListOptions) -> tuple[int | None, str]:
    """The version to answer at (None: the newest) and the position to go on after."""
    if options.token:
        try:
            token = json.loads(base64.urlsafe_b64decode(options.token))
            return token["rv"], token["start"]
        except (ValueError, KeyError, TypeError) as problem:
            raise bad_request("invalid continue token: continue key is not valid") from problem
    asked = number({"resourceVersion": options.version}, "resourceVersion")
    if asked > store.version:
        raise version_too_large(asked, store.version)
    if options.match == "Exact":
        return asked, ""
    stale = faults.list_version(from_cache=options.version == "0")
    if stale is None or stale < asked:
        return None, ""
    return stale, ""


def _position(obj: Json) -> str:
    """Sorts like the store's keys, and after the empty string."""
    metadata = obj["metadata"]
    return f"{metadata.get('namespace', '')}\x00{metadata['name']}"


def _token(version: int | None, start: str) -> str:
    """`version` None: the rest of the list at the newest version, inconsistent but whole."""
    return base64.urlsafe_b64encode(json.dumps({"rv": version, "start": start}).encode()).decode()

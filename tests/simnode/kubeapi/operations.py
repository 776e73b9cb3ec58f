"""GET, create, update, patch and delete of single objects, with the real server's rules."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import pods
from .errors import (
    ApiError,
    Json,
    already_exists,
    bad_request,
    conflict,
    invalid,
    modified_meanwhile,
    not_found,
    success,
)
from .patch import apply_patch, check_type
from .resources import RESOURCES, Resource
from .store import Key, Store

DeletionHook = Callable[[Json], None]


@dataclass(frozen=True)
class Target:
    """What a request path points at; `name` empty: the collection."""

    resource: Resource
    namespace: str = ""
    name: str = ""
    subresource: str = ""

    @property
    def key(self) -> Key:
        return (self.resource.name, self.namespace, self.name)


class Operations:
    def __init__(self, store: Store) -> None:
        self._store = store
        # Told of each graceful deletion, on a thread of its own: the kubelet's part.
        self.deletion_hooks: list[DeletionHook] = []

    def get(self, target: Target) -> Json:
        obj = self._store.get(target.key)
        if obj is None:
            raise not_found(target.resource.name, target.name)
        return obj

    def create(self, target: Target, body: Any, *, dry_run: bool = False) -> Json:  # noqa: ANN401
        if not isinstance(body, dict):
            raise bad_request("the object provided is not a JSON object")
        obj = pods.as_created(target.resource, target.namespace, body)
        return self.insert(target.resource, obj, dry_run=dry_run)

    def insert(self, resource: Resource, obj: Json, *, dry_run: bool = False) -> Json:
        """Store a new, complete object."""
        namespace, name = obj["metadata"].get("namespace", ""), obj["metadata"]["name"]
        if resource.namespaced and not self._store.get(("namespaces", "", namespace)):
            raise not_found("namespaces", namespace)

        def add(old: Json | None) -> Json:
            if old is not None:
                raise already_exists(resource.name, name)
            return obj

        return self._change((resource.name, namespace, name), add, dry_run=dry_run)

    def update(self, target: Target, body: Any, *, dry_run: bool = False) -> Json:  # noqa: ANN401
        """PUT."""
        if not isinstance(body, dict) or not isinstance(body.get("metadata"), dict):
            raise bad_request("the object provided has no metadata")
        return self.modify(target, lambda _: body, dry_run=dry_run)

    def patch(
        self,
        target: Target,
        content_type: str,
        patch: Any,  # noqa: ANN401 (JSON)
        *,
        dry_run: bool = False,
    ) -> Json:
        check_type(content_type)

        def patched(old: Json) -> Json:
            return apply_patch(content_type, old, patch)

        return self.modify(target, patched, dry_run=dry_run)

    def modify(
        self, target: Target, change: Callable[[Json], Json], *, dry_run: bool = False
    ) -> Json:
        """One read-modify-write; what the caller may not touch stays as it was."""

        def checked(old: Json | None) -> Json:
            if old is None:
                raise not_found(target.resource.name, target.name)
            new = _settled(target, old, change(old))
            pods.check_update(target.resource, old, new)
            return new

        return self._change(target.key, checked, dry_run=dry_run)

    def delete(self, target: Target, options: Any, *, dry_run: bool = False) -> Json:  # noqa: ANN401
        options = options if isinstance(options, dict) else {}
        current = self.get(target)
        _check_preconditions(target, current, options.get("preconditions") or {})
        if dry_run:
            return current
        if target.resource.name == "pods":
            return self._delete_pod(target, options.get("gracePeriodSeconds"))
        if target.resource.name == "namespaces":
            self._empty_namespace(target.name)
        gone = self._store.change(target.key, lambda _: None)
        if target.resource.name in ("events", "nodes"):
            return success(target.resource.name, target.name, gone["metadata"]["uid"])
        return gone

    def _delete_pod(self, target: Target, asked_s: int | None) -> Json:
        with self._store.lock:
            pod = self.get(target)
            grace_s = pods.grace_s(pod, asked_s)
            left_s = pod["metadata"].get("deletionGracePeriodSeconds")
            if grace_s == 0:
                return self._end_pod(target.key)
            if left_s is not None and grace_s >= left_s:
                return pod  # asked again: an end is brought forward, never put off
            pod = self._store.change(target.key, lambda _: pods.terminating(pod, grace_s))
        if left_s is None:
            for hook in self.deletion_hooks:
                threading.Thread(target=hook, args=(pod,), daemon=True).start()
        return pod

    def _end_pod(self, key: Key) -> Json:
        """Two versions, as the real server makes them: no grace left, then gone."""
        with self._store.lock:
            self._store.change(key, lambda pod: pod and pods.terminating(pod, 0))
            return self._store.change(key, lambda _: None)

    def _empty_namespace(self, namespace: str) -> None:
        for resource in ("pods", "events"):
            for key in self._store.keys(resource):
                if key[1] == namespace:
                    self._store.change(key, lambda _: None)

    def end_pod(self, namespace: str, name: str, uid: str | None) -> None:
        """Gone at once, if it is (still) there."""
        key = ("pods", namespace, name)
        with self._store.lock:
            pod = self._store.get(key)
            if pod is not None and uid in (None, pod["metadata"]["uid"]):
                self._end_pod(key)

    def ensure(self, resource_name: str, obj: Json) -> None:
        try:
            self.insert(RESOURCES[resource_name], obj)
        except ApiError as problem:
            if problem.code != 409:
                raise

    def _change(self, key: Key, change: Callable[[Json | None], Json], *, dry_run: bool) -> Json:
        if dry_run:
            with self._store.lock:
                return change(self._store.get(key))
        return self._store.change(key, change)


def _settled(target: Target, old: Json, new: Json) -> Json:
    """The new object with the parts the server keeps: identity always, status or all but it."""
    before, after = old["metadata"], new.get("metadata") or {}
    name = target.name
    if after.get("name") != name:
        raise bad_request(
            f"the name of the object ({after.get('name')}) does not match the name on the URL "
            f"({name})"
        )
    if after.get("resourceVersion") not in (None, "", before["resourceVersion"]):
        raise modified_meanwhile(target.resource.name, name)
    if after.get("uid") not in (None, "", before["uid"]):
        why = f'Invalid value: "{after["uid"]}": field is immutable'
        raise invalid(target.resource.kind, name, "metadata.uid", why)
    server_owned = (
        "name",
        "namespace",
        "uid",
        "resourceVersion",
        "creationTimestamp",
        "deletionTimestamp",
        "deletionGracePeriodSeconds",
    )
    metadata = {key: value for key, value in after.items() if value not in (None, {}, [])}
    for key in server_owned:
        metadata.pop(key, None)
        if key in before:
            metadata[key] = before[key]
    kind = {"kind": old["kind"], "apiVersion": old["apiVersion"]}
    if target.subresource == "status":
        return {**old, "metadata": metadata, "status": new.get("status", {})}
    if target.resource.has_status:
        return {**new, **kind, "metadata": metadata, "status": old.get("status", {})}
    return {**new, **kind, "metadata": metadata}


def _check_preconditions(target: Target, obj: Json, wanted: Json) -> None:
    for key, name in (("uid", "UID"), ("resourceVersion", "ResourceVersion")):
        if wanted.get(key) not in (None, obj["metadata"][key]):
            why = (
                f"the {name} in the precondition ({wanted[key]}) does not match the {name} in "
                f"record ({obj['metadata'][key]}). The object might have been deleted and then "
                "recreated"
            )
            raise conflict(target.resource.kind, target.name, why)

"""Nodes and pods of a real API server, with the methods that the embedded API (kubeapi) has.

No scheduler, controller or kubelet runs: a pod is created on its node, its phase is what the
caller says, and somebody must finish a graceful deletion.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.simnode.controlplane_rest import ApiError, Object, RestClient


class Objects:
    """Speaks as the cluster's administrator."""

    _rest: RestClient

    def __init__(self) -> None:
        self._made: set[tuple[str, str]] = set()  # so that a thousand pods do not ask each time

    def create_node(self, name: str) -> None:
        """No matter if it is there."""
        self._ensure("nodes", "Node", name)

    def create_namespace(self, name: str) -> None:
        """No matter if it is there."""
        self._ensure("namespaces", "Namespace", name)

    def _ensure(self, resource: str, kind: str, name: str) -> None:
        if (kind, name) in self._made:
            return
        body = {"apiVersion": "v1", "kind": kind, "metadata": {"name": name}}
        status, text = self._rest.raw("POST", f"/api/v1/{resource}", body)
        if status not in (201, 409):
            raise ApiError(status, f"create {resource} {name}", text)
        self._made.add((kind, name))

    def create_pod(
        self,
        name: str,
        *,
        node: str,
        namespace: str = "default",
        annotations: Mapping[str, str] | None = None,
        uid: str | None = None,
        phase: str = "Running",
        owner: Mapping[str, Any] | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> Object:
        """The pod as the server stored it; node and namespace are made where missing. `owner` is
        an ownerReference, of which kind and name are enough."""
        if uid is not None:
            raise ValueError("a real API server chooses the uid itself: read it from the answer")
        self.create_node(node)
        self.create_namespace(namespace)
        metadata: Object = {
            "name": name,
            "annotations": dict(annotations or {}),
            "labels": dict(labels or {}),
        }
        if owner is not None:
            metadata["ownerReferences"] = [{"apiVersion": "v1", "uid": "unknown"} | dict(owner)]
        containers = [{"name": "main", "image": "none.invalid/none"}]
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": metadata,
            "spec": {"nodeName": node, "containers": containers},
        }
        created = self._rest.json("POST", f"/api/v1/namespaces/{namespace}/pods", pod)
        if phase == created["status"]["phase"]:
            return created
        return self.set_phase(namespace, name, phase)

    def get_pod(self, namespace: str, name: str) -> Object | None:
        try:
            return self._rest.json("GET", _path(namespace, name))
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    def annotate(self, namespace: str, name: str, key: str, value: str | None) -> Object:
        """None removes the annotation."""
        change = {"metadata": {"annotations": {key: value}}}
        return self._rest.patch(_path(namespace, name), change)

    def set_phase(self, namespace: str, name: str, phase: str) -> Object:
        return self._rest.patch(f"{_path(namespace, name)}/status", {"status": {"phase": phase}})

    def delete_pod(self, namespace: str, name: str, *, grace: bool = False) -> None:
        """With `grace` it stays, terminating, until `finish_deletion`."""
        options = {} if grace else {"gracePeriodSeconds": 0}
        self._rest.json("DELETE", _path(namespace, name), options)

    def finish_deletion(self, namespace: str, name: str, *, uid: str | None = None) -> None:
        """Remove the pod if it is still there (and still that one)."""
        options: Object = {"gracePeriodSeconds": 0}
        if uid is not None:
            options["preconditions"] = {"uid": uid}
        status, text = self._rest.raw("DELETE", _path(namespace, name), options)
        if status not in (200, 404, 409):
            raise ApiError(status, f"delete pod {namespace}/{name}", text)


def _path(namespace: str, name: str) -> str:
    return f"/api/v1/namespaces/{namespace}/pods/{name}"

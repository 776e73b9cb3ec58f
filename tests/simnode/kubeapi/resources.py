"""The kinds this API serves: names, scope, and the fields a selector may ask for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .errors import Json

ALL_VERBS = ("create", "delete", "get", "list", "patch", "update", "watch")


@dataclass(frozen=True)
class Resource:
    name: str
    kind: str
    singular: str
    short_names: tuple[str, ...]
    namespaced: bool
    fields: Callable[[Json], dict[str, str]]
    has_status: bool = False

    @property
    def list_kind(self) -> str:
        return f"{self.kind}List"


def _metadata(obj: Json) -> dict[str, str]:
    metadata = obj["metadata"]
    return {
        "metadata.name": metadata["name"],
        "metadata.namespace": metadata.get("namespace", ""),
    }


def _pod(obj: Json) -> dict[str, str]:
    spec, status = obj.get("spec", {}), obj.get("status", {})
    return {
        **_metadata(obj),
        "spec.nodeName": spec.get("nodeName", ""),
        "spec.restartPolicy": spec.get("restartPolicy", ""),
        "spec.schedulerName": spec.get("schedulerName", ""),
        "spec.serviceAccountName": spec.get("serviceAccountName", ""),
        "spec.hostNetwork": "true" if spec.get("hostNetwork") else "false",
        "status.phase": status.get("phase", ""),
        "status.podIP": status.get("podIP", ""),
        "status.nominatedNodeName": status.get("nominatedNodeName", ""),
    }


def _node(obj: Json) -> dict[str, str]:
    unschedulable = "true" if obj.get("spec", {}).get("unschedulable") else "false"
    return {"metadata.name": obj["metadata"]["name"], "spec.unschedulable": unschedulable}


def _namespace(obj: Json) -> dict[str, str]:
    phase = obj.get("status", {}).get("phase", "")
    return {"metadata.name": obj["metadata"]["name"], "status.phase": phase}


def _event(obj: Json) -> dict[str, str]:
    about, source = obj.get("involvedObject", {}), obj.get("source", {})
    reporter = obj.get("reportingComponent", "")
    about_keys = ("kind", "namespace", "name", "uid", "apiVersion", "resourceVersion", "fieldPath")
    return {
        **_metadata(obj),
        **{f"involvedObject.{key}": about.get(key, "") for key in about_keys},
        "reason": obj.get("reason", ""),
        "reportingComponent": reporter,
        "source": source.get("component", "") or reporter,
        "type": obj.get("type", ""),
    }


RESOURCES: dict[str, Resource] = {
    resource.name: resource
    for resource in (
        Resource("events", "Event", "event", ("ev",), True, _event),
        Resource("namespaces", "Namespace", "namespace", ("ns",), False, _namespace, True),
        Resource("nodes", "Node", "node", ("no",), False, _node, True),
        Resource("pods", "Pod", "pod", ("po",), True, _pod, True),
    )
}

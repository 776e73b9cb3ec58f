"""The rows `kubectl get` prints: columns and cells, made on the server as the real one does."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from .errors import Json
from .resources import Resource

# Name and priority; priority 1 shows with `-o wide` only.
_COLUMNS: dict[str, tuple[tuple[str, int], ...]] = {
    "pods": (
        ("Name", 0),
        ("Ready", 0),
        ("Status", 0),
        ("Restarts", 0),
        ("Age", 0),
        ("IP", 1),
        ("Node", 1),
        ("Nominated Node", 1),
        ("Readiness Gates", 1),
    ),
    "nodes": (
        ("Name", 0),
        ("Status", 0),
        ("Roles", 0),
        ("Age", 0),
        ("Version", 0),
        ("Internal-IP", 1),
        ("OS-Image", 1),
    ),
    "namespaces": (("Name", 0), ("Status", 0), ("Age", 0)),
    "events": (
        ("Last Seen", 0),
        ("Type", 0),
        ("Reason", 0),
        ("Object", 0),
        ("Subobject", 1),
        ("Source", 1),
        ("Message", 0),
        ("First Seen", 1),
        ("Count", 1),
        ("Name", 1),
    ),
}


def columns(resource: Resource) -> list[Json]:
    return [
        {
            "name": name,
            "type": "string",
            "format": "name" if name == "Name" else "",
            "description": "",
            "priority": priority,
        }
        for name, priority in _COLUMNS[resource.name]
    ]


def cells(resource: Resource, obj: Json) -> list[Any]:
    return {"pods": _pod, "nodes": _node, "namespaces": _namespace, "events": _event}[
        resource.name
    ](obj)


def _pod(pod: Json) -> list[Any]:
    spec, status = pod.get("spec", {}), pod.get("status", {})
    containers = status.get("containerStatuses", [])
    ready = sum(1 for container in containers if container.get("ready"))
    restarts = sum(container.get("restartCount", 0) for container in containers)
    return [
        pod["metadata"].get("name", ""),
        f"{ready}/{len(spec.get('containers') or [])}",
        _pod_status(pod, containers),
        str(restarts),
        age(pod["metadata"].get("creationTimestamp")),
        status.get("podIP") or "<none>",
        spec.get("nodeName") or "<none>",
        status.get("nominatedNodeName") or "<none>",
        "<none>",
    ]


def _pod_status(pod: Json, containers: list[Json]) -> str:
    if pod["metadata"].get("deletionTimestamp"):
        return "Terminating"
    status = pod.get("status", {})
    shown = str(status.get("reason") or status.get("phase", ""))
    for container in containers:
        state = container.get("state", {})
        for kind in ("waiting", "terminated"):
            shown = state.get(kind, {}).get("reason") or shown
    return shown


def _node(node: Json) -> list[Any]:
    status = node.get("status", {})
    ready = {c["type"]: c["status"] for c in status.get("conditions", [])}.get("Ready")
    shown = {"True": "Ready", None: "Unknown"}.get(ready, "NotReady")
    if node.get("spec", {}).get("unschedulable"):
        shown += ",SchedulingDisabled"
    info = status.get("nodeInfo", {})
    addresses = {a["type"]: a["address"] for a in status.get("addresses", [])}
    return [
        node["metadata"].get("name", ""),
        shown,
        "<none>",
        age(node["metadata"].get("creationTimestamp")),
        info.get("kubeletVersion", ""),
        addresses.get("InternalIP", "<none>"),
        info.get("osImage", "<unknown>"),
    ]


def _namespace(namespace: Json) -> list[Any]:
    metadata = namespace["metadata"]
    phase = namespace.get("status", {}).get("phase", "")
    return [metadata.get("name", ""), phase, age(metadata.get("creationTimestamp"))]


def _event(event: Json) -> list[Any]:
    about, source = event.get("involvedObject", {}), event.get("source", {})
    series = event.get("series") or {}
    first = event.get("firstTimestamp") or event.get("eventTime")
    last = series.get("lastObservedTime") or event.get("lastTimestamp") or first
    return [
        age(last),
        event.get("type", ""),
        event.get("reason", ""),
        f"{about.get('kind', '').lower()}/{about.get('name', '')}",
        about.get("fieldPath", ""),
        source.get("component") or event.get("reportingComponent", ""),
        event.get("message", "").strip(),
        age(first),
        str(series.get("count") or event.get("count") or 1),
        event["metadata"].get("name", ""),
    ]


def age(timestamp: str | None) -> str:
    if not timestamp:
        return "<unknown>"
    seconds = int((datetime.now(UTC) - datetime.fromisoformat(timestamp)).total_seconds())
    if seconds < 120:
        return f"{max(seconds, 0)}s"
    if seconds < 600:
        return f"{seconds // 60}m{seconds % 60}s" if seconds % 60 else f"{seconds // 60}m"
    if seconds < 3 * 3600:
        return f"{seconds // 60}m"
    if seconds < 48 * 3600:
        return f"{seconds // 3600}h"
    return f"{seconds // 86400}d"

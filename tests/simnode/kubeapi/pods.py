"""What a pod and its neighbours look like: built, completed, checked, moved between phases."""

from __future__ import annotations

import copy
import json
import random
import re
import string
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from .errors import Json, bad_request, invalid
from .resources import Resource

ANNOTATIONS_MAX_BYTES = 256 * 1024
DEFAULT_GRACE_S = 30
FINISHED = ("Succeeded", "Failed")

_DNS_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
_ANNOTATION_KEY = re.compile(
    r"([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
)


def now(offset_s: float = 0) -> str:
    return (datetime.now(UTC) + timedelta(seconds=offset_s)).strftime("%Y-%m-%dT%H:%M:%SZ")


def new_metadata(name: str, namespace: str, uid: str | None = None) -> Json:
    metadata = {
        "name": name,
        "uid": uid or str(uuid.uuid4()),
        "creationTimestamp": now(),
    }
    return {**metadata, "namespace": namespace} if namespace else metadata


def as_created(resource: Resource, namespace: str, body: Json) -> Json:
    """A posted object with what the server adds: identity, time, defaults, first status."""
    if (body.get("kind"), body.get("apiVersion")) not in {(resource.kind, "v1"), (None, None)}:
        raise bad_request(
            f'no kind "{body.get("kind")}" is registered for version "{body.get("apiVersion")}" '
            "here"
        )
    posted = _mapping(body, "metadata")
    given = posted.get("namespace") or namespace
    if given != namespace:
        raise bad_request(
            "the namespace of the provided object does not match the namespace sent on the request"
        )
    name = posted.get("name") or _generated(posted.get("generateName"))
    kept = ("labels", "annotations", "ownerReferences", "finalizers", "generateName")
    metadata = {
        **new_metadata(name, namespace),
        **{key: posted[key] for key in kept if posted.get(key)},
    }
    obj = {**body, "kind": resource.kind, "apiVersion": "v1", "metadata": metadata}
    if resource.name == "pods":
        obj = _completed_pod(obj)
    if resource.name == "events":
        # Fields of the newer events API, written even when empty.
        obj = {"eventTime": None, "reportingComponent": "", "reportingInstance": "", **obj}
    check(resource, obj)
    return obj


def _generated(prefix: object) -> str:
    if not isinstance(prefix, str) or not prefix:
        return ""
    return prefix + "".join(random.choices(string.ascii_lowercase + string.digits, k=5))


def _mapping(body: Json, key: str) -> Json:
    value = body.get(key) or {}
    if not isinstance(value, dict):
        raise bad_request(f"json: cannot unmarshal {type(value).__name__} into field {key}")
    return value


def _completed_pod(pod: Json) -> Json:
    spec = copy.deepcopy(_mapping(pod, "spec"))
    for key, value in {
        "restartPolicy": "Always",
        "terminationGracePeriodSeconds": DEFAULT_GRACE_S,
        "dnsPolicy": "ClusterFirst",
        "serviceAccountName": "default",
        "securityContext": {},
        "schedulerName": "default-scheduler",
        "enableServiceLinks": True,
    }.items():
        spec.setdefault(key, value)
    for container in spec.get("containers") or []:
        container.setdefault("resources", {})
        container.setdefault("terminationMessagePath", "/dev/termination-log")
        container.setdefault("terminationMessagePolicy", "File")
        container.setdefault("imagePullPolicy", "IfNotPresent")
    return {**pod, "spec": spec, "status": {"phase": "Pending", "qosClass": "BestEffort"}}


def check(resource: Resource, obj: Json) -> None:
    """The checks of the real server that this project can trip over."""
    metadata = obj["metadata"]
    name = metadata.get("name")
    if not name:
        raise invalid(
            resource.kind, "", "metadata.name", "Required value: name or generateName is required"
        )
    if not isinstance(name, str) or not _DNS_SUBDOMAIN.fullmatch(name):
        why = f'Invalid value: "{name}": a lowercase RFC 1123 subdomain is wanted'
        raise invalid(resource.kind, str(name), "metadata.name", why)
    for field in ("labels", "annotations"):
        _check_strings(field, metadata.get(field) or {})
    _check_annotations(resource, name, metadata.get("annotations") or {})
    if resource.name == "pods":
        _check_containers(name, obj)
    if resource.name == "events":
        about = obj.get("involvedObject", {}).get("namespace") or "default"
        if about != metadata["namespace"]:
            why = f'Invalid value: "{about}": does not match event.namespace'
            raise invalid("Event", name, "involvedObject.namespace", why)


def _check_strings(field: str, values: object) -> None:
    if not isinstance(values, dict):
        raise bad_request(f"json: cannot unmarshal into Go struct field ObjectMeta.{field}")
    for value in values.values():
        if not isinstance(value, str):
            kinds = {bool: "bool", int: "number", float: "number", list: "array", dict: "object"}
            kind = kinds.get(type(value), "null")
            raise bad_request(
                f"json: cannot unmarshal {kind} into Go struct field ObjectMeta.metadata.{field} "
                "of type string"
            )


def _check_annotations(resource: Resource, name: str, annotations: Mapping[str, str]) -> None:
    for key in annotations:
        if not _ANNOTATION_KEY.fullmatch(key.lower() if "/" in key else key):
            why = f'Invalid value: "{key}": name part must consist of alphanumeric characters'
            raise invalid(resource.kind, name, "metadata.annotations", why)
    size = sum(len(key.encode()) + len(value.encode()) for key, value in annotations.items())
    if size > ANNOTATIONS_MAX_BYTES:
        why = f"Too long: may not be more than {ANNOTATIONS_MAX_BYTES} bytes"
        raise invalid(resource.kind, name, "metadata.annotations", why)


def _check_containers(name: str, pod: Json) -> None:
    containers = pod.get("spec", {}).get("containers")
    if not containers:
        raise invalid("Pod", name, "spec.containers", "Required value")
    for index, container in enumerate(containers):
        for field in ("name", "image"):
            if not container.get(field):
                where = f"spec.containers[{index}].{field}"
                raise invalid("Pod", name, where, "Required value")


def check_update(resource: Resource, old: Json, new: Json) -> None:
    """What must not change once an object exists."""
    check(resource, new)
    if resource.name == "pods" and _without_images(old) != _without_images(new):
        why = "Forbidden: pod updates may not change fields other than `spec.containers[*].image`"
        raise invalid("Pod", new["metadata"]["name"], "spec", why)


def _without_images(pod: Json) -> Json:
    spec = copy.deepcopy(pod.get("spec", {}))
    for container in spec.get("containers") or []:
        container.pop("image", None)
    return dict(spec)


def new_pod(
    name: str,
    namespace: str,
    node: str,
    *,
    uid: str | None = None,
    annotations: Mapping[str, str] | None = None,
    labels: Mapping[str, str] | None = None,
    owner: Mapping[str, Any] | None = None,
) -> Json:
    """A pod bound to `node`, as the scheduler leaves it."""
    metadata: Json = new_metadata(name, namespace, uid)
    if annotations:
        metadata["annotations"] = dict(annotations)
    if labels:
        metadata["labels"] = dict(labels)
    if owner:
        defaults = {"apiVersion": "v1", "controller": True, "uid": str(uuid.uuid4())}
        metadata["ownerReferences"] = [{**defaults, **owner}]
    return _completed_pod(
        {
            "kind": "Pod",
            "apiVersion": "v1",
            "metadata": metadata,
            "spec": {
                "nodeName": node,
                "containers": [{"name": "main", "image": "registry.example/worker:1"}],
            },
        }
    )


def in_phase(pod: Json, phase: str) -> Json:
    """The pod with the status a kubelet would report for that phase."""
    started = pod["metadata"]["creationTimestamp"]
    states: dict[str, Json] = {
        "Pending": {"waiting": {"reason": "ContainerCreating"}},
        "Running": {"running": {"startedAt": started}},
        "Succeeded": {"terminated": {"exitCode": 0, "reason": "Completed", "finishedAt": now()}},
        "Failed": {"terminated": {"exitCode": 1, "reason": "Error", "finishedAt": now()}},
    }
    running = phase == "Running"
    conditions = {"PodScheduled": True, "Initialized": True, "ContainersReady": running}
    conditions["Ready"] = running
    status = {
        **pod.get("status", {}),
        "phase": phase,
        "startTime": started,
        "hostIP": "192.0.2.10",
        "podIP": _pod_ip(pod["metadata"]["uid"]),
        "conditions": [
            {"type": kind, "status": str(true), "lastTransitionTime": started}
            for kind, true in conditions.items()
        ],
        "containerStatuses": [
            {
                "name": container["name"],
                "image": container["image"],
                "imageID": "",
                "ready": running,
                "started": running,
                "restartCount": 0,
                "state": states.get(phase, {}),
                "lastState": {},
            }
            for container in pod["spec"]["containers"]
        ],
    }
    return {**pod, "status": status}


def _pod_ip(uid: str) -> str:
    """Made up from the uid, so that it stays the same over a pod's life."""
    seed = random.Random(uid)
    return f"10.244.{seed.randrange(256)}.{seed.randrange(1, 255)}"


def terminating(pod: Json, grace_s: int) -> Json:
    """Asked to end: the kubelet has `grace_s` to stop it."""
    metadata = {
        **pod["metadata"],
        "deletionTimestamp": now(grace_s),
        "deletionGracePeriodSeconds": grace_s,
    }
    return {**pod, "metadata": metadata}


def grace_s(pod: Json, asked_s: int | None) -> int:
    """How long a deletion may take; 0: gone at once, as for a pod that no kubelet runs."""
    if not pod["spec"].get("nodeName") or pod["status"].get("phase") in FINISHED:
        return 0
    if asked_s is not None:
        return asked_s
    return int(pod["spec"].get("terminationGracePeriodSeconds", DEFAULT_GRACE_S))


def new_node(name: str) -> Json:
    info = {"kubeletVersion": "v1.34.0", "osImage": "simulated", "architecture": "amd64"}
    return {
        "kind": "Node",
        "apiVersion": "v1",
        "metadata": {**new_metadata(name, ""), "labels": {"kubernetes.io/hostname": name}},
        "spec": {},
        "status": {
            "conditions": [{"type": "Ready", "status": "True", "reason": "KubeletReady"}],
            "addresses": [{"type": "InternalIP", "address": "192.0.2.10"}],
            "nodeInfo": info,
        },
    }


def new_namespace(name: str) -> Json:
    labels = {"kubernetes.io/metadata.name": name}
    return {
        "kind": "Namespace",
        "apiVersion": "v1",
        "metadata": {**new_metadata(name, ""), "labels": labels},
        "spec": {"finalizers": ["kubernetes"]},
        "status": {"phase": "Active"},
    }


def parse_object(raw: bytes) -> Any:  # noqa: ANN401 (JSON)
    try:
        return json.loads(raw)
    except ValueError as problem:
        raise bad_request(f"the object provided is unrecognized: {problem}") from problem

"""What the server says about itself: version, resources, and as much OpenAPI as kubectl asks."""

from __future__ import annotations

from .errors import Json
from .resources import ALL_VERBS, RESOURCES, Resource

_STATUS_VERBS = ("get", "patch", "update")
# OpenAPI v2 in protobuf, the only form kubectl asks for: swagger (field 1) "2.0", and info
# (field 2) with a title and a version. kubectl wants a document it can decode, nothing in it.
OPENAPI_V2_PROTOBUF = b"\x0a\x032.0\x12\x0b\x0a\x04Kube\x12\x03sim"
OPENAPI_V2_TYPE = "application/com.github.proto-openapi.spec.v2.v1.0+protobuf"


def parse_version(k8s: str) -> tuple[int, int]:
    major, minor = k8s.split(".")[:2]
    return int(major), int(minor)


def supports_watch_list(version: tuple[int, int]) -> bool:
    """`sendInitialEvents`: on in 1.32, off again in 1.33, on from 1.34."""
    return version == (1, 32) or version >= (1, 34)


def version_info(version: tuple[int, int]) -> Json:
    major, minor = version
    return {
        "major": str(major),
        "minor": str(minor),
        "gitVersion": f"v{major}.{minor}.0",
        "gitCommit": "",
        "gitTreeState": "clean",
        "buildDate": "1970-01-01T00:00:00Z",
        "goVersion": "none",
        "compiler": "none",
        "platform": "linux/amd64",
    }


def aggregated_type(version: tuple[int, int], accept: str) -> str | None:
    """The media type of the aggregated answer, if client and server both know it."""
    for level, since in (("v2", (1, 30)), ("v2beta1", (1, 27))):
        media = f"application/json;g=apidiscovery.k8s.io;v={level};as=APIGroupDiscoveryList"
        if version >= since and media in accept.replace(" ", ""):
            return media
    return None


def core_versions(address: str) -> Json:
    return {
        "kind": "APIVersions",
        "versions": ["v1"],
        "serverAddressByClientCIDRs": [{"clientCIDR": "0.0.0.0/0", "serverAddress": address}],
    }


def no_groups() -> Json:
    return {"kind": "APIGroupList", "apiVersion": "v1", "groups": []}


def resource_list() -> Json:
    entries = []
    for resource in RESOURCES.values():
        entry = {
            "name": resource.name,
            "singularName": resource.singular,
            "namespaced": resource.namespaced,
            "kind": resource.kind,
            "verbs": list(ALL_VERBS),
            "shortNames": list(resource.short_names),
        }
        entries.append(entry)
        if resource.has_status:
            entries.append(
                {
                    "name": f"{resource.name}/status",
                    "singularName": "",
                    "namespaced": resource.namespaced,
                    "kind": resource.kind,
                    "verbs": list(_STATUS_VERBS),
                }
            )
    return {"kind": "APIResourceList", "groupVersion": "v1", "resources": entries}


def aggregated(media: str, *, core: bool) -> Json:
    """`/api` (core) lists everything there is, `/apis` has no group at all."""
    level = "v2" if ";v=v2;" in media else "v2beta1"
    versions = [
        {
            "version": "v1",
            "freshness": "Current",
            "resources": [_aggregated_entry(resource) for resource in RESOURCES.values()],
        }
    ]
    group = {"metadata": {"name": "", "creationTimestamp": None}, "versions": versions}
    return {
        "kind": "APIGroupDiscoveryList",
        "apiVersion": f"apidiscovery.k8s.io/{level}",
        "metadata": {},
        "items": [group] if core else [],
    }


def _aggregated_entry(resource: Resource) -> Json:
    kind = {"group": "", "version": "v1", "kind": resource.kind}
    entry: Json = {
        "resource": resource.name,
        "responseKind": kind,
        "scope": "Namespaced" if resource.namespaced else "Cluster",
        "singularResource": resource.singular,
        "shortNames": list(resource.short_names),
        "verbs": list(ALL_VERBS),
    }
    if resource.has_status:
        status = {"subresource": "status", "responseKind": kind, "verbs": list(_STATUS_VERBS)}
        entry["subresources"] = [status]
    return entry


def openapi_v3_index() -> Json:
    return {"paths": {"api/v1": {"serverRelativeURL": "/openapi/v3/api/v1?hash=0"}}}


def openapi_v3_core(version: tuple[int, int]) -> Json:
    """Paths without schemas: kubectl looks up whether PATCH takes `fieldValidation`."""
    paths = {}
    for resource in RESOURCES.values():
        scope = "/namespaces/{namespace}" if resource.namespaced else ""
        query = ("dryRun", "fieldManager", "fieldValidation")
        parameters = [
            {"name": name, "in": "query", "schema": {"type": "string", "uniqueItems": True}}
            for name in query
        ]
        patch = {
            "operationId": f"patchCoreV1{resource.kind}",
            "parameters": parameters,
            "responses": {"200": {"description": "OK"}},
            "x-kubernetes-action": "patch",
            "x-kubernetes-group-version-kind": {
                "group": "",
                "version": "v1",
                "kind": resource.kind,
            },
        }
        paths[f"/api/v1{scope}/{resource.name}/{{name}}"] = {"patch": patch}
    info = {"title": "Kubernetes", "version": version_info(version)["gitVersion"]}
    return {"openapi": "3.0.0", "info": info, "paths": paths, "components": {"schemas": {}}}

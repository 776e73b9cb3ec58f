"""The three kinds of patch: JSON patch, JSON merge patch, strategic merge patch; all pure."""

from __future__ import annotations

import copy
from typing import Any

from .errors import ApiError, Json, bad_request, unsupported_media_type

JSON_PATCH = "application/json-patch+json"
MERGE_PATCH = "application/merge-patch+json"
STRATEGIC_PATCH = "application/strategic-merge-patch+json"

# Lists that a strategic patch merges by a key (`patchMergeKey` in the API's types); every other
# list is replaced, save the sets of plain values below.
_MERGE_KEYS = {
    "addresses": "type",
    "conditions": "type",
    "containers": "name",
    "env": "name",
    "ephemeralContainers": "name",
    "hostAliases": "ip",
    "imagePullSecrets": "name",
    "initContainers": "name",
    "ownerReferences": "uid",
    "podIPs": "ip",
    "ports": "containerPort",
    "topologySpreadConstraints": "topologyKey",
    "volumeMounts": "mountPath",
    "volumes": "name",
}
_MERGED_SETS = {"finalizers", "podCIDRs"}


def check_type(content_type: str) -> None:
    """Refuse what is none of the three.

    Server-side apply (application/apply-patch+yaml) ends here: 415 is how a server without it
    answers, and kubectl turns it into "Server-side apply not available".
    """
    if content_type not in (JSON_PATCH, MERGE_PATCH, STRATEGIC_PATCH):
        raise unsupported_media_type(", ".join([JSON_PATCH, MERGE_PATCH, STRATEGIC_PATCH]))


def apply_patch(content_type: str, current: Json, patch: Any) -> Json:  # noqa: ANN401 (JSON)
    """The object after the patch; `current` is left as it is."""
    if content_type == JSON_PATCH:
        return _json_patch(current, patch)
    if not isinstance(patch, dict):
        raise bad_request("the patch must be a JSON object")
    merge = _merge if content_type == MERGE_PATCH else _strategic_merge
    return merge(copy.deepcopy(current), patch)


def _merge(target: Any, patch: Any) -> Any:  # noqa: ANN401 (JSON)
    """RFC 7386."""
    if not isinstance(patch, dict):
        return patch
    result = target if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = _merge(result.get(key), value)
    return result


def _strategic_merge(target: Json, patch: Json) -> Json:
    if patch.get("$patch") == "replace":
        return {key: value for key, value in patch.items() if key != "$patch"}
    for key, value in patch.items():
        if key.startswith("$deleteFromPrimitiveList/"):
            field = key.partition("/")[2]
            target[field] = [item for item in target.get(field) or [] if item not in value]
        elif key.startswith("$"):
            continue  # $setElementOrder and $retainKeys: order and unions matter to no one here
        elif value is None or value == {"$patch": "delete"}:
            target.pop(key, None)
        elif isinstance(value, dict):
            have = target.get(key)
            target[key] = _strategic_merge(have if isinstance(have, dict) else {}, value)
        elif isinstance(value, list):
            target[key] = _merge_list(key, target.get(key) or [], value)
        else:
            target[key] = value
    return target


def _merge_list(field: str, have: list[Any], patch: list[Any]) -> list[Any]:
    if field in _MERGED_SETS:
        return have + [item for item in patch if item not in have]
    key = _MERGE_KEYS.get(field)
    if key is None or not all(isinstance(item, dict) for item in [*have, *patch]):
        return patch
    if any(item.get("$patch") == "replace" for item in patch):
        return [item for item in patch if "$patch" not in item]
    merged = {item.get(key): item for item in have}
    for item in patch:
        if item.get("$patch") == "delete":
            merged.pop(item.get(key), None)
        else:
            merged[item.get(key)] = _strategic_merge(merged.get(item.get(key), {}), item)
    return list(merged.values())


def _json_patch(current: Json, patch: Any) -> Json:  # noqa: ANN401 (JSON)
    """RFC 6902."""
    if not isinstance(patch, list):
        raise bad_request("a JSON patch must be a list of operations")
    document = copy.deepcopy(current)
    for step in patch:
        try:
            _json_patch_step(document, step)
        except (KeyError, IndexError, ValueError, TypeError) as problem:
            message = "the server rejected our request due to an error in our request"
            raise ApiError(422, "Invalid", message, details={}) from problem
    return document


def _json_patch_step(document: Json, step: Json) -> None:
    operation = step["op"]
    if operation == "test":
        if _at(document, step["path"]) != step["value"]:
            raise ValueError("test failed")
    elif operation == "add":
        _put(document, step["path"], step["value"], insert=True)
    elif operation == "replace":
        _at(document, step["path"])
        _put(document, step["path"], step["value"], insert=False)
    elif operation == "remove":
        _remove(document, step["path"])
    elif operation in {"move", "copy"}:
        value = copy.deepcopy(_at(document, step["from"]))
        if operation == "move":
            _remove(document, step["from"])
        _put(document, step["path"], value, insert=True)
    else:
        raise ValueError(f"unknown operation {operation!r}")


def _tokens(pointer: str) -> list[str]:
    if not pointer.startswith("/"):
        raise ValueError(f"not a JSON pointer: {pointer!r}")
    return [part.replace("~1", "/").replace("~0", "~") for part in pointer[1:].split("/")]


def _walk(document: Any, tokens: list[str]) -> Any:  # noqa: ANN401 (JSON)
    for token in tokens:
        document = document[int(token)] if isinstance(document, list) else document[token]
    return document


def _at(document: Json, pointer: str) -> Any:  # noqa: ANN401 (JSON)
    return _walk(document, _tokens(pointer))


def _put(document: Json, pointer: str, value: Any, *, insert: bool) -> None:  # noqa: ANN401
    *way, last = _tokens(pointer)
    parent = _walk(document, way)
    if not isinstance(parent, list):
        parent[last] = value
    elif last == "-":
        parent.append(value)
    elif insert:
        parent.insert(int(last), value)
    else:
        parent[int(last)] = value


def _remove(document: Json, pointer: str) -> None:
    *way, last = _tokens(pointer)
    parent = _walk(document, way)
    del parent[int(last) if isinstance(parent, list) else last]

"""From the API's JSON to the few facts about pods that are kept; everything else is skipped.

Only metadata is asked for, so no pod spec ever enters the process, and of the metadata only the
fields below are turned into objects.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from shared.messages import Id, Name
from watcher import annotations
from watcher.settings import CONFIG_HASH

LIST_ACCEPT = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
WATCH_ACCEPT = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"

# What a decoder raises for an answer that is none; msgspec the last for one that is nested.
SENSELESS = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class Pod(Struct, frozen=True, gc=False):
    """One pod of this node; `wish` None where it does not carry the annotation."""

    uid: str
    namespace: str
    name: str
    created: str
    wish: annotations.Wish | None
    static_id: str | None


class Event(Struct, frozen=True):
    """One line of a watch; what `object` is depends on `type`."""

    type: Literal["ADDED", "MODIFIED", "DELETED", "BOOKMARK", "ERROR"]
    object: msgspec.Raw


class Failure(Struct, frozen=True):
    """The object of an ERROR event."""

    code: int = 0
    message: str = ""


class _Version(Struct, frozen=True, rename="camel"):
    resource_version: str
    continue_: str = msgspec.field(default="", name="continue")


class _Versioned(Struct, frozen=True):
    metadata: _Version


class _Owner(Struct, frozen=True):
    kind: str = ""


_Time = Annotated[str, Meta(max_length=64)]
# What msgspec makes a type of: name, type, and the default where there is one.
_Fields = list[str | tuple[str, Any] | tuple[str, Any, Any]]

_event_decoder = msgspec.json.Decoder(Event)
_failure_decoder = msgspec.json.Decoder(Failure)
_versioned_decoder = msgspec.json.Decoder(_Versioned)


def event(line: bytes) -> Event:
    """Return the event in a line of a watch; raises msgspec.DecodeError."""
    return _event_decoder.decode(line)


def failure(raw: msgspec.Raw) -> Failure:
    """Return what an ERROR event says; raises msgspec.DecodeError."""
    return _failure_decoder.decode(raw)


def version(raw: msgspec.Raw | bytes) -> str:
    """Return the resource version of a list or an object; raises msgspec.DecodeError."""
    return _versioned_decoder.decode(raw).metadata.resource_version


def _item(annotation: str) -> Any:  # noqa: ANN401 - a type that only exists at run time
    """Return the type of a pod whose limit stands in `annotation`."""
    wanted = msgspec.defstruct(
        "Annotations",
        [
            ("limit", str | None, msgspec.field(default=None, name=annotation)),
            ("config_hash", str | None, msgspec.field(default=None, name=CONFIG_HASH)),
        ],
        frozen=True,
    )
    fields: _Fields = [
        ("uid", Id),
        ("name", Name),
        ("namespace", Name),
        ("version", str, msgspec.field(name="resourceVersion")),
        ("created", _Time | None, msgspec.field(default=None, name="creationTimestamp")),
        ("annotations", wanted | None, None),
        ("owners", list[_Owner] | None, msgspec.field(default=None, name="ownerReferences")),
    ]
    meta = msgspec.defstruct("ObjectMeta", fields, frozen=True)
    return msgspec.defstruct("Item", [("metadata", meta)], frozen=True)


class PodReader:
    """Decodes pods whose limit stands in one certain annotation."""

    def __init__(self, annotation: str) -> None:
        """Prepare decoders for the key `annotation`."""
        item = _item(annotation)
        items = list[item] | None  # type: ignore[valid-type]
        fields: _Fields = [("metadata", _Version), ("items", items, None)]
        whole = msgspec.defstruct("List", fields, frozen=True)
        self._item: msgspec.json.Decoder[Any] = msgspec.json.Decoder(item)
        self._list: msgspec.json.Decoder[Any] = msgspec.json.Decoder(whole)

    def pod(self, raw: msgspec.Raw) -> tuple[str, Pod]:
        """Return (resource version, pod) of a watch event; raises msgspec.DecodeError."""
        meta = self._item.decode(raw).metadata
        return meta.version, _pod(meta)

    def pods(self, body: bytes) -> tuple[str, dict[str, Pod]]:
        """Return (resource version, pods by uid) of a list; raises msgspec.DecodeError."""
        answer = self._list.decode(body)
        if answer.metadata.continue_:
            raise msgspec.DecodeError("the list is incomplete although all of it was asked for")
        pods = [_pod(item.metadata) for item in answer.items or ()]  # an empty one may be null
        return answer.metadata.resource_version, {pod.uid: pod for pod in pods}


def _pod(meta: Any) -> Pod:  # noqa: ANN401
    limit = meta.annotations.limit if meta.annotations else None
    static_id = meta.annotations.config_hash if meta.annotations else None
    # Anyone may put that annotation on a pod of his own; kubelet's mirror pods belong to the Node.
    of_node = any(owner.kind == "Node" for owner in meta.owners or ())
    return Pod(
        uid=meta.uid,
        namespace=meta.namespace,
        name=meta.name,
        created=meta.created or "",
        wish=None if limit is None else annotations.read(limit),
        static_id=static_id if of_node and static_id and len(static_id) <= 64 else None,
    )

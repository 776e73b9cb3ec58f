"""The forms an Accept header can ask for: whole objects, metadata only, or table rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from . import tables
from .errors import Json, not_acceptable
from .resources import Resource

META_V1 = "meta.k8s.io/v1"
_OFFERED = "only the following media types are accepted: application/json"


def encode(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def choose(accept: str, include_object: str = "Metadata") -> Representation:
    """The first alternative of an Accept header that this server has."""
    for alternative in accept.split(",") if accept.strip() else ["*/*"]:
        media, *parameters = (part.strip() for part in alternative.split(";"))
        if media not in {"application/json", "application/*", "*/*"}:
            continue
        asked = dict(part.split("=", 1) for part in parameters if "=" in part)
        form = asked.get("as", "")
        if not form:
            return Representation("", include_object)
        if (asked.get("g"), asked.get("v")) == ("meta.k8s.io", "v1") and form in _FORMS:
            return Representation(form, include_object)
    raise not_acceptable(_OFFERED)


_FORMS = {"Table", "PartialObjectMetadata", "PartialObjectMetadataList"}


@dataclass(frozen=True)
class Representation:
    form: str  # "" for the whole object, else one of _FORMS
    include_object: str  # Table rows carry: None, Metadata or Object

    @property
    def name(self) -> str:
        """Tells apart what is encoded differently."""
        return f"{self.form}/{self.include_object}" if self.form == "Table" else self.form

    def check_single(self) -> None:
        if self.form == "PartialObjectMetadataList":
            raise not_acceptable(
                "you requested PartialObjectMetadataList, but the requested object is not a list"
            )

    def one(self, resource: Resource, obj: Json) -> Json:
        self.check_single()
        if self.form == "PartialObjectMetadata":
            return partial(obj)
        if self.form == "Table":
            version = obj["metadata"].get("resourceVersion", "")
            return self._table(resource, [obj], {"resourceVersion": version})
        return obj

    def many(self, resource: Resource, objects: Sequence[Json], metadata: Json) -> Json:
        if self.form == "PartialObjectMetadata":
            raise not_acceptable(
                f"you requested {self.form}, but the requested object is a list "
                f"(*core.{resource.list_kind})"
            )
        if self.form == "Table":
            return self._table(resource, objects, metadata)
        if self.form == "PartialObjectMetadataList":
            return {
                "kind": "PartialObjectMetadataList",
                "apiVersion": META_V1,
                "metadata": metadata,
                # An empty list is null here, and only here, as the real server has it.
                "items": [partial(obj) for obj in objects] or None,
            }
        return {
            "kind": resource.list_kind,
            "apiVersion": "v1",
            "metadata": metadata,
            "items": [_bare(obj) for obj in objects],
        }

    def _table(self, resource: Resource, objects: Sequence[Json], metadata: Json) -> Json:
        return {
            "kind": "Table",
            "apiVersion": META_V1,
            "metadata": metadata,
            "columnDefinitions": tables.columns(resource),
            "rows": [
                {"cells": tables.cells(resource, obj), **self._row_object(obj)} for obj in objects
            ],
        }

    def _row_object(self, obj: Json) -> Json:
        if self.include_object == "None":
            return {}
        return {"object": obj if self.include_object == "Object" else partial(obj)}

    def bookmark(self, resource: Resource, metadata: Json) -> Json:
        """An object that says nothing but how far the watch has come."""
        # The real one is a typed object with every field empty.
        body = {"spec": {"containers": None}, "status": {}} if resource.name == "pods" else {}
        return self.one(
            resource, {"kind": resource.kind, "apiVersion": "v1", "metadata": metadata, **body}
        )


def partial(obj: Json) -> Json:
    return {
        "kind": "PartialObjectMetadata",
        "apiVersion": META_V1,
        "metadata": obj["metadata"],
    }


def _bare(obj: Json) -> Json:
    """Items of a typed list carry no kind and apiVersion of their own."""
    return {key: value for key, value in obj.items() if key not in {"kind", "apiVersion"}}

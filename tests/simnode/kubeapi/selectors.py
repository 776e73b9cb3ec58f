"""Field and label selectors: text to predicate, with the server's own refusals."""

from __future__ import annotations

import re
from collections.abc import Callable

from .errors import Json, bad_request
from .resources import Resource

Predicate = Callable[[Json], bool]

_SET_BASED = re.compile(r"(?P<key>\S+)\s+(?P<op>in|notin)\s*\((?P<values>[^()]*)\)")
_EQUALITY = re.compile(r"(?P<key>[^=!\s]+)\s*(?P<op>!=|==|=)\s*(?P<value>[^=!\s]*)")
_EXISTS = re.compile(r"(?P<absent>!?)\s*(?P<key>[^=!\s(),]+)")
# A comma or an operator inside a field's value is escaped with a backslash.
_FIELD_TERM = re.compile(r"(?P<key>[^=!]+?)(?P<op>!=|==|=)(?P<value>(?:\\.|[^\\=!])*)")


def matcher(resource: Resource, field_selector: str, label_selector: str) -> Predicate:
    """True for an object that both selectors let through."""
    fields = _parse_fields(resource, field_selector)
    labels = [_label_term(term) for term in _split_labels(label_selector)]

    def matches(obj: Json) -> bool:
        if fields:
            seen = resource.fields(obj)
            if any((seen[key] == value) is not wanted for key, wanted, value in fields):
                return False
        have = obj["metadata"].get("labels") or {}
        return all(term(have) for term in labels)

    return matches


def _parse_fields(resource: Resource, text: str) -> list[tuple[str, bool, str]]:
    known = resource.fields({"metadata": {"name": ""}})
    terms: list[tuple[str, bool, str]] = []
    for raw in re.split(r"(?<!\\),", text):
        if not raw.strip():
            continue
        found = _FIELD_TERM.fullmatch(raw.strip())
        if found is None:
            raise bad_request(f"invalid selector: '{text}'; can't understand '{raw}'")
        if found["key"] not in known:
            raise bad_request(f"field label not supported: {found['key']}")
        value = re.sub(r"\\(.)", r"\1", found["value"])
        terms.append((found["key"], found["op"] != "!=", value))
    return terms


def _split_labels(text: str) -> list[str]:
    """At commas, but not those between the brackets of `in (a,b)`."""
    return [term.strip() for term in re.split(r",(?![^(]*\))", text) if term.strip()]


def _label_term(term: str) -> Callable[[dict[str, str]], bool]:
    if found := _SET_BASED.fullmatch(term):
        key, wanted = found["key"], found["op"] == "in"
        values = {value.strip() for value in found["values"].split(",")}
        return lambda labels: (labels.get(key) in values) is wanted
    if found := _EQUALITY.fullmatch(term):
        key, value, equal = found["key"], found["value"], found["op"] != "!="
        return lambda labels: (labels.get(key) == value) is equal
    if found := _EXISTS.fullmatch(term):
        key, present = found["key"], not found["absent"]
        return lambda labels: (key in labels) is present
    raise bad_request(f"unable to parse requirement: {term!r}")

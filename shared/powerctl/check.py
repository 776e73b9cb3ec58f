"""The result of one check of the doctor."""

from typing import Literal

import msgspec

# What a remedy says where another check of the same list has the cause.
PROCESS = "`enforcer process`, below, tells what it does"


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One thing looked at; `remedy` is empty where none is needed."""

    name: str
    result: Literal["ok", "warn", "fail"] = "ok"
    seen: str
    remedy: str = ""


def fail(name: str, seen: str, remedy: str) -> Check:
    """Return what must be repaired."""
    return Check(name=name, result="fail", seen=seen, remedy=remedy)


def warn(name: str, seen: str, remedy: str) -> Check:
    """Return what may be intended, but is worth a look."""
    return Check(name=name, result="warn", seen=seen, remedy=remedy)

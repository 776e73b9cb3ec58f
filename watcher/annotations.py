"""The annotation's text: what it means in milliwatts, or why it means nothing."""

from dataclasses import dataclass

from shared.messages import RAW_CHARS
from shared.units import parse_watts


@dataclass(frozen=True, slots=True)
class Wish:
    """What an annotation says (`raw`, cut) and means; `problem` where it means nothing."""

    raw: str
    limit_mw: int | None
    problem: str = ""


def read(text: str) -> Wish:
    """Return what the annotation `text` asks for."""
    raw = text[:RAW_CHARS]
    try:
        return Wish(raw, parse_watts(text))
    except ValueError as error:
        return Wish(raw, None, str(error))

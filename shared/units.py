"""Watts as people write them, milliwatts as the program counts them."""

import re

MILLIWATTS_PER_WATT = 1000
MAX_MW = 100_000 * MILLIWATTS_PER_WATT

# A value from a file or a block scalar ends in a line break.
_BLANKS = " \t\n\v\f\r"
# `\d` would also take digits of other scripts. The plus sign is what some writers let through.
_WATTS = re.compile(r"\+?([0-9]{1,6})(?:\.([0-9]+))?")
_MILLIWATTS = re.compile(r"\+?([0-9]{1,9})(?:\.[0-9]+)?")
_DECIMALS = 3


def parse_watts(text: str) -> int:
    """Return the milliwatts that `text` (decimal watts such as `350` or `48.75`) means.

    Surrounding ASCII blanks and a plus sign are ignored. Decimals beyond milliwatts, as a program
    writes them that computes in floating point, are cut off: a limit is rounded down, never up.
    Raises ValueError for anything else, zero and values over 100000 W included.
    """
    match = _WATTS.fullmatch(text.strip(_BLANKS))
    if match is None:
        raise ValueError("not decimal watts such as 350 or 350.5")
    whole, fraction = match.group(1), match.group(2) or ""
    milliwatts = fraction[:_DECIMALS].ljust(_DECIMALS, "0")
    limit_mw = int(whole) * MILLIWATTS_PER_WATT + int(milliwatts)
    if not 0 < limit_mw <= MAX_MW:
        raise ValueError("not above 0 and at most 100000 watts; write watts, not milliwatts")
    return limit_mw


def meant_mw(text: str) -> int | None:
    """Return what `text` means if it counts milliwatts, None where no limit comes of it.

    Of 350 W that are written as 350000, for instance, which is above what may be asked.
    """
    match = _MILLIWATTS.fullmatch(text.strip(_BLANKS))
    return int(match.group(1)) if match and 0 < int(match.group(1)) <= MAX_MW else None


def watts(limit_mw: int | None) -> int | float | None:
    """Return milliwatts as a number of watts for a log line, a whole one where it is whole."""
    if limit_mw is None or limit_mw % MILLIWATTS_PER_WATT == 0:
        return limit_mw and limit_mw // MILLIWATTS_PER_WATT
    return limit_mw / MILLIWATTS_PER_WATT


def same_limit(one_mw: int, other_mw: int) -> bool:
    """Tell whether two limits are the same to hardware that may keep whole watts only."""
    return abs(one_mw - other_mw) < MILLIWATTS_PER_WATT


def format_watts(limit_mw: int | None) -> str:
    """Return `limit_mw` as the shortest exact text in watts, `-` where it is not known."""
    if limit_mw is None:
        return "-"
    whole, fraction = divmod(limit_mw, MILLIWATTS_PER_WATT)
    return str(whole) if fraction == 0 else f"{whole}.{fraction:03d}".rstrip("0")

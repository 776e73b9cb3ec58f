"""Watts as people write them: what is read, what is not, and that nothing is rounded up."""

import re
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.units import MAX_MW, format_watts, parse_watts


@pytest.mark.parametrize(
    ("text", "limit_mw"),
    [
        ("350", 350_000),
        ("350.5", 350_500),
        ("48.75", 48_750),
        ("350.123", 350_123),
        ("0.001", 1),
        ("00350", 350_000),
        ("000000.5", 500),
        ("350.000", 350_000),
        (" 350", 350_000),
        ("350\t ", 350_000),
        ("1", 1_000),
        ("100000", 100_000_000),
        ("100000.000", 100_000_000),
        # Computed in floating point: 350 * 0.7, 437.5 * 0.7.
        ("244.99999999999997", 244_999),
        ("306.25000000000006", 306_250),
        ("1.2345", 1_234),
        ("350.5000", 350_500),
        ("0.0019", 1),
        ("100000.0009", 100_000_000),
        # From a file, a block scalar, or a writer that is generous.
        ("350\n", 350_000),
        ("\n350", 350_000),
        ("350\r\n", 350_000),
        ("\v\f 350\r", 350_000),
        ("+350", 350_000),
        ("\t+350.5 ", 350_500),
    ],
)
def test_decimal_watts_are_read(text: str, limit_mw: int) -> None:
    assert parse_watts(text) == limit_mw


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "350W",
        "350 W",
        "350w",
        "-1",
        "0",
        "0.0",
        "0.000",
        "0.0001",
        "1e3",
        "NaN",
        "inf",
        "0x15e",
        "３５０",
        "٣٥٠",
        "35０",
        "²",
        "1,5",
        "1_000",
        "1.",
        ".5",
        "1.2.3",
        "1 2",
        "100000.001",
        "100001",
        "999999",
        "0000350",
        "9" * 5000,
        "35\n0",
        "++350",
        "+ 350",
        "+-350",
        "+",
        "350\x00",
        "\u00a0350",
        "350\u2003",
        "350\x1f",
        "350\x85",
        "\ufeff350",
        "None",
        "70%",
    ],
)
def test_everything_else_is_unusable(text: str) -> None:
    with pytest.raises(ValueError, match="watts"):
        parse_watts(text)


@pytest.mark.parametrize(
    ("limit_mw", "text"),
    [
        (350_000, "350"),
        (350_500, "350.5"),
        (48_750, "48.75"),
        (1, "0.001"),
        (10, "0.01"),
        (100_000_000, "100000"),
        (0, "0"),
        (None, "-"),
    ],
)
def test_watts_are_written_shortest_and_exact(limit_mw: int | None, text: str) -> None:
    assert format_watts(limit_mw) == text


@given(st.integers(1, MAX_MW))
def test_what_is_written_reads_back_as_the_same(limit_mw: int) -> None:
    assert parse_watts(format_watts(limit_mw)) == limit_mw
    assert Decimal(format_watts(limit_mw)) * 1000 == limit_mw


@given(st.text() | st.from_regex(r"\A[ \t\n\r]?\+?[0-9]{0,7}\.?[0-9]{0,9}[ \t\n\r]?\Z"))
def test_a_text_is_read_to_the_milliwatt_below_or_not_at_all(text: str) -> None:
    usable = re.fullmatch(r"[ \t\n\v\f\r]*\+?[0-9]{1,6}(\.[0-9]+)?[ \t\n\v\f\r]*", text)
    value = Decimal(text.strip(" \t\n\v\f\r")) if usable else Decimal(0)
    limit_mw = int(value * 1000)
    if 0 < limit_mw <= 100_000_000:
        assert parse_watts(text) == limit_mw
    else:
        with pytest.raises(ValueError, match="watts"):
            parse_watts(text)

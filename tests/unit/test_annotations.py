"""The annotation's text: what is a limit, what is none, and how much of it is kept."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared import messages
from shared.messages import RAW_CHARS
from watcher import annotations, snapshot
from watcher.metadata import Pod


@pytest.mark.parametrize(
    ("text", "limit_mw"),
    [
        ("350", 350_000),
        ("350.5", 350_500),
        (" 350\t", 350_000),
        ("48.75", 48_750),
        ("1", 1000),
        ("350.555", 350_555),
        ("0.001", 1),
        ("100000", 100_000_000),
        ("244.99999999999997", 244_999),
        ("306.25000000000006", 306_250),
        ("350.5000", 350_500),
        ("350\n", 350_000),
        ("350\r\n", 350_000),
        ("+350", 350_000),
    ],
)
def test_decimal_watts_are_a_limit(text: str, limit_mw: int) -> None:
    assert annotations.read(text) == annotations.Wish(text, limit_mw)


@pytest.mark.parametrize(
    "text",
    [
        "350W",
        "-1",
        "0",
        "1e3",
        "NaN",
        "３５０",
        "",
        " ",
        "100001",
        "350,5",
        "0x10",
        "++5",
        "+ 5",
        "3 5",
        "inf",
        "350.",
        ".5",
        "0.000",
        "100000.001",
        "350\n\n5",
        "350\u00a0",
        "70%",
    ],
)
def test_everything_else_is_no_limit_and_says_why(text: str) -> None:
    wish = annotations.read(text)
    assert wish.limit_mw is None
    assert wish.raw == text
    assert wish.problem


def test_a_long_text_is_kept_in_part_and_read_in_whole() -> None:
    long = annotations.read("9" * 65536)
    assert (long.raw, long.limit_mw) == ("9" * RAW_CHARS, None)
    # Cut first and read then, this would be 350 W.
    hidden = "350" + " " * RAW_CHARS + "W"
    assert annotations.read(hidden).limit_mw is None
    assert len(annotations.read(hidden).raw) == RAW_CHARS
    assert annotations.read("５" * 100).raw == "５" * RAW_CHARS  # characters, not bytes


@given(st.text(max_size=80))
def test_any_text_gives_a_message_that_the_enforcer_takes(text: str) -> None:
    wish = annotations.read(text)
    pod = Pod("u", "ns", "p", "", wish, None)
    content = snapshot.content([pod])
    made = messages.Snapshot(session="s", revision=1, node="n", pods=content.pods, others=[])
    assert messages.decode_request(messages.encode(made)) == made

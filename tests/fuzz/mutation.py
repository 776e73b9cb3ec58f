"""Changes of a well-formed input, from a source of chance: cut, doubled, flipped, spliced."""

from __future__ import annotations

import random

_WORDS = [
    *(b"0", b"-1", b"1e9", b"null", b"true", b"[]", b"{}", b'""', b'"', b"\\", b"\n", b"\0", b" "),
    *(b"\xff", b"\xff\xff\xff\xff", b"\x80", b"\xc1", b"\xdf", b"9" * 400, b"[" * 2000, b"/"),
    *(b"..", b"kubepods", b"pod", b".slice", b":", b"::", b" (deleted)", "３".encode(), b"."),
]


def mutated(chance: random.Random, seeds: list[bytes]) -> bytes:
    """One of `seeds` with some changes."""
    data = bytearray(chance.choice(seeds))
    for _ in range(chance.choice([1, 1, 1, 2, 3, 8])):
        where = chance.randrange(len(data) + 1)
        until = min(len(data), where + chance.choice([1, 1, 2, 4, 16, 100]))
        match chance.randrange(7):
            case 0 if where < len(data):
                data[where] ^= 1 << chance.randrange(8)
            case 1:
                del data[where:until]
            case 2:
                data[where:where] = chance.choice(_WORDS)
            case 3:
                data[where:where] = data[where:until] * chance.choice([1, 2, 50])
            case 4:
                data[where:until] = chance.randbytes(until - where)
            case 5:
                other = chance.choice(seeds)
                cut = chance.randrange(len(other) + 1)
                data[where:] = other[cut:]
            case _:
                del data[where:]
    return bytes(data)

"""Draws that all surfaces share: a member of a list, a value of any type, damaged bytes."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

NAMES = ("", " ", "x", "no such", "None", "True", "nan", "1e9", "../../x", "a/b", "[/b]", "%s{0}", "ä\u202e", "x" * 300)
NUMBERS = (0, 1, -1, 2, 3, 10**6, 10**6 + 1, 2**31, 2**32, 2**63, 10**30, -(10**30))
NUMBERS += (0.0, -0.0, 0.5, -0.5, 1e-320, 1e308)
NOT_FINITE = (math.nan, math.inf, -math.inf)


def one(rng: np.random.Generator, choices: Sequence[Any]) -> Any:
    """A member as it is: NumPy's own choice would turn all of them into one type."""
    return choices[int(rng.integers(len(choices)))]


def value(rng: np.random.Generator, depth: int = 0) -> Any:
    """Anything that a Python literal can say, and the numbers that are none."""
    kinds: list[Callable[[], Any]] = [
        lambda: one(rng, NAMES),
        lambda: one(rng, NUMBERS),
        lambda: one(rng, NOT_FINITE),
        lambda: one(rng, (None, True, False)),
        lambda: int(rng.integers(-100, 1000)),
        lambda: float(rng.normal()) * 10.0 ** int(rng.integers(-4, 5)),
    ]
    if depth < 2:
        kinds += [
            lambda: tuple(value(rng, depth + 1) for _ in range(rng.integers(4))),
            lambda: [value(rng, depth + 1) for _ in range(rng.integers(4))],
            lambda: {one(rng, NAMES): value(rng, depth + 1) for _ in range(rng.integers(3))},
        ]
    return one(rng, kinds)()


def damaged(rng: np.random.Generator, content: bytes) -> tuple[str, bytes]:
    """(what was done in a word or two, other bytes): as a disk, a network or a stranger would leave them."""
    size = len(content)
    at = int(rng.integers(size)) if size else 0
    to = at + int(rng.integers(1, max(2, size // 4)))
    flipped = bytearray(content)
    for position in rng.integers(size, size=int(rng.integers(1, 5))) if size else ():
        flipped[int(position)] ^= 1 << int(rng.integers(8))
    kinds: Mapping[str, bytes] = {
        "empty": b"",
        "truncated": content[:at],
        "bits flipped": bytes(flipped),
        "a piece zeroed": content[:at] + bytes(len(content[at:to])) + content[to:],
        "a piece cut out": content[:at] + content[to:],
        "random bytes": rng.bytes(max(1, min(size, 4096))),
        "bytes before": rng.bytes(int(rng.integers(1, 9))) + content,
        "bytes behind": content + rng.bytes(int(rng.integers(1, 9))),
        "text": b"<html>404 Not Found</html>",
        "no text": b"\xff\xfe\x80" + content,
        "deep": b"[" * 100_000,
    }
    kind = one(rng, list(kinds))
    return kind, kinds[kind]

"""Command lines of the experiments: what an option may be, and one line for what it cannot be."""

import argparse
import re
from collections.abc import Callable, Collection
from typing import Any, NoReturn

from lt_adv.runtime import registry


class Parser(argparse.ArgumentParser):
    """Raises ValueError where argparse would print and exit."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def positive(kind: type) -> Callable[[str], Any]:
    """A number above 0 of the type `kind`, and no infinity."""

    def convert(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a number of type {kind.__name__}, not {text!r}") from None
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"must be above 0, not {text}")
        return value

    return convert


def some(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Of "64,128" [64, 128]; nothing twice."""
    return lambda text: list(dict.fromkeys(kind(part) for part in text.split(",")))


def one_of(kind: str, choices: Collection[Any], convert: Callable[[str], Any] = str) -> Callable[[str], Any]:
    """One of `choices`; for anything else the message names them as of this `kind`, and the nearest."""

    def chosen(text: str) -> Any:
        try:
            value = convert(text)
        except ValueError:
            value = text
        if value not in choices:
            raise argparse.ArgumentTypeError(str(registry.unknown(kind, value, map(str, choices))))
        return value

    return chosen


def name(text: str) -> str:
    """Of a file or folder: no ".." among them."""
    if not re.fullmatch(r"[\w-][\w.-]*", text):
        raise argparse.ArgumentTypeError(f"must be of letters, digits, '_', '-' and, not first, '.', not {text!r}")
    return text

"""Option types for the command lines of the experiments, with one-line errors."""

import argparse
import re
from collections.abc import Callable, Collection
from typing import Any, NoReturn

from lt_adv.runtime import registry


class Parser(argparse.ArgumentParser):
    """An argument parser that raises ValueError instead of printing and exiting."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def positive(kind: type) -> Callable[[str], Any]:
    """Returns a converter to a finite number above 0 of the type `kind`."""

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
    """Returns a converter of comma-separated values, "64,128" to [64, 128], without duplicates."""
    return lambda text: list(dict.fromkeys(kind(part) for part in text.split(",")))


def one_of(kind: str, choices: Collection[Any], convert: Callable[[str], Any] = str) -> Callable[[str], Any]:
    """Returns a converter that accepts `choices`; its error names the `kind`, the nearest choice and all of them."""

    def choose(text: str) -> Any:
        try:
            value = convert(text)
        except ValueError:
            value = text
        if value not in choices:
            raise argparse.ArgumentTypeError(str(registry.unknown(kind, value, map(str, choices))))
        return value

    return choose


def name(text: str) -> str:
    """Returns `text` if it is a valid name of a file or folder; ".." is not."""
    if not re.fullmatch(r"[\w-][\w.-]*", text):
        raise argparse.ArgumentTypeError(f"must be of letters, digits, '_', '-' and, not first, '.', not {text!r}")
    return text

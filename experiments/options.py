"""Command lines of the experiments: option types with one-line errors, and exit codes."""

import argparse
import re
import sys
from collections.abc import Callable, Collection, Sequence
from typing import Any, NoReturn

from lt_adv.main import is_user_error, one_line
from lt_adv.runtime import registry


class Parser(argparse.ArgumentParser):
    """An argument parser without abbreviations that raises ValueError instead of printing and exiting."""

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, add_help=False, **options)

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)

    def parse_with_config(self, argv: Sequence[str], config: str) -> tuple[argparse.Namespace, list[str]]:
        """Returns (options, the other arguments), all of which begin with a match of `config`."""
        options, rest = self.parse_known_args(argv)
        for argument in rest:
            if not re.match(config, argument):
                known = [f"--{option.replace('_', '-')}" for option in vars(options)]
                raise registry.unknown("option", argument.partition("=")[0], [*known, "--config"])
        return options, rest


def run_command(command: Callable[[Sequence[str]], int], argv: Sequence[str], usage: str | None) -> int:
    """Returns the exit code of `command(argv)`; 2 after one line for a user error, 0 after `usage` for --help."""
    if {"-h", "--help"} & set(argv):
        print(usage)
        return 0
    try:
        return command(argv)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    except Exception as error:
        if not is_user_error(error):
            raise
        print("Error:", one_line(error), file=sys.stderr)
        return 2


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

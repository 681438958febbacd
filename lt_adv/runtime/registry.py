"""Names to modules: the files of a folder are its registry."""

import difflib
import importlib
import pkgutil
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any


def unknown(kind: str, name: object, choices: Iterable[str]) -> ValueError:
    """The error for a name that is not among `choices`: lists them and guesses what was meant."""
    choices = sorted(choices)
    near = difflib.get_close_matches(str(name), choices, n=1)
    guess = f" Did you mean {near[0]!r}?" if near else ""
    return ValueError(f"Unknown {kind} {name!r}.{guess} There are: {', '.join(choices) or 'none'}.")


def of_type(path: str, value: object, default: object) -> None:
    """ValueError unless `value` is of the type of a plain `default`; for a float a whole number will do."""
    kinds = {bool: (bool,), int: (int,), float: (float, int), str: (str,)}.get(type(default))
    if kinds and type(value) not in kinds:
        raise ValueError(f"{path} must be of type {type(default).__name__}, not {value!r}.")


def options(kind: str, config: Mapping[str, Any], takes: Mapping[str, Mapping[str, Any]]) -> tuple[str, dict[str, Any]]:
    """`{"name": ..., **options}` -> (name, those of the options that it takes). `takes`: choice -> option -> default.

    An option of another choice is left out, so one config can hold the options of all and change its name alone;
    ValueError for a name that is no choice, an option of none, or one of another type than its default.
    """
    given = dict(config)
    name = given.pop("name", None)
    if name not in takes:
        raise unknown(kind, name, takes)
    known = set().union(*takes.values())
    for option in given:
        if option not in known:
            raise unknown(f"option of {kind} {name!r}:", option, known)
    taken = {option: value for option, value in given.items() if option in takes[name]}
    for option, value in taken.items():
        of_type(f"option {option} of {kind} {name!r}", value, takes[name][option])
    return name, taken


def names(package: str) -> list[str]:
    """The modules of a package that can be asked for by name (`base`, private ones and folders cannot)."""
    path = importlib.import_module(package).__path__
    found = (m.name for m in pkgutil.iter_modules(path) if not m.ispkg)
    return sorted(name for name in found if name != "base" and not name.startswith("_"))


def module(package: str, name: str) -> ModuleType:
    """The module `package.name`; ValueError for a name that is not a file of the package."""
    if name not in names(package):
        raise unknown(package.rsplit(".", 1)[-1].rstrip("s"), name, names(package))
    return importlib.import_module(f"{package}.{name}")

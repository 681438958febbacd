"""Maps names to modules: the files of a folder are its registry."""

import difflib
import importlib
import pkgutil
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

Config = Mapping[str, Any]  # options by name; the values have any type


def unknown(kind: str, name: object, choices: Iterable[str]) -> ValueError:
    """Returns the ValueError for a name that is not in `choices`: it lists them and suggests the closest."""
    choices = sorted(choices)
    matches = difflib.get_close_matches(str(name), choices, n=1)
    suggestion = f" Did you mean {matches[0]!r}?" if matches else ""
    return ValueError(f"Unknown {kind} {name!r}.{suggestion} There are: {', '.join(choices) or 'none'}.")


def check_type(path: str, value: object, default: object) -> None:
    """Raises ValueError unless `value` has the type of a scalar `default`; an integer is accepted for a float."""
    types = {bool: (bool,), int: (int,), float: (float, int), str: (str,)}.get(type(default))
    if types and type(value) not in types:
        raise ValueError(f"{path} must be of type {type(default).__name__}, not {value!r}.")


def check_number(path: str, value: Any, interval: str, kind: type = float, hint: str = "") -> None:
    """Raises ValueError unless `value` is a number in an interval such as "(0, 1]"; NaN is in no interval.

    `kind` is float, for any number, or int, for whole numbers. The message ends with `hint`.
    """
    low, high = (float(end) for end in interval[1:-1].split(","))
    is_number = isinstance(value, (int, kind)) and not isinstance(value, bool)
    if is_number:
        above = value > low if interval[0] == "(" else value >= low
        below = value < high if interval[-1] == ")" else value <= high
        if above and below:
            return
    name = "whole number" if kind is int else "number"
    raise ValueError(f"{path} must be a {name} in {interval}, not {value!r}{': ' if hint else ''}{hint}.")


def select_options(kind: str, config: Config, defaults: Mapping[str, Config]) -> tuple[str, dict[str, Any]]:
    """Returns the name and the options of that name from a config `{"name": ..., **options}`.

    Options of another choice are dropped, so that one config can hold the options of all choices and only change its
    name.

    Args:
      kind: what the choices are; used in error messages.
      config: the name and the options.
      defaults: choice -> option -> default value.

    Raises:
      ValueError: for an unknown name, an option that no choice has, or a value of another type than its default.
    """
    options = dict(config)
    name = options.pop("name", None)
    if name not in defaults:
        raise unknown(kind, name, defaults)
    known = set().union(*defaults.values())
    for option in options:
        if option not in known:
            raise unknown(f"option of {kind} {name!r}:", option, known)
    selected = {option: value for option, value in options.items() if option in defaults[name]}
    for option, value in selected.items():
        check_type(f"option {option} of {kind} {name!r}", value, defaults[name][option])
    return name, selected


def names(package: str) -> list[str]:
    """Returns the names of a package's public modules, without `base` and sub-packages."""
    path = importlib.import_module(package).__path__
    modules = (m.name for m in pkgutil.iter_modules(path) if not m.ispkg)
    return sorted(name for name in modules if name != "base" and not name.startswith("_"))


def module(package: str, name: str) -> ModuleType:
    """Returns the module `package.name`; raises ValueError for a name that is not in `names(package)`."""
    if name not in names(package):
        raise unknown(package.rsplit(".", 1)[-1].rstrip("s"), name, names(package))
    return importlib.import_module(f"{package}.{name}")

"""Names to modules: the files of a folder are its registry."""

import difflib
import importlib
import pkgutil
from collections.abc import Iterable
from types import ModuleType


def unknown(kind: str, name: object, choices: Iterable[str]) -> ValueError:
    """The error for a name that is not among `choices`: lists them and guesses what was meant."""
    choices = sorted(choices)
    near = difflib.get_close_matches(str(name), choices, n=1)
    guess = f" Did you mean {near[0]!r}?" if near else ""
    return ValueError(f"Unknown {kind} {name!r}.{guess} There are: {', '.join(choices)}.")


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

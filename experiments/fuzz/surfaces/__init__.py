"""The kinds of input: a module each, with a class of its name."""

import importlib
from pathlib import Path

from experiments.fuzz.cases import Surface


def make(name: str, shared: Path) -> Surface:
    """The surface `name`; what all its inputs need goes to the folder `shared`. Weights need PyTorch."""
    module = importlib.import_module(f"{__name__}.{name}")
    return getattr(module, "".join(part.capitalize() for part in name.split("_")))(shared)

"""Add-ons: what changes the training of any method. One file per paper, a dataclass around an inner method.

`config.addons` names those that are on, the outermost last; the section of an add-on's name holds its settings.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from lt_adv.methods import Method, method_class
from lt_adv.runtime import registry


def names() -> list[str]:
    """Every add-on that `config.addons` can name."""
    return registry.names(__name__)


def wrap(method: Method, chosen: Sequence[str], settings: Mapping[str, Mapping[str, Any]]) -> Method:
    """`method` inside the chosen add-ons, the last outermost, each with the settings under its name."""
    for name in chosen:
        if chosen.count(name) > 1:
            raise ValueError(f"config.addons names {name!r} twice.")
        addon = method_class(name, __name__)
        method = addon(inner=method, **settings[name])
    return method

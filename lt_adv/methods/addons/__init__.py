"""Add-ons change the training of any method. One file per paper: a dataclass around an inner method.

`config.addons` lists those in use, the outermost last. The config section of the same name has the options of each.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lt_adv.methods import Method, method_class
from lt_adv.runtime import registry


def names() -> list[str]:
    """Returns the names that `config.addons` accepts."""
    return registry.names(__name__)


def wrap(method: Method, chosen: Sequence[str], settings: Mapping[str, Mapping[str, Any]]) -> Method:
    """Returns `method` inside the add-ons `chosen`, the last one outermost; `settings` has the options by name."""
    for name in chosen:
        if chosen.count(name) > 1:
            raise ValueError(f"config.addons names {name!r} twice.")
        addon: Callable[..., Method] = method_class(name, __name__)
        method = addon(inner=method, **settings[name])
    return method

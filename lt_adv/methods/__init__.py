"""Methods: one file per paper. `create` finds the file by its name and the dataclass in it."""

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

from lt_adv.methods.base import Batch, DataInfo, LossOutput, Method, Net, Stage, TrainProgress
from lt_adv.runtime import registry

__all__ = [
    "Batch",
    "DataInfo",
    "LossOutput",
    "Method",
    "Net",
    "Stage",
    "TrainProgress",
    "create",
    "method_class",
    "names",
]


def names() -> list[str]:
    """Every method that `config.method.name` can be."""
    return registry.names(__name__)


def method_class(name: str, package: str = __name__) -> type[Method]:
    """The one Method defined in `lt_adv/methods/<name>.py`, or in the module `name` of another package."""
    module = registry.module(package, name)
    found = [
        c
        for _, c in inspect.getmembers(module, inspect.isclass)
        if c.__module__ == module.__name__ and issubclass(c, Method)
    ]
    if len(found) != 1:
        raise ImportError(f"{module.__name__} must define exactly one Method, found {len(found)}.")
    return found[0]


def create(options: Mapping[str, Any], **common: Any) -> Method:
    """The method of `config.method`: {"name": ..., **hyper-parameters}; ValueError for one that it does not have, or of
    another type. `common`: what every method has, which other sections of the config say. An option that is None takes
    the default of `common["fidelity"]`, where the method has one for each (`base.by_fidelity`).
    """
    own = dict(options)
    cls = method_class(own.pop("name"))
    shared = {f.name for f in dataclasses.fields(Method)}
    takes = {f.name: f for f in dataclasses.fields(cls) if f.name not in shared}
    for option, value in own.items():
        if option not in takes:
            raise registry.unknown(f"option of method {cls.__module__.rsplit('.', 1)[-1]}", option, takes)
        values = takes[option].metadata  # of `base.by_fidelity`, where None asks for one of them
        if not (values and value is None):
            registry.of_type(f"config.method.{option}", value, values.get("paper", takes[option].default))
    return cls(**common, **own)

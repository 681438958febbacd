"""Training methods, one file per paper. `create` imports the file of that name and returns its dataclass."""

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

from lt_adv.methods.base import Batch, DataInfo, LossOutput, Method, Net, Stage, TrainProgress, ValidationResult
from lt_adv.runtime import registry

__all__ = [
    "Batch",
    "DataInfo",
    "LossOutput",
    "Method",
    "Net",
    "Stage",
    "TrainProgress",
    "ValidationResult",
    "create",
    "method_class",
    "names",
]


def names() -> list[str]:
    """Returns the names that `config.method.name` accepts."""
    return registry.names(__name__)


def method_class(name: str, package: str = __name__) -> type[Method]:
    """Returns the Method that `lt_adv/methods/<name>.py` defines, or the module `name` of another package."""
    module = registry.module(package, name)
    classes = [
        c
        for _, c in inspect.getmembers(module, inspect.isclass)
        if c.__module__ == module.__name__ and issubclass(c, Method)
    ]
    if len(classes) != 1:
        raise ImportError(f"{module.__name__} must define exactly one Method, not {len(classes)}.")
    return classes[0]


def create(options: Mapping[str, Any], **common: Any) -> Method:
    """Returns the method of `config.method`.

    Args:
        options: {"name": ..., **hyper-parameters}. A hyper-parameter whose default depends on the fidelity takes it for
            None.
        **common: the fields of every method, from other sections of the config.

    Raises:
        ValueError: an unknown method or hyper-parameter, or a value of the wrong type or out of range.
    """
    hyper_parameters = dict(options)
    cls = method_class(hyper_parameters.pop("name"))
    shared = {f.name for f in dataclasses.fields(Method)}
    accepted = {f.name: f for f in dataclasses.fields(cls) if f.name not in shared}
    for option, value in hyper_parameters.items():
        if option not in accepted:
            raise registry.unknown(f"option of method {cls.__module__.rsplit('.', 1)[-1]}", option, accepted)
        field = accepted[option]
        if not (value is None and field.default is None):
            registry.check_type(f"config.method.{option}", value, field.metadata.get("paper", field.default))
    return cls(**common, **hyper_parameters)

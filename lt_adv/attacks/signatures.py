"""Types in the signatures of attacks."""

from collections.abc import Callable
from typing import Any, Concatenate

from jax import Array

PyTree = Any  # nested containers of arrays, as in jax.tree
Bounds = tuple[float, float]  # (low, high)

LogitsFn = Callable[[Array], Array]  # x [batch, ...] -> logits [batch, classes]
KeyedLogitsFn = Callable[[Array, Array], Array]  # (x [batch, ...], keys [batch]) -> logits [batch, classes]
Objective = Callable[[Array, Array], Array]  # (logits [batch, classes], y) -> [batch]
TargetedObjective = Callable[[Array, Array, Array], Array]  # (logits [batch, classes], y, target [batch]) -> [batch]
Attack = Callable[Concatenate[Array, LogitsFn, Array, Array, ...], Array]  # (key, logits_fn, x, y, **options) -> x_adv

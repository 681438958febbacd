"""The train state: everything that training carries from step to step, as arrays, so that a checkpoint is complete."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from lt_adv.attacks.initialization import threefry
from lt_adv.runtime.distributed import PyTree


@struct.dataclass
class TrainState:
    """The state of one stage.

    `step` counts within the stage. `average` is {} or {"params", "batch_stats"}; "epoch_ema" also has "num_epochs", see
    `epoch_update.average_epoch`. `metric_sums` are the sums of the metrics since the last log step: a run that is
    stopped between two log steps and resumed logs the same numbers.
    """

    step: jax.Array
    params: PyTree
    batch_stats: PyTree
    opt_state: optax.OptState
    average: PyTree
    method_state: PyTree
    metric_sums: PyTree
    key: jax.Array

    @property
    def variables(self) -> dict[str, Any]:
        """Returns the variables to evaluate: the averaged weights if the run averages them, otherwise the latest."""
        latest = {"params": self.params, "batch_stats": self.batch_stats}
        return {name: self.average[name] for name in latest} if self.average else latest

    @property
    def evaluated(self) -> dict[str, Any]:
        """Returns `variables` and `method_state`, which some post-hoc adjustments need."""
        return {**self.variables, "method_state": self.method_state}


def create(
    key: jax.Array,
    variables: Mapping[str, Any],
    tx: optax.GradientTransformation,
    method_state: PyTree,
    *,
    average: str = "none",
) -> TrainState:
    """Returns the state before the first step of a stage, but for `metric_sums`: see `make_train_step`.

    `average` is `config.average.name`.
    A key of another implementation is replaced by a threefry key: see `attacks.initialization.threefry`.
    """
    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    # Copies: an array that stood in the state twice would be donated twice.
    averages = jax.tree.map(jnp.copy, {"params": params, "batch_stats": batch_stats}) if average != "none" else {}
    if average == "epoch_ema":
        averages["num_epochs"] = jnp.zeros((), jnp.int32)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        opt_state=tx.init(params),
        average=averages,
        method_state=jax.tree.map(jnp.copy, method_state),  # likewise: `init_state` may use an array twice
        metric_sums={},
        key=threefry(key),
    )


def average_weight(average: Mapping[str, Any], step: jax.Array, steps_per_epoch: int) -> jax.Array:
    """Returns the weight w of the new parameters in  a <- a + w (p - a)  after step `step` (from 0).

    "ema": 1 - min(decay, (1 + t) / (10 + t)), a shorter memory in the first steps. "swa": the mean of the weights at
    the ends of the epochs from `start_epoch` on (from 0): w = 1 / (number of these epochs so far), 0 within an epoch.
    Before the first of them the average equals the weights. Running statistics are averaged too (our choice).
    """
    if average["name"] == "ema":
        return 1.0 - jnp.minimum(jnp.float32(average["decay"]), (1.0 + step) / (10.0 + step))
    num_epochs = step // steps_per_epoch - average["start_epoch"] + 1  # with the current one
    epoch_ends = (step + 1) % steps_per_epoch == 0
    mean = jnp.where(epoch_ends, 1.0 / jnp.maximum(num_epochs, 1), 0.0)
    return jnp.where((num_epochs < 1) | ((num_epochs == 1) & ~epoch_ends), 1.0, mean).astype(jnp.float32)

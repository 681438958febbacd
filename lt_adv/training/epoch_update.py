"""The change of the train state between two epochs: feedback from the validation split, and an average over epochs."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from lt_adv import attacks
from lt_adv.data import Split
from lt_adv.methods import DataInfo, Method, ValidationResult
from lt_adv.runtime import distributed
from lt_adv.runtime.distributed import PyTree
from lt_adv.training import sharding
from lt_adv.training.image_batches import ImageBatches
from lt_adv.training.train_state import TrainState


def needs_validation(method: Method, average: Mapping[str, Any]) -> bool:
    """Whether training attacks the validation split; `average` is `config.average`."""
    return bool(method.feedback_every or min_class_accuracy(average))


def min_class_accuracy(average: Mapping[str, Any]) -> float:
    """Returns the accuracy that every class must have for an epoch to enter the average; 0 accepts all epochs."""
    return average["min_class_accuracy"] if average["name"] == "epoch_ema" else 0.0


class EpochUpdate:
    """`update(state, epoch) -> state` after the last step of epoch `epoch` (from 1); `state` is donated.

    With `method.feedback_every`, the new `method_state` is that of `method.feedback`. With the average "epoch_ema",
    weights and running statistics are averaged, see `average_epoch`. Otherwise nothing changes.

    The result is a function of the state and the epoch. The checkpoint of an epoch is written afterwards, so that a run
    that resumes from it takes the same steps.

    Args:
        method: the method of the stage.
        info: static facts of the training set.
        average: `config.average`.
        validate: a `Validation` if `needs_validation`, else None.
        mesh: all devices.
        parallel: "pmap" or "shard_map".
        sharded: fields of the state that are sharded over the devices.
    """

    def __init__(
        self,
        method: Method,
        info: DataInfo,
        average: Mapping[str, Any],
        validate: Callable[[PyTree, int], ValidationResult] | None,
        mesh: Mesh,
        parallel: str = "pmap",
        sharded: Collection[str] = (),
    ):
        self._every, self._validate, self._mesh, self._parallel = method.feedback_every, validate, mesh, parallel
        self._averages, self._threshold = average["name"] == "epoch_ema", min_class_accuracy(average)
        state_mesh = sharding.state_mesh(mesh, parallel)

        def update(state: TrainState, result: ValidationResult | None, feedback: bool) -> TrainState:
            if feedback:
                assert result is not None
                method_state = method.feedback(state.method_state, result, info)
                state = dataclasses.replace(state, method_state=method_state)
            if self._averages:
                accepted = result is None or jnp.min(result.accuracy) >= self._threshold
                new = average_epoch(state.average, latest(state), accepted, average["decay"])
                state = dataclasses.replace(state, average=new)
            return lax.with_sharding_constraint(state, sharding.shardings(state, state_mesh, sharded))

        self._update = jax.jit(update, static_argnums=2, donate_argnums=0)

    def __call__(self, state: TrainState, epoch: int) -> TrainState:
        feedback = bool(self._every) and epoch % self._every == 0
        if not (feedback or self._averages):
            return state
        result = None
        if self._validate and (feedback or self._threshold):
            variables = distributed.replicate(latest(state), distributed.replicated(self._mesh))
            result = sharding.to_local(self._validate(variables, epoch), self._mesh, self._parallel)
        return jax.block_until_ready(self._update(state, result, feedback))


def latest(state: TrainState) -> dict[str, PyTree]:
    """Returns the variables of the last step, not their average."""
    return {"params": state.params, "batch_stats": state.batch_stats}


def average_epoch(average: PyTree, new: PyTree, accepted: jax.Array | bool, decay: float) -> PyTree:
    """Returns the average a after an epoch with the variables p:  a <- a + (1 - decay) (p - a)  if it is accepted.

    a = p until after the first accepted epoch. `average["num_epochs"]` counts the accepted epochs.

    With `config.average.min_class_accuracy` this is the weight average of CFA (Wei et al., CVPR 2023), which accepts an
    epoch by the network of the last step, not by the average, and also averages the running statistics, as ours does.

    Differs from the released code of CFA: its average is an untrained network until the first accepted epoch; it
    attacks the validation split with ten steps, ours with 20; and its default threshold is 0.24, that of the paper 0.2.
    """
    started = average["num_epochs"] > 0

    def update(a: jax.Array, p: jax.Array) -> jax.Array:
        return jnp.where(started, jnp.where(accepted, a + (1 - decay) * (p - a), a), p)

    means = jax.tree.map(update, {name: average[name] for name in new}, new)
    return {**means, "num_epochs": average["num_epochs"] + jnp.asarray(accepted, jnp.int32)}


class Validation:
    """`validation(variables, epoch)` attacks the validation split by PGD and returns a `ValidationResult`.

    Args:
        apply: (variables, x) -> (logits, {"features": ...}) in evaluation mode, without an adjustment of the logits.
        split: the validation split.
        num_classes: number of classes.
        attack: options of PGD.
        key: the start for an image is a function of `key`, the epoch and the position of the image.
        mesh: all devices.
        batch_size: over all devices.
    """

    def __init__(
        self,
        apply: Callable[..., Any],
        split: Split,
        num_classes: int,
        *,
        attack: Mapping[str, Any],
        key: jax.Array,
        mesh: Mesh,
        batch_size: int,
    ):
        images = ImageBatches(split.image, split.label, mesh=mesh, batch_size=batch_size)

        def predict(variables: PyTree, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            logits, out = apply(variables, x)
            return attacks.prediction(logits), out["features"]

        def summarize(predictions: list[tuple[jax.Array, jax.Array]], label: jax.Array) -> ValidationResult:
            batches = jax.tree.map(lambda *columns: jnp.concatenate(columns), *predictions)
            predicted, features, label = (a[: images.num_images] for a in (*batches, label.reshape(-1)))  # no padding
            one_hot = functools.partial(jax.nn.one_hot, num_classes=num_classes, dtype=features.dtype)
            of_class = one_hot(label).T  # [classes, images]
            count = jnp.maximum(of_class.sum(axis=1, keepdims=True), 1)
            return ValidationResult(
                confusion=jnp.dot(of_class, one_hot(predicted), precision="highest") / count,
                features=jnp.dot(of_class, features, precision="highest") / count,
            )

        self._key, self._images = key, images
        self._attack = attacks.jit(attacks.pgd, lambda variables, x: apply(variables, x)[0], **attack)
        # Only the last program has collectives: two of them must not run concurrently.
        self._predict = jax.jit(predict, out_shardings=images.over_devices)
        self._summarize = jax.jit(summarize, out_shardings=distributed.replicated(mesh))

    def __call__(self, variables: PyTree, epoch: int) -> ValidationResult:
        batches = self._images.batches(jax.random.fold_in(self._key, epoch))
        predictions = [self._predict(variables, self._attack(keys, variables, x, y)) for x, y, keys in batches]
        return self._summarize(predictions, self._images.label)

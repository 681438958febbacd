"""The change of the train state between two epochs: feedback from the validation split, and an average over epochs."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lt_adv import attacks, data, models
from lt_adv.methods import DataInfo, Method, ValidationResult
from lt_adv.runtime import distributed
from lt_adv.runtime.distributed import PyTree
from lt_adv.training import sharding
from lt_adv.training.image_batches import ImageBatches
from lt_adv.training.train_state import TrainState

NUM_STEPS = 20  # of the attack on the validation split


def needs_validation(method: Method, config: ConfigDict) -> bool:
    """Whether training attacks the validation split."""
    return bool(method.feedback_every or min_class_accuracy(config.average))


def min_class_accuracy(average: Mapping[str, Any]) -> float:
    """Returns the accuracy that every class must have for an epoch to enter the average; 0 accepts all epochs."""
    return average["min_class_accuracy"] if average["name"] == "epoch_ema" else 0.0


class EpochUpdate:
    """`update(state, epoch) -> state` after the last step of epoch `epoch` (from 1); `state` is donated.

    With `method.feedback_every`, the new `method_state` is that of `method.feedback`. With `config.average.name =
    "epoch_ema"`, weights and running statistics are averaged, see `average_epoch`. Otherwise nothing changes.

    The result is a function of the state and the epoch. The checkpoint of an epoch is written afterwards, so that a run
    that resumes from it takes the same steps.

    Args:
        method: the method of the stage.
        config: the config of the stage.
        split: its data.
        info: static facts of the training set.
        key: the key of the train state.
        mesh: all devices.
    """

    def __init__(
        self, method: Method, config: ConfigDict, split: data.LongTailed, info: DataInfo, key: jax.Array, mesh: Mesh
    ):
        self._every, self._mesh, self._parallel = method.feedback_every, mesh, config.parallel
        self._averages, self._threshold = config.average.name == "epoch_ema", min_class_accuracy(config.average)
        state_mesh, decay = sharding.state_mesh(mesh, config.parallel), config.average.decay

        def update(state: TrainState, result: ValidationResult | None, feedback: bool) -> TrainState:
            if feedback:
                assert result is not None
                method_state = method.feedback(state.method_state, result, info)
                state = dataclasses.replace(state, method_state=method_state)
            if self._averages:
                accepted = result is None or result.accuracy.min() >= self._threshold
                latest = {"params": state.params, "batch_stats": state.batch_stats}
                average = average_epoch(state.average, latest, accepted, decay)
                state = dataclasses.replace(state, average=average)
            return lax.with_sharding_constraint(state, sharding.shardings(state, state_mesh, config.sharded))

        self._update = jax.jit(update, static_argnums=2, donate_argnums=0)
        self._validate = None
        if needs_validation(method, config):
            assert split.validation is not None  # checked with the config
            self._validate = Validation(config, split.validation, info.num_classes, jax.random.fold_in(key, 3), mesh)

    def __call__(self, state: TrainState, epoch: int) -> TrainState:
        feedback = bool(self._every) and epoch % self._every == 0
        if not (feedback or self._averages):
            return state
        result = None
        if self._validate and (feedback or self._threshold):
            latest = {"params": state.params, "batch_stats": state.batch_stats}
            result = self._validate(distributed.replicate(latest, distributed.replicated(self._mesh)), epoch)
            result = sharding.to_local(result, self._mesh, self._parallel)
        return jax.block_until_ready(self._update(state, result, feedback))


def average_epoch(average: PyTree, latest: PyTree, accepted: jax.Array | bool, decay: float) -> PyTree:
    """Returns the average a after an epoch with the weights p:  a <- a + (1 - decay) (p - a)  if it is accepted.

    Until the first accepted epoch, and after it, a = p. `average["num_epochs"]` counts the accepted epochs.
    """
    started = average["num_epochs"] > 0

    def update(a: jax.Array, p: jax.Array) -> jax.Array:
        return jnp.where(started, jnp.where(accepted, a + (1 - decay) * (p - a), a), p)

    means = jax.tree.map(update, {name: average[name] for name in latest}, latest)
    return {**means, "num_epochs": average["num_epochs"] + jnp.asarray(accepted, jnp.int32)}


class Validation:
    """`validation(variables, epoch)` attacks the validation split by PGD-20 and returns a `ValidationResult`.

    The network is that of training: without averaged weights and without the adjustment of the evaluation, but in
    `config.eval.dtype`. Radius and step size are those of training.

    Args:
        config: the config of the stage.
        split: the validation split.
        num_classes: number of classes.
        key: an image's start is a function of `key`, the epoch and the position of the image.
        mesh: all devices.
    """

    def __init__(self, config: ConfigDict, split: data.Split, num_classes: int, key: jax.Array, mesh: Mesh):
        model = models.create({**config.model, "dtype": config.eval.dtype}, num_classes)
        self._key = key
        self._images = images = ImageBatches(split.image, split.label, mesh=mesh, batch_size=config.eval.batch_size)

        def logits_fn(variables: PyTree, x: jax.Array) -> jax.Array:
            return model.apply(variables, x, train=False)[0]

        def predict(variables: PyTree, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            logits, out = model.apply(variables, x, train=False)
            return attacks.prediction(logits), out["features"]

        def summarize(predictions: list[tuple[jax.Array, jax.Array]], label: jax.Array) -> ValidationResult:
            stacked = jax.tree.map(lambda *batches: jnp.concatenate(batches), *predictions)
            predicted, features = jax.tree.map(lambda a: a[: images.num_images], stacked)  # without the padding
            one_hot = functools.partial(jax.nn.one_hot, num_classes=num_classes, dtype=features.dtype)
            of_class = one_hot(label.reshape(-1)[: images.num_images]).T  # [classes, images]
            count = jnp.maximum(of_class.sum(axis=1, keepdims=True), 1)
            return ValidationResult(
                confusion=jnp.dot(of_class, one_hot(predicted), precision="highest") / count,
                features=jnp.dot(of_class, features, precision="highest") / count,
            )

        options = {"eps": config.attack.eps, "step_size": config.attack.step_size, "num_steps": NUM_STEPS}
        self._attack = attacks.jit(attacks.pgd, logits_fn, **options)
        # Only the last program has collectives: two of them must not run concurrently.
        self._predict = jax.jit(predict, out_shardings=images.over_devices)
        self._summarize = jax.jit(summarize, out_shardings=distributed.replicated(mesh))

    def __call__(self, variables: PyTree, epoch: int) -> ValidationResult:
        batches = self._images.batches(jax.random.fold_in(self._key, epoch))
        predictions = [self._predict(variables, self._attack(keys, variables, x, y)) for x, y, keys in batches]
        return self._summarize(predictions, self._images.label)

"""A split that lives on the devices, and which of its examples make up a batch.

The draws are functions of a key, traceable, and independent of the number of devices: a resumed run repeats them.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lt_adv.data import class_aware
from lt_adv.data.dataset import Split
from lt_adv.runtime import distributed

SAMPLERS = ("uniform", "class_aware")


def put(split: Split, mesh: Mesh) -> dict[str, jax.Array]:
    """{"image" uint8 [n, h * w * c], "label" int32 [n], "index" int32 [n]}, a full copy on every device of `mesh`.

    An image is one row, reshaped once it is in a batch: TPUs gather from rows as they lie, while a set [n, h, w, c]
    would be copied into another layout in every step. Of several processes each fills its own devices from its own copy
    of the split.
    """
    if len(split) and int(split.index.max()) > np.iinfo(np.int32).max:
        raise ValueError("Original indices above 2^31 - 1 do not fit the int32 they have on the devices.")
    image = np.asarray(split.image).reshape(len(split), -1)
    arrays = {"image": image, "label": np.asarray(split.label), "index": split.index.astype(np.int32)}
    return distributed.device_put(arrays, distributed.replicated(mesh))


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Full batches in an epoch (the last, incomplete one is dropped); ValueError if there is none."""
    if not 1 <= batch_size <= num_examples:
        raise ValueError(f"batch_size {batch_size} must be from 1 to the number of training images, {num_examples}.")
    return num_examples // batch_size


def batch_indices(key: jax.Array, step_in_epoch: jax.Array | int, *, num_examples: int, batch_size: int) -> jax.Array:
    """Examples of one batch, int32 [batch_size]: slice `step_in_epoch` of a permutation drawn from the epoch's key.

    With the same key, steps 0 .. num_examples // batch_size - 1 never repeat an example.
    """
    steps_per_epoch(num_examples, batch_size)
    permutation = jax.random.permutation(key, num_examples)
    return jax.lax.dynamic_slice(permutation, (step_in_epoch * batch_size,), (batch_size,))


def class_table(label: np.ndarray, num_classes: int) -> dict[str, np.ndarray]:
    """Where each class's examples are: class c owns order[starts[c] : starts[c] + counts[c]]; all int32.

    ValueError for a class without examples, which could not be drawn.
    """
    counts = np.bincount(label, minlength=num_classes)
    if counts.min() == 0:
        raise ValueError(f"Class {int(counts.argmin())} has no training image: class-aware sampling cannot draw it.")
    order = np.argsort(label, kind="stable")
    starts = np.cumsum(counts) - counts
    return {k: v.astype(np.int32) for k, v in {"order": order, "starts": starts, "counts": counts}.items()}


def batch_rows(
    key: jax.Array,
    epoch: jax.Array | int,
    step_in_epoch: jax.Array | int,
    *,
    num_examples: int,
    batch_size: int,
    classes: Mapping[str, jax.Array] | None = None,
    cycles: bool = False,
) -> jax.Array:
    """Examples of the batch of a step, int32 [batch_size], in a run with this key: those of an epoch are a permutation,
    or class-aware where a `class_table` is given: each draw for itself, `class_aware_indices`, or with `cycles` through
    the classes and through the examples of each in turn, `class_aware.cycled_indices`."""
    run_key = jax.random.fold_in(key, 0)
    if classes is not None and cycles:
        return class_aware.cycled_indices(run_key, epoch, step_in_epoch, **classes, batch_size=batch_size)
    epoch_key = jax.random.fold_in(run_key, epoch)
    if classes is None:
        return batch_indices(epoch_key, step_in_epoch, num_examples=num_examples, batch_size=batch_size)
    return class_aware_indices(jax.random.fold_in(epoch_key, step_in_epoch), **classes, batch_size=batch_size)


def epoch_indices(
    key: jax.Array,
    epoch: jax.Array | int,
    classes: Mapping[str, jax.Array] | None = None,
    *,
    steps_per_epoch: int,
    num_examples: int,
    batch_size: int,
    cycles: bool = False,
) -> jax.Array:
    """Examples of all batches of an epoch, int32 [steps_per_epoch, batch_size]: `batch_rows` for each of its steps.

    One program for an epoch, so that no step has to sort the whole set to find its own batch.
    """
    one = functools.partial(
        batch_rows, num_examples=num_examples, batch_size=batch_size, classes=classes, cycles=cycles
    )
    return jax.vmap(one, (None, None, 0))(key, epoch, jnp.arange(steps_per_epoch))


def class_aware_indices(
    key: jax.Array, order: jax.Array, starts: jax.Array, counts: jax.Array, *, batch_size: int
) -> jax.Array:
    """Examples of one batch, int32 [batch_size]: each a uniform class, then a uniform example of it (`class_table`).

    Chance decides how often a class is in a batch. Differs from the released code, which is `cycled_indices`.
    """
    class_key, example_key = jax.random.split(key)
    classes = jax.random.randint(class_key, (batch_size,), 0, len(counts))
    within = jax.random.randint(example_key, (batch_size,), 0, counts[classes])
    return order[starts[classes] + within].astype(jnp.int32)

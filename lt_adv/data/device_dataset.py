"""Data sets in device memory, and the sampling of batches.

Sampling is a traceable function of a key and does not depend on the number of devices, so a resumed run repeats it.
"""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lt_adv.data import class_aware
from lt_adv.data.dataset import Split
from lt_adv.runtime import distributed

SAMPLERS = ("uniform", "class_aware")


class ExtraDraws(NamedTuple):
    """Extra images that follow the training set, and how many of a batch are drawn from them."""

    split: Split
    per_batch: int


def with_extra(split: Split, extra: ExtraDraws | None) -> tuple[Split, ...]:
    """Returns (training set, extra images), in the order of the rows of batches.

    Raises:
      ValueError: original indices do not fit int32, their type on the devices.
    """
    splits = (split, extra.split) if extra else (split,)
    if any(len(part) and np.abs(part.index).max() > np.iinfo(np.int32).max for part in splits):
        raise ValueError("Original indices above 2^31 - 1 do not fit int32, their type on the devices.")
    return splits


def put(split: Split, mesh: Mesh, extra: ExtraDraws | None = None) -> dict[str, jax.Array]:
    """Puts a full copy of a split, followed by extra images, on every device of `mesh`.

    An image is one row and is reshaped in the batch: TPUs gather rows in place, but would copy a set [n, h, w, c] into
    another layout in every step. In a multi-process run each process fills its devices from its copy of the split.

    Returns:
      {"image": uint8 [n, h * w * c], "label": int32 [n], "index": int32 [n]}.
    """
    columns = [
        (np.asarray(part.image).reshape(len(part), -1), np.asarray(part.label), part.index.astype(np.int32))
        for part in with_extra(split, extra)
    ]
    # A single split is not copied: it may be memory-mapped.
    image, label, index = columns[0] if extra is None else map(np.concatenate, zip(*columns, strict=True))
    arrays = {"image": image, "label": label, "index": index}
    return distributed.device_put(arrays, distributed.replicated(mesh))


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Returns the number of full batches in an epoch (the last, incomplete one is dropped).

    Raises:
      ValueError: if there is none.
    """
    if not 1 <= batch_size <= num_examples:
        raise ValueError(
            f"batch_size must be from 1 to the number of training images, {num_examples}, not {batch_size}."
        )
    return num_examples // batch_size


def batch_indices(key: jax.Array, step_in_epoch: jax.Array | int, *, num_examples: int, batch_size: int) -> jax.Array:
    """Returns the examples of one batch: slice `step_in_epoch` of a permutation drawn from the epoch's key.

    With one key, the steps 0 .. num_examples // batch_size - 1 never repeat an example.

    Returns:
      int32 [batch_size].
    """
    steps_per_epoch(num_examples, batch_size)
    permutation = jax.random.permutation(key, num_examples)
    return jax.lax.dynamic_slice(permutation, (step_in_epoch * batch_size,), (batch_size,))


def class_table(label: np.ndarray, num_classes: int) -> dict[str, np.ndarray]:
    """Returns the examples of each class: those of class c are order[starts[c] : starts[c] + counts[c]].

    Returns:
      {"order": int32 [examples], "starts": int32 [classes], "counts": int32 [classes]}.

    Raises:
      ValueError: for a class without examples.
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
    extra: ExtraDraws | None = None,
) -> jax.Array:
    """Returns the examples of the batch of a step.

    Args:
      key: the key of the run.
      epoch: from 0.
      step_in_epoch: from 0.
      num_examples: size of the training set, without extra images.
      batch_size: examples per batch.
      classes: None to draw a permutation in each epoch, or a `class_table` for class-aware sampling.
      cycles: class-aware sampling in cycles (`class_aware.cycled_indices`) instead of independent draws
        (`class_aware_indices`).
      extra: extra images, examples `num_examples` and above. They are spread evenly over the batch, so that every
        device has its share of them.

    Returns:
      int32 [batch_size].
    """
    if extra:
        size = batch_size - extra.per_batch
        real = batch_rows(
            key, epoch, step_in_epoch, num_examples=num_examples, batch_size=size, classes=classes, cycles=cycles
        )
        drawn = num_examples + extra_indices(key, epoch, step_in_epoch, len(extra.split), extra.per_batch)
        extra_before = np.arange(batch_size + 1) * extra.per_batch // batch_size  # each position of the batch
        order = np.argsort(np.diff(extra_before), kind="stable")  # positions of real, then of extra examples
        rows = jnp.concatenate([real, drawn]).astype(jnp.int32)
        return jnp.zeros_like(rows).at[order].set(rows)
    run_key = jax.random.fold_in(key, 0)
    if classes is not None and cycles:
        return class_aware.cycled_indices(run_key, epoch, step_in_epoch, **classes, batch_size=batch_size)
    epoch_key = jax.random.fold_in(run_key, epoch)
    if classes is None:
        return batch_indices(epoch_key, step_in_epoch, num_examples=num_examples, batch_size=batch_size)
    return class_aware_indices(jax.random.fold_in(epoch_key, step_in_epoch), **classes, batch_size=batch_size)


def extra_indices(
    key: jax.Array, epoch: jax.Array | int, step_in_epoch: jax.Array | int, num_examples: int, per_batch: int
) -> jax.Array:
    """Returns the extra images of a batch, int32 [per_batch], from 0 to `num_examples` - 1.

    Each epoch goes through them in its own random order, and through all before it repeats one. An entry of the order
    is computed without the others: the cost does not depend on the number of extra images.
    """
    seed = jax.random.bits(jax.random.fold_in(jax.random.fold_in(key, 3), epoch), (), jnp.uint32)
    position = step_in_epoch * per_batch + jnp.arange(per_batch, dtype=jnp.int32)
    seeds = class_aware.hash_uint32(seed, position // num_examples)
    return class_aware.permutation_entry(position % num_examples, num_examples, seeds)


def epoch_indices(
    key: jax.Array,
    epoch: jax.Array | int,
    classes: Mapping[str, jax.Array] | None = None,
    *,
    steps_per_epoch: int,
    num_examples: int,
    batch_size: int,
    cycles: bool = False,
    extra: ExtraDraws | None = None,
) -> jax.Array:
    """Returns `batch_rows` of all steps of an epoch, int32 [steps_per_epoch, batch_size].

    One program per epoch, so that no step has to permute the whole set for its batch.
    """
    rows_of_step = functools.partial(
        batch_rows, num_examples=num_examples, batch_size=batch_size, classes=classes, cycles=cycles, extra=extra
    )
    return jax.vmap(rows_of_step, (None, None, 0))(key, epoch, jnp.arange(steps_per_epoch))


def class_aware_indices(
    key: jax.Array, order: jax.Array, starts: jax.Array, counts: jax.Array, *, batch_size: int
) -> jax.Array:
    """Returns the examples of one batch, int32 [batch_size]: for each a uniform class, then a uniform example of it.

    `order`, `starts` and `counts` are those of `class_table`. The number of examples of a class in a batch is random.
    Differs from the released code, which samples in cycles (`class_aware.cycled_indices`).
    """
    class_key, example_key = jax.random.split(key)
    classes = jax.random.randint(class_key, (batch_size,), 0, len(counts))
    within = jax.random.randint(example_key, (batch_size,), 0, counts[classes])
    return order[starts[classes] + within].astype(jnp.int32)

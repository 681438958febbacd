"""What the step is given of the training set: the set itself, on every device, or batches that are read ahead of it."""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lt_adv.data import Split, device_dataset, prefetch
from lt_adv.methods import DataInfo
from lt_adv.runtime import distributed
from lt_adv.training import sharding
from lt_adv.training.net import AXIS

BLOCK = 64  # steps for which the step is told at once what to take from a resident set


@dataclasses.dataclass(frozen=True)
class Feed:
    """`batches(first, total)` gives the step's `data`, one for each step from `first` on, while it is entered;
    `example` is one of them, or its shapes."""

    example: Any
    batches: Callable[[int, int], AbstractContextManager[Iterator[Any]]]


def resident(
    split: Split,
    classes: Mapping[str, np.ndarray] | None,
    key: jax.Array,
    info: DataInfo,
    batch_size: int,
    home: Mesh,
    cycles: bool = False,
) -> Feed:
    """The images in whole copies, and what the batches of a block of steps take of them: "row", "label" and "index",
    int32 [BLOCK, batch_size]. An epoch is drawn when it begins, with the state's `key`; of all this a step sees one
    block, so that it costs the same whatever the size of the set. `classes` is the `class_table` of the set, for
    class-aware draws, which with `cycles` are those of `class_aware.cycled_indices`."""
    on_device = device_dataset.put(split, home)
    image = on_device.pop("image")
    key, classes = sharding.replicate((jnp.copy(key), classes), home)  # the state's key is donated with it
    options = {"num_examples": len(split), "batch_size": batch_size, "cycles": cycles}
    options["steps_per_epoch"] = info.steps_per_epoch
    jit = functools.partial(jax.jit, out_shardings=distributed.replicated(home))

    @jit
    def draw(key: jax.Array, epoch: int, classes: Any, columns: dict[str, jax.Array]) -> dict[str, jax.Array]:
        row = device_dataset.epoch_indices(key, epoch, classes, **options)
        tables = {"row": row, **{name: column[row] for name, column in columns.items()}}
        missing = ((0, -len(row) % BLOCK), (0, 0))  # steps after the last, which nobody takes
        return {name: jnp.pad(a, missing).reshape(-1, BLOCK, batch_size) for name, a in tables.items()}

    @jit
    def take(tables: dict[str, jax.Array], block: int) -> dict[str, jax.Array]:
        return {name: a[block] for name, a in tables.items()}

    def each(first: int, total: int) -> Iterator[Any]:
        for epoch, steps in itertools.groupby(range(first, total), lambda step: step // info.steps_per_epoch):
            tables = draw(key, epoch, classes, on_device)
            for block, part in itertools.groupby(steps, lambda step: step % info.steps_per_epoch // BLOCK):
                yield from itertools.repeat({"image": image, **take(tables, block)}, len(list(part)))

    return Feed(next(each(0, 1)), lambda first, total: contextlib.nullcontext(each(first, total)))


def streamed(
    split: Split,
    classes: Mapping[str, np.ndarray] | None,
    key: jax.Array,
    info: DataInfo,
    batch_size: int,
    mesh: Mesh,
    parallel: str,
    cycles: bool = False,
) -> Feed:
    """The batches that the step would draw from a resident set with the state's `key`, so that the bits are the same;
    each process reads what its own devices need. Nothing has to be saved: a step's batch is known by its number."""
    key = jnp.copy(key)  # as above
    share = batch_size // mesh.size
    places = [i for i, device in enumerate(mesh.devices.flat) if device.process_index == jax.process_index()]
    own = np.concatenate([np.arange(share) + i * share for i in places])
    batch_sharding = NamedSharding(sharding.state_mesh(mesh, parallel), PartitionSpec(AXIS))
    # pmap wants an axis of devices, and has a mesh for each process.
    shape = (len(places), share) if parallel == "pmap" else (batch_size,)

    def put(column: np.ndarray) -> jax.Array:
        if parallel == "pmap":
            return jax.device_put(column.reshape(*shape, *column.shape[1:]), batch_sharding)
        blocks = jax.device_put(np.split(column, len(places)), [mesh.devices.flat[i] for i in places])
        return jax.make_array_from_single_device_arrays((*shape, *column.shape[1:]), batch_sharding, blocks)

    @contextlib.contextmanager
    def batches(first: int, total: int) -> Iterator[Iterator[Any]]:
        options = {"steps_per_epoch": info.steps_per_epoch, "classes": classes, "cycles": cycles}
        with prefetch.batches(split, key, first, total, own, batch_size=batch_size, **options) as found:
            yield ({name: put(column) for name, column in batch.items()} for batch in found)

    example = {name: jax.ShapeDtypeStruct(shape, np.int32) for name in ("label", "index")}
    example["image"] = jax.ShapeDtypeStruct((*shape, *split.image.shape[1:]), np.uint8)
    return Feed(example, batches)

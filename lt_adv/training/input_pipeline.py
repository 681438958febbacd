"""The `data` of the training step: the whole training set on every device, or batches that are prefetched."""

import contextlib
import dataclasses
import functools
import itertools
import math
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
from lt_adv.runtime.distributed import PyTree
from lt_adv.training import sharding
from lt_adv.training.net import AXIS

BLOCK = 64  # steps whose batch indices are on the device at once


@dataclasses.dataclass(frozen=True)
class InputPipeline:
    """Input of the training step.

    `batches(first, total)` is a context manager around an iterator over the `data` of the steps `first` to `total - 1`.
    `example` is the `data` of one step, or its shapes.
    """

    example: PyTree
    batches: Callable[[int, int], AbstractContextManager[Iterator[PyTree]]]


def resident(
    split: Split,
    classes: Mapping[str, np.ndarray] | None,
    key: jax.Array,
    info: DataInfo,
    batch_size: int,
    mesh: Mesh,
    cycles: bool = False,
    extra: device_dataset.ExtraDraws | None = None,
) -> InputPipeline:
    """Returns the input of a training set that every device holds.

    The `data` of a step are all images and, for a block of steps, the rows of the images that its batches take, their
    labels and their original indices: "row", "label" and "index", int32 [BLOCK, batch_size]. The order of an epoch is
    drawn when it begins. A step reads one block only, so that its cost does not depend on the size of the set.

    Args:
        split: the training set.
        classes: the `device_dataset.class_table` of the set for class-aware sampling, or None.
        key: the key of the train state.
        info: static facts of the training set.
        batch_size: over all devices.
        mesh: the mesh of the data; see `sharding.state_mesh`.
        cycles: whether class-aware sampling is that of `class_aware.cycled_indices`.
        extra: extra images, which are part of the set, and their number in a batch.
    """
    columns = device_dataset.put(split, mesh, extra)
    image = columns.pop("image")
    key, classes = sharding.replicate((jnp.copy(key), classes), mesh)  # a copy: the state's key is donated
    jit = functools.partial(jax.jit, out_shardings=distributed.replicated(mesh))

    @jit
    def draw(key: jax.Array, epoch: int, classes: Any, columns: dict[str, jax.Array]) -> dict[str, jax.Array]:
        row = device_dataset.epoch_indices(
            key,
            epoch,
            classes,
            num_examples=len(split),
            batch_size=batch_size,
            steps_per_epoch=info.steps_per_epoch,
            cycles=cycles,
            extra=extra,
        )
        tables = {"row": row, **{name: column[row] for name, column in columns.items()}}
        padding = ((0, -len(row) % BLOCK), (0, 0))  # steps after the last one
        return {name: jnp.pad(a, padding).reshape(-1, BLOCK, batch_size) for name, a in tables.items()}

    @jit
    def take(tables: dict[str, jax.Array], block: int) -> dict[str, jax.Array]:
        return {name: a[block] for name, a in tables.items()}

    def steps_data(first: int, total: int) -> Iterator[PyTree]:
        for epoch, steps in itertools.groupby(range(first, total), lambda step: step // info.steps_per_epoch):
            tables = draw(key, epoch, classes, columns)
            for block, block_steps in itertools.groupby(steps, lambda step: step % info.steps_per_epoch // BLOCK):
                yield from itertools.repeat({"image": image, **take(tables, block)}, len(list(block_steps)))

    return InputPipeline(next(steps_data(0, 1)), lambda first, total: contextlib.nullcontext(steps_data(first, total)))


def streamed(
    split: Split,
    classes: Mapping[str, np.ndarray] | None,
    key: jax.Array,
    info: DataInfo,
    batch_size: int,
    mesh: Mesh,
    parallel: str,
    cycles: bool = False,
    extra: device_dataset.ExtraDraws | None = None,
) -> InputPipeline:
    """Returns the input of a training set that is read from the host, batch by batch.

    The batches equal those of `resident` bit for bit. Each process reads the examples of its local devices. A batch is
    a function of the key and the number of its step, so a checkpoint holds nothing of the input. Arguments as of
    `resident`, but `mesh` holds all devices; `parallel` is "pmap" or "shard_map".
    """
    key = jnp.copy(key)  # the state's key is donated
    per_device = batch_size // mesh.size
    local_devices = [i for i, device in enumerate(mesh.devices.flat) if device.process_index == jax.process_index()]
    local_positions = np.concatenate([np.arange(per_device) + i * per_device for i in local_devices])
    batch_sharding = NamedSharding(sharding.state_mesh(mesh, parallel), PartitionSpec(AXIS))
    # pmap requires a device axis, and has a mesh per process.
    shape = (len(local_devices), per_device) if parallel == "pmap" else (batch_size,)

    def put(column: np.ndarray) -> jax.Array:
        if parallel == "pmap":
            return jax.device_put(column.reshape(*shape, *column.shape[1:]), batch_sharding)
        blocks = jax.device_put(np.split(column, len(local_devices)), [mesh.devices.flat[i] for i in local_devices])
        return jax.make_array_from_single_device_arrays((*shape, *column.shape[1:]), batch_sharding, blocks)

    @contextlib.contextmanager
    def batches(first: int, total: int) -> Iterator[Iterator[PyTree]]:
        with prefetch.batches(
            split,
            key,
            first,
            total,
            local_positions,
            batch_size=batch_size,
            steps_per_epoch=info.steps_per_epoch,
            classes=classes,
            cycles=cycles,
            extra=extra,
        ) as host_batches:
            yield ({name: put(column) for name, column in batch.items()} for batch in host_batches)

    return InputPipeline(streamed_example(split, batch_size, mesh, parallel), batches)


def streamed_example(split: Split, batch_size: int, mesh: Mesh, parallel: str) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the `example` of `streamed`."""
    # pmap requires a device axis, and has a mesh per process.
    num_local = distributed.local(mesh).size
    shape = (num_local, batch_size // mesh.size) if parallel == "pmap" else (batch_size,)
    batch_sharding = NamedSharding(sharding.state_mesh(mesh, parallel), PartitionSpec(AXIS))
    shapes = {"label": shape, "index": shape, "image": (*shape, *split.image.shape[1:])}
    dtypes = {"label": np.int32, "index": np.int32, "image": np.uint8}
    return {name: jax.ShapeDtypeStruct(shapes[name], dtypes[name], sharding=batch_sharding) for name in shapes}


def resident_example(
    split: Split, batch_size: int, extra: device_dataset.ExtraDraws | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of the `example` of `resident`."""
    rows = {name: jax.ShapeDtypeStruct((BLOCK, batch_size), np.int32) for name in ("row", "label", "index")}
    shape = (sum(map(len, device_dataset.with_extra(split, extra))), math.prod(split.image.shape[1:]))
    return {**rows, "image": jax.ShapeDtypeStruct(shape, np.uint8)}

"""What the step is given of the training set: the set itself, on every device, or batches that are read ahead of it."""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lt_adv.data import Split, stream
from lt_adv.data import resident as residents
from lt_adv.methods import Info
from lt_adv.training import mesh as meshes
from lt_adv.training.net import AXIS


@dataclasses.dataclass(frozen=True)
class Feed:
    """`batches(first, total)` gives the step's `data`, one for each step from `first` on, while it is entered;
    `example` is one of them, or its shapes."""

    example: Any
    batches: Callable[[int, int], AbstractContextManager[Iterator[Any]]]


def resident(split: Split, classes: Mapping[str, np.ndarray] | None, home: Mesh) -> Feed:
    """The set in whole copies, from which each step draws; `classes` is its `class_table`, for class-aware draws."""
    on_device: dict[str, Any] = residents.put(split, home)
    if classes is not None:
        on_device["classes"] = meshes.replicate(classes, home)
    return Feed(on_device, lambda first, total: contextlib.nullcontext(itertools.repeat(on_device)))


def streamed(
    split: Split,
    classes: Mapping[str, np.ndarray] | None,
    key: jax.Array,
    info: Info,
    batch_size: int,
    mesh: Mesh,
    parallel: str,
    cycles: bool = False,
) -> Feed:
    """The batches that the step would draw from a resident set with the state's `key`, so that the bits are the same;
    each process reads what its own devices need. Nothing has to be saved: a step's batch is known by its number."""
    share = batch_size // mesh.size
    places = [i for i, device in enumerate(mesh.devices.flat) if device.process_index == jax.process_index()]
    own = np.concatenate([np.arange(share) + i * share for i in places])
    sharding = NamedSharding(meshes.home(mesh, parallel), PartitionSpec(AXIS))
    # pmap wants an axis of devices, and has a mesh for each process.
    shape = (len(places), share) if parallel == "pmap" else (batch_size,)

    def put(column: np.ndarray) -> jax.Array:
        if parallel == "pmap":
            return jax.device_put(column.reshape(*shape, *column.shape[1:]), sharding)
        blocks = jax.device_put(np.split(column, len(places)), [mesh.devices.flat[i] for i in places])
        return jax.make_array_from_single_device_arrays((*shape, *column.shape[1:]), sharding, blocks)

    @contextlib.contextmanager
    def batches(first: int, total: int) -> Iterator[Iterator[Any]]:
        options = {"steps_per_epoch": info.steps_per_epoch, "classes": classes, "cycles": cycles}
        with stream.batches(split, key, first, total, own, batch_size=batch_size, **options) as found:
            yield ({name: put(column) for name, column in batch.items()} for batch in found)

    example = {name: jax.ShapeDtypeStruct(shape, np.int32) for name in ("label", "index")}
    example["image"] = jax.ShapeDtypeStruct((*shape, *split.image.shape[1:]), np.uint8)
    return Feed(example, batches)

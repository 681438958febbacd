"""Devices, and the two ways in which one per-device function is run on them."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lt_adv import lookup
from lt_adv.training.net import AXIS

PARALLEL = ("pmap", "shard_map")


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """All devices along the one axis "data". (`jax.make_mesh` would make the axis Explicit.)"""
    return Mesh(np.array(devices if devices is not None else jax.devices()), (AXIS,))


def replicate(tree: Any, mesh: Mesh) -> Any:
    """A copy of `tree` on every device. State must come this way: host arrays in the first call cost a second compilation."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def parallelise(replica: Callable[..., Any], mesh: Mesh, parallel: str) -> Callable[..., Any]:
    """`replica(state, *constants) -> (state, metrics)`, written over the named axis "data", as one donated program.

    State and constants are replicated without a leading device axis; each device takes its share by `lax.axis_index`.
    """
    if parallel == "pmap":
        # pmap's arguments are positional and its axes are one per argument; constants are the data and the teacher.
        return jax.pmap(
            replica, axis_name=AXIS, in_axes=(None, None, None), out_axes=None, donate_argnums=0, devices=list(mesh.devices.flat)
        )
    if parallel == "shard_map":
        replicated = PartitionSpec()
        mapped = jax.shard_map(replica, mesh=mesh, in_specs=replicated, out_specs=replicated, check_vma=True)
        return jax.jit(mapped, donate_argnums=0)
    raise lookup.unknown("config.parallel", parallel, PARALLEL)

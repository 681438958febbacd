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
    if jax.process_count() > 1:
        raise ValueError("Runs of several processes (jax.distributed) are not supported yet: start a single one.")
    return Mesh(np.array(devices if devices is not None else jax.devices()), (AXIS,))


def replicate(tree: Any, mesh: Mesh) -> Any:
    """A copy of `tree` on every device. Host arrays in the first call of a step would cost a second compilation."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def parallelise(replica: Callable[..., Any], mesh: Mesh, parallel: str) -> Callable[..., Any]:
    """`replica(state, data, teacher) -> (state, metrics)`, written over the named axis "data", as one donated program.

    State and constants are replicated without a leading device axis; each device takes its share by `lax.axis_index`.
    """
    if parallel == "pmap":
        # pmap insists on one argument with a device axis: the number of the device, which nobody reads.
        number = jax.device_put(np.arange(mesh.size), NamedSharding(mesh, PartitionSpec(AXIS)))
        mapped = jax.pmap(
            lambda state, _, data, teacher: replica(state, data, teacher),
            axis_name=AXIS,
            in_axes=(None, 0, None, None),
            out_axes=None,
            donate_argnums=0,
            devices=list(mesh.devices.flat),
        )
        return lambda state, data, teacher: mapped(state, number, data, teacher)
    if parallel == "shard_map":
        replicated = PartitionSpec()
        mapped = jax.shard_map(replica, mesh=mesh, in_specs=replicated, out_specs=replicated, check_vma=True)
        return jax.jit(mapped, donate_argnums=0)
    raise lookup.unknown("config.parallel", parallel, PARALLEL)

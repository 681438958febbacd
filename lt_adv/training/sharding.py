"""Devices, where the state lies on them, and the two ways in which one per-device function is run on them."""

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lt_adv.runtime import distributed, registry
from lt_adv.training.net import AXIS

PARALLEL = ("pmap", "shard_map")
SHARDED = ("opt_state", "average", "params")  # what of the state may be cut up among the devices


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """All devices of all processes along the one axis "data". (`jax.make_mesh` would make the axis Explicit.)"""
    return Mesh(np.array(devices if devices is not None else jax.devices()), (AXIS,))


def state_mesh(mesh: Mesh, parallel: str) -> Mesh:
    """Where state and data live: pmap wants them on each process's own devices, shard_map on those of all."""
    return distributed.local(mesh) if parallel == "pmap" else mesh


def replicate(tree: Any, mesh: Mesh) -> Any:
    """A copy of `tree` on every device. Host arrays in the first call of a step would cost a second compilation."""
    return distributed.device_put(tree, distributed.replicated(mesh))


def shardings(state: Any, mesh: Mesh, sharded: Collection[str]) -> Any:
    """A sharding for every array of a state: in the parts `sharded`, cut along its longest axis that the devices divide
    (ZeRO); a whole copy on every device where no axis is, and in all other parts. Shapes do not depend on the devices.
    """

    def one(a: Any, cut: bool) -> NamedSharding:
        fitting = [axis for axis, length in enumerate(a.shape) if length % mesh.size == 0 and length] if cut else []
        if not fitting or mesh.size == 1:
            return NamedSharding(mesh, PartitionSpec())
        longest = max(fitting, key=lambda axis: a.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*[None] * longest, AXIS))

    parts = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return type(state)(
        **{name: jax.tree.map(lambda a, cut=name in sharded: one(a, cut), part) for name, part in parts.items()}
    )


def shard_state(state: Any, mesh: Mesh, sharded: Collection[str]) -> Any:
    """A replicated state, as `shardings` says."""
    if not sharded:
        return state
    return jax.jit(lambda state: state, out_shardings=shardings(state, mesh, sharded))(state)


def to_global(state: Any, mesh: Mesh, parallel: str) -> Any:
    """A state at home as arrays of all processes, as orbax wants them; no byte is copied."""
    if state_mesh(mesh, parallel) is mesh:
        return state
    return distributed.replicate(state, distributed.replicated(mesh))


def to_local(state: Any, mesh: Mesh, parallel: str) -> Any:
    """The other way round."""
    own = state_mesh(mesh, parallel)
    return state if own is mesh else distributed.replicate(state, distributed.replicated(own))


def parallelise(
    replica: Callable[..., Any],
    finish: Callable[..., Any],
    mesh: Mesh,
    parallel: str,
    sharded: Collection[str] = (),
    streamed: bool = False,
) -> Callable[..., Any]:
    """`replica(state, data, teacher) -> (found, metrics)` and `finish(state, found) -> state` as one donated program
    (state, data, teacher) -> (state, metrics).

    `replica` is written over the named axis "data": state and constants have no leading device axis, and each device
    takes its share by `lax.axis_index`; `streamed` data are a batch, of which each device is given its share. `finish`,
    the update, knows no axis: of a state that is sharded each device computes its part.
    """
    if parallel == "pmap":

        def whole(state: Any, _: Any, data: Any, teacher: Any) -> Any:
            state = with_key(state)
            found, metrics = replica(state, data, teacher)
            return without_key(finish(state, found)), metrics

        # Of several processes, pmap would fetch a typed key in every step, and so wait for the step before.
        several = jax.process_count() > 1

        def with_key(state: Any) -> Any:
            return state.replace(key=jax.random.wrap_key_data(state.key)) if several else state

        def without_key(state: Any) -> Any:
            return state.replace(key=jax.random.key_data(state.key)) if several else state

        # pmap insists on one argument with a device axis: the number of the device, which nobody reads.
        own = distributed.local(mesh)
        number = jax.device_put(np.arange(own.size), NamedSharding(own, PartitionSpec(AXIS)))
        mapped = jax.pmap(
            whole,
            axis_name=AXIS,
            in_axes=(None, 0, 0 if streamed else None, None),
            out_axes=None,
            donate_argnums=0,
            devices=list(mesh.devices.flat),
        )

        def step(state: Any, data: Any, teacher: Any) -> Any:
            state, metrics = mapped(without_key(state), number, data, teacher)
            return with_key(state), metrics

        return step
    if parallel == "shard_map":
        everywhere = PartitionSpec()
        taken = (everywhere, PartitionSpec(AXIS) if streamed else everywhere, everywhere)
        mapped = jax.shard_map(replica, mesh=mesh, in_specs=taken, out_specs=everywhere, check_vma=True)

        def sharded_step(state: Any, data: Any, teacher: Any) -> Any:
            # What only the update needs stays where it is.
            found, metrics = mapped(state.replace(opt_state=(), average={}), data, teacher)
            state = finish(state, found)
            return jax.lax.with_sharding_constraint(state, shardings(state, mesh, sharded)), metrics

        return jax.jit(sharded_step, donate_argnums=0)
    raise registry.unknown("config.parallel", parallel, PARALLEL)

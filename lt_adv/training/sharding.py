"""The device mesh, the sharding of the train state, and the two ways (pmap, shard_map) to run a per-device function."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lt_adv.runtime import distributed, registry
from lt_adv.runtime.distributed import PyTree
from lt_adv.training.net import AXIS

PARALLEL = ("pmap", "shard_map")
SHARDED = ("opt_state", "average", "params")  # fields of the state that may be sharded over the devices


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns a mesh of `devices` (by default all devices of all processes) along the single axis "data"."""
    # `jax.make_mesh` would make the axis Explicit.
    return Mesh(np.array(devices if devices is not None else jax.devices()), (AXIS,))


def state_mesh(mesh: Mesh, parallel: str) -> Mesh:
    """Returns the mesh of state and data: the local devices of each process for pmap, all devices for shard_map."""
    return distributed.local(mesh) if parallel == "pmap" else mesh


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """Copies `tree` to every device. (A step called first with host arrays would be compiled twice.)"""
    return distributed.device_put(tree, distributed.replicated(mesh))


def shardings(state: PyTree, mesh: Mesh, sharded: Collection[str]) -> PyTree:
    """Returns a sharding for every array of a state.

    In the fields `sharded` an array is sharded along its longest axis whose length the number of devices divides
    (ZeRO). Arrays without such an axis, and all other fields, are replicated. Shapes do not depend on the devices.
    """

    def array_sharding(a: Any, is_sharded: bool) -> NamedSharding:
        axes = [axis for axis, length in enumerate(a.shape) if length % mesh.size == 0 and length] if is_sharded else []
        if not axes or mesh.size == 1:
            return NamedSharding(mesh, PartitionSpec())
        longest = max(axes, key=lambda axis: a.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*[None] * longest, AXIS))

    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return type(state)(
        **{
            name: jax.tree.map(functools.partial(array_sharding, is_sharded=name in sharded), value)
            for name, value in fields.items()
        }
    )


def shard_state(state: PyTree, mesh: Mesh, sharded: Collection[str]) -> PyTree:
    """Returns a replicated state, sharded according to `shardings`."""
    if not sharded:
        return state
    return jax.jit(lambda state: state, out_shardings=shardings(state, mesh, sharded))(state)


def to_global(state: PyTree, mesh: Mesh, parallel: str) -> PyTree:
    """Returns a state on `state_mesh` as arrays over all devices, as orbax needs them. No byte is copied."""
    if state_mesh(mesh, parallel) is mesh:
        return state
    return distributed.replicate(state, distributed.replicated(mesh))


def to_local(state: PyTree, mesh: Mesh, parallel: str) -> PyTree:
    """Inverse of `to_global`."""
    local = state_mesh(mesh, parallel)
    return state if local is mesh else distributed.replicate(state, distributed.replicated(local))


def parallelize(
    per_device: Callable[..., Any],
    update: Callable[..., Any],
    mesh: Mesh,
    parallel: str,
    sharded: Collection[str] = (),
    streamed: bool = False,
) -> Callable[..., Any]:
    """Compiles a per-device function and an update into one donated program (state, data, teacher) -> (state, metrics).

    Args:
        per_device: `per_device(state, data, teacher) -> output`, written over the named axis "data": state and
            constants have no leading device axis, each device finds its share by `lax.axis_index`, and `output` is
            equal on all devices.
        update: `update(state, output) -> (state, metrics)`. It uses no axis: each device computes its part of a state
            that is sharded.
        mesh: all devices.
        parallel: "pmap" or "shard_map".
        sharded: fields of the state that are sharded; see `shardings`.
        streamed: whether `data` is a batch, split over the devices, rather than a set that every device has.
    """
    if parallel == "pmap":
        return _pmap(per_device, update, mesh, streamed)
    if parallel == "shard_map":
        return _shard_map(per_device, update, mesh, sharded, streamed)
    raise registry.unknown("config.parallel", parallel, PARALLEL)


def _pmap(per_device: Callable[..., Any], update: Callable[..., Any], mesh: Mesh, streamed: bool) -> Callable[..., Any]:
    # With several processes, pmap would fetch a typed key in every step, and so wait for the step before.
    raw_keys = len({device.process_index for device in mesh.devices.flat}) > 1

    def with_key(state: PyTree) -> PyTree:
        return state.replace(key=jax.random.wrap_key_data(state.key)) if raw_keys else state

    def without_key(state: PyTree) -> PyTree:
        return state.replace(key=jax.random.key_data(state.key)) if raw_keys else state

    def update_step(_: Any, state: PyTree, data: PyTree, teacher: PyTree) -> PyTree:
        state = with_key(state)
        state, metrics = update(state, per_device(state, data, teacher))
        return without_key(state), metrics

    # pmap requires an argument with a device axis: the device's number, which is not used.
    local = distributed.local(mesh)
    by_device = NamedSharding(local, PartitionSpec(AXIS))
    device_number = jax.ShapeDtypeStruct((local.size,), np.int32, sharding=by_device)
    if distributed.exists(mesh):
        device_number = jax.device_put(np.arange(local.size, dtype=np.int32), by_device)
    mapped = jax.pmap(
        update_step,
        axis_name=AXIS,
        in_axes=(0, None, 0 if streamed else None, None),
        out_axes=None,
        donate_argnums=1,
        devices=list(mesh.devices.flat),
    )

    if not raw_keys:
        return functools.partial(mapped, device_number)

    def step(state: PyTree, data: PyTree, teacher: PyTree) -> PyTree:
        state, metrics = mapped(device_number, without_key(state), data, teacher)
        return with_key(state), metrics

    def arguments(state: PyTree, data: PyTree, teacher: PyTree) -> tuple[PyTree, ...]:
        """Returns the arguments of `mapped` for those of `step`, all as shapes with shardings."""
        key = jax.eval_shape(jax.random.key_data, state.key)
        key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=state.key.sharding)
        return device_number, state.replace(key=key), data, teacher

    step.mapped, step.arguments = mapped, arguments  # type: ignore[attr-defined]
    return step


def lower(function: Any, arguments: Sequence[PyTree], platform: str) -> tuple[jax.stages.Lowered, core.ClosedJaxpr]:
    """Returns a program lowered for a platform, and its jaxpr.

    Args:
        function: jitted, or the result of `parallelize`.
        arguments: arrays are shapes with shardings, on devices that need not exist.
        platform: "cpu", "cuda" or "tpu".
    """
    mapped: Any = None  # by pmap, which lowers for the platform of its devices
    if isinstance(function, functools.partial):
        mapped, arguments = function.func, (*function.args, *arguments)
    elif hasattr(function, "mapped"):
        mapped, arguments = function.mapped, function.arguments(*arguments)
    if mapped:
        return mapped.lower(*arguments), jax.make_jaxpr(mapped)(*arguments)
    traced = function.trace(*arguments)
    return traced.lower(lowering_platforms=(platform,)), traced.jaxpr


def _shard_map(
    per_device: Callable[..., Any], update: Callable[..., Any], mesh: Mesh, sharded: Collection[str], streamed: bool
) -> Callable[..., Any]:
    replicated = PartitionSpec()
    in_specs = (replicated, PartitionSpec(AXIS) if streamed else replicated, replicated)
    mapped = jax.shard_map(per_device, mesh=mesh, in_specs=in_specs, out_specs=replicated, check_vma=True)

    def sharded_step(state: PyTree, data: PyTree, teacher: PyTree) -> PyTree:
        # The fields that only the update reads stay sharded.
        output = mapped(state.replace(opt_state=(), average={}), data, teacher)
        state, metrics = update(state, output)
        out_shardings = shardings(state, mesh, sharded), NamedSharding(mesh, replicated)
        return jax.lax.with_sharding_constraint((state, metrics), out_shardings)

    return jax.jit(sharded_step, donate_argnums=0)

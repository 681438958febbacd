"""Train state that is sharded over the devices: its shardings, its results, and its checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.sharding import PartitionSpec as P

from lt_adv import methods
from lt_adv.training import sharding, train_state
from lt_adv.training.checkpoint import Checkpoints
from lt_adv.training.checksums import digest
from tests.training.helpers import assert_same, make, run

ALL = sharding.SHARDED
EMA = {"name": "ema", "decay": 0.9, "start_epoch": 0}
METHOD = methods.create({"name": "at"}, num_steps=1)


def sharded_specs(state):
    return {
        jax.tree_util.keystr(path): a.sharding.spec
        for path, a in jax.tree_util.tree_leaves_with_path(state)
        if a.sharding.spec != P()
    }


def test_the_longest_divisible_axis_is_sharded_in_the_requested_fields():
    mesh = sharding.make_mesh(jax.devices()[:4])
    shapes = {"kernel": (3, 3, 8, 12), "dense": (64, 10), "bias": (6,), "scalar": (), "empty": (0, 4)}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    state = train_state.TrainState(0, params, params, params, params, {}, {}, None)
    state = state.replace(step=jax.ShapeDtypeStruct((), jnp.int32), key=jax.ShapeDtypeStruct((4,), jnp.uint32))
    result = sharding.shardings(state, mesh, ("opt_state", "average"))
    assert {name: s.spec for name, s in result.opt_state.items()} == {
        "kernel": P(None, None, None, "data"), "dense": P("data"), "bias": P(), "scalar": P(), "empty": P(None, "data"),
    }  # fmt: skip
    assert result.average == result.opt_state
    replicated = jax.tree.leaves([result.params, result.batch_stats, result.key, result.step])
    assert {s.spec for s in replicated} == {P()}
    one_device = sharding.shardings(state, sharding.make_mesh(jax.devices()[:1]), ALL)
    assert {s.spec for s in jax.tree.leaves(one_device)} == {P()}


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("sharded", [("opt_state",), ALL], ids=["optimiser", "all"])
def test_sharded_training_equals_one_device(sharded):
    expected = run(METHOD, 1, average=EMA)
    for devices in (2, 4):
        assert_same(run(METHOD, devices, "shard_map", sharded=sharded, average=EMA), expected, 1e-9)


def test_the_state_stays_sharded_and_the_step_compiles_once(caplog):
    step, state, pipeline, teacher = make(METHOD, 2, "shard_map", sharded=ALL, average=EMA)
    before = sharded_specs(state)
    assert len(before) >= 3 * 2 and all(name.startswith((".params", ".opt_state", ".average")) for name in before)
    kernel = state.params["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(3, 4)} and kernel.shape == (6, 4)
    with jax.log_compiles():
        for _ in range(3):
            old = state
            state, _ = step(state, pipeline.example, teacher)
    assert sharded_specs(state) == before and old.params["kernel"].is_deleted(), "donated"
    assert sum("Finished XLA compilation of jit(sharded_step)" in line for line in caplog.messages) == 1


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2, 4])
def test_shards_are_restored_on_any_number_of_devices(tmp_path, devices):
    _, state, _, _ = make(METHOD, 2, "shard_map", sharded=ALL, average=EMA)
    stage = epath.Path(tmp_path) / "checkpoints" / "0_train"
    checkpoints = Checkpoints(stage)
    checkpoints.save(1, state, {"step": 1})
    checkpoints.close()
    _, other, _, _ = make(METHOD, devices, "shard_map", sharded=ALL, average=EMA, seed=4)
    restored, meta = Checkpoints(stage).restore(1, other, sharding.make_mesh(jax.devices()[:devices]))
    assert sharded_specs(restored) == sharded_specs(other) and bool(sharded_specs(restored)) == (devices > 1)
    stored = {name: value for name, value in meta["digest"].items() if name != "meta"}
    assert digest(restored) == digest(state) == stored != digest(other)
    for actual, expected in zip(jax.tree.leaves(restored.params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_array_equal(actual, expected)

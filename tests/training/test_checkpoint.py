"""Checkpoints: restored bit for bit on any number of devices; damaged ones are detected and skipped."""

import pathlib
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from lt_adv.training import sharding, train_state
from lt_adv.training.checkpoint import BEST, Checkpoints, read_shapes, read_variables
from lt_adv.training.checksums import digest
from tests.training.helpers import Small


@pytest.fixture(scope="module")
def state():
    import optax

    variables = Small().init(jax.random.key(0), jnp.zeros((1, 6, 6, 1)), train=False)
    initial = train_state.create(jax.random.key(5), variables, optax.sgd(0.1, momentum=0.9), {"counts": jnp.arange(4)})
    return sharding.replicate(
        initial.replace(metric_sums={"loss": (jnp.float32(1.5), jnp.float32(2))}), sharding.make_mesh()
    )


META = {"seconds": 1.0, "class_counts": [3, 2, 1, 1]}


def later(state, n):
    return state.replace(step=state.step + n, params=jax.tree.map(lambda a: a + n, state.params))


@pytest.fixture
def saved(state, tmp_path):
    """A stage's folder with the checkpoints 1 and 2."""
    stage = epath.Path(tmp_path) / "checkpoints" / "0_train"
    checkpoints = Checkpoints(stage)
    for n in (1, 2):
        checkpoints.save(n, later(state, n), {**META, "step": n})
    checkpoints.close()
    return stage


def host(state):
    return jax.device_get(state.replace(key=jax.random.key_data(state.key)))


def array_files(step):
    files = [f for f in pathlib.Path(str(step / "state")).rglob("*") if f.is_file() and "d" in f.parent.name]
    assert files
    return files


@pytest.mark.parametrize("devices", [8, 4, 1])
def test_state_is_restored_bit_for_bit_on_any_number_of_devices(saved, state, devices):
    mesh = sharding.make_mesh(jax.devices()[:devices])
    restored, meta = Checkpoints(saved).restore_latest(state, mesh)
    chex.assert_trees_all_equal(host(restored), host(later(state, 2)))
    assert meta["step"] == 2 and restored.params["kernel"].sharding.mesh.size == devices
    assert jax.random.key_impl(restored.key) == jax.random.key_impl(state.key)


def test_a_flipped_bit_falls_back_to_the_checkpoint_before(saved, state, caplog):
    """Either the digest or the decompression of orbax must detect it."""
    for file in array_files(saved / "2"):
        raw = bytearray(file.read_bytes())
        if len(raw) < 64:
            continue
        raw[len(raw) // 2] ^= 16
        file.write_bytes(bytes(raw))
    restored, meta = Checkpoints(saved).restore_latest(state, sharding.make_mesh())
    chex.assert_trees_all_equal(host(restored), host(later(state, 1)))
    assert meta["step"] == 1 and "checkpoint 2" in caplog.text and "going on from checkpoint 1" in caplog.text
    assert (saved.parent.parent / "damaged" / "0_train-2" / "state").exists()  # moved, not deleted
    assert not (saved / "2").exists() and read_variables(saved.parent.parent)[1]["step"] == 1


def test_the_digest_detects_arrays_of_another_checkpoint(saved, state):
    """Orbax restores arrays of another step without an error."""
    checkpoints = Checkpoints(saved)
    shutil.rmtree(saved / "2" / "state")
    shutil.copytree(saved / "1" / "state", saved / "2" / "state")
    with pytest.raises(ValueError, match="checkpoint 2 .* is damaged: its digest differs"):
        checkpoints.restore(2, state, sharding.make_mesh())
    assert read_variables(saved.parent.parent)[1]["step"] == 1


@pytest.mark.parametrize("content", ["{}", "[]", "{"])
def test_unreadable_metadata_fall_back_to_the_checkpoint_before(saved, state, content):
    (saved / "2" / "meta" / "metadata").write_text(content)
    assert Checkpoints(saved).restore_latest(state, sharding.make_mesh())[1]["step"] == 1


def test_the_digest_detects_changed_metadata(saved, state):
    """The metadata are still valid JSON of the right types."""
    path = saved / "2" / "meta" / "metadata"
    path.write_text(path.read_text().replace('"seconds": 1.0', '"seconds": 9.0'))
    with pytest.raises(ValueError, match="its digest differs at meta"):
        Checkpoints(saved).restore(2, state, sharding.make_mesh())
    assert read_variables(saved.parent.parent)[1]["step"] == 1


def test_a_connection_error_is_not_damage(saved, state, monkeypatch):
    checkpoints = Checkpoints(saved)

    def fail(*args, **options):
        raise ConnectionError("503")

    monkeypatch.setattr(checkpoints._manager, "restore", fail)
    with pytest.raises(ConnectionError):
        checkpoints.restore_latest(state, sharding.make_mesh())
    assert Checkpoints(saved).steps() == [1, 2]


def test_a_damaged_step_can_be_saved_again(saved, state):
    shutil.rmtree(saved / "2" / "state")
    checkpoints = Checkpoints(saved)
    assert checkpoints.restore_latest(state, sharding.make_mesh())[1]["step"] == 1
    checkpoints.save(2, later(state, 2), {**META, "step": 2})
    checkpoints.close()
    assert Checkpoints(saved).restore_latest(state, sharding.make_mesh())[1]["step"] == 2


def test_truncated_files_fall_back_and_raise_if_all_are_damaged(saved, state):
    for file in array_files(saved / "2"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert Checkpoints(saved).restore_latest(state, sharding.make_mesh())[1]["step"] == 1
    shutil.rmtree(saved / "1" / "state")
    with pytest.raises(ValueError, match="None of the checkpoints can be restored: checkpoint 1 .* cannot be read"):
        Checkpoints(saved).restore_latest(state, sharding.make_mesh())


def test_empty_folder_restores_nothing(tmp_path, state):
    assert Checkpoints(tmp_path / "new").restore_latest(state, sharding.make_mesh()) is None
    with pytest.raises(FileNotFoundError, match="train first"):
        read_variables(tmp_path)


def test_the_latest_and_the_best_checkpoint_are_kept(tmp_path, state):
    stage = tmp_path / "checkpoints" / "0_train"
    checkpoints = Checkpoints(stage, keep=1, best_metric=BEST)
    for n, accuracy in ((1, 0.3), (2, 0.6), (3, 0.4), (4, 0.5)):
        checkpoints.save(n, later(state, n), {**META, "step": n}, {BEST: accuracy})
    checkpoints.close()
    assert Checkpoints(stage, keep=1, best_metric=BEST).steps() == [2, 4]
    (stage / "5.orbax-checkpoint-tmp").mkdir()  # a checkpoint that is being written
    assert read_variables(tmp_path, "best")[1]["step"] == 2 and read_variables(tmp_path)[1]["step"] == 4
    assert (stage / "5.orbax-checkpoint-tmp").exists()


def test_read_variables_returns_the_average_if_there_is_one(tmp_path, saved, state):
    variables, _ = read_variables(saved.parent.parent)
    expected = jax.device_get(later(state, 2).evaluated)
    assert expected["method_state"]["counts"].tolist() == [0, 1, 2, 3]
    chex.assert_trees_all_equal(variables, expected)
    shapes, meta = read_shapes(saved.parent.parent)
    assert jax.tree.map(lambda a: tuple(a.shape), shapes) == jax.tree.map(np.shape, variables) and meta["step"] == 2
    averaged = state.replace(average=jax.tree.map(lambda a: a * 3, state.variables))
    checkpoints = Checkpoints(tmp_path / "averaged" / "checkpoints" / "0_train")
    checkpoints.save(1, averaged, {**META, "step": 1})
    checkpoints.close()
    expected = jax.device_get(averaged.average) | {"method_state": {"counts": np.arange(4)}}
    chex.assert_trees_all_equal(read_variables(tmp_path / "averaged")[0], expected)


@pytest.mark.parametrize("dtype", [np.float32, np.int32, np.uint8, "bfloat16", bool])
def test_digest_depends_on_every_element_and_their_order(dtype):
    a = jnp.arange(12).astype(dtype) if dtype is not bool else jnp.arange(12) % 3 == 0
    base = digest({"a": a})
    for n in (0, 5, 11):
        changed = a.at[n].set(~a[n]) if dtype is bool else a.at[n].add(1)
        assert digest({"a": changed}) != base
    assert digest({"a": a[::-1]}) != base and digest({"a": a}) == base
    assert digest({"k": jax.random.key(1)}) != digest({"k": jax.random.key(2)})

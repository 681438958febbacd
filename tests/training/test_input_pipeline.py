"""Input from a training set on the devices: the right batches, at a cost that does not grow with the set."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lt_adv import methods
from lt_adv.data import Split, device_dataset
from lt_adv.methods import DataInfo
from lt_adv.training import input_pipeline, sharding
from tests.training.helpers import make

TYPES = ("pvary", "pcast")  # operations of the type check of shard_map; they compile to nothing
KEY, MESH = jax.random.key(3), sharding.make_mesh(jax.devices()[:2])


def make_pipeline(examples, batch_size, class_aware=False, key=KEY):
    """Returns (split, its class table, steps per epoch, pipeline) of images of 3 x 2 pixels."""
    label = np.arange(examples, dtype=np.int32) % 3
    image = np.random.RandomState(0).randint(0, 256, (examples, 3, 2, 1)).astype(np.uint8)
    split = Split(image, label, np.arange(examples) * 10)
    info = DataInfo(np.bincount(label), examples // batch_size, epochs=3, image_shape=(3, 2, 1), num_features=1)
    classes = device_dataset.class_table(label, 3) if class_aware else None
    return split, classes, info.steps_per_epoch, input_pipeline.resident(split, classes, key, info, batch_size, MESH)


@pytest.mark.parametrize("class_aware", [False, True])
def test_every_step_gets_the_rows_of_its_batch(class_aware):
    """Epochs of two blocks, the second incomplete; also when resumed within a block of the second epoch."""
    examples, batch_size = 2 * (input_pipeline.BLOCK + 9), 2
    split, classes, steps, pipeline = make_pipeline(examples, batch_size, class_aware)
    options = {"num_examples": examples, "batch_size": batch_size, "classes": classes}
    for first, total in ((0, steps + 1), (steps + 5, 2 * steps + 3)):
        with pipeline.batches(first, total) as batches:
            steps_data = list(batches)
        assert len(steps_data) == total - first
        for step, data in enumerate(steps_data, first):
            row = np.asarray(device_dataset.batch_rows(KEY, step // steps, step % steps, **options))
            actual = {
                name: np.asarray(data[name])[step % steps % input_pipeline.BLOCK] for name in ("row", "label", "index")
            }
            np.testing.assert_array_equal(actual["row"], row)
            np.testing.assert_array_equal(actual["label"], split.label[row])
            np.testing.assert_array_equal(actual["index"], split.index[row])
            np.testing.assert_array_equal(data["image"][row], split.image[row].reshape(batch_size, -1))


def test_only_the_images_depend_on_the_size_of_the_set():
    for examples in (64, 4096):
        data = make_pipeline(examples, 4)[-1].example
        assert data["image"].shape == (examples, 6)
        assert {data[name].shape for name in ("row", "label", "index")} == {(input_pipeline.BLOCK, 4)}


def test_the_key_of_the_state_may_be_donated():
    """Later epochs are drawn with this key, and a replicated copy may share its buffer."""
    key = jax.random.key(3)
    *_, steps, pipeline = make_pipeline(8, 4, key=key)
    jax.block_until_ready(jax.jit(jax.random.clone, donate_argnums=0)(sharding.replicate(key, MESH)))
    with pipeline.batches(steps, steps + 1) as batches:
        assert set(np.asarray(next(batches)["row"][:steps]).ravel().tolist()) == set(range(8))


def large_operations(jaxpr, size):
    """Returns (primitive, shapes) of all operations, at any depth, with an array of `size` elements or more."""
    operations = []
    for equation in jaxpr.eqns:
        inner = [part for value in equation.params.values() for part in jax.tree.leaves(value, is_leaf=is_jaxpr)]
        inner = [getattr(part, "jaxpr", part) for part in inner if is_jaxpr(part)]
        for part in inner:
            operations += large_operations(part, size)
        shapes = [tuple(atom.aval.shape) for atom in (*equation.invars, *equation.outvars)]
        if not inner and any(np.prod(shape, dtype=int) >= size for shape in shapes):
            operations.append((equation.primitive.name, shapes))
    return operations


def is_jaxpr(part):
    return hasattr(getattr(part, "jaxpr", part), "eqns")


@pytest.mark.parametrize("parallel", ["pmap", "shard_map"])
def test_only_the_gather_reads_all_images(parallel):
    """Otherwise a step would cost more on a larger set: no sort, no copy, no change of layout."""
    step, state, pipeline, teacher = make(methods.create({"name": "at"}, num_steps=1), 2, parallel)
    texts = []
    for examples in (14_009, 200_003):
        data = {**pipeline.example, "image": jax.ShapeDtypeStruct((examples, 36), jnp.uint8)}
        jaxpr = jax.make_jaxpr(step)(state, data, teacher)
        ((name, (operand, *_)),) = [
            operation for operation in large_operations(jaxpr.jaxpr, 14_000) if operation[0] not in TYPES
        ]
        assert name == "gather" and operand == (examples, 36)
        texts.append(str(jaxpr).replace(str(examples), "examples"))
    assert texts[0] == texts[1]

"""Data sets in device memory, and the sampling of batches."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh

from lt_adv.data import device_dataset
from lt_adv.data.dataset import Split

LABEL = np.array([2, 0, 0, 1, 0, 0, 0, 2, 0, 0], np.int32)


def split(index):
    n = len(index)
    return Split(np.arange(n * 4, dtype=np.uint8).reshape(n, 2, 2, 1), np.arange(n, dtype=np.int32), np.array(index))


@pytest.mark.parametrize("count", [1, 8])
def test_put_replicates_over_the_mesh(count):
    arrays = device_dataset.put(split([7, 3, 5]), Mesh(np.array(jax.devices()[:count]), ("data",)))
    assert {k: v.dtype.name for k, v in arrays.items()} == {"image": "uint8", "label": "int32", "index": "int32"}
    for array in arrays.values():
        assert array.sharding.is_fully_replicated and len(array.sharding.device_set) == count
    np.testing.assert_array_equal(arrays["index"], [7, 3, 5])
    np.testing.assert_array_equal(arrays["image"], split([7, 3, 5]).image.reshape(3, 4))


def test_put_refuses_an_index_above_int32():
    with pytest.raises(ValueError, match="int32"):
        device_dataset.put(split([0, 2**31]), Mesh(np.array(jax.devices()[:1]), ("data",)))


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 12), st.integers(0, 3))
def test_epoch_repeats_no_example(batch_size, seed):
    key, steps = jax.random.key(seed), device_dataset.steps_per_epoch(12, batch_size)
    batches = [device_dataset.batch_indices(key, s, num_examples=12, batch_size=batch_size) for s in range(steps)]
    rows = np.concatenate(batches)
    assert len(rows) == steps * batch_size == len(set(rows.tolist()))
    assert set(rows.tolist()) <= set(range(12))
    if 12 % batch_size == 0:
        assert set(rows.tolist()) == set(range(12))


def test_batches_are_a_function_of_the_key():
    draw = jax.jit(device_dataset.batch_indices, static_argnames=("num_examples", "batch_size"))
    a, b, c = (np.asarray(draw(jax.random.key(s), 1, num_examples=100, batch_size=10)) for s in (0, 1, 0))
    assert (a != b).any() and (a == c).all()
    eager = device_dataset.batch_indices(jax.random.key(0), 1, num_examples=100, batch_size=10)
    np.testing.assert_array_equal(a, eager)


@pytest.mark.parametrize("batch_size", [0, 11])
def test_invalid_batch_size_is_refused(batch_size):
    with pytest.raises(ValueError, match="batch_size"):
        device_dataset.batch_indices(jax.random.key(0), 0, num_examples=10, batch_size=batch_size)


def test_class_table():
    table = device_dataset.class_table(LABEL, 3)
    for c in range(3):
        start, count = table["starts"][c], table["counts"][c]
        np.testing.assert_array_equal(table["order"][start : start + count], np.flatnonzero(c == LABEL))
    with pytest.raises(ValueError, match="Class 3 has no training image"):
        device_dataset.class_table(LABEL, 4)


def test_class_aware_sampling_is_uniform_over_classes_and_their_examples():
    table = device_dataset.class_table(LABEL, 3)
    draw = jax.jit(device_dataset.class_aware_indices, static_argnames="batch_size")
    rows = np.asarray(draw(jax.random.key(0), **table, batch_size=21000))
    assert rows.dtype == np.int32
    per_class = np.bincount(LABEL[rows])
    np.testing.assert_allclose(per_class / 21000, 1 / 3, atol=0.015)
    per_example = np.bincount(rows, minlength=10)
    expected = 21000 / 3 / np.bincount(LABEL)[LABEL]
    np.testing.assert_allclose(per_example / expected, 1, atol=0.12)

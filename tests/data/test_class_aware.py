"""Class-aware sampling in cycles: counts of classes and images, and the swap-or-not shuffle."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lt_adv.data import class_aware, device_dataset, longtail

COUNTS = longtail.class_counts(10, 5000, imbalance_ratio=50.0)  # CIFAR-10-LT
LABEL = np.random.default_rng(0).permutation(np.repeat(np.arange(10), COUNTS))
KEY = jax.random.key(5)
STEPS = 10 * 5000 // 64


def sampler(label=LABEL, batch_size=64, cycles=True):
    """Returns a function (epoch, steps) -> rows [steps, batch] of a run."""
    classes = {k: jnp.asarray(v) for k, v in device_dataset.class_table(label, int(label.max()) + 1).items()}
    options = {"num_examples": len(label), "batch_size": batch_size, "classes": classes, "cycles": cycles}
    rows = jax.jit(jax.vmap(partial(device_dataset.batch_rows, KEY, **options), (None, 0)))
    return lambda epoch, steps: np.asarray(rows(epoch, jnp.asarray(steps, jnp.int32)))


@pytest.fixture(scope="module")
def epochs():
    """Rows of two epochs of CIFAR-10-LT, [2, steps, 64]."""
    rows = sampler()
    return np.stack([rows(epoch, np.arange(STEPS)) for epoch in (0, 1)])


def test_every_batch_has_5_to_8_images_of_every_class(epochs):
    per_class = (LABEL[epochs][..., None] == np.arange(10)).sum(axis=2)
    assert per_class.min() >= 5 and per_class.max() <= 8
    assert np.ptp(per_class, axis=-1).max() <= 2
    independent = sampler(cycles=False)(0, np.arange(STEPS))
    per_class = (LABEL[independent][..., None] == np.arange(10)).sum(axis=1)
    assert per_class.min() < 3 and per_class.max() > 12, "independent draws vary more"


def test_images_of_a_class_are_drawn_equally_often(epochs):
    """Images of the rarest class are drawn 49 or 50 times per epoch: 16 draws follow its last full batch."""
    for rows, times in ((epochs[0], 50), (epochs[1], 50), (epochs, 100)):
        draws = np.bincount(rows.ravel(), minlength=len(LABEL))
        rarest = draws[LABEL == 9]
        assert len(rarest) == 100 and rarest.min() >= times - times // 50 and rarest.max() == times
        assert rarest.sum() >= 100 * times - 2 * (times // 50)
    largest = np.bincount(epochs[0].ravel(), minlength=len(LABEL))[LABEL == 0]
    assert largest.max() == 1 and largest.sum() >= 5000 - 2, "each image of the largest class once"


def test_cycles_and_passes_have_all_orders():
    """Six images of three classes in batches of three: each batch is a cycle."""
    label = np.array([0, 1, 1, 2, 2, 2])
    rows = sampler(label, batch_size=3)
    batches = np.concatenate([rows(epoch, np.arange(3)) for epoch in range(40)])
    np.testing.assert_array_equal(np.sort(label[batches], axis=1), [[0, 1, 2]] * 120)
    assert len({tuple(row) for row in label[batches]}) == 6, "every order of the classes"
    passes_of_class_2 = batches[label[batches] == 2].reshape(-1, 3)
    np.testing.assert_array_equal(np.sort(passes_of_class_2, axis=1), [[3, 4, 5]] * 40)
    assert len({tuple(row) for row in passes_of_class_2}) == 6, "every order of the images"
    passes_of_class_1 = batches[label[batches] == 1].reshape(-1, 2)  # continue over the ends of epochs of three cycles
    np.testing.assert_array_equal(np.sort(passes_of_class_1, axis=1), [[1, 2]] * 60)


def test_batch_is_a_function_of_step_and_key(epochs):
    rows = sampler()
    for epoch, step in ((1, 700), (0, 3), (1, 0)):
        np.testing.assert_array_equal(rows(epoch, [step])[0], epochs[epoch, step])
    assert not np.array_equal(epochs[0], epochs[1]) and rows(0, [0]).dtype == np.int32
    options = {
        "num_examples": len(LABEL),
        "batch_size": 64,
        "classes": device_dataset.class_table(LABEL, 10),
        "cycles": True,
    }
    np.testing.assert_array_equal(device_dataset.batch_rows(KEY, 1, 700, **options), epochs[1, 700])
    assert not np.array_equal(device_dataset.batch_rows(jax.random.key(6), 1, 700, **options), epochs[1, 700])


def test_cost_does_not_depend_on_the_number_of_images():
    """The compiled program has no sort and the same number of operations."""

    def operations(n):
        label = np.repeat(np.arange(10), n)
        table = {k: jnp.asarray(v) for k, v in device_dataset.class_table(label, 10).items()}
        draw = partial(class_aware.cycled_indices, batch_size=64)
        compiled = jax.jit(draw).lower(KEY, 0, 0, **table).compile()
        assert "sort" not in compiled.as_text()
        return compiled.cost_analysis()["flops"]

    assert operations(100) == operations(20000)


# --- the shuffle


@pytest.fixture(scope="module")
def permutation():
    """Returns a function (size, seed) -> all entries of a permutation."""
    entries = jax.jit(lambda index, size, seed: class_aware.permutation_entry(index, size, seed))
    length = 4096

    def all_entries(size, seed):
        index = np.arange(-(-size // length) * length) % size
        parts = [entries(part, size, jnp.uint32(seed)) for part in index.reshape(-1, length)]
        return np.concatenate(parts)[:size]

    return all_entries


def test_shuffled_is_a_permutation_of_any_size(permutation):
    for size in [*range(1, 201), 4096, 4097, 5000, 65536, 100003]:
        for seed in (0, 12345 + size):
            np.testing.assert_array_equal(np.sort(permutation(size, seed)), np.arange(size))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_small_permutations_are_uniform(size):
    seeds = class_aware.hash_uint32(jnp.uint32(3), jnp.arange(24000))
    permutations = jax.vmap(class_aware.permutation_entry, (None, None, 0))(jnp.arange(size), size, seeds)
    _, counts = np.unique(permutations, axis=0, return_counts=True)
    expected = 24000 / math.factorial(size)
    assert len(counts) == math.factorial(size)
    chi_squared, freedom = np.sum((counts - expected) ** 2) / expected, len(counts) - 1
    assert chi_squared < freedom + 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("size", [7, 10, 64])
def test_pairs_of_entries_are_uniform(size):
    """In entries 1 and 4 of 40,000 permutations all pairs of different values are equally frequent."""
    seeds = class_aware.hash_uint32(jnp.uint32(4), jnp.arange(40000))
    pairs = np.asarray(jax.vmap(class_aware.permutation_entry, (None, None, 0))(jnp.array([1, 4]), size, seeds))
    counts = np.bincount(pairs[:, 0] * size + pairs[:, 1], minlength=size**2).reshape(size, size)
    assert not np.diag(counts).any()
    counts, freedom = counts[~np.eye(size, dtype=bool)], size * (size - 1) - 1
    expected = 40000 / (freedom + 1)
    assert abs(np.sum((counts - expected) ** 2) / expected - freedom) < 4 * math.sqrt(2 * freedom)


def test_large_permutation_is_uncorrelated_with_the_order(permutation):
    for seed in (1, 2):
        order = permutation(100003, seed)
        assert abs(np.corrcoef(order, np.arange(100003))[0, 1]) < 4 / math.sqrt(100003)
        assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 4 / math.sqrt(100003)
        assert (order == np.arange(100003)).sum() < 8 and (np.abs(np.diff(order)) == 1).sum() < 12

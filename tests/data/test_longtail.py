"""Comparison of long-tailed subsets with the golden indices of the released code; their properties."""

import json
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lt_adv.data import longtail
from lt_adv.data.dataset import Dataset, Split

ROOT = pathlib.Path(__file__).parents[2]
SPLITS = json.loads((ROOT / "tests/golden/long_tail_splits.json").read_text())
CIFAR10 = ROOT.parent / "shared/golden/long_tail_splits_cifar10.npz"
SHAPES = {"": (10, 5000), "cifar100_": (100, 500), "tiny_imagenet_": (200, 500), "synthetic_": (7, 300)}


def profile(name):
    """`cifar100_exp_0.1` -> ((num_classes, max_count), keywords of `class_counts`)."""
    prefix, kind, factor = name.rpartition("_")[0].rpartition("_")[0], *name.rsplit("_", 2)[-2:]
    if kind == "balanced":
        options = {"imbalance": "balanced", "balanced_fraction": float(factor)}
    else:
        options = {"imbalance": {"exp": "exponential"}.get(kind, kind), "imbalance_ratio": 1 / float(factor)}
    return SHAPES[prefix + "_" if prefix else ""], options


def dataset(label):
    n, label = len(label), np.asarray(label, np.int32)
    train = Split(np.arange(n, dtype=np.uint8).reshape(n, 1, 1, 1), label, np.arange(n, dtype=np.int64) + 1000)
    names = tuple(str(c) for c in range(label.max() + 1))
    return Dataset("fake", train, train.take(np.arange(2)), names, "d" * 64)


@pytest.mark.parametrize("name", sorted(SPLITS))
def test_class_counts_are_golden(name):
    shape, options = profile(name)
    counts = longtail.class_counts(*shape, **options).tolist()
    if name == "synthetic_step_0.1":  # the released code's step profile drops the last of an odd number of classes
        assert counts == [300] * 3 + [30] * 4
        counts = counts[:6]
    assert counts == SPLITS[name]


@pytest.mark.parametrize(("ratio", "total"), [(10, 20431), (20, 17023), (50, 13996), (100, 12406)])
def test_published_totals(ratio, total):
    assert longtail.class_counts(10, 5000, imbalance_ratio=ratio).sum() == total


def test_synthetic_selection_is_golden(golden):
    arrays = golden("long_tail_splits_synthetic")
    label = arrays["synthetic_labels"]
    np.testing.assert_array_equal(
        longtail.select(label, longtail.class_counts(7, 300, imbalance_ratio=20)), arrays["synthetic_exp_0.05"]
    )
    counts = longtail.class_counts(7, 300, imbalance="step", imbalance_ratio=10)
    np.testing.assert_array_equal(longtail.select(label, counts)[:990], arrays["synthetic_step_0.1"])


@pytest.mark.skipif(not CIFAR10.exists(), reason="the golden CIFAR-10 labels are not part of the repository")
def test_cifar10_selection_is_golden():
    arrays = np.load(CIFAR10)
    for name in arrays.files:
        if name != "cifar10_train_labels":
            shape, options = profile(name)
            selected = longtail.select(arrays["cifar10_train_labels"], longtail.class_counts(*shape, **options))
            np.testing.assert_array_equal(selected, arrays[name], err_msg=name)


def test_error_for_ratio_below_one_gives_its_inverse():
    with pytest.raises(ValueError, match=r"0\.02 is ratio 50"):
        longtail.class_counts(10, 5000, imbalance_ratio=0.02)
    with pytest.raises(ValueError, match="ratio 50"):
        longtail.long_tailed(dataset([0, 1]), {"imbalance": "none", "imbalance_ratio": 0.02})
    for ratio in (float("nan"), float("inf"), 0, -2):
        with pytest.raises(ValueError, match=">= 1"):
            longtail.class_counts(10, 5000, imbalance_ratio=ratio)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"imbalance": "exponental"}, "Did you mean 'exponential'"),
        ({"imbalance_ratio": 10000}, "leaves class 9 without images"),
        ({"imbalance": "balanced", "balanced_fraction": 1.5}, r"\(0, 1\]"),
    ],
)
def test_invalid_profiles_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        longtail.class_counts(10, 5000, **options)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([2, 2], "2 entries, the data set has 3"),
        ([2, 0, 1], "class 1 has 0"),
        ([2, -1, 1], "class 1 has -1"),
        ([2, 1.5, 1], "class 1 has 1.5"),
        ([2, 1, 3], "Class 2 has 2 images, fewer than the 3"),
    ],
)
def test_invalid_counts_are_refused(counts, message):
    with pytest.raises(ValueError, match=message):
        longtail.select(np.array([0, 1, 2, 0, 1, 2]), counts)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(2, 9), min_size=2, max_size=6), st.integers(0, 5), st.data())
def test_selection_and_validation_properties(sizes, seed, data):
    label = np.random.RandomState(1).permutation(np.repeat(np.arange(len(sizes)), sizes))
    counts = [data.draw(st.integers(2, size)) for size in sizes]
    selected = longtail.select(label, counts, seed)
    assert len(set(selected)) == len(selected)
    np.testing.assert_array_equal(label[selected], np.repeat(np.arange(len(sizes)), counts))

    per_class = data.draw(st.integers(0, min(counts) - 1))
    train, validation = longtail.split_validation(label, selected, per_class, seed)
    assert set(train) | set(validation) == set(selected) and not set(train) & set(validation)
    np.testing.assert_array_equal(np.bincount(label[validation], minlength=len(sizes)), per_class)
    np.testing.assert_array_equal(train, [i for i in selected if i in set(train)])
    with pytest.raises(ValueError, match="no training image"):
        longtail.split_validation(label, selected, min(counts), seed)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=6), st.integers(0, 12), st.integers(0, 5))
def test_validation_from_unused_images_spares_the_rare_classes(counts, per_class, seed):
    label = np.random.RandomState(0).permutation(np.repeat(np.arange(len(counts)), 10))
    selected = longtail.select(label, counts, seed)
    short = [max(0, per_class - (10 - count)) for count in counts]  # taken from training images
    if any(s >= count for s, count in zip(short, counts, strict=True)):
        with pytest.raises(ValueError, match="no training image"):
            longtail.split_validation(label, selected, per_class, seed, "unused")
        return
    train, validation = longtail.split_validation(label, selected, per_class, seed, "unused")
    assert not set(train) & set(validation) and len(set(validation)) == len(validation)
    np.testing.assert_array_equal(np.bincount(label[validation], minlength=len(counts)), per_class)
    np.testing.assert_array_equal(np.bincount(label[train], minlength=len(counts)), np.subtract(counts, short))
    np.testing.assert_array_equal(train, [i for i in selected if i in set(train)])


def test_selection_and_validation_depend_on_the_seed():
    label = np.repeat([0, 1], 50)
    chosen = [longtail.select(label, [10, 10], seed).tolist() for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]
    cuts = [longtail.split_validation(label, np.arange(100), 10, seed)[1].tolist() for seed in (0, 0, 1)]
    assert cuts[0] == cuts[1] != cuts[2]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=2, max_size=6), st.floats(0.1, 1.0), st.integers(0, 5))
def test_resample_balanced_repeats_the_tail_evenly_and_subsamples_the_head(counts, share, seed):
    label = np.random.RandomState(1).permutation(np.repeat(np.arange(len(counts)), 40))
    selected = longtail.select(label, counts, seed)
    count = int(share * max(counts))
    if not count:
        with pytest.raises(ValueError, match="leaves no image of a class"):
            longtail.resample_balanced(label, selected, share, seed)
        return
    equal = longtail.resample_balanced(label, selected, share, seed)
    np.testing.assert_array_equal(label[equal], np.repeat(np.arange(len(counts)), count))
    assert set(equal) <= set(selected) and np.array_equal(
        equal, longtail.resample_balanced(label, selected, share, seed)
    )
    for c, available in enumerate(counts):
        times = np.bincount(equal[label[equal] == c], minlength=len(label))[selected[label[selected] == c]]
        assert times.sum() == count and np.ptp(times) <= 1
        assert times.max() == -(-count // available)


@pytest.mark.parametrize("share", [-0.5, 1.5, float("nan")])
def test_invalid_shares_are_refused(share):
    with pytest.raises(ValueError, match="share of the largest class"):
        longtail.resample_balanced(np.array([0, 0, 1]), np.arange(3), share)


def test_balanced_set_has_training_images_only():
    """IR 4: floor(gamma n_min) with gamma = IR / 2 is half of the largest class."""
    data = dataset(np.tile(np.arange(3), 40))
    config = {"imbalance": "exponential", "imbalance_ratio": 4, "validation_per_class": 2}
    plain, equal = (longtail.long_tailed(data, {**config, **extra}) for extra in ({}, {"resample_balanced": 0.5}))
    assert equal.class_counts == (19, 19, 19) and equal.class_counts_before == plain.class_counts_before
    assert set(equal.train.index) <= set(plain.train.index) and equal.digest != plain.digest
    np.testing.assert_array_equal(equal.validation.index, plain.validation.index)
    quarter = longtail.long_tailed(data, {"imbalance": "none", "resample_balanced": 0.25})
    assert quarter.class_counts == (10, 10, 10) and len(set(quarter.train.index)) == 30
    assert not np.array_equal((quarter.train.index[:10] - 1000) // 3, np.arange(10)), "random, not the first ones"


@pytest.mark.parametrize(
    ("counts", "definition", "expected"),
    [
        (range(100, 0, -10), "thirds", {"head": [0, 1, 2], "body": [3, 4, 5, 6], "tail": [7, 8, 9]}),
        ([5, 9, 5, 1], "thirds", {"head": [1], "body": [0, 2], "tail": [3]}),
        (range(11, 0, -1), "reat", {"head": [0, 1, 2], "body": [3, 4, 5, 6], "tail": [7, 8, 9, 10]}),
        (range(9, 0, -1), "reat", {"head": [0, 1, 2], "body": [3, 4, 5, 6], "tail": [7, 8]}),
        (range(10, 0, -1), "robustlt", {"head": [0, 1], "body": [], "tail": [2, 3, 4, 5, 6, 7, 8, 9]}),
        (range(20, 0, -1), "tenths", {str(i + 1): [2 * i, 2 * i + 1] for i in range(10)}),
    ],
)
def test_groups(counts, definition, expected):
    assert {k: v.tolist() for k, v in longtail.groups(list(counts), definition).items()} == expected


def test_unknown_group_definition():
    with pytest.raises(ValueError, match="Did you mean 'thirds'"):
        longtail.groups([3, 2, 1], "third")


def test_long_tailed_reports_both_counts_and_keeps_the_test_set():
    data = dataset(np.tile(np.arange(3), 40))
    config = {"imbalance": "exponential", "imbalance_ratio": 4, "validation_per_class": 2}
    result = longtail.long_tailed(data, config)
    assert result.class_counts_before == (40, 20, 10) and result.class_counts == (38, 18, 8)
    assert result.test is data.test and len(result.validation) == 6
    assert tuple(np.bincount(result.train.label)) == result.class_counts
    np.testing.assert_array_equal(result.train.image[:, 0, 0, 0].astype(int) + 1000, result.train.index)
    assert longtail.long_tailed(data, config).digest == result.digest
    others = [{**config, "split_seed": 1}, {**config, "validation_per_class": 3}, {"imbalance": "none"}]
    assert len({result.digest, *(longtail.long_tailed(data, c).digest for c in others)}) == 4


def test_complete_training_set_is_not_copied():
    data = dataset([0, 1, 0])
    result = longtail.long_tailed(data, {"imbalance": "none"})
    assert result.train is data.train and result.validation is None and result.class_counts == (2, 1)


def test_explicit_counts_override_the_profile():
    for imbalance in ("exponential", "none"):
        result = longtail.long_tailed(dataset([0, 1] * 5), {"imbalance": imbalance, "class_counts": (5, 5)})
        assert result.class_counts == (5, 5)
        np.testing.assert_array_equal(result.train.label, [0] * 5 + [1] * 5)


def test_largest_count_of_almost_balanced_sets():
    sizes = np.array([9, 12, 12])
    assert longtail.largest_count(sizes, imbalance="exponential", imbalance_ratio=4) == 9
    assert longtail.largest_count(np.array([12, 9, 12]), imbalance="exponential", imbalance_ratio=4) == 12
    with pytest.raises(ValueError, match="without images"):
        longtail.largest_count(sizes, imbalance="exponential", imbalance_ratio=1000)


def test_empty_class_is_refused():
    data = dataset([0, 2, 0])
    with pytest.raises(ValueError):
        longtail.long_tailed(data, {"imbalance": "exponential", "imbalance_ratio": 2})

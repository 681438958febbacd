"""Training images that a file selects: exactly these, in the order of the file."""

import hashlib
import pathlib

import numpy as np
import pytest

from lt_adv.data import abstract, longtail, split_file
from lt_adv.data.dataset import Dataset, Split
from tests.data.test_longtail import CIFAR10, SPLITS

INDEX = np.array([10, 4, 7, 25, 13, 1, 16, 22, 19])  # in no order, with gaps
CIFAR = {"name": "cifar10", "imbalance": "exponential", "imbalance_ratio": 50.0}
LABEL = np.array([0, 0, 0, 0, 1, 1, 1, 2, 2], np.int32)


def dataset():
    train = Split(INDEX.astype(np.uint8).reshape(-1, 1, 1, 1), LABEL, INDEX)
    return Dataset("fake", train, train.take(np.arange(2)), ("a", "b", "c"), "d" * 64)


@pytest.fixture
def write(tmp_path):
    def save(**arrays):
        np.savez(tmp_path / "split.npz", **arrays)
        return str(tmp_path / "split.npz")

    return save


def test_training_images_are_those_of_the_file_in_its_order(write):
    """train_indices before val_indices; digest, counts and description are those of the file."""
    path = write(val_indices=np.array([22, 4], np.int32), train_indices=np.array([7, 25, 13]))
    result = longtail.long_tailed(dataset(), {"split_file": path, "imbalance": "none"})
    assert result.train.index.tolist() == result.train.image.ravel().tolist() == [7, 25, 13, 22, 4]
    assert result.train.label.tolist() == [0, 0, 1, 2, 0] and result.class_counts == (3, 1, 1)
    sha256 = hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()
    assert result.split_file == f"split.npz, SHA-256 {sha256}"
    assert result.digest == longtail.long_tailed(dataset(), {"split_file": path}).digest
    joined = write(indices=[7, 25, 13, 22, 4])
    assert longtail.long_tailed(dataset(), {"split_file": joined}).digest == result.digest
    other = write(indices=[25, 7, 13, 22, 4])
    assert longtail.long_tailed(dataset(), {"split_file": other}).digest != result.digest


def test_an_empty_list_of_validation_images(write):
    """numpy saves it as floats."""
    path = write(train_indices=[7, 13, 22], val_indices=[])
    assert longtail.long_tailed(dataset(), {"split_file": path}).class_counts == (1, 1, 1)


def test_validation_split_and_balanced_resampling_of_the_file(write):
    path = write(indices=INDEX[[0, 1, 2, 3, 4, 5, 7, 8]])
    config = {"split_file": path, "validation_per_class": 1}
    result = longtail.long_tailed(dataset(), config)
    assert result.class_counts_before == (4, 2, 2) and result.class_counts == (3, 1, 1)
    assert sorted([*result.train.index, *result.validation.index]) == sorted(INDEX[[0, 1, 2, 3, 4, 5, 7, 8]])
    unused = longtail.long_tailed(dataset(), {**config, "validation_from": "unused"})
    assert 16 in unused.validation.index, "the image outside the file"
    assert longtail.long_tailed(dataset(), {**config, "resample_balanced": 1.0}).class_counts == (3, 3, 3)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"train_indices": [10, 13, 22]},
            "must have either an array indices, or train_indices and val_indices; it has",
        ),
        ({"images": [10, 13, 22]}, "it has none of them"),
        ({"indices": [10], "train_indices": [13], "val_indices": [22]}, "must have either"),
        ({"indices": np.array([10.0, 13, 22])}, r"indices must be integers \[n\], .* not float64 \(3,\)"),
        ({"indices": [[10, 13, 22]]}, r"not int64 \(1, 3\)"),
        ({"indices": np.array([], int)}, "has no indices"),
        ({"indices": [10, 13, 22, 13, 10]}, "2 indices occur more than once, such as 10"),
        ({"indices": [10, 13, 22, 0, 99]}, "2 of 5 indices are not in the training set of 9 images, .* 1 to 25, .* 0"),
        ({"indices": [10, 13, -22]}, "1 of 3 indices are not in the training set .* such as -22"),
        ({"indices": [10, 13]}, "The class 'c' has no training image"),
        ({"indices": np.array([None, 13, 22])}, "pickled objects are not read"),
    ],
)
def test_faults_of_a_file_are_one_line(write, arrays, message):
    with pytest.raises(ValueError, match=message) as error:
        longtail.long_tailed(dataset(), {"split_file": write(**arrays)})
    assert "\n" not in str(error.value) and "split.npz" in str(error.value)


def test_missing_and_unreadable_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no file .*none\.npz: set --config\.data\.split_file"):
        split_file.read(str(tmp_path / "none.npz"))
    (tmp_path / "text.npz").write_text("1 2 3")
    with pytest.raises(ValueError, match=r"text\.npz is not a readable \.npz"):
        split_file.read(str(tmp_path / "text.npz"))


def test_class_counts_must_be_those_of_the_config(write):
    path = write(indices=INDEX[[0, 1, 2, 3, 4, 5, 7]])
    for options in ({"class_counts": (4, 2, 1)}, {"imbalance": "exponential", "imbalance_ratio": 4.0}):
        assert longtail.long_tailed(dataset(), {"split_file": path, **options}).class_counts == (4, 2, 1)
    with pytest.raises(
        ValueError, match=r"2 images of class 1 \('b'\), but data.class_counts gives 3 .* 1 of 3 classes\)"
    ):
        longtail.long_tailed(dataset(), {"split_file": path, "class_counts": (4, 3, 1)})
    with pytest.raises(ValueError, match="class_counts has 2 entries, the data set has 3"):
        longtail.long_tailed(dataset(), {"split_file": path, "class_counts": (4, 3)})
    with pytest.raises(ValueError, match="the profile of data.imbalance gives 3 .* or set data.imbalance=none"):
        longtail.long_tailed(dataset(), {"split_file": path, "imbalance": "exponential", "imbalance_ratio": 1.5})


@pytest.mark.skipif(not CIFAR10.exists(), reason="the golden CIFAR-10 labels are not part of the repository")
def test_split_file_of_cifar10(write):
    """The released selection, and a file by the rule of RobustLT's: a new generator of numpy, a fifth held out."""
    arrays = np.load(CIFAR10)
    label = arrays["cifar10_train_labels"].astype(np.int32)
    n = len(label)
    train = Split(np.zeros((n, 1, 1, 1), np.uint8), label, np.arange(n))
    cifar10 = Dataset("cifar10", train, train.take(np.arange(1)), tuple("abcdefghij"), "d" * 64)
    profile = {"imbalance": "exponential", "imbalance_ratio": 50.0}
    expected = longtail.long_tailed(cifar10, profile)
    actual = longtail.long_tailed(cifar10, {**profile, "split_file": write(indices=arrays["exp_0.02"])})
    assert actual.class_counts == (5000, 3237, 2096, 1357, 878, 568, 368, 238, 154, 100)
    assert actual.digest == expected.digest, "the same training set, in the same order"

    rng, parts = np.random.default_rng(102), {"train_indices": [], "val_indices": []}
    for c, count in enumerate(SPLITS["exp_0.02"]):
        members = np.flatnonzero(label == c)
        rng.shuffle(members)
        held_out = int(0.2 * count)
        parts["train_indices"].extend(members[: count - held_out])
        parts["val_indices"].extend(members[count - held_out : count])
    robustlt = longtail.long_tailed(cifar10, {**profile, "split_file": write(**parts)})
    assert robustlt.class_counts == expected.class_counts and len(robustlt.train) == 13996
    assert robustlt.train.index.tolist() == parts["train_indices"] + parts["val_indices"]


def compiled_counts(**options):
    """Class counts of a compilation, for which no image and no label is read."""
    config = abstract.without_split_file({**CIFAR, **options})
    assert not config["split_file"]
    return longtail.long_tailed(abstract.abstract_dataset(config), config).class_counts


def test_compilation_has_the_number_of_images_of_the_file(write, caplog):
    assert sum(compiled_counts(split_file=write(indices=np.arange(13996)))) == 13996
    counts = compiled_counts(split_file=write(indices=np.arange(0, 50000, 10)[:4321]), imbalance="none")
    assert sum(counts) == 4321 and np.ptp(counts) == 1
    with pytest.raises(ValueError, match=r"split\.npz has 4321 images, but config\.data describes 13996"):
        compiled_counts(split_file=write(indices=np.arange(4321)))
    assert not caplog.messages
    assert sum(compiled_counts(split_file="nowhere.npz")) == 13996 and "no file nowhere.npz" in caplog.text

"""Invalid labels and classes without images are refused when a set is loaded, in either split."""

import json
import logging
import re

import numpy as np
import pytest

from lt_adv.data import cache, load, longtail
from lt_adv.data.dataset import Dataset, Split, check_labels
from tests.data.test_tfds_source import encoded, prepare

LABEL = np.arange(12) % 3
WRONG = {
    "negative": (
        np.where(LABEL == 1, -1, LABEL),
        r"4 of 12 labels are not whole numbers from 0.*, such as -1\. .*labels",
    ),
    "nan": (np.where(LABEL == 1, np.nan, LABEL), r"not float64 \(4 of which are not integers, such as nan\)"),
    "inf": (np.where(LABEL == 1, np.inf, LABEL), r"not float64 \(4 of which are not integers, such as inf\)"),
    "fractions": (LABEL + 0.5, r"\(12 of which are not integers, such as 0\.5\)"),
    "float": (LABEL.astype(np.float32), r"12 whole numbers from 0, of an integer type, not float32\."),
    "bool": (LABEL > 1, "of an integer type, not bool"),
    "text": (np.array(["a", "b", "c"])[LABEL], r"of an integer type, not <U1 .*such as a\)"),
    "bytes": (np.array([b"a", b"b", b"c"])[LABEL], r"of an integer type, not \|S1"),
    "one-hot": (np.eye(3)[LABEL], r"one for each image, not float64 \(12, 3\): convert one-hot labels with argmax"),
    "column": (LABEL[:, None], r"one for each image, not int64 \(12, 1\)\."),
    "scalar": (np.array(3), r"one for each image, not int64 \(\)\."),
    "short": (LABEL[1:], r"12 whole numbers from 0, one for each image, not int64 \(11,\)\."),
    "huge": (LABEL.astype(np.uint64) + np.uint64(2**63), "labels go up to 9223372036854775810.*: 12 of {split}_label"),
    "many": (np.where(LABEL == 2, 99, LABEL), "labels go up to 99, .*: 4 of {split}_label are not below 12"),
}


def write(path, **changes):
    image = np.random.RandomState(0).randint(0, 256, (12, 4, 4, 1)).astype(np.uint8)
    arrays = {"train_image": image, "train_label": LABEL, "test_image": image, "test_label": LABEL}
    np.savez(path, **{**arrays, **changes})
    return {"name": "npz", "path": str(path), "data_dir": str(path.parent)}


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("kind", WRONG)
def test_invalid_labels_are_refused(tmp_path, split, kind):
    label, message = WRONG[kind]
    config = write(tmp_path / "a.npz", **{f"{split}_label": label})
    with pytest.raises(ValueError) as caught:
        load(config)
    assert re.search(message.replace("{split}", split), str(caught.value)) and f"{split}_label" in str(caught.value)
    assert not (tmp_path / "lt_adv_cache").exists()


def test_dataset_checks_labels():
    image, index = np.zeros((12, 2, 2, 1), np.uint8), np.arange(12)
    good, bad = Split(image, LABEL.astype(np.int32), index), Split(image, LABEL.astype(np.int32) - 1, index)
    assert check_labels(LABEL, 12, 3, "x") is LABEL
    for names, train, test, message in (
        ("abc", bad, good, r"mine, split train: 4 of 12 labels are not whole numbers from 0 to 2, such as -1\."),
        ("abc", good, bad, "mine, split test: 4 of 12"),
        ("ab", good, good, r"mine, split train: 4 of 12 labels are not whole numbers from 0 to 1, such as 2\."),
        ("abc", good, good.take(index[:0]), "mine, split test: there are no images"),
    ):
        with pytest.raises(ValueError, match=message):
            Dataset("mine", train, test, tuple(names), "d" * 64)


def test_cache_with_invalid_labels_is_rebuilt(tmp_path, monkeypatch):
    """Such as a cache that was written before labels were checked."""
    config = write(tmp_path / "a.npz")
    load(config)
    (meta,) = tmp_path.glob("lt_adv_cache/*/meta.json")
    monkeypatch.setattr(cache, "digest_of", lambda *_: "d")
    meta.write_text(json.dumps({**json.loads(meta.read_text()), "class_names": ["0", "1"], "digest": "d"}))
    assert load(config).class_names == ("0", "1", "2")


@pytest.fixture
def unlabelled(tmp_path):
    """`unlabelled(train=..., test=..., ...)` prepares a set of TensorFlow-Datasets with these labels in its splits."""
    import tensorflow_datasets as tfds

    def make(**splits):
        features = {
            "image": tfds.features.Image(shape=(4, 4, 3), encoding_format="png"),
            "label": tfds.features.ClassLabel(names=["no", "yes"]),
        }
        image = np.random.RandomState(0).randint(0, 256, (4, 4, 3)).astype(np.uint8)
        examples = {name: [encoded(image, label) for label in labels] for name, labels in splits.items()}
        prepare(tmp_path, "some_set", features=features, examples=examples)
        return {"name": "some_set", "data_dir": str(tmp_path)}

    return make


def test_test_split_without_labels_is_refused(unlabelled):
    """imagenet2012 has one."""
    config = unlabelled(train=[0, 1, 1], test=[-1, -1], validation=[1, 0, 1, 0])
    message = (
        r"some_set, split test: 2 of 2 labels .* from 0 to 1, such as -1\. .*--config\.data\.test_split=validation"
    )
    with pytest.raises(ValueError, match=message):
        load(config)
    data = load({**config, "test_split": "validation"})
    assert np.bincount(data.test.label).tolist() == [2, 2]
    with pytest.raises(ValueError, match=message):
        load({**config, "test_split": ""})  # another cache
    with pytest.raises(ValueError, match="some_set has no split val; it has train, test, validation"):
        load({**config, "test_split": "val"})


def test_no_split_with_labels(unlabelled):
    with pytest.raises(ValueError, match="Only the split train of some_set has labels: choose another set"):
        load(unlabelled(train=[0, 1], test=[-1, 0], other=[-1]))


def test_training_images_without_labels_are_refused(unlabelled):
    with pytest.raises(ValueError, match="some_set, split train: 1 of 3 labels .*such as -1.*Training needs labels"):
        load(unlabelled(train=[0, 1, -1], test=[0]))


@pytest.mark.parametrize("name", ["digits", "npz", "image_folder", "cifar10"])
def test_test_split_is_refused_for_other_sets(tmp_path, name):
    with pytest.raises(ValueError, match=rf"config\.data\.test_split.*{name}"):
        load({"name": name, "path": str(tmp_path), "data_dir": str(tmp_path), "test_split": "validation"})


def test_warning_about_classes_without_test_images(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        load(write(tmp_path / "a.npz", test_label=np.where(LABEL == 1, 0, LABEL), class_names=["a", "b", "c"]))
    assert "npz: no test image of class 1 ('b'): not evaluated." in caplog.text


NAMES = ["ant", "bee", "cow"]
PROFILES = [
    {"imbalance": "exponential", "imbalance_ratio": 2},
    {"imbalance": "step", "imbalance_ratio": 2},
    {"imbalance": "balanced", "balanced_fraction": 0.5},
    {"class_counts": (2, 2, 2)},
    {"class_counts": (2, 2, 0)},
]


@pytest.mark.parametrize("profile", PROFILES, ids=str)
@pytest.mark.parametrize("lacking", [[0], [1], [2], [1, 2]])
def test_class_without_training_images_is_refused(tmp_path, profile, lacking):
    """The message names these classes and does not blame the ratio; the last class is detected by its name only."""
    available = np.flatnonzero(~np.isin(LABEL, lacking))
    label = LABEL[np.resize(available, 12)]
    dataset = load(write(tmp_path / "a.npz", train_label=label, class_names=NAMES))
    with pytest.raises(ValueError) as caught:
        longtail.long_tailed(dataset, profile)
    text = str(caught.value)
    assert f"The class {NAMES[lacking[0]]!r} has no training image" in text and "npz" in text
    assert all(f"class {c} ({NAMES[c]!r})" in text for c in lacking)
    assert "imbalance_ratio" not in text


def test_class_with_too_few_images_is_named(tmp_path):
    """The exponential profile needs most images of class 0, which is the rarest in this set."""
    label = np.array([0, *[1] * 5, *[2] * 6])
    dataset = load(write(tmp_path / "a.npz", train_label=label, class_names=NAMES))
    with pytest.raises(
        ValueError, match=r"imbalance_ratio 4.* needs at least 4 images of class 0 \('ant'\), which has 1"
    ):
        longtail.long_tailed(dataset, {"imbalance": "exponential", "imbalance_ratio": 4})
    with pytest.raises(ValueError, match=r"Class 0 \('ant'\) has 1 images, fewer than the 2 of class_counts"):
        longtail.long_tailed(dataset, {"class_counts": (2, 2, 2)})
    with pytest.raises(ValueError, match=r"leaves no training image of class 0 \('ant'\), which has 1"):
        longtail.long_tailed(dataset, {"validation_per_class": 1})

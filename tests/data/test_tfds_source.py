"""Loading of prepared sets of TensorFlow-Datasets."""

import io

import numpy as np
import pytest
from PIL import Image

from lt_adv.data import load, tfds_source

RNG = np.random.RandomState(0)


def prepare(data_dir, name, *, features, examples, file_format="array_record"):
    """Prepares a set `name` with these features and examples, as TensorFlow-Datasets does."""
    import tensorflow_datasets as tfds

    class Other(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("3.0.1")

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {k: iter(list(enumerate(v))) for k, v in examples.items()}

        def _generate_examples(self):
            raise AssertionError

    Other.name = name
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    Other(data_dir=data_dir, file_format=file_format).download_and_prepare(download_config=config)


def encoded(image, label):
    """Returns an example whose image is stored as an unchanged PNG stream."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return {"image": io.BytesIO(stream.getvalue()), "label": label}


@pytest.mark.parametrize("name", ["some_other_set", "mnist"])
def test_prepared_set_by_name(tmp_path, name):
    import tensorflow_datasets as tfds

    image = RNG.randint(0, 256, (12, 28, 28, 1)).astype(np.uint8)
    features = {
        "image": tfds.features.Image(shape=(28, 28, 1), encoding_format="png"),
        "label": tfds.features.ClassLabel(names=["no", "yes"]),
        "id": tfds.features.Text(),
    }

    def example(split, i):
        stream = io.BytesIO()
        Image.fromarray(image[i, ..., 0]).save(stream, "PNG")
        return {"image": io.BytesIO(stream.getvalue()), "label": i % 2, "id": f"{split}_{i:05}"}

    examples = {"train": [example("train", i) for i in range(12)], "validation": [example("validation", 3)]}
    prepare(tmp_path, name, features=features, examples=examples)
    data = load({"name": name, "data_dir": str(tmp_path)})
    np.testing.assert_array_equal(data.train.image, image)
    np.testing.assert_array_equal(data.train.label, np.arange(12) % 2)
    np.testing.assert_array_equal(data.test.index, [3])
    assert data.class_names == ("no", "yes")
    assert load({"name": name, "data_dir": str(tmp_path)}).digest == data.digest


def test_set_without_images_or_test_split_is_refused(tmp_path):
    import tensorflow_datasets as tfds

    label = {"label": tfds.features.ClassLabel(num_classes=2)}
    prepare(tmp_path, "no_images", features=label, examples={"train": [{"label": 0}], "test": [{"label": 1}]})
    with pytest.raises(ValueError, match="not an image classification set"):
        load({"name": "no_images", "data_dir": str(tmp_path)})
    prepare(tmp_path, "no_test", features=label, examples={"train": [{"label": 0}]})
    with pytest.raises(ValueError, match="no_test has no split validation"):
        load({"name": "no_test", "data_dir": str(tmp_path)})


def test_tfrecord_needs_the_extra(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    label = {"label": tfds.features.ClassLabel(num_classes=2)}
    prepare(tmp_path, "old_set", features=label, examples={"train": [{"label": 0}], "test": [{"label": 1}]})
    info = tmp_path / "old_set/3.0.1/dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    monkeypatch.setattr(tfds_source, "_has_tensorflow", lambda: False)
    with pytest.raises(ValueError, match=r'as tfrecord; reading it needs TensorFlow: .*"\.\[tfds-tf\]"'):
        load({"name": "old_set", "data_dir": str(tmp_path)})


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([b"train_3", b"train_0"], [3, 0]),
        ([5, 2], [5, 2]),
        ([b"a_1", b"b_1"], [0, 1]),
        ([b"cat", b"dog"], [0, 1]),
        ([None, None], [0, 1]),
    ],
)
def test_original_indices(ids, expected):
    assert tfds_source._original_indices(ids).tolist() == expected


def test_unprepared_and_unknown_sets_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tfds_source, "_has_tensorflow", lambda: False)
    with pytest.raises(ValueError, match=r'mnist is not prepared .* needs TensorFlow: .*"\.\[tfds-tf\]"'):
        load({"name": "mnist", "data_dir": str(tmp_path)})
    monkeypatch.setattr(tfds_source, "_has_tensorflow", lambda: True)
    with pytest.raises(FileNotFoundError, match="--config.data.download=True"):
        load({"name": "mnist", "data_dir": str(tmp_path)})
    for name in ("cifar1", "nothing_like_it", "../x", "mnist/no_such_config", ""):
        with pytest.raises(ValueError, match="Unknown data set") as caught:
            load({"name": name, "data_dir": str(tmp_path)})
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", ["dataset_info.json", "features.json", "*-train.array_record*"])
def test_pointer_in_place_of_a_file_is_named(tmp_path, part):
    import tensorflow_datasets as tfds

    features = {
        "image": tfds.features.Image(shape=(2, 2, 3), encoding_format="png"),
        "label": tfds.features.ClassLabel(num_classes=2),
    }
    image = np.zeros((2, 2, 3), np.uint8)
    examples = {split: [encoded(image, label) for label in (0, 1)] for split in ("train", "test")}
    prepare(tmp_path, "cloned", features=features, examples=examples)
    (path,) = (tmp_path / "cloned" / "3.0.1").glob(part)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n")
    with pytest.raises(ValueError, match=f"{path} is a Git LFS pointer"):
        load({"name": "cloned", "data_dir": str(tmp_path)})

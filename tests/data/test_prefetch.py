"""Prefetched batches equal those that a step draws from the set on the devices."""

import io
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from lt_adv.data import Split, device_dataset, images, load, long_tailed, prefetch, tfds_source
from tests.data.test_tfds_source import prepare

RNG = np.random.RandomState(0)
KEY = jax.random.key(3)
OPTIONS = {"steps_per_epoch": 3, "batch_size": 4}
ALL = np.arange(4)


def split(examples=14):
    label = np.arange(examples, dtype=np.int32) % 3
    return Split(RNG.randint(0, 256, (examples, 5, 5, 3)).astype(np.uint8), label, np.arange(examples) * 10)


def read(split, first=0, total=7, local_rows=ALL, **options):
    with prefetch.batches(split, KEY, first, total, local_rows, **{**OPTIONS, **options}) as batches:
        return list(batches)


@pytest.mark.slow
@pytest.mark.parametrize(("class_aware", "cycles"), [(False, False), (True, False), (True, True)])
def test_batches_match_the_draws_of_the_steps(class_aware, cycles):
    """Over two epochs and the start of a third; each has its own order."""
    data = split()
    classes = device_dataset.class_table(data.label, 3) if class_aware else None
    batches = read(data, classes=classes, cycles=cycles)
    assert len(batches) == 7
    for step, batch in enumerate(batches):
        options = {"num_examples": 14, "batch_size": 4, "classes": classes, "cycles": cycles}
        rows = device_dataset.batch_rows(KEY, step // 3, step % 3, **options)
        for name, dtype in (("image", np.uint8), ("label", np.int32), ("index", np.int32)):
            assert batch[name].dtype == dtype
            np.testing.assert_array_equal(batch[name], getattr(data, name)[rows])
    assert len({tuple(batch["index"]) for batch in batches}) == 7


def test_resume_at_a_step_and_local_rows_of_a_process():
    data = split()
    batches, resumed = read(data), read(data, first=5)
    for expected, actual in zip(batches[5:], resumed, strict=True):
        np.testing.assert_array_equal(actual["image"], expected["image"])
    local_rows = np.array([2, 3])
    for expected, actual in zip(batches, read(data, local_rows=local_rows), strict=True):
        np.testing.assert_array_equal(actual["index"], expected["index"][local_rows])


def test_threads_end_with_the_context():
    before = threading.active_count()
    with prefetch.batches(split(), KEY, 0, 7, np.arange(4), **OPTIONS) as batches:
        next(batches)
    for thread in threading.enumerate():
        if thread.name.startswith("grain"):
            thread.join(timeout=10)
    assert threading.active_count() <= before


def test_number_of_prefetched_batches_is_limited(monkeypatch):
    """Memory holds a few batches, whatever the length of the run."""
    monkeypatch.setattr(prefetch.os, "cpu_count", lambda: 2)
    reads, done = [], threading.Event()
    expected_reads = 1 + 2 * prefetch.BATCHES_PER_THREAD

    class Counted:
        shape, dtype = (14, 5, 5, 3), np.uint8

        def read(self, rows):
            reads.append(rows)
            if len(reads) == expected_reads:
                done.set()
            return np.zeros((len(rows), 5, 5, 3), np.uint8)

    data = split()
    with prefetch.batches(Split(Counted(), data.label, data.index), KEY, 0, 999, np.arange(4), **OPTIONS) as batches:
        next(batches)
        assert done.wait(10), "nothing was prefetched"
    assert len(reads) == expected_reads


def png(image):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def sizes(tmp_path):
    """A set of TensorFlow-Datasets in array_record whose images differ in size, like ImageNet."""
    import tensorflow_datasets as tfds

    features = {"image": tfds.features.Image(shape=(None, None, 3)), "label": tfds.features.ClassLabel(num_classes=3)}
    pictures = [RNG.randint(0, 256, (8 + i, 12, 3)).astype(np.uint8) for i in range(14)]
    examples = {
        split: [{"image": io.BytesIO(png(p)), "label": i % 3} for i, p in enumerate(pictures[:count])]
        for split, count in (("train", 14), ("test", 3))
    }
    prepare(tmp_path, "all_sizes", features=features, examples=examples)
    return {"name": "all_sizes", "data_dir": str(tmp_path), "image_size": 6}


def test_large_set_is_decoded_at_each_access(sizes):
    """Images equal those of the decoded set; a set that has a cache is read from it."""
    large = load({**sizes, "max_device_gib": 0})
    assert isinstance(large.train.image, images.LazyImages) and isinstance(large.test.image, images.LazyImages)
    assert large.train.image.shape == (14, 6, 6, 3) and large.train.image.nbytes == 14 * 108
    small = load({**sizes, "max_device_gib": 1})
    assert isinstance(small.train.image, np.ndarray)
    np.testing.assert_array_equal(large.train.image, small.train.image)
    np.testing.assert_array_equal(large.train.label, small.train.label)
    for batch, decoded in zip(read(large.train), read(small.train), strict=True):
        np.testing.assert_array_equal(batch["image"], decoded["image"])
    assert isinstance(load({**sizes, "max_device_gib": 0}).train.image, np.ndarray), "the cache exists now"


def test_long_tailed_subset_of_encoded_images(sizes, monkeypatch):
    monkeypatch.setattr(images, "CHUNK", 2)  # several threads
    dataset = load({**sizes, "max_device_gib": 0})
    cut = long_tailed(dataset, {"class_counts": (4, 3, 1), "validation_per_class": 0})
    assert isinstance(cut.train.image, images.LazyImages) and cut.class_counts == (4, 3, 1)
    rows = np.array([7, 0, 3])
    np.testing.assert_array_equal(cut.train.image[rows], np.asarray(dataset.train.image)[cut.train.index[rows]])
    assert len(cut.train.image[:0]) == 0 and cut.train.image[2:5].shape == (3, 6, 6, 3)
    other = long_tailed(dataset, {"class_counts": (4, 3, 1), "split_seed": 1})
    assert cut.train.image.digest != other.train.image.digest and cut.digest != other.digest


def test_labels_of_large_splits_are_cached(sizes, monkeypatch, caplog):
    monkeypatch.setattr(tfds_source, "LABEL_CACHE_BYTES", 0)
    calls, original = [], tfds_source._original_indices
    monkeypatch.setattr(tfds_source, "_original_indices", lambda ids: calls.append(1) or original(ids))
    first = load({**sizes, "max_device_gib": 0})
    again = load({**sizes, "max_device_gib": 0})
    assert len(calls) == 2, "once for each split"
    assert first.digest == again.digest
    np.testing.assert_array_equal(first.train.label, again.train.label)
    (file,) = (f for f in Path(sizes["data_dir"], "lt_adv_cache").glob("all_sizes-train-labels*.npz"))
    file.write_bytes(file.read_bytes()[:40])
    assert load({**sizes, "max_device_gib": 0}).digest == first.digest
    assert "all_sizes-train-labels" in caplog.text and "is rebuilt" in caplog.text


def test_unreadable_image_is_named_at_its_access(tmp_path):
    for name in ("train/a/0.png", "train/b/1.png", "test/a/0.png", "test/b/1.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(np.zeros((6, 6, 3), np.uint8)))
    config = {"name": "image_folder", "path": str(tmp_path), "data_dir": str(tmp_path / "data"), "max_device_gib": 0}
    data = load(config)
    content = (tmp_path / "train/b/1.png").read_bytes()
    (tmp_path / "train/b/1.png").write_bytes(content[:40])
    with pytest.raises(images.BadImage, match=r"train/b/1\.png is not a readable JPEG or PNG image"):
        read(data.train, steps_per_epoch=1, batch_size=2, local_rows=np.arange(2))
    (tmp_path / "train/b/1.png").write_bytes(png(np.zeros((7, 6, 3), np.uint8)))
    with pytest.raises(images.BadImage, match=r"train/b/1\.png is \(7, 6, 3\), the others are \(6, 6, 3\)"):
        data.train.image[:]
    assert not (tmp_path / "data").exists(), "no cache was written"

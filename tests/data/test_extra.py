"""Extra images: reading, draws of a batch, class counts."""

import dataclasses
import functools

import hypothesis.extra.numpy
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from hypothesis import given
from PIL import Image

from lt_adv.data import device_dataset, extra, images, longtail, prefetch
from lt_adv.data.dataset import Dataset, Split, read_rows
from lt_adv.data.device_dataset import ExtraDraws

RNG = np.random.RandomState(0)
KEY = jax.random.key(5)


def split(number, channels=3):
    image = RNG.randint(0, 256, (number, 4, 4, channels)).astype(np.uint8)
    return Split(image, np.arange(number, dtype=np.int32) % 3, np.arange(number))


def dataset(channels=3):
    return Dataset("fake", split(9, channels), split(3, channels), ("cat", "dog", "eel"), "d" * 64)


@pytest.fixture
def load(tmp_path):
    """Returns `load(**arrays)` of an .npz with these arrays, or of a folder that is written before."""

    def call(data=None, options=None, path="extra.npz", held_out=None, **arrays):
        if arrays:
            np.savez(tmp_path / path, **arrays)
        config = {"extra": str(tmp_path / path), "data_dir": str(tmp_path / "data"), **(options or {})}
        return extra.load(data or dataset(), config, held_out)

    return call


def test_npz_is_read_and_cached(load, tmp_path):
    image, label = split(5).image, np.array([2, 2, 0, 1, 2])
    first = load(image=image, label=label)
    np.testing.assert_array_equal(first.split.image, image)
    assert first.split.label.tolist() == label.tolist() and first.split.index.tolist() == [-1, -2, -3, -4, -5]
    assert isinstance(first.split.image, np.memmap) and load().digest == first.digest
    (cached,) = (tmp_path / "data" / "lt_adv_cache").iterdir()
    assert cached.name.startswith("extra-")
    changed = image.copy()
    changed[4, 3, 3, 2] ^= 1
    digests = {load(image=changed, label=label).digest, load(image=image, label=label[::-1]).digest, first.digest}
    assert len(digests) == 3
    assert extra.load(dataset(), {"name": "fake", "extra": ""}) is None


def test_images_are_resized_like_those_of_the_data_set(load):
    grey = split(4, channels=1).image[..., 0].repeat(2, 1).repeat(2, 2)
    actual = load(dataset(1), {"image_size": 4}, image=grey, label=[0, 1, 2, 0]).split.image
    np.testing.assert_array_equal(actual, images.resize(grey[..., None], 4))


def test_images_of_a_held_out_split_are_counted(load, monkeypatch, caplog):
    """Repeated ones each time, with a warning; the count is cached for the same images."""
    data = dataset()
    image = np.concatenate([split(5).image, data.test.image[[1, 1]]])
    image[0] = data.test.image[2]
    image[0, 3, 3, 2] ^= 1  # a single level differs
    load_again = functools.partial(load, held_out={"test": data.test}, data=data)
    assert load_again(image=image, label=np.zeros(7, int)).copies == {"test": 2}
    assert caplog.text.count("extra.npz: 2 of 7 images are also test images") == 1
    with monkeypatch.context() as patch:
        patch.setattr(extra, "number_of_copies", None)
        assert load_again().copies == {"test": 2}
    fewer = dataclasses.replace(data.test, image=data.test.image[:1], index=data.test.index[:1])
    assert load(data, held_out={"test": fewer}).copies == {"test": 0} and load(data).copies == {}


@given(hypothesis.extra.numpy.arrays(np.uint8, (5, 1, 2, 1), elements=st.integers(0, 2)), st.integers(1, 4))
def test_number_of_copies(image, rows):
    expected = sum(any((a == b).all() for b in image[3:]) for a in image[:3])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extra, "BLOCK_BYTES", 2 * rows)
        assert extra.number_of_copies(image[:3], image[3:]) == expected


def write_folder(folder, names=("dog", "cat"), side=4, mode="RGB"):
    pixels = {}
    for name in names:
        (folder / name).mkdir(parents=True)
        for i in range(2):
            array = RNG.randint(0, 256, (side, side, 3) if mode == "RGB" else (side, side)).astype(np.uint8)
            Image.fromarray(array).save(folder / name / f"{i}.png")
            pixels[name, i] = array
    return pixels


@pytest.mark.parametrize("limit", [None, 0.0])
def test_folder_of_classes(load, tmp_path, limit):
    """By class and name; decoded into the cache, or at each access above the limit. A class may have no images."""
    pixels = write_folder(tmp_path / "folder")
    loaded = load(options={"max_device_gib": limit}, path="folder", held_out={"test": split(3)})
    assert loaded.copies == {"test": None if limit == 0 else 0}
    result = loaded.split
    assert result.label.tolist() == [0, 0, 1, 1]
    assert isinstance(result.image, images.LazyImages) == (limit == 0)
    expected = [pixels[name, i] for name in ("cat", "dog") for i in range(2)]
    np.testing.assert_array_equal(np.asarray(result.image), expected)
    assert extra.count_images(tmp_path / "folder") == 4


def test_grey_folder_of_a_colour_data_set(load, tmp_path):
    write_folder(tmp_path / "folder", mode="L")
    image = np.asarray(load(path="folder").split.image)
    assert image.shape == (4, 4, 4, 3) and np.all(image == image[..., :1])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"label": [0]}, "has no array image; it has label"),
        ({"image": split(2).image}, "has no array label; it has image"),
        ({"image": split(2).image / 255, "label": [0, 1]}, r"image must be uint8 .* not float64 \(2, 4, 4, 3\)"),
        ({"image": split(0).image, "label": np.zeros(0, int)}, r"image must be uint8 .* not uint8 \(0, 4, 4, 3\)"),
        ({"image": split(2).image, "label": [0.0, 1.0]}, "label: the labels must be 2 whole numbers .* not float64"),
        ({"image": split(2).image, "label": [0, 3]}, "1 of 2 labels are not whole numbers from 0 to 2, such as 3"),
        ({"image": split(2).image, "label": [0, -1]}, "1 of 2 labels are not whole numbers from 0 to 2, such as -1"),
        ({"image": split(2).image, "label": [0, 1, 2]}, r"one for each image, not int64 \(3,\)"),
        ({"image": split(2, 1).image, "label": [0, 1]}, r"are 4 x 4 x 1 .* those of fake are 4 x 4 x 3"),
        ({"image": split(2).image[:, :3], "label": [0, 1]}, r"are 3 x 4 x 3 .*config.data.image_size=N"),
        ({"image": np.array([None]), "label": [0]}, "pickled objects are not read"),
    ],
)
def test_faults_of_a_file_are_one_line(load, tmp_path, arrays, message):
    with pytest.raises(ValueError, match=message) as error:
        load(**arrays)
    assert "\n" not in str(error.value) and "extra.npz" in str(error.value)
    assert not list((tmp_path / "data").rglob("*.npy"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"names": ("cat", "bird")}, "has a folder 'bird', which is not a class of fake: its classes are 'cat', 'dog'"),
        ({"side": 5}, "are 5 x 5 x 3 .* those of fake are 4 x 4 x 3"),
        ({"names": ()}, "There is no file or folder"),
    ],
)
def test_faults_of_a_folder_are_one_line(load, tmp_path, options, message):
    write_folder(tmp_path / "folder", **options)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load(path="folder")


def test_colour_folder_of_a_grey_data_set_is_refused(load, tmp_path):
    write_folder(tmp_path / "folder")
    with pytest.raises(ValueError, match="are 4 x 4 x 3 .* those of fake are 4 x 4 x 1"):
        load(dataset(1), path="folder")


@pytest.mark.parametrize("per_batch", [1, 7, 15])
@pytest.mark.parametrize("class_aware", [False, True])
def test_every_batch_has_its_number_of_extra_images(per_batch, class_aware):
    """The others are those that the sampler draws for a smaller batch; every device has its share of both."""
    data, added = split(50), ExtraDraws(split(11), per_batch)
    classes = jax.device_put(device_dataset.class_table(data.label, 3)) if class_aware else None
    options = {"num_examples": 50, "classes": classes}
    rows = np.asarray(device_dataset.epoch_indices(KEY, 2, steps_per_epoch=3, batch_size=16, extra=added, **options))
    for step in range(3):
        is_extra = rows[step] >= 50
        assert is_extra.sum() == per_batch and np.ptp(is_extra.reshape(4, 4).sum(1)) <= 1
        real = device_dataset.batch_rows(KEY, 2, step, batch_size=16 - per_batch, **options)
        np.testing.assert_array_equal(rows[step][~is_extra], real)
        np.testing.assert_array_equal(
            rows[step], device_dataset.batch_rows(KEY, 2, step, batch_size=16, extra=added, **options)
        )


def test_an_epoch_repeats_no_extra_image_before_all_are_drawn():
    drawn = [
        [np.asarray(device_dataset.extra_indices(KEY, epoch, step, 10, 4)) for step in range(5)] for epoch in range(3)
    ]
    for epoch in drawn:
        order = np.concatenate(epoch)
        assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
        assert not np.array_equal(order[:10], order[10:])
    assert len({tuple(np.concatenate(epoch)) for epoch in drawn}) == 3


def test_draws_are_uniform_over_the_extra_images():
    """First draws of 2,000 epochs: chi-squared with 6 degrees of freedom, below its 0.999 quantile."""
    first = jax.vmap(lambda epoch: device_dataset.extra_indices(KEY, epoch, 0, 7, 1)[0])(np.arange(2000))
    counts = np.bincount(first, minlength=7)
    assert np.sum((counts - 2000 / 7) ** 2 / (2000 / 7)) < 22.46


def test_rows_of_concatenated_splits():
    first, second = split(5), Split(split(3).image, np.array([2, 1, 0], np.int32), -1 - np.arange(3))
    image, label, index = read_rows((first, second), np.array([6, 0, 7, 4]))
    np.testing.assert_array_equal(image, [second.image[1], first.image[0], second.image[2], first.image[4]])
    assert label.tolist() == [1, 0, 0, first.label[4]] and index.tolist() == [-2, 0, -3, 4]


def test_prefetched_batches_have_the_rows_of_the_steps(load, tmp_path):
    """Extra images that are decoded at each access; restarted within the second epoch."""
    write_folder(tmp_path / "folder")
    data, added = split(14), ExtraDraws(load(options={"max_device_gib": 0.0}, path="folder").split, 2)
    columns = {k: np.asarray(v) for k, v in device_dataset.put(data, jax.make_mesh((1,), ("data",)), added).items()}
    options = {"steps_per_epoch": 3, "batch_size": 4, "extra": added}
    with prefetch.batches(data, KEY, 4, 7, np.arange(4), **options) as batches:
        for step, batch in zip(range(4, 7), batches, strict=True):
            row = device_dataset.batch_rows(KEY, step // 3, step % 3, num_examples=14, batch_size=4, extra=added)
            np.testing.assert_array_equal(batch["image"].reshape(4, -1), columns["image"][row])
            for name in ("label", "index"):
                np.testing.assert_array_equal(batch[name], columns[name][row])
            assert (batch["index"] < 0).sum() == 2


def test_mixed_class_counts_are_the_prior_of_a_batch():
    label = np.array([2, 2, 2, 1], np.int32)
    added = extra.Extra(Split(split(4).image, label, -1 - np.arange(4)), "")
    counts = extra.mixed_counts([60, 30, 10], added, 12, 16)
    real, generated = np.array([0.6, 0.3, 0.1]), np.array([0, 0.25, 0.75])
    np.testing.assert_allclose(counts / counts.sum(), 0.25 * real + 0.75 * generated, rtol=1e-15)
    assert counts[0] == 60, "a class without extra images keeps its count"
    assert longtail.groups(counts)["head"].tolist() == [2]

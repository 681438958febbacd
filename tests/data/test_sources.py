"""Loading of digits, image folders and .npz files."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from lt_adv.data import images, load


def picture(seed, shape=(6, 6, 3)):
    return np.random.RandomState(seed).randint(0, 256, shape).astype(np.uint8)


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


@pytest.fixture
def folder(tmp_path):
    """Two classes with three training and two test images each, in PNG."""
    for split, count in (("train", 3), ("test", 2)):
        for c, name in enumerate(("cat", "dog")):
            for i in range(count):
                save(tmp_path / "images" / split / name / f"{i}.png", picture(100 * c + 10 * count + i))
    return tmp_path / "images"


@pytest.fixture
def read(tmp_path):
    """`read(name, path)` loads a set with the cache in `tmp_path`."""
    return lambda name, path, **options: load({"name": name, "path": str(path), "data_dir": str(tmp_path), **options})


def test_digits():
    data = load({"name": "digits"})
    assert data.train.image.shape == (1252, 8, 8, 1) and data.test.image.shape == (545, 8, 8, 1)
    assert data.train.image.dtype == np.uint8 and data.train.image.max() == 255
    assert data.train.label.dtype == np.int32 and data.train.index.dtype == np.int64
    assert data.class_names == tuple("0123456789")
    assert sorted([*data.train.index, *data.test.index]) == list(range(1797))
    counts = [np.bincount(s.label) for s in (data.train, data.test)]
    np.testing.assert_array_equal(counts[0], (0.7 * sum(counts)).astype(int))
    assert load({"name": "digits"}).digest == data.digest
    assert load({"name": "digits", "image_size": 16}).test.image.shape == (545, 16, 16, 1)
    with pytest.raises(ValueError):
        data.train.image[0] = 0

    from sklearn.datasets import load_digits

    raw = load_digits()
    np.testing.assert_array_equal(data.test.label, raw.target[data.test.index])
    error = data.test.image[..., 0] / 255 - raw.images[data.test.index] / 16
    assert np.abs(error).max() < 0.5 / 255 + 1e-9


def test_image_folder(folder, read):
    data = read("image_folder", folder)
    assert data.class_names == ("cat", "dog")
    np.testing.assert_array_equal(data.train.label, [0, 0, 0, 1, 1, 1])
    np.testing.assert_array_equal(data.train.index, np.arange(6))
    np.testing.assert_array_equal(data.train.image[4], picture(131))
    np.testing.assert_array_equal(data.test.image[0], picture(20))
    assert isinstance(data.train.image, np.memmap) and not data.train.image.flags.writeable


def test_changed_file_is_decoded_again(folder, read):
    before, changed = read("image_folder", folder), folder / "train/cat/0.png"
    size = changed.stat().st_size
    save(changed, picture(99))
    assert changed.stat().st_size == size, "only the time differs"
    after = read("image_folder", folder)
    assert after.digest != before.digest
    np.testing.assert_array_equal(after.train.image[0], picture(99))


def test_jpeg_is_decoded_and_other_files_are_ignored(folder, read):
    smooth = np.repeat(np.arange(0, 48, 8, dtype=np.uint8)[:, None, None], 6, 1).repeat(3, 2)
    save(folder / "train/cat/3.JPG", smooth, format="JPEG", quality=95)
    (folder / "train/cat/notes.txt").write_text("no image")
    (folder / "train/cat/.hidden.png").write_bytes(b"no image")
    (folder / "train/readme.md").write_text("no class")
    data = read("image_folder", folder)
    assert len(data.train) == 7
    assert np.abs(data.train.image[3].astype(int) - smooth).max() < 12


def test_many_images_keep_their_order(tmp_path, read, monkeypatch):
    monkeypatch.setattr(images, "CHUNK", 3)
    for split, count in (("train", 230), ("test", 2)):
        for i in range(count):
            save(tmp_path / "many" / split / "a" / f"{i:03}.png", np.full((2, 2, 3), i, np.uint8))
    data = read("image_folder", tmp_path / "many")
    np.testing.assert_array_equal(data.train.image[:, 0, 0, 0], np.arange(230))


def test_image_modes_are_converted(folder, read):
    grey = picture(7, (6, 6))
    save(folder / "train/cat/0.png", grey)
    rgba = np.concatenate([picture(8), np.full((6, 6, 1), 9, np.uint8)], -1)
    save(folder / "train/cat/1.png", rgba)
    Image.fromarray(picture(9)).quantize(16).save(folder / "train/cat/2.png")
    deep = (grey.astype(np.uint16) << 8) + 77
    save(folder / "train/dog/0.png", deep)
    data = read("image_folder", folder)
    np.testing.assert_array_equal(data.train.image[0], np.repeat(grey[..., None], 3, -1))
    np.testing.assert_array_equal(data.train.image[1], picture(8))
    np.testing.assert_array_equal(data.train.image[3], np.repeat(grey[..., None], 3, -1))


def test_grey_folder_has_one_channel(tmp_path, read):
    for split in ("train", "test"):
        save(tmp_path / "grey" / split / "a" / "0.png", picture(1, (4, 5)))
    data = read("image_folder", tmp_path / "grey")
    np.testing.assert_array_equal(data.train.image[0, ..., 0], picture(1, (4, 5)))


def test_different_sizes_are_refused_without_image_size(folder, read):
    save(folder / "test/dog/1.png", picture(5, (4, 8, 3)))
    with pytest.raises(ValueError, match=r"train/cat/0.png is 6 x 6, .*test/dog/1.png is 8 x 4; .*image_size"):
        read("image_folder", folder)
    data = read("image_folder", folder, image_size=4)
    assert data.train.image.shape == (6, 4, 4, 3)
    # Scaled to fit, then cropped at the centre: an 8 x 4 image only loses its sides.
    np.testing.assert_array_equal(data.test.image[3], picture(5, (4, 8, 3))[:, 2:6])


@pytest.mark.parametrize("size", [0, -3, 2.5])
def test_invalid_image_size_is_refused(folder, read, size):
    with pytest.raises(ValueError, match="image_size"):
        read("image_folder", folder, image_size=size)


def test_damaged_images_are_named(folder, read, monkeypatch):
    path = folder / "train/dog/1.png"
    original = path.read_bytes()
    damaged = [(b"", "is empty"), (b"no image", "is not a readable"), (original[:-40], "is not .*truncated")]
    for content, message in damaged:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"train/dog/1.png {message}") as caught:
            read("image_folder", folder)
        assert "\n" not in str(caught.value)
    path.write_bytes(original)
    monkeypatch.setattr(images, "MAX_PIXELS", 35)
    with pytest.raises(ValueError, match="declares 6 x 6 pixels"):
        read("image_folder", folder)


def test_bmp_image_with_the_suffix_png_is_refused(folder, read):
    save(folder / "train/cat/0.png", picture(0), format="BMP")
    with pytest.raises(ValueError, match="cat/0.png is not a readable JPEG or PNG"):
        read("image_folder", folder)


def test_incomplete_folders_are_refused(folder, read):
    with pytest.raises(FileNotFoundError, match="nowhere/train"):
        read("image_folder", folder / "nowhere")
    (folder / "test/bird").mkdir()
    with pytest.raises(ValueError, match="bird has no images"):
        read("image_folder", folder)
    save(folder / "test/bird/0.png", picture(0))
    with pytest.raises(ValueError, match="'bird' .*no images in .*train"):
        read("image_folder", folder)
    with pytest.raises(ValueError, match="config.data.path"):
        load({"name": "image_folder", "path": None})


def test_npz(tmp_path, read):
    arrays = {"train_image": picture(0, (5, 4, 4, 3)), "train_label": np.array([0, 1, 2, 0, 1])}
    arrays |= {"test_image": picture(1, (2, 4, 4, 3)), "test_label": np.array([1, 2])}
    np.savez_compressed(tmp_path / "a.npz", **arrays)
    data = read("npz", tmp_path / "a.npz")
    np.testing.assert_array_equal(data.train.image, arrays["train_image"])
    np.testing.assert_array_equal(data.test.label, [1, 2])
    np.testing.assert_array_equal(data.train.index, np.arange(5))
    assert data.class_names == ("0", "1", "2")

    grey = {**arrays, "train_image": picture(0, (5, 4, 4)), "test_image": picture(1, (2, 4, 4))}
    np.savez(tmp_path / "b.npz", **grey, class_names=np.array(["x", "y", "z"]))
    data = read("npz", tmp_path / "b.npz", image_size=2)
    assert data.train.image.shape == (5, 2, 2, 1) and data.class_names == ("x", "y", "z")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_image": np.zeros((2, 4, 4, 3), np.float32)}, "must be uint8"),
        ({"train_image": np.zeros((2, 4, 4, 2), np.uint8)}, "must be uint8"),
        ({"train_label": np.array([0, 1, 1])}, "must be 2 whole numbers"),
        ({"train_label": np.array([0, -1])}, "whole numbers from 0"),
        ({"train_label": np.array([0.0, 1.0])}, "whole numbers from 0"),
        ({"train_label": np.array([0, {}], dtype=object)}, "pickled objects are not read"),
        ({"test_image": np.zeros((2, 5, 4, 3), np.uint8)}, r"train images are \(4, 4, 3\) and test images"),
        ({"train_label": np.array([0, 10**12])}, "the labels go up to 1000000000000, but each class needs"),
        ({"class_names": np.array(["x"])}, "class_names has 1"),
        ({"class_names": np.array("xy")}, "class_names has 1"),
    ],
)
def test_invalid_npz_is_refused(tmp_path, read, change, message):
    arrays = {f"{s}_image": picture(0, (2, 4, 4, 3)) for s in ("train", "test")}
    arrays |= {f"{s}_label": np.array([0, 1]) for s in ("train", "test")}
    np.savez(tmp_path / "a.npz", **{**arrays, **change})
    with pytest.raises(ValueError, match=message):
        read("npz", tmp_path / "a.npz")


def test_missing_or_damaged_npz_is_refused(tmp_path, read):
    with pytest.raises(FileNotFoundError, match="no file"):
        read("npz", tmp_path / "a.npz")
    (tmp_path / "a.npz").write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(ValueError, match="not a readable .npz"):
        read("npz", tmp_path / "a.npz")
    np.save(tmp_path / "one.npy", picture(0))
    with pytest.raises(ValueError, match="not a readable .npz"):
        read("npz", (tmp_path / "one.npy").rename(tmp_path / "one.npz"))
    np.savez(tmp_path / "b.npz", train_image=picture(0))
    with pytest.raises(ValueError, match="no array train_label, test_image, test_label; it has train_image"):
        read("npz", tmp_path / "b.npz")


def test_unknown_name_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Unknown data set 'cifar1'. Did you mean 'cifar10'"):
        load({"name": "cifar1", "data_dir": str(tmp_path)})


def test_default_data_dir_is_that_of_tensorflow_datasets(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "shared"))
    load({"name": "image_folder", "path": str(folder), "data_dir": None})
    assert (tmp_path / "shared/lt_adv_cache").is_dir()


def test_digits_import_neither_tensorflow_nor_jax():
    code = "import sys; from lt_adv.data import load; load({'name': 'digits'}); print([m for m in sys.modules if m in "
    code += "('tensorflow', 'tensorflow_datasets', 'jax')])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n",
            "a Git LFS pointer in place of the file",
        ),
        (b"<html>Quota exceeded</html>", "an HTML page"),
        (b"", "empty"),
        (b"\x1f\x8b\x08\x00", "a gzip archive"),
        (b"\x80\x04N.", "a pickle"),
        (b"Access denied", "a text file that begins with 'Access denied'"),
        (b"\x00\x01\x02", "is not a zip archive"),
    ],
)
def test_other_file_in_place_of_an_npz_is_refused(tmp_path, read, content, what):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.npz is not a readable \.npz: .*{what}") as caught:
        read("npz", tmp_path / "a.npz")
    assert "allow_pickle" not in str(caught.value) and "\n" not in str(caught.value)


def test_cache_warning_does_not_recommend_pickle(tmp_path, read, folder, caplog):
    read("image_folder", folder)
    (path,) = tmp_path.glob("lt_adv_cache/*/train_label.npy")
    path.write_bytes(b"\x80\x04N.")
    read("image_folder", folder)
    assert "is damaged" in caplog.text and "allow_pickle" not in caplog.text

"""Reading, checking and downloading of archives, with small archives of the official formats."""

import dataclasses
import hashlib
import io
import shutil
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from lt_adv.data import archives, load, tfds_source

OFFLINE = "python -m lt_adv.main --config=configs/robal.py:dataset=digits"
RNG = np.random.RandomState(0)
CIFAR10_RECORDS = {f"data_batch_{i}.bin": 3 for i in range(1, 6)} | {"test_batch.bin": 4}


def records(count, header, classes):
    """Random binary records of CIFAR: `header` label bytes, of which the last is the class, then three planes."""
    array = RNG.randint(0, 256, (count, header + 3072)).astype(np.uint8)
    array[:, :header] = RNG.randint(0, classes, (count, header))
    return array


def pixels(array, header):
    return array[:, header:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)


def tar(files, folder="cifar"):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def jpeg(shape):
    stream = io.BytesIO()
    Image.fromarray(RNG.randint(0, 256, shape).astype(np.uint8)).save(stream, "JPEG")
    return stream.getvalue()


@pytest.fixture
def publish(tmp_path, monkeypatch):
    """`publish(name, content)` replaces the official archive `name` by `content` and puts it in the manual folder."""

    def replace(name, content, place=True):
        published = tmp_path / "published"
        published.write_bytes(content)
        archive = dataclasses.replace(
            archives.ARCHIVES[name],
            size=len(content),
            sha256=hashlib.sha256(content).hexdigest(),
            url=published.as_uri(),
        )
        monkeypatch.setitem(archives.ARCHIVES, name, archive)
        manual = tmp_path / "downloads/manual"
        manual.mkdir(parents=True, exist_ok=True)
        if place:
            (manual / archive.file).write_bytes(content)
        return manual / archive.file

    return replace


@pytest.fixture
def cifar10():
    batches = {name: records(count, 1, 10) for name, count in CIFAR10_RECORDS.items()}
    names = "\n".join(f"class{i}" for i in range(10)) + "\n\n"
    return batches, tar({k: v.tobytes() for k, v in batches.items()} | {"batches.meta.txt": names.encode()})


def test_published_checksums():
    assert {k: (a.file, a.size, a.sha256[:8]) for k, a in archives.ARCHIVES.items()} == {
        "cifar10": ("cifar-10-binary.tar.gz", 170052171, "c4a38c50"),
        "cifar100": ("cifar-100-binary.tar.gz", 168513733, "58a81ae1"),
        "tiny_imagenet": ("tiny-imagenet-200.zip", 248100043, "6198c8ae"),
    }


def test_missing_archive_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        load({"name": "cifar10", "data_dir": str(tmp_path)})
    message = str(caught.value)
    for part in (
        "cifar-10-binary.tar.gz",
        str(tmp_path / "downloads/manual"),
        "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        "--config.data.download=True",
        OFFLINE,
    ):
        assert part in message
    assert "\n" not in message and not list(tmp_path.iterdir())


def test_cifar10_keeps_the_original_order(tmp_path, publish, cifar10):
    batches, content = cifar10
    path = publish("cifar10", content)
    data = load({"name": "cifar10", "data_dir": str(tmp_path)})
    train = np.concatenate([batches[f"data_batch_{i}.bin"] for i in range(1, 6)])
    np.testing.assert_array_equal(data.train.image, pixels(train, 1))
    np.testing.assert_array_equal(data.train.label, train[:, 0])
    np.testing.assert_array_equal(data.train.index, np.arange(15))
    np.testing.assert_array_equal(data.test.image, pixels(batches["test_batch.bin"], 1))
    assert data.class_names == tuple(f"class{i}" for i in range(10))

    # With an image size the set is prepared by the builder. Then the cache and the prepared set replace the archive.
    assert not (tmp_path / "lt_adv_cifar10").exists()
    small = load({"name": "cifar10", "data_dir": str(tmp_path), "image_size": 8})
    assert small.train.image.shape == (15, 8, 8, 3)
    path.unlink()
    assert load({"name": "cifar10", "data_dir": str(tmp_path)}).digest == data.digest
    assert load({"name": "cifar10", "data_dir": str(tmp_path), "image_size": 4}).train.image.shape == (15, 4, 4, 3)
    import tensorflow_datasets as tfds

    example = tfds.data_source("lt_adv_cifar10", split="train", data_dir=tmp_path)[0]
    np.testing.assert_array_equal(example["image"], data.train.image[example["index"]])


def test_cifar100_has_the_fine_labels(tmp_path, publish):
    train, test = records(6, 2, 20), records(2, 2, 20)
    names = "\n".join(f"fine{i}" for i in range(100))
    files = {"train.bin": train.tobytes(), "test.bin": test.tobytes(), "fine_label_names.txt": names.encode()}
    publish("cifar100", tar(files | {"coarse_label_names.txt": b"coarse"}))
    data = load({"name": "cifar100", "data_dir": str(tmp_path)})
    np.testing.assert_array_equal(data.train.label, train[:, 1])
    np.testing.assert_array_equal(data.test.image, pixels(test, 2))
    assert len(data.class_names) == 100 and data.class_names[7] == "fine7"


@pytest.mark.parametrize("name", archives.CIFAR)
def test_cifar_from_the_archive_equals_the_prepared_set(tmp_path, publish, cifar10, name):
    """Arrays, labels, indices, class names and digest; also the content of the cache."""
    from lt_adv.data import builders

    if name == "cifar10":
        publish(name, cifar10[1])
    else:
        names = "\n".join(f"fine{i}" for i in range(100)).encode()
        files = {"train.bin": records(6, 2, 20), "test.bin": records(2, 2, 20)}
        publish(name, tar({k: v.tobytes() for k, v in files.items()} | {"fine_label_names.txt": names}))
    config = {"name": name, "data_dir": str(tmp_path)}

    def load_and_read_cache():
        data = load(config)
        (folder,) = (tmp_path / "lt_adv_cache").iterdir()
        return data, {path.name: path.read_bytes() for path in folder.iterdir()}, folder

    direct, direct_cache, folder = load_and_read_cache()
    assert not (tmp_path / f"lt_adv_{name}").exists()
    shutil.rmtree(folder)
    tfds_source._prepare(builders.BUILDERS[name](data_dir=tmp_path), tmp_path / "downloads" / "manual")
    prepared, prepared_cache, _ = load_and_read_cache()
    assert direct_cache == prepared_cache and len(direct_cache) == 7
    assert direct.digest == prepared.digest and direct.class_names == prepared.class_names
    for split, expected in ((direct.train, prepared.train), (direct.test, prepared.test)):
        for field in ("image", "label", "index"):
            np.testing.assert_array_equal(getattr(split, field), getattr(expected, field), strict=True)


def test_tiny_imagenet(tmp_path, publish):
    wnids = [f"n{i:08}" for i in range(200)]
    stream, root = io.BytesIO(), "tiny-imagenet-200"
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr(f"{root}/wnids.txt", "\n".join(reversed(wnids)))
        words = [f"{wnid}\t{'crane' if i < 2 else f'word{i}'}, other" for i, wnid in enumerate(wnids)]
        archive.writestr(f"{root}/words.txt", "\n".join(words))
        archive.writestr(f"{root}/train/", "")
        encoded = {}
        for wnid in wnids:
            for k in (1, 0):
                encoded[wnid, k] = jpeg((64, 64) if k else (64, 64, 3))
                archive.writestr(f"{root}/train/{wnid}/images/{wnid}_{k}.JPEG", encoded[wnid, k])
            archive.writestr(f"{root}/train/{wnid}/{wnid}_boxes.txt", "")
        tests = [jpeg((64, 64, 3)) for _ in range(2)]
        for k, content in enumerate(tests):
            archive.writestr(f"{root}/val/images/val_{k}.JPEG", content)
        annotations = [f"val_1.JPEG\t{wnids[3]}\t0\t0\t9\t9", f"val_0.JPEG\t{wnids[150]}\t0\t0\t9\t9"]
        archive.writestr(f"{root}/val/val_annotations.txt", "\n".join(annotations))
    publish("tiny_imagenet", stream.getvalue())
    data = load({"name": "tiny_imagenet", "data_dir": str(tmp_path)})
    assert data.train.image.shape == (400, 64, 64, 3) and data.class_names[:3] == (
        "crane (n00000000)",
        "crane (n00000001)",
        "word2",
    )
    np.testing.assert_array_equal(data.train.index, np.arange(400))
    np.testing.assert_array_equal(data.train.label, np.repeat(np.arange(200), 2))
    np.testing.assert_array_equal(data.test.label, [150, 3])
    decoded = np.asarray(Image.open(io.BytesIO(encoded[wnids[5], 0])))
    np.testing.assert_array_equal(data.train.image[10], decoded)
    np.testing.assert_array_equal(data.test.image[1], np.asarray(Image.open(io.BytesIO(tests[1]))))
    assert (data.train.image[11] == data.train.image[11][..., :1]).all()  # a grey file


def test_damaged_archive_is_refused(tmp_path, publish, cifar10):
    path = publish("cifar10", cifar10[1])
    original = path.read_bytes()
    for content, message in [(original[:-1], "bytes"), (original[:-1] + b"?", "sha256")]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"has {message}|has .* {message}") as caught:
            load({"name": "cifar10", "data_dir": str(tmp_path)})
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["../evil", "/evil", "a\\..\\evil"])
def test_members_outside_the_archive_are_refused(tmp_path, publish, cifar10, name):
    publish("cifar10", tar({name: b"x"}, folder="" if name[0] == "/" else "cifar"))
    with pytest.raises(ValueError, match="member outside its folder"):
        load({"name": "cifar10", "data_dir": str(tmp_path)})
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr(name, "x")
    (tmp_path / "a.zip").write_bytes(stream.getvalue())
    with pytest.raises(ValueError, match="member outside its folder"):
        archives.read_tiny_imagenet(tmp_path / "a.zip")


def test_archives_with_other_content_are_refused(tmp_path, publish):
    publish("cifar10", tar({"readme.html": b"x"}))
    with pytest.raises(ValueError, match="has no data_batch_1.bin"):
        load({"name": "cifar10", "data_dir": str(tmp_path)})
    publish("cifar100", b"no archive")
    with pytest.raises(ValueError, match="tar.gz is not a readable archive"):
        load({"name": "cifar100", "data_dir": str(tmp_path)})
    publish("tiny_imagenet", b"no archive")
    with pytest.raises(ValueError, match="zip is not a readable archive"):
        load({"name": "tiny_imagenet", "data_dir": str(tmp_path)})


def test_download_is_optional_checked_and_atomic(tmp_path, publish, cifar10, monkeypatch):
    path = publish("cifar10", cifar10[1], place=False)
    with pytest.raises(FileNotFoundError, match="download=True"):
        load({"name": "cifar10", "data_dir": str(tmp_path)})
    archive = archives.ARCHIVES["cifar10"]
    monkeypatch.setitem(archives.ARCHIVES, "cifar10", dataclasses.replace(archive, sha256="0" * 64))
    with pytest.raises(ValueError, match="has sha256"):
        load({"name": "cifar10", "data_dir": str(tmp_path), "download": True})
    assert not list(path.parent.iterdir())
    missing = dataclasses.replace(archive, url=(tmp_path / "nothing").as_uri())
    monkeypatch.setitem(archives.ARCHIVES, "cifar10", missing)
    with pytest.raises(FileNotFoundError, match="could not be downloaded .* yourself") as caught:
        load({"name": "cifar10", "data_dir": str(tmp_path), "download": True})
    assert "\n" not in str(caught.value)
    monkeypatch.setitem(archives.ARCHIVES, "cifar10", archive)
    assert len(load({"name": "cifar10", "data_dir": str(tmp_path), "download": True}).train) == 15
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_unwritable_folder_is_reported_in_one_line(tmp_path, publish, cifar10):
    publish("cifar10", cifar10[1])
    (tmp_path / "lt_adv_cifar10").write_text("a file where a folder should be")
    with pytest.raises(ValueError, match="Cannot prepare lt_adv_cifar10 .*data_dir") as caught:
        load({"name": "cifar10", "data_dir": str(tmp_path), "image_size": 8})
    assert "\n" not in str(caught.value)


def test_builders_do_not_import_tensorflow(tmp_path, cifar10):
    (tmp_path / "a.tar.gz").write_bytes(cifar10[1])
    code = f"""
import dataclasses, hashlib, pathlib, shutil, sys
from lt_adv.data import archives, load
root = pathlib.Path({str(tmp_path)!r})
content = (root / "a.tar.gz").read_bytes()
archives.ARCHIVES["cifar10"] = a = dataclasses.replace(
    archives.CIFAR10, size=len(content), sha256=hashlib.sha256(content).hexdigest())
(root / "downloads/manual").mkdir(parents=True)
shutil.copy(root / "a.tar.gz", root / "downloads/manual" / a.file)
print(len(load({{"name": "cifar10", "data_dir": str(root), "image_size": 8}}).train), "tensorflow" in sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == "15 False", result.stderr
    # The second start does not import TensorFlow-Datasets.
    code = (
        code.split('(root / "downloads')[0]
        + """
data = load({"name": "cifar10", "data_dir": str(root), "image_size": 8})
print(len(data.train), "tensorflow_datasets" in sys.modules)
"""
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "15 False", result.stderr


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "tiny_imagenet"])
@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n", "a Git LFS pointer in place"),
        (b"<html>moved</html>", "an HTML page"),
    ],
)
def test_other_file_in_place_of_an_archive_is_refused(tmp_path, name, content, what):
    path = tmp_path / "downloads" / "manual" / archives.ARCHIVES[name].file
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path} is {what}.* Put the published archive there, from http"):
        load({"name": name, "data_dir": str(tmp_path)})
    read = archives.read_tiny_imagenet if name == "tiny_imagenet" else lambda p: archives.read_cifar(p, False)
    with pytest.raises(ValueError, match=f"{path} is not a readable archive .it is {what}"):
        read(path)

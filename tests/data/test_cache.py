"""The cache: a second load decodes nothing, a damaged cache is rebuilt, an unfinished one is never visible."""

import dataclasses
import json
import logging
import os
import subprocess
import sys
import time

import numpy as np
import pytest

from lt_adv.data import cache
from lt_adv.data.dataset import Source, array_reader, in_memory

IMAGE = np.random.RandomState(0).randint(0, 256, (7, 3, 3, 1)).astype(np.uint8)


def make_source(identity="a", fail_after=None, reads=None):
    """A source that appends to `reads` when it is read, and raises `fail_after` in the middle of the images."""

    def blocks():
        yield IMAGE[:4]
        if fail_after:
            raise fail_after
        yield IMAGE[4:]

    def read():
        if reads is not None:
            reads.append(identity)
        split = dataclasses.replace(array_reader(IMAGE, np.arange(7) % 2, np.arange(7)), blocks=blocks)
        return ("even", "odd"), {"train": split, "test": split}

    return Source(identity, read)


def leftovers(data_dir):
    return sorted(p.name for p in (data_dir / "lt_adv_cache").iterdir())


def test_second_load_reads_no_source(tmp_path):
    source = make_source(reads=(reads := []))
    first, second = (cache.load(tmp_path, "set", source) for _ in range(2))
    assert reads == ["a"] and first.digest == second.digest
    np.testing.assert_array_equal(second.train.image, IMAGE)
    np.testing.assert_array_equal(second.test.label, np.arange(7) % 2)
    assert isinstance(second.train.image, np.memmap) and second.class_names == ("even", "odd")
    assert first.digest == in_memory("set", make_source()).digest
    assert leftovers(tmp_path) == [cache.folder_of(tmp_path, "set", source).name]


def test_identity_selects_the_cache(tmp_path):
    cache.load(tmp_path, "set", make_source("a"))
    cache.load(tmp_path, "set", make_source("b", reads=(reads := [])))
    assert reads == ["b"] and len(leftovers(tmp_path)) == 2


def flip(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def edit_meta(path):
    meta = json.loads(path.read_text())
    meta["class_names"] = ["x", "y"]
    path.write_text(json.dumps(meta))


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("train_image.npy", flip),
        ("test_label.npy", flip),
        ("train_image.npy", lambda p: p.write_bytes(p.read_bytes()[:-1])),
        ("train_image.npy", lambda p: p.write_bytes(p.read_bytes() + b"0")),
        ("train_image.npy", lambda p: np.save(p, IMAGE[:3])),
        ("train_image.npy", lambda p: p.unlink()),
        ("test_label.npy", lambda p: p.write_bytes(b"")),
        ("meta.json", lambda p: p.write_text("{")),
        ("meta.json", lambda p: p.write_text("[]")),
        ("meta.json", lambda p: p.write_text('{"arrays": {}, "class_names": [], "digest": ""}')),
        ("meta.json", edit_meta),
    ],
)
def test_damaged_cache_is_rebuilt_with_a_warning(tmp_path, caplog, file, damage):
    source = make_source(reads=(reads := []))
    digest = cache.load(tmp_path, "set", source).digest
    folder = cache.folder_of(tmp_path, "set", source)
    damage(folder / file)
    with caplog.at_level(logging.WARNING):
        data = cache.load(tmp_path, "set", source)
    assert len(reads) == 2 and data.digest == digest
    np.testing.assert_array_equal(data.train.image, IMAGE)
    assert len(caplog.records) == 1 and "damaged" in caplog.text and "\n" not in caplog.records[0].getMessage()
    assert leftovers(tmp_path) == [folder.name]


def test_digest_of_large_images_is_not_checked(tmp_path, monkeypatch):
    source = make_source(reads=(reads := []))
    cache.load(tmp_path, "set", source)
    monkeypatch.setattr(cache, "FULL_CHECK_BYTES", 60)
    flip(cache.folder_of(tmp_path, "set", source) / "train_image.npy")
    cache.load(tmp_path, "set", source)
    assert len(reads) == 1


@pytest.mark.parametrize("failure", [ValueError("x.png is not readable"), KeyboardInterrupt()])
def test_interrupted_write_leaves_no_files(tmp_path, failure):
    with pytest.raises(type(failure)):
        cache.load(tmp_path, "set", make_source(fail_after=failure))
    assert leftovers(tmp_path) == []
    assert len(cache.load(tmp_path, "set", make_source()).train) == 7


def test_full_disk_is_reported_in_one_line(tmp_path):
    with pytest.raises(ValueError, match="Cannot write the cache .*No space left.* MiB") as caught:
        cache.load(tmp_path, "set", make_source(fail_after=OSError(28, "No space left on device")))
    assert "\n" not in str(caught.value)


def test_unwritable_data_dir_is_reported_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="Cannot write the cache .*data_dir"):
        cache.load(tmp_path / "file", "set", make_source())


def test_killed_writer_leaves_no_cache(tmp_path):
    code = f"""
import dataclasses, os, signal, pathlib, numpy as np
from lt_adv.data import cache
from lt_adv.data.dataset import Source, array_reader
image = np.zeros((7, 3, 3, 1), np.uint8)
def blocks():
    yield image[:4]
    os.kill(os.getpid(), signal.SIGKILL)
d = dataclasses.replace(array_reader(image, np.zeros(7), np.arange(7)), blocks=blocks)
cache.load(pathlib.Path({str(tmp_path)!r}), "set", Source("a", lambda: (("x",), {{"train": d, "test": d}})))
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    folder = cache.folder_of(tmp_path, "set", make_source())
    (unfinished,) = (tmp_path / "lt_adv_cache").iterdir()
    assert unfinished.name.startswith(f".{folder.name}.") and not folder.exists()
    two_days_ago = time.time() - 2 * cache.STALE_SECONDS
    os.utime(unfinished, (two_days_ago, two_days_ago))
    assert len(cache.load(tmp_path, "set", make_source()).train) == 7
    assert leftovers(tmp_path) == [folder.name]


def test_cache_written_by_a_faster_process_is_used(tmp_path):
    def read():
        cache.load(tmp_path, "set", make_source())
        return make_source().read()

    assert len(cache.load(tmp_path, "set", Source("a", read)).train) == 7
    assert len(leftovers(tmp_path)) == 1


def test_existing_cache_is_not_written(tmp_path, monkeypatch):
    cache.load(tmp_path, "set", make_source())
    monkeypatch.setattr(cache, "_write", lambda *_: pytest.fail("nothing needs to be written"))
    assert len(cache.load(tmp_path, "set", make_source()).train) == 7


RACE = """
import sys
from pathlib import Path
from lt_adv.data import load

for path in sorted(Path(sys.argv[1]).glob("*.npz")):
    assert load({"name": "npz", "path": str(path), "data_dir": sys.argv[1]}).train.image.shape == (3, 2, 2, 1)
"""


def test_two_processes_write_one_cache(tmp_path):
    """Neither replaces the folder that the other has just written and is opening."""
    for number in range(40):
        arrays = {f"{split}_image": np.full((3, 2, 2, 1), number, np.uint8) for split in ("train", "test")}
        np.savez(tmp_path / f"{number}.npz", **arrays, train_label=np.arange(3), test_label=np.arange(3))
    command = [sys.executable, "-c", RACE, str(tmp_path)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert len(list((tmp_path / "lt_adv_cache").iterdir())) == 40


def test_a_temporary_folder_that_vanishes_is_not_stale(tmp_path, monkeypatch):
    """Another process renames its finished folder between the listing and the look at its age."""
    vanished = tmp_path / ".set.abc"
    monkeypatch.setattr(type(tmp_path), "glob", lambda self, pattern: iter([vanished]))
    cache._remove_stale(tmp_path / "set")

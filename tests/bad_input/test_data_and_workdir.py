"""Invalid data and working directories give one line and leave no partial files."""

import errno
import os
import re

import numpy as np
import pytest
from PIL import Image

from lt_adv import main
from lt_adv.runtime import atomic_io
from tests.bad_input.conftest import DIGITS


def test_missing_archive_is_named_with_its_digest(answer, tmp_path):
    printed = answer("--config=configs/robal.py")
    folder = tmp_path / "data" / "downloads" / "manual"
    assert f"cifar-10-binary.tar.gz is not in {folder}: put it there (sha256 c4a38c50" in printed
    assert "--config=configs/robal.py:dataset=digits" in printed


@pytest.fixture
def pictures(tmp_path):
    """Creates an image folder of two classes; `pictures(side)` adds an image of another size."""

    def write(split, name, number, side):
        folder = tmp_path / "pictures" / split / name
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((side, side, 3), number, np.uint8)).save(folder / f"{number}.png")

    for split in ("train", "test"):
        for name in ("cat", "dog"):
            for number in range(4):
                write(split, name, number, 8)
    return lambda side: write("train", "dog", 9, side)


FOLDER = ["--config=configs/at.py:dataset=image_folder", "--config.optim.batch_size=8", "--config.data.imbalance=none"]


def test_images_of_different_sizes_are_refused(answer, no_training, pictures, tmp_path):
    pictures(9)
    printed = answer(*FOLDER, f"--config.data.path={tmp_path / 'pictures'}")
    assert re.search(r"cat/0\.png is 8 x 8, \S*dog/9\.png is 9 x 9; --config\.data\.image_size=N", printed)


def test_padding_larger_than_the_image_is_refused(answer, no_training, pictures, tmp_path):
    arguments = [*FOLDER, f"--config.data.path={tmp_path / 'pictures'}"]
    assert "config.data.pad must be a whole number in [0, 8), not 8" in answer(*arguments, "--config.data.pad=8")
    assert main.main(["main", *arguments, "--config.data.pad=7", f"--workdir={tmp_path / 'run'}"], no_training) == 0


def test_missing_image_folder_is_refused(answer, tmp_path):
    assert "There is no folder" in answer(*FOLDER, f"--config.data.path={tmp_path / 'nowhere'}")


def test_class_without_training_images_is_refused(answer, tmp_path):
    image, label = np.zeros((16, 4, 4, 1), np.uint8), np.arange(16) % 2
    path = tmp_path / "gap.npz"
    arrays = {"train_image": image, "train_label": 2 * label, "test_image": image, "test_label": label}
    np.savez(path, class_names=list("abc"), **arrays)
    arguments = ["--config=configs/at.py:dataset=npz", f"--config.data.path={path}", "--config.data.imbalance=none"]
    assert "The class 'b' has no training image" in answer(*arguments)


def test_batch_size_not_divisible_by_devices_is_refused(answer):
    printed = answer(DIGITS, "--config.optim.batch_size=65")
    assert "config.optim.batch_size = 65 is not a multiple of the 8 devices" in printed


def test_unwritable_workdir_is_refused(answer, tmp_path):
    (tmp_path / "file").write_text("mine")
    for workdir in (tmp_path / "file", tmp_path / "file" / "below", "/proc/run"):
        assert f"{workdir} cannot be written (" in answer(DIGITS, f"--workdir={workdir}")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_unwritable_config_is_refused(answer, monkeypatch, number):
    def fail(path, text):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(atomic_io, "write_atomically", fail)
    assert f"run cannot be written ({os.strerror(number)}): change that, or use another --workdir" in answer(DIGITS)


def test_evaluation_without_a_checkpoint_is_refused(answer, tmp_path):
    assert "There is no checkpoint under" in answer(DIGITS, "--mode=eval")
    (tmp_path / "run").mkdir()
    assert "There is no checkpoint under" in answer(DIGITS, "--mode=eval")
    assert not list((tmp_path / "run").iterdir())

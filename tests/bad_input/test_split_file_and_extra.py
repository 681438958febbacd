"""Bad split files and extra images give one line through `main`, before anything is written."""

import numpy as np
import pytest

from tests.bad_input.conftest import DIGITS


@pytest.fixture
def save(tmp_path):
    def call(**arrays):
        np.savez(tmp_path / "file.npz", **arrays)
        return tmp_path / "file.npz"

    return call


def test_split_files(answer, save, tmp_path):
    option = f"--config.data.split_file={tmp_path / 'file.npz'}"
    assert "There is no file" in answer(DIGITS, option)
    save(indices=np.arange(5))
    assert "The class" in answer(DIGITS, option, "--config.data.imbalance=none")
    save(indices=np.arange(1797))
    assert "are not in the training set of 1252 images" in answer(DIGITS, option)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.data.extra_fraction=0.5"], "config.data.extra_fraction needs config.data.extra"),
        (["--config.data.extra_prior=mixture"], "config.data.extra_prior needs config.data.extra"),
        (["--config.data.extra=x.npz"], "config.data.extra needs config.data.extra_fraction"),
        (["--config.data.extra_fraction=1.0"], "config.data.extra_fraction must be a number in [0, 1), not 1.0"),
        (["--config.data.extra_prior=both"], "Unknown config.data.extra_prior 'both'"),
    ],
)
def test_entries_without_effect(answer, arguments, message):
    assert message in answer(DIGITS, *arguments)


def test_extra_images(answer, save, tmp_path):
    option = [f"--config.data.extra={tmp_path / 'file.npz'}", "--config.data.extra_fraction=0.5"]
    assert "There is no file or folder" in answer(DIGITS, *option)
    image = np.zeros((4, 8, 8, 1), np.uint8)
    save(image=image, label=[0, 1, 2, 10])
    assert "1 of 4 labels are not whole numbers from 0 to 9, such as 10" in answer(DIGITS, *option)
    save(image=image[:, :7], label=[0, 1, 2, 3])
    assert "are 7 x 8 x 1 (height x width x channels), those of digits are 8 x 8 x 1" in answer(DIGITS, *option)
    save(image=image, label=3)
    compilation = ["--mode=compile", "--topology=cpu:1"]
    assert "label must be integers [n], not of shape ()" in answer(DIGITS, *option, *compilation)
    save(image=image, label=[0, 1, 2, 3])
    assert "is 0 of the 64 images of a batch" in answer(DIGITS, option[0], "--config.data.extra_fraction=0.001")

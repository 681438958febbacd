"""The header of records and reports."""

import numpy as np
import pytest

from configs import at
from lt_adv.cli import record_header
from lt_adv.cli.experiment import Experiment


@pytest.mark.parametrize(
    ("fidelity", "addons", "start"),
    [
        ("paper", (), "uniform"),
        ("released_code", (), "one_sided"),
        ("released_code", ("robustlt", "awp"), "uniform"),
    ],
)
@pytest.mark.parametrize("split", ["test", "validation"])
def test_header_names_the_split_and_the_start_of_the_training_attack(fidelity, addons, start, split):
    config = at.get_config("dataset=digits")
    config.fidelity, config.addons, config.eval.split = fidelity, addons, split
    config.data.validation_per_class = 1
    meta = {"step": 7, "total_steps": 7, "stage": "0_train", "stages": 1, "class_counts": [2, 1], "seconds": 1.0}
    experiment = Experiment.from_config(config)
    header = record_header.header(experiment, meta, "some images")
    assert header["training_attack"].endswith(f", start {start}")
    assert (header["split"], header["subset"], header["training"]) == (split, "some images", "finished")


def test_header_names_the_split_file_and_the_extra_images(tmp_path):
    """The extra images from the metadata of the checkpoint: their file is not read."""
    config = at.get_config("dataset=digits")
    plain = Experiment.from_config(config)
    meta = {"step": 7, "total_steps": 7, "stage": "0_train", "stages": 1, "class_counts": [2, 1], "seconds": 1.0}
    assert not {"split_file", "extra_images"} & record_header.header(plain, meta, "").keys()
    np.savez(tmp_path / "split.npz", indices=plain.split.train.index)
    config.data.split_file = str(tmp_path / "split.npz")
    config.data.extra, config.data.extra_fraction = "nowhere.npz", 0.5
    extra = {"file": "nowhere.npz", "digest": "d" * 64, "images": 9, "per_batch": 32, "batch_size": 64, "prior": "real"}
    extra["copies"] = {"validation": None, "test": 2}
    experiment = Experiment.from_config(config)
    header = record_header.header(experiment, {**meta, "extra": extra}, "")
    assert header["dataset"] == "Digits-LT, split file" and header["split_file"] == experiment.split.split_file
    assert header["dataset_digest"] == plain.split.digest[:16], "the same images in the same order"
    description = "nowhere.npz, 9 images, 32 of 64 images of a batch, prior real, digest dddddddddddddddd, "
    description += "not compared with validation images, 2 of them test images"
    assert header["extra_images"] == description

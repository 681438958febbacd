"""The header of records and reports."""

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

"""What a report says of the run that it is of."""

from types import SimpleNamespace

import pytest

from configs import at
from lt_adv.cli import run as runs


@pytest.mark.parametrize(
    ("fidelity", "addons", "start"),
    [
        ("paper", (), "uniform"),
        ("released_code", (), "one_sided"),
        ("released_code", ("robustlt", "awp"), "uniform"),
    ],
)
@pytest.mark.parametrize("split", ["test", "validation"])
def test_header_has_the_split_and_the_start_that_the_attack_had(fidelity, addons, start, split):
    config = at.get_config("dataset=digits")
    config.fidelity, config.addons, config.eval.split = fidelity, addons, split
    meta = {"step": 7, "total_steps": 7, "stage": "0_train", "stages": 1, "class_counts": [2, 1], "seconds": 1.0}
    header = runs.header(config, SimpleNamespace(digest="0" * 64), meta, "some images")
    assert header["training_attack"].endswith(f", start {start}")
    assert (header["split"], header["subset"], header["training"]) == (split, "some images", "finished")

"""Feedback from test images: which images the arms take, the contrasts, and refused arguments."""

import numpy as np
import pytest

from configs import cgrm
from experiments import cgrm_feedback
from lt_adv.cli.experiment import Experiment


def test_the_arms_take_the_images_that_they_name():
    split = Experiment.from_config(cgrm.get_config("dataset=digits")).split
    images = {arm: cgrm_feedback.feedback_images(arm, split).index for arm in cgrm_feedback.ARMS}
    half = cgrm_feedback.seen(split)
    np.testing.assert_array_equal(images["half"], split.test.index[half])
    np.testing.assert_array_equal(images["test"], split.test.index)
    np.testing.assert_array_equal(images["validation"], split.validation.index)
    for c in range(10):
        of_class = half[split.test.label == c]
        assert 0 <= of_class.sum() - (~of_class).sum() <= 1


def test_contrasts():
    """Of two seeds; the second contrast is a difference of differences."""

    def run(test, validation, seen, unseen):
        terms = {f"{a}/{b}": 0.0 for a in ("pgd20", "clean") for b in ("all", "tail", "seen", "unseen")}
        arms = {"test": {"pgd20/all": test}, "validation": {"pgd20/all": validation, "pgd20/seen": 5.0}}
        arms["half"] = {"pgd20/seen": seen, "pgd20/unseen": unseen}
        return {"accuracy": {arm: terms | values for arm, values in arms.items()}}

    runs = [run(42.0, 40.0, 51.0, 40.0), run(46.0, 40.0, 49.0, 40.0)]
    contrasts = cgrm_feedback.summarize(runs)
    assert contrasts["test - validation, pgd20/all"] == pytest.approx({"value": 4.0, "standard_error": 2.0})
    assert contrasts["seen - unseen, pgd20"] == pytest.approx({"value": 5.0, "standard_error": 1.0})
    assert contrasts["test - validation, clean/all"] == {"value": 0.0, "standard_error": 0.0}
    assert cgrm_feedback.summarize(runs[:1])["seen - unseen, pgd20"] == {"value": 6.0, "standard_error": None}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "--config is missing"),
        (["--config=configs/at.py:dataset=digits"], "config.method.name is 'at': this experiment is about cgrm."),
        (["--config=configs/cgrm.py:dataset=digits", "--seed=3"], "Did you mean '--seeds'?"),
        (["--config=configs/cgrm.py:dataset=digits", "--seeds=0"], "--seeds: must be above 0"),
        (["--config=configs/cgrm.py:dataset=digits", "--name=../x"], "--name: must be of letters"),
    ],
)
def test_arguments_are_refused_in_one_line(arguments, expected, capsys):
    assert cgrm_feedback.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line

"""Fixtures for bad input: `answer` checks the exit code and the one-line error."""

from pathlib import Path

import pytest

from lt_adv import main
from lt_adv.training import loop
from lt_adv.training.hooks import Hook

ROOT = Path(__file__).parents[2]
DIGITS = "--config=configs/robal.py:dataset=digits"


class RaiseBeforeTraining(Hook):
    """Ends the run with an error where training would begin."""

    def __init__(self, error):
        self._error = error

    def on_train_start(self, stages):
        raise self._error


@pytest.fixture
def hooks():
    """The hooks of `answer`: a list to append to."""
    return []


@pytest.fixture
def answer(capsys, tmp_path, monkeypatch, hooks):
    """Returns `answer(*arguments)` -> the error line of `main`, after the checks that hold for every such line."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "data"))

    def call(*arguments):
        workdir = tmp_path / "run"
        existed = workdir.exists()
        has_workdir = any(arg.startswith("--workdir") for arg in arguments)
        code = main.main(["main", *([] if has_workdir else [f"--workdir={workdir}"]), *arguments], hooks)
        printed = capsys.readouterr()
        assert code == 2, printed
        assert printed.err.startswith("Error: ") and printed.err.count("\n") == 1, printed.err
        assert len(printed.err) < 1000 and "Traceback" not in printed.err + printed.out
        assert workdir.exists() == existed
        return printed.err

    return call


@pytest.fixture
def no_training(hooks):
    """Stops where training would begin; returns the hooks that do so."""
    hooks.append(RaiseBeforeTraining(loop.Preempted("training is reached")))
    return hooks

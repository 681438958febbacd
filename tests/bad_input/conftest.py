"""What every test of bad input asserts."""

from pathlib import Path

import pytest

from lt_adv import main
from lt_adv.training import loop

ROOT = Path(__file__).parents[2]
DIGITS = "--config=configs/robal.py:dataset=digits"


@pytest.fixture
def answer(capsys, tmp_path, monkeypatch):
    """`answer(*arguments)`: the one line that `main` prints, after checking all that holds for every such line."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "data"))

    def call(*given):
        workdir = tmp_path / "run"
        was_there = workdir.exists()
        named = any(arg.startswith("--workdir") for arg in given)
        code = main.main(["main", *([] if named else [f"--workdir={workdir}"]), *given])
        printed = capsys.readouterr()
        assert code == 2, printed
        assert printed.err.startswith("Error: ") and printed.err.count("\n") == 1, printed.err
        assert len(printed.err) < 1000 and "Traceback" not in printed.err + printed.out
        assert workdir.exists() == was_there
        return printed.err

    return call


@pytest.fixture
def no_training(monkeypatch):
    """Training that is reached, and goes no further."""

    def reached(*_):
        raise loop.Preempted("training is reached")

    monkeypatch.setattr(loop, "train", reached)

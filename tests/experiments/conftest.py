"""A study of few rows whose runs are not run."""

from pathlib import Path

import pytest

from experiments.study import jobs
from experiments.study.__main__ import main
from experiments.study.rows import ROWS, Row
from tests.experiments.fake_runs import Runs

ROOT = Path(__file__).parents[2]
TABLE = {
    "at": Row("AT", "at"),
    "shifted": Row("AT, shifted", "posthoc", "adjustment=cdt", base="at", evaluates=True),
    "tuned": Row("AT, tuned", "lws", "baseline={base}", base="at", share=0),
    "tuned_twice": Row("AT, tuned twice", "lws", "baseline={base}", base="tuned", share=0),
    "robal": Row("RoBal-N", "robal", "variant=N", ("--config.attack.num_steps=3",), share=0.5),
}


@pytest.fixture
def study(tmp_path, monkeypatch):
    """`study(*arguments)`: (exit code, the runs of this call), with the rows of TABLE."""
    monkeypatch.chdir(ROOT)
    rows = dict(ROWS)
    _become(TABLE)
    monkeypatch.setattr("experiments.study.__main__.draw", lambda *_: None)  # slow, and tested beside the tables

    def call(*given, **runs):
        fake = Runs()
        vars(fake).update(runs)
        monkeypatch.setattr(jobs, "execute", fake)
        usual = ["--dataset=digits", "--scales=none", f"--workdirs={tmp_path}/runs", f"--out={tmp_path}", "--name=s"]
        return main([*usual, *given]), fake

    call.folder = tmp_path / "s"
    yield call
    _become(rows)


def _become(rows):
    """ROWS in the order of `rows`, which the tables of other tests follow: monkeypatch would restore it reversed."""
    ROWS.clear()
    ROWS.update(rows)

"""Fixtures: a study with few rows and fake processes; PyTorch on one thread."""

from pathlib import Path

import pytest

from experiments.study import jobs
from experiments.study.__main__ import main
from experiments.study.rows import ROWS, Row
from tests.experiments.fake_runs import FakeRuns

ROOT = Path(__file__).parents[2]
TABLE = {
    "at": Row("AT", "at"),
    "shifted": Row("AT, shifted", "posthoc", "adjustment=cdt", base="at", evaluates=True),
    "tuned": Row("AT, tuned", "lws", "baseline={base}", base="at", share=0),
    "tuned_twice": Row("AT, tuned twice", "lws", "baseline={base}", base="tuned", share=0),
    "robal": Row("RoBal-N", "robal", "variant=N", ("--config.attack.num_steps=3",), share=0.5),
}


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    """The names of config files are relative."""
    monkeypatch.chdir(ROOT)


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Returns `study(*arguments)` -> (exit code, the fake runs of this call), with the rows of TABLE."""
    rows = dict(ROWS)
    _set_rows(TABLE)
    monkeypatch.setattr("experiments.study.__main__.draw", lambda *_: None)  # slow, and tested in test_study_summary

    def call(*arguments, **attributes):
        fake = FakeRuns()
        vars(fake).update(attributes)
        monkeypatch.setattr(jobs, "execute", fake)
        defaults = ["--dataset=digits", "--scales=none", f"--workdirs={tmp_path}/runs", f"--out={tmp_path}", "--name=s"]
        return main([*defaults, *arguments]), fake

    call.folder = tmp_path / "s"
    yield call
    _set_rows(rows)


def _set_rows(rows):
    """Sets ROWS in the order of `rows`, which other tests depend on; monkeypatch would restore it reversed."""
    ROWS.clear()
    ROWS.update(rows)


@pytest.fixture
def one_torch_thread():
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

"""The comparison of precisions, with processes that only say what they were asked for."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import precision

ROOT = Path(__file__).parents[2]


@pytest.fixture
def runs(monkeypatch, tmp_path):
    """The commands that were run; each leaves a report."""
    given = []

    def run(command, check):
        assert check
        given.append(command)
        (workdir,) = (Path(part.partition("=")[2]) for part in command if part.startswith("--workdir="))
        workdir.mkdir(parents=True)
        metrics = {metric: 0.25 for metric in precision.METRICS}
        report = {"metrics": metrics, "context": {"commit": "0123456"}, "header": {"device": "1 x cpu"}}
        (workdir / "report.json").write_text(json.dumps(report))

    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(precision, "RESULTS", tmp_path / "results")
    return given


def test_the_documented_command(runs, monkeypatch, tmp_path):
    (line,) = (line for line in precision.__doc__.splitlines() if "python -m" in line and "--name" in line)
    command = shlex.split(line.partition("[")[0])
    monkeypatch.setattr(sys, "argv", command[2:])
    assert precision.main() == 0
    name = next(part.partition("=")[2] for part in command if part.startswith("--name="))
    made = json.loads((tmp_path / "results" / f"{name}.json").read_text())
    assert [(run["seed"], run["precision"]) for run in made["runs"]] == [
        (seed, kind) for seed in "012" for kind in ("float32", "attack", "all")
    ]
    assert made["cores"] >= 1 and made["commit"] == "0123456" and made["header"] == {"device": "1 x cpu"}
    assert ["--config.attack.dtype=bfloat16" in run for run in runs[:3]] == [False, True, False]
    assert ["--config.model.dtype=bfloat16" in run for run in runs[:3]] == [False, False, True]


def test_a_config_that_cannot_be_starts_nothing(runs, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["precision", "--name=x", "--config=configs/nothing.py"])
    assert precision.main() == 2 and runs == []
    assert capsys.readouterr().err.startswith("Error: Unknown config file")

"""A study of digits with real, small processes."""

import json
import re
from pathlib import Path

import pytest

from experiments.study import jobs
from experiments.study.__main__ import main, parse

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_study_of_a_network_and_its_adjustment(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    arguments = ["--dataset=digits", "--epochs=2", "--name=small"]
    arguments += [f"--workdirs={tmp_path}/runs", f"--out={tmp_path}", "--config.eval.only=('pgd20',)"]
    arguments += ["--config.eval.subset_per_class=20", "--config.attack.num_steps=1"]
    arguments += ["--config.eval.attacks.pgd20.num_steps=2", "--config.log.clean_per_class=0"]
    assert main([*arguments, "--rows=tau_norm", "--scales=none"]) == 0, capfd.readouterr()
    assert capfd.readouterr().out.startswith("2 of 2 runs to do.")
    assert main([*arguments, "--rows=at", "--scales=10"]) == 0, capfd.readouterr()
    assert capfd.readouterr().out.startswith("1 of 2 runs to do."), "the network exists, the sweep is new"
    folder = tmp_path / "small"
    table = json.loads((folder / "table.json").read_text())
    assert list(table["rows"]) == ["at", "tau_norm"] and not table["failed"]
    assert table["about"]["images"] == 200 and table["about"]["epochs"] == 2 and table["about"]["eps"] == 0.1
    for name, row in table["rows"].items():
        figures = {k: v["mean"] for k, v in row["figures"].items()}
        assert figures["eval/worst/accuracy"] <= figures["eval/pgd20/accuracy"]
        assert row["training_seconds"]["mean"] > 0
        log = (tmp_path / "runs" / f"{name}-seed0-subset.log").read_text()
        assert "Report:" in log
        result = (folder / f"{name}-seed0-subset.json").read_text()
        assert str(tmp_path) not in result and json.loads(result)["report"]["context"]["training_seconds"] > 0
    assert [scale for scale, _ in table["rows"]["at"]["scales"]] == [10] and not table["rows"]["tau_norm"]["scales"]
    clean, adjusted = (table["rows"][name]["figures"]["eval/clean/accuracy"]["mean"] for name in ("at", "tau_norm"))
    assert clean > 0.2 and adjusted != clean, "two epochs are enough to be above chance"
    text = (folder / "table.md").read_text()
    pictures = re.findall(r"!\[[\w ]+\]\((.*?)\)", text)
    assert sorted(pictures) == [f"plots/{name}.png" for name in ("classes", "errors", "logit_scale", "robustness")]
    assert all((folder / picture).stat().st_size > 10_000 for picture in pictures)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_damaged_result_is_made_again(tmp_path, content):
    study = parse(["--rows=at", "--dataset=digits", "--scales=none", f"--out={tmp_path}", "--name=s"])
    (job,) = study.jobs()
    jobs.result_path(study, job).parent.mkdir()
    jobs.result_path(study, job).write_text(content)
    assert jobs.remaining_jobs(study) == [job] and jobs.results(study, study.part) == {}

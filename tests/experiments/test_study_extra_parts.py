"""Additional evaluations of a study: PGD on rescaled logits, AutoAttack, and verdicts on gains."""

import json
import shutil
from pathlib import Path

import pytest

from experiments.study import sweep
from lt_adv.cli import flags
from tests.experiments.conftest import ROOT
from tests.experiments.fake_runs import option


def test_autoattack_runs_for_the_first_seed_on_fewer_images(study):
    arguments = ("--epochs=5", "--scales=none", "--autoattack=3", "--config.eval.attacks.pgd20.eps=0.05")
    arguments += ("--config.eval.only=('pgd20',)", "--config.eval.subset_per_class=9")  # of the main evaluation
    code, runs = study("--rows=at,shifted", "--seeds=0,1", *arguments)
    assert code == 0
    assert runs.names == ["at-seed0", "at-seed0/autoattack", "at-seed0/shifted", "at-seed0/shifted-autoattack"] + [
        "at-seed1", "at-seed1/shifted",
    ]  # fmt: skip
    commands = dict(zip(runs.names, runs.commands, strict=True))
    config = flags.parse(commands["at-seed0/autoattack"][1:]).config
    assert config.eval.only == ("autoattack",) and config.eval.subset_per_class == 3
    assert config.eval.attacks.autoattack.eps == 0.05, "the radius of pgd20"
    assert option(commands["at-seed0/autoattack"], "mode") == "eval"
    assert study("--rows=at", "--autoattack=many")[0] == 2


def test_every_row_is_compared_with_the_baseline(study):
    arguments = ("--scales=none", "--baseline=at", "--config.eval.only=('fgsm',)")
    code, runs = study("--rows=robal,shifted", "--seeds=0,1", *arguments)
    assert code == 0
    assert runs.names == [
        "at-seed0", "robal-seed0", "robal-seed0/verdict", "at-seed0/shifted", "at-seed0/shifted-verdict",
        "at-seed1", "robal-seed1", "at-seed1/shifted",
    ]  # fmt: skip
    commands = dict(zip(runs.names, runs.commands, strict=True))
    for name in ("robal-seed0/verdict", "at-seed0/shifted-verdict"):
        config = flags.parse(commands[name][1:]).config
        assert config.eval.only == ("pgd20",) and config.eval.baseline.endswith("/at-seed0")
        assert option(commands[name], "mode") == "eval"
    table = json.loads((study.folder / "table.json").read_text())
    assert table["about"]["baseline"] == "AT" and table["rows"]["robal"]["verdict"]["trustworthy"]
    assert table["rows"]["at"]["verdict"] is None
    text = (study.folder / "table.md").read_text()
    assert "| trustworthy |" in text and "| **not real: all, tail** |" in text
    assert "The gain is not real. Of it, nothing is left." in text
    assert "the gain over AT, on 25 images" in text
    results = [path.read_text() for path in study.folder.glob("*-verdict.json")]
    assert len(results) == 2 and not any(str(study.folder.parent) in text for text in results)
    shutil.rmtree(Path(option(commands["at-seed0"], "workdir")) / "checkpoints")
    (study.folder / "robal-seed0-verdict.json").unlink()
    code, runs = study("--rows=robal,shifted", "--seeds=0,1", *arguments)
    assert code == 0 and runs.names == ["at-seed0", "robal-seed0/verdict"], (
        "the verdict requires the network of the baseline"
    )
    assert study("--rows=at", "--baseline=att")[0] == 2


def test_the_sweep_follows_the_radius(monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments = ["main", "--config=experiments/study/sweep.py:configs/at.py", "--config.eval.attacks.pgd20.eps=0.05"]
    attacks = flags.parse(arguments).config.eval.attacks.to_dict()
    assert {attacks[sweep.attack_name(scale)]["eps"] for scale in sweep.SCALES} == {0.05}
    assert attacks["lsa"]["eps"] != 0.05
    with pytest.raises(ValueError, match="config file"):
        flags.parse(["main", "--config=experiments/study/sweep.py"])

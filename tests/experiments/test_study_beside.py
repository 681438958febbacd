"""What the study looks at beside the main evaluation: PGD on rescaled logits, and AutoAttack."""

import pytest

from experiments.study import sweep
from lt_adv import arguments
from tests.experiments.conftest import ROOT
from tests.experiments.study_parts import option


def test_autoattack_is_of_the_first_seed_and_of_fewer_images(study):
    given = ("--epochs=5", "--scales=none", "--autoattack=3", "--config.eval.attacks.pgd20.eps=0.05")
    given += ("--config.eval.only=('pgd20',)", "--config.eval.subset_per_class=9")  # of the main part
    code, runs = study("--rows=at,shifted", "--seeds=0,1", *given)
    assert code == 0
    assert runs.names == ["at-seed0", "at-seed0/autoattack", "at-seed0/shifted", "at-seed0/shifted-autoattack"] + [
        "at-seed1", "at-seed1/shifted",
    ]  # fmt: skip
    found = dict(zip(runs.names, runs.given, strict=True))
    config = arguments.parse(found["at-seed0/autoattack"][1:]).config
    assert config.eval.only == ("autoattack",) and config.eval.subset_per_class == 3
    assert config.eval.attacks.autoattack.eps == 0.05, "the radius of pgd20"
    assert option(found["at-seed0/autoattack"], "mode") == "eval"
    assert study("--rows=at", "--autoattack=many")[0] == 2


def test_the_sweep_follows_the_radius(monkeypatch):
    monkeypatch.chdir(ROOT)
    given = ["main", "--config=experiments/study/sweep.py:configs/at.py", "--config.eval.attacks.pgd20.eps=0.05"]
    attacks = arguments.parse(given).config.eval.attacks.to_dict()
    assert {attacks[sweep.name(scale)]["eps"] for scale in sweep.SCALES} == {0.05}
    assert attacks["lsa"]["eps"] != 0.05
    with pytest.raises(ValueError, match="config file"):
        arguments.parse(["main", "--config=experiments/study/sweep.py"])

"""`--config.eval.baseline`: a run held against another, from the command line to the report."""

import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from matplotlib.image import imread

from lt_adv import main
from lt_adv.cli import baseline
from lt_adv.cli import run as runs
from lt_adv.evaluation.masking import diagnose
from tests.bad_input.conftest import ROOT, answer  # noqa: F401 (a fixture)

# Ten images, two steps, one epoch: what is tested is the way from one end to the other.
TINY = [
    "--config=configs/at.py:dataset=digits,epochs=1",
    "--config.data.class_counts=(4,4,2,2,2,2,2,2,1,1)",
    "--config.optim.batch_size=16",
    "--config.attack.num_steps=0",
    "--config.log.clean_per_class=0",
    "--config.eval.subset_per_class=1",
    "--config.eval.batch_size=10",
    "--config.eval.only=('fgsm',)",
]


@pytest.fixture(scope="module", autouse=True)
def small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs.sharding, "make_mesh", lambda: Mesh(np.array(jax.devices()[:1]), ("data",)))
        patch.setattr(baseline, "STEPS", 2)
        patch.setattr(diagnose, "QUERIES", 3)
        patch.chdir(ROOT)
        yield


def call(workdir, *more):
    return main.main(["main", *TINY, f"--workdir={workdir}", *more])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The working directories of a baseline, of a run held against it, and what the latter's terminal said."""
    folder = tmp_path_factory.mktemp("runs")
    plain, held = folder / "plain", folder / "held"
    assert call(plain) == 0
    assert call(held, "--config.seed=1", f"--config.eval.baseline={plain}") == 0
    return plain, held


def test_the_report_carries_the_verdict(made):
    plain, held = made
    report = json.loads((held / "report.json").read_text())
    found = report["reliability"]
    assert isinstance(found["verdict"]["trustworthy"], bool)
    assert [row["group"] for row in found["verdict"]["gains"][::2]] == ["", "head", "body", "tail"]
    assert found["baseline_run"] == str(plain) and found["protocol"]["images"] == 10
    assert found["network"]["logit_lead"] != found["baseline"]["logit_lead"]
    text = (held / "report.md").read_text()
    assert f"## Is the gain real?\n\n**{found['verdict']['words']}**" in text
    assert "| Examples made on the baseline |" in text and "](plots/reliability.png)" in text
    picture = imread(held / "plots" / "reliability.png")
    assert min(picture.shape[:2]) > 200 and picture[..., :3].std() > 0.01


def test_without_the_entry_nothing_changes(made):
    plain, _ = made
    assert "reliability" not in json.loads((plain / "report.json").read_text())
    assert "Is the gain real?" not in (plain / "report.md").read_text()
    assert not (plain / "plots" / "reliability.png").exists()


def test_facts_are_kept_and_found_again(made, monkeypatch, capsys):
    plain, held = made
    kept = {side: list((side / "eval" / "reliability").iterdir()) for side in made}
    assert [len(files) for files in kept.values()] == [1, 1]
    before = json.loads((held / "report.json").read_text())

    def probe(*_, **__):
        raise AssertionError("probed again")

    monkeypatch.setattr(diagnose, "probe", probe)
    again = ["--config.seed=1", f"--config.eval.baseline={plain}", "--mode=eval"]
    assert call(held, *again) == 0
    assert json.loads((held / "report.json").read_text()) == before
    assert before["reliability"]["verdict"]["words"] in capsys.readouterr().out
    monkeypatch.undo()
    kept[plain][0].write_text("{")  # damaged: made again
    assert call(held, *again) == 0
    assert json.loads((held / "report.json").read_text()) == before


def test_a_network_is_trustworthy_beside_itself(made):
    plain, _ = made
    assert call(plain, f"--config.eval.baseline={plain}", "--mode=eval", "--config.eval.report=itself") == 0
    found = json.loads((plain / "reports" / "itself" / "report.json").read_text())["reliability"]
    assert found["verdict"]["trustworthy"] and found["network"] == found["baseline"]


def test_bad_baselines(made, answer, tmp_path):  # noqa: F811
    plain, _ = made
    assert re.search(
        r"The baseline is the run in 'nowhere' \(config.eval.baseline\), where there is none: train it",
        answer(*TINY, "--config.eval.baseline=nowhere"),
    )
    damaged = Path(shutil.copytree(plain, tmp_path / "damaged"))
    (damaged / "config.json").write_text("{}")
    held = Path(shutil.copytree(plain, tmp_path / "held"))
    at = [f"--workdir={held}", "--mode=eval"]
    assert "config.json is damaged (KeyError" in answer(*TINY, *at, f"--config.eval.baseline={damaged}")
    (damaged / "config.json").unlink()
    assert "is it the working directory of a run?" in answer(*TINY, *at, f"--config.eval.baseline={damaged}")
    other = json.loads((plain / "config.json").read_text())
    seed, other["seed"] = other["seed"], "x"
    (damaged / "config.json").write_text(json.dumps(other))
    said = answer(*TINY, *at, f"--config.eval.baseline={damaged}")
    assert f"config.eval.baseline: the run in {damaged}: config.seed must be a whole number" in said
    other["seed"] = seed
    other["data"]["image_size"] = 9
    (damaged / "config.json").write_text(json.dumps(other))
    assert "trained on other classes or sizes" in answer(*TINY, *at, f"--config.eval.baseline={damaged}")

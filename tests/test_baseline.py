"""`--config.eval.baseline`: comparison of a run with a baseline, from the command line to the report."""

import json
import re
import shutil
from pathlib import Path

import pytest
from matplotlib.image import imread

from lt_adv import main
from lt_adv.evaluation.masking import compare, diagnose
from tests.bad_input.conftest import ROOT, answer, hooks  # noqa: F401 (fixtures)

pytestmark = pytest.mark.slow

# Ten images, two steps, one epoch: these tests check the path, not the numbers.
TINY = [
    "--config=configs/at.py:dataset=digits,epochs=1",
    "--config.data.class_counts=(4,4,2,2,2,2,2,2,1,1)",
    "--config.optim.batch_size=16",
    "--config.attack.num_steps=0",
    "--config.log.clean_per_class=0",
    "--config.eval.subset_per_class=1",
    "--config.eval.batch_size=10",
    "--config.cpu_devices=1",  # compiling for eight takes twice as long
    "--config.eval.only=('fgsm',)",
]


@pytest.fixture(scope="module", autouse=True)
def small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "NUM_STEPS", 2)
        patch.setattr(diagnose, "QUERIES", 3)
        patch.chdir(ROOT)
        yield


def call(workdir, *more):
    return main.main(["main", *TINY, f"--workdir={workdir}", *more])


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
    """Returns the working directories of a baseline and of a run compared with it."""
    folder = tmp_path_factory.mktemp("runs")
    baseline, network = folder / "baseline", folder / "network"
    assert call(baseline) == 0
    assert call(network, "--config.seed=1", f"--config.eval.baseline={baseline}") == 0
    return baseline, network


def test_the_report_has_the_verdict(workdirs):
    baseline, network = workdirs
    report = json.loads((network / "report.json").read_text())
    comparison = report["reliability"]
    assert isinstance(comparison["verdict"]["trustworthy"], bool)
    assert [row["group"] for row in comparison["verdict"]["gains"][::2]] == ["", "head", "body", "tail"]
    assert comparison["baseline_run"] == str(baseline) and comparison["protocol"]["images"] == 10
    assert comparison["network"]["logit_lead"] != comparison["baseline"]["logit_lead"]
    text = (network / "report.md").read_text()
    assert f"## Gradient masking\n\n**{comparison['verdict']['words']}**" in text
    assert "| Transfer from the baseline |" in text and "](plots/gradient_masking.png)" in text
    picture = imread(network / "plots" / "gradient_masking.png")
    assert min(picture.shape[:2]) > 200 and picture[..., :3].std() > 0.01


def test_the_report_without_a_baseline_has_no_section_on_gradient_masking(workdirs):
    baseline, _ = workdirs
    assert "reliability" not in json.loads((baseline / "report.json").read_text())
    assert "Gradient masking" not in (baseline / "report.md").read_text()
    assert not (baseline / "plots" / "gradient_masking.png").exists()


def test_stored_diagnostics_are_reused(workdirs, monkeypatch, capsys):
    baseline, network = workdirs
    files = {side: list((side / "eval" / "gradient_masking").iterdir()) for side in workdirs}
    assert [len(paths) for paths in files.values()] == [1, 1]
    before = json.loads((network / "report.json").read_text())

    def run_diagnostics(*_, **__):
        raise AssertionError("computed again")

    monkeypatch.setattr(diagnose, "run_diagnostics", run_diagnostics)
    again = ["--config.seed=1", f"--config.eval.baseline={baseline}", "--mode=eval"]
    assert call(network, *again) == 0
    assert json.loads((network / "report.json").read_text()) == before
    assert before["reliability"]["verdict"]["words"] in capsys.readouterr().out
    monkeypatch.undo()
    files[baseline][0].write_text("{")  # damaged: computed again
    assert call(network, *again) == 0
    assert json.loads((network / "report.json").read_text()) == before


def test_a_network_compared_with_itself_is_trustworthy(workdirs):
    baseline, _ = workdirs
    assert call(baseline, f"--config.eval.baseline={baseline}", "--mode=eval", "--config.eval.report=itself") == 0
    comparison = json.loads((baseline / "reports" / "itself" / "report.json").read_text())["reliability"]
    assert comparison["verdict"]["trustworthy"] and comparison["network"] == comparison["baseline"]


def test_bad_baselines_are_refused(workdirs, answer, tmp_path):  # noqa: F811
    baseline, _ = workdirs
    assert re.search(
        r"The baseline is the run in 'nowhere' \(config.eval.baseline\), which does not exist: train it",
        answer(*TINY, "--config.eval.baseline=nowhere"),
    )
    damaged = Path(shutil.copytree(baseline, tmp_path / "damaged"))
    network = Path(shutil.copytree(baseline, tmp_path / "network"))
    compare_with_damaged = [
        *TINY, f"--workdir={network}", "--mode=eval", f"--config.eval.baseline={damaged}"
    ]  # fmt: skip
    (damaged / "config.json").write_text("{}")
    assert "config.json is damaged (KeyError" in answer(*compare_with_damaged)
    (damaged / "config.json").unlink()
    assert "does not exist; name the working directory of a finished run" in answer(*compare_with_damaged)
    config = json.loads((baseline / "config.json").read_text())
    seed, config["seed"] = config["seed"], "x"
    (damaged / "config.json").write_text(json.dumps(config))
    printed = answer(*compare_with_damaged)
    assert f"config.eval.baseline: the run in {damaged}: config.seed must be a whole number" in printed
    config["seed"] = seed
    config["data"]["equalise"] = 0.0
    (damaged / "config.json").write_text(json.dumps(config))
    printed = answer(*compare_with_damaged)
    assert f"the run in {damaged}: config.data.equalise is now config.data.resample_balanced." in printed
    del config["data"]["equalise"]
    config["data"]["image_size"] = 9
    (damaged / "config.json").write_text(json.dumps(config))
    assert "trained on other classes or another image size" in answer(*compare_with_damaged)

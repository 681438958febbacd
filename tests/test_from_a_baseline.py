"""Configs that start from a finished run (fine-tuning, post-hoc adjustment), and TDE, evaluated with its state."""

import json
import logging
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import at, finetune_resampling, finetune_reweighting, lws
from lt_adv import main
from lt_adv.cli import flags, train
from lt_adv.cli.experiment import Experiment
from lt_adv.methods.at import AT
from lt_adv.methods.base import Stage
from lt_adv.training import optimizer
from lt_adv.training.checkpoint import read_variables
from tests.bad_input.conftest import ROOT, answer, hooks, no_training  # noqa: F401 (fixtures)

# Two epochs of one step without attack: the tests compare initial and trained parameters.
TINY = [
    "--config.data.class_counts=(4,4,2,2,2,2,2,2,1,1)",
    "--config.optim.batch_size=16",
    "--config.attack.num_steps=0",
    "--config.eval.attacks={}",
    "--config.eval.subset_per_class=5",
    "--config.eval.batch_size=50",
    "--config.log.clean_per_class=0",
    "--config.checkpoint.every_epochs=1",
    "--config.cpu_devices=1",
]
AT_TWO = "--config=configs/at.py:dataset=digits,epochs=2"


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Returns `start(config, name, ...)`, which runs on one device and returns the working directory `name`."""
    folder = tmp_path_factory.mktemp("runs")

    def call(config, name, *more):
        assert main.main(["main", config, f"--workdir={folder / name}", *TINY, *more]) == 0
        return folder / name

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        yield call


@pytest.fixture(scope="module")
def baseline(start):
    return start(AT_TWO, "baseline")


def changes(before, after):
    """Returns {path: largest change} of the arrays that are in both trees."""
    flat = [dict(jax.tree_util.tree_leaves_with_path(tree)) for tree in (before, after)]
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.abs(flat[1][path] - a).max()
        for path, a in flat[0].items()
        if path in flat[1]
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "trained", "unshared"),
    [
        ("finetune_resampling", ("params/head/",), None),
        ("lws", (), ("new: params/head/scale", "unused: params/head/bias")),
        ("finetune_reweighting", ("params/", "batch_stats/"), None),
    ],
)
def test_fine_tuning_changes_only_the_trained_parameters(start, baseline, caplog, name, trained, unshared):
    with caplog.at_level(logging.WARNING):
        run = start(f"--config=configs/{name}.py:dataset=digits,baseline={baseline}", name)
    before, after = read_variables(baseline)[0], read_variables(run)[0]
    for path, distance in changes(before, after).items():
        assert (distance > 0) == path.startswith(trained), path
    for text in unshared or ():
        assert text in caplog.text
    if name == "lws":
        scale = after["params"]["head"]["scale"]
        assert (scale != 1).all() and np.abs(scale - 1).max() < 1
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["epoch"] == 1 and rows[-1]["train/learning_rate"] == pytest.approx(0.1)
    steps = 10 * 4 // 16 if "class_aware" in (run / "config.json").read_text() else 1
    assert rows[-1]["step"] == steps
    assert json.loads((run / "report.json").read_text())["header"]["training"] == "finished"


@pytest.mark.parametrize("config", [finetune_resampling, lws])
def test_the_released_code_updates_statistics(config):
    c = config.get_config("dataset=digits")
    assert c.init_from == "workdirs/at-dataset=digits"
    for c.fidelity, frozen in (("paper", True), ("released_code", False)):
        (stage,) = Experiment.from_config(c).stages
        assert stage.freeze_batch_stats == frozen and stage.freeze.startswith("backbone/")
        assert stage.init == c.init_from and stage.epochs == 1


@pytest.mark.parametrize("config", [finetune_resampling, finetune_reweighting, lws])
def test_fine_tuning_is_one_epoch_at_the_initial_rate_of_the_study(config):
    c, baseline = config.get_config("dataset=cifar10,baseline=elsewhere"), at.get_config("dataset=cifar10")
    assert c.init_from == "elsewhere" and c.optim.epochs == 1
    for compounding in (False, True):
        rate = optimizer.schedule(c.optim, 7, 1, compounding)
        assert float(rate(0)) == float(rate(6)) == pytest.approx(0.1)
    assert (c.optim.batch_size, c.optim.weight_decay) == (64, 2e-4) and c.attack == baseline.attack
    assert {**c.model, "head": None} == {**baseline.model, "head": None} and c.eval == baseline.eval


@pytest.mark.parametrize("name", ["cdt", "tau_norm", "logit_adjustment"])
def test_post_hoc_adjustment_changes_only_the_evaluation_of_the_baseline(start, baseline, name):
    before = {f: f.read_bytes() for f in sorted((baseline / "checkpoints").rglob("*")) if f.is_file()}
    no_attack = (baseline / "report.json").read_text()
    start(f"--config=configs/posthoc.py:dataset=digits,epochs=2,adjustment={name}", "baseline", "--mode=eval")
    assert {f: f.read_bytes() for f in before} == before and (baseline / "report.json").read_text() == no_attack
    header = json.loads((baseline / "reports" / name / "report.json").read_text())["header"]
    tau = {"cdt": 0.3}.get(name, 1.0)
    assert header["adjustment"] == f"{name}, tau {tau}" and header["method"] == "at"
    assert header["weights_digest"] == json.loads(no_attack)["header"]["weights_digest"]


@pytest.mark.slow
def test_tde_evaluates_with_the_mean_of_its_training(start):
    run = start("--config=configs/tde.py:dataset=digits,epochs=2", "tde", "--config.log.clean_per_class=1")
    mean = read_variables(run)[0]["method_state"]["feature_mean"]
    # Directions have length 1, so two steps give at most 1.9; those of features after a ReLU have a mean well above 0.
    assert mean.shape == (64,) and 0.5 < np.linalg.norm(mean) <= 1.9
    assert json.loads((run / "report.json").read_text())["header"]["adjustment"] == "alpha 0.1, tde"


LWS = "--config=configs/lws.py:dataset=digits"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([LWS, "--config.init_from=nowhere"], r"starts from the run in 'nowhere' .*which does not exist: train it"),
        ([LWS, "--config.init_from="], "config.init_from is missing: method finetune begins with the network of"),
        ([LWS, "--config.method.freeze=(backbone"], r"'\(backbone' is not a valid regular expression"),
        ([LWS, "--config.method.freeze=bakbone"], r"No parameter matches the frozen pattern 'bakbone'\. There are: "),
        (
            [LWS, "--config.model.width=2"],
            r"batch_stats/backbone/\S+ has shape \(.*\) there, \(.*\) in config\.model: name",
        ),
        ([AT_TWO, "--config.eval.adjustment.name=tde"], "The adjustment 'tde' is for the heads cosine, cosine_plus"),
        (
            ["--config=configs/cosine.py:dataset=digits", "--config.eval.adjustment.name=tde"],
            r"adjustment\.name is 'tde', which needs the state of method tde, but config\.method\.name is 'at': choose",
        ),
    ],
)
def test_bad_starting_points_are_refused(baseline, answer, no_training, arguments, line):  # noqa: F811
    init_from = [f"--config.init_from={baseline}"] if arguments[0] == LWS and "init_from" not in arguments[1] else []
    assert re.search(line, answer(*arguments, *init_from, *TINY))


def test_an_unfinished_baseline_is_refused(baseline, answer, no_training, tmp_path):  # noqa: F811
    stopped = Path(shutil.copytree(baseline, tmp_path / "stopped"))
    shutil.rmtree(stopped / "checkpoints" / "0_train" / "2")
    printed = answer(LWS, *TINY, f"--config.init_from={stopped}")
    assert "which is at step 1 of 2 of stage 0_train: let it finish" in printed


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ({"optim.drop_epochs": ("x",)}, r"Stage 'second': item of config\.optim\.drop_epochs must be"),
        ({"optim.epohcs": 1}, r"Stage 'second': Unknown entry of config: 'optim\.epohcs'"),
        ({"optim.batch_size": 23}, r"config\.optim\.batch_size = 23 is more than the 22 training images"),
        ({"data.class_counts": (5, 5)}, r"class_counts has 2 entries, the data set has 10 classes"),
    ],
)
def test_overrides_of_a_stage_are_validated(tmp_path, overrides, line):
    stages = Stage(method=AT(), epochs=1), Stage(method=AT(), epochs=1, name="second", overrides=overrides)
    with pytest.raises(ValueError, match=line):
        train.check(Experiment.from_config(flags.parse(["", AT_TWO, *TINY]).config, stages=stages), tmp_path)


def test_init_from_is_refused_by_methods_that_start_from_no_run(baseline):
    config = flags.parse(["", AT_TWO, *TINY, f"--config.init_from={baseline}"]).config
    with pytest.raises(ValueError, match=r"config\.init_from: method at starts from no other run: leave it out"):
        Experiment.from_config(config, stages=(Stage(method=AT(), epochs=1),))

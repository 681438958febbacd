"""Training with the PyTorch baseline, evaluation by lt_adv, and refusal of bad input."""

import json
import sys

import numpy as np
import pytest

from experiments.pytorch_baseline import models, train, weights
from lt_adv import data, evaluation
from lt_adv.cli import evaluate, flags
from lt_adv.training import checkpoint
from tests.experiments import NO_TORCH

pytestmark = pytest.mark.slow

torch = pytest.importorskip("torch", reason=NO_TORCH)

CONFIG = "--config=configs/at_bsl.py:dataset=digits,epochs=2"
SHORT = [CONFIG, "--config.attack.num_steps=1", "--config.eval.only=('fgsm',)", "--config.eval.subset_per_class=12"]


def test_lt_adv_evaluates_a_network_trained_in_pytorch(tmp_path, capsys):
    options = [*SHORT, f"--workdir={tmp_path / 'run'}"]
    assert train.main(["train", *options, "--setting=released", "--device=cpu"]) == 0
    printed = capsys.readouterr().out
    assert "epoch 2/2" in printed
    config, workdir, *_ = flags.parse(["main", *options])
    summary, split = evaluate.evaluate(config, workdir), data.long_tailed(data.load(config.data), config.data)
    header = summary["header"]
    assert header["stage"] == f"0_train by PyTorch {torch.__version__}, released, on cpu"
    assert header["training"] == "finished" and header["checkpoint_step"] == 2 * (len(split.train) // 64)

    # PyTorch predicts the same classes with these weights.
    variables, _ = checkpoint.read_variables(workdir)
    test = split.test.take(evaluation.balanced_subset(split.test.label, 12))
    network = models.create(config.model, 10, channels=1).eval()
    network.load_state_dict(weights.to_torch(variables))
    with torch.no_grad():
        prediction = network(torch.from_numpy(test.image).permute(0, 3, 1, 2) / 255).argmax(-1).numpy()
    assert summary["metrics"]["eval/clean/accuracy"] == pytest.approx(np.mean(prediction == test.label))
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2] and rows[1]["train/loss"] < rows[0]["train/loss"]

    assert train.main(["train", *options]) == 2
    assert "use another --workdir" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([CONFIG], "--workdir is missing"),
        ([CONFIG, "--workdir=x", "--setting=fast"], "Unknown --setting 'fast'"),
        ([CONFIG, "--workdir=x", "--device=tpu"], "Unknown --device 'tpu'"),
        ([CONFIG, "--workdir=x", "--mode=eval"], "lt_adv.main --mode=eval evaluates"),
        ([CONFIG, "--workdir=x", "--setings=tuned"], "--setings"),
        ([CONFIG, "--workdir=x", "--config.data.sampler=class_aware"], "config.data.sampler = 'class_aware'"),
        (["--workdir=x"], "--config is missing"),
    ],
)
def test_bad_input_gives_one_line(argv, message, tmp_path, capsys, monkeypatch):
    where = tmp_path / "x"
    assert train.main(["train", *(arg.replace("=x", f"={where}") for arg in argv)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("Error: ") and error.count("\n") == 1 and message in error
    assert not where.exists()


def test_missing_torch_names_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert train.main(["train", CONFIG, "--workdir=x"]) == 2
    assert capsys.readouterr().err == "Error: The PyTorch baseline needs PyTorch: pip install '.[torch]'.\n"

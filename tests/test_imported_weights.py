"""Evaluation of imported PyTorch weights from the command line, and the example of docs/pytorch_weights.md."""

import hashlib
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lt_adv import attacks, data, main, models
from lt_adv.cli import flags
from lt_adv.cli.experiment import Experiment
from lt_adv.evaluation import records
from lt_adv.training import stage_builder
from tests.bad_input.conftest import ROOT, answer, hooks  # noqa: F401 (fixtures)
from tests.models.test_classifier import random_variables
from tests.models.torch_files import golden_state, save_npz, save_torch, wide_resnet_state

ROBAL = "--config=configs/robal.py:dataset=digits"
TINY = [
    "--config.eval.only=('fgsm',)",
    "--config.eval.subset_per_class=5",
    "--config.eval.batch_size=50",
    "--config.cpu_devices=1",  # compiling for eight takes twice as long
]
TAU = 0.5


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """(file, variables) of a network that classifies digits by their mean features, with RoBal's tensor names."""
    config = flags.load_config("configs/robal.py:dataset=digits")
    train = data.load(config.data).train
    images, label = train.image[:500] / np.float32(255), train.label[:500]
    model = models.create(config.model, 10)
    variables = random_variables(model, images)

    @jax.jit
    def fit(params, before):
        """Returns the batch statistics of the images, of which 0.1 enters the running average, and a kernel."""
        initial = {"params": params, "batch_stats": before}
        (_, out), after = model.apply(initial, images, train=True, mutable=["batch_stats"])
        statistics = jax.tree.map(lambda new, old: 10 * new - 9 * old, after["batch_stats"], before)
        means = np.eye(10)[label].T @ out["features"] / np.bincount(label)[:, None]
        return statistics, (means - means.mean(0)).T

    statistics, kernel = jax.device_get(fit(variables["params"], variables["batch_stats"]))
    params = {**variables["params"], "head": {"kernel": np.float32(kernel)}}
    variables = {"params": params, "batch_stats": statistics}
    state = {f"backbone.{name}": a for name, a in wide_resnet_state(variables).items() if not name.startswith("fc.")}
    state["classifier.weight"] = np.asarray(variables["params"]["head"]["kernel"]).T
    state |= {"classifier.bias": np.zeros(10, np.float32), "classifier.moving_ed": np.ones((1, 64), np.float32)}
    return save_npz(tmp_path_factory.mktemp("weights") / "robal.npz", state), variables


@pytest.mark.slow
def test_imported_weights_are_evaluated_with_their_statistics_and_the_adjustment(weights, tmp_path, capsys):
    path, variables = weights
    command = [
        "main",
        ROBAL,
        *TINY,
        f"--config.eval.adjustment.tau_p={TAU}",
        "--mode=eval",
        f"--config.init_from={path}",
        f"--workdir={tmp_path / 'run'}",
    ]
    assert main.main(command) == 0, capsys.readouterr().err
    results = records.read_records(tmp_path / "run" / "eval")
    config = flags.parse(command).config
    split = data.long_tailed(data.load(config.data), config.data)
    assert max(split.class_counts) > 2 * min(split.class_counts)
    position = {index: i for i, index in enumerate(split.test.index)}
    x = split.test.image[[position[index] for index in results.index]] / np.float32(255)
    logits, _ = jax.jit(models.create(config.model, 10).apply)(variables, x)
    prior = np.array(split.class_counts) / sum(split.class_counts)
    expected = np.argmax(10 * logits - TAU * np.log(prior), -1)
    np.testing.assert_array_equal(results.clean, expected)
    assert (expected != np.argmax(logits, -1)).any() and (expected == results.label).mean() > 0.4

    header = json.loads((tmp_path / "run" / "report.json").read_text())["header"]
    assert header["weights"] == f"{path}, SHA-256 {hashlib.sha256(path.read_bytes()).hexdigest()}"
    assert header["method"] == "not known" and "epochs" not in header and "seed" not in header
    assert re.fullmatch(r"1: RoBal's running mean .*; 1: a bias of zeros; .*", header["unused_tensors"])
    report = (tmp_path / "run" / "report.md").read_text()
    assert header["weights"] in report and "adjustment:** name boundary" not in report and "boundary" in report

    assert main.main(command) == 0  # resumes from its records
    other = save_npz(tmp_path / "other.npz", {})
    assert main.main([*command, f"--config.init_from={other}"]) == 2
    assert "was started with another config (init_from: " in capsys.readouterr().err


@pytest.mark.slow
def test_mean_and_std_of_the_config_normalise_inside_the_evaluated_network(weights, tmp_path, capsys):
    """Predictions on clean images and under FGSM, whose radius remains in pixels, are those of (x - mean) / std."""
    path, variables = weights
    mean, std, eps = 0.3, 0.4, 0.1
    command = [
        "main",
        ROBAL,
        *TINY,
        "--mode=eval",
        f"--config.init_from={path}",
        f"--config.eval.attacks.fgsm.eps={eps}",
    ]
    command += [f"--config.model.mean=({mean},)", f"--config.model.std=({std},)", f"--workdir={tmp_path / 'run'}"]
    assert main.main(command) == 0, capsys.readouterr().err
    results, config = records.read_records(tmp_path / "run" / "eval"), flags.parse(command).config
    split = data.long_tailed(data.load(config.data), config.data)
    position = {index: i for i, index in enumerate(split.test.index)}
    x = split.test.image[[position[index] for index in results.index]] / np.float32(255)
    config.model.mean = config.model.std = ()
    apply = stage_builder.evaluation_apply(config, split)

    @jax.jit
    def predictions(mean, std):
        def network(x):
            return apply(variables, (x - mean) / std)

        x_adv = attacks.fgsm(jax.random.key(0), network, x, jnp.asarray(results.label), eps=eps)
        return network(x).argmax(-1), network(x_adv).argmax(-1)

    clean, attacked = predictions(np.float32(mean), np.float32(std))
    np.testing.assert_array_equal(results.clean, clean)
    np.testing.assert_array_equal(results.prediction("fgsm"), attacked)
    assert (clean != attacked).any() and (clean != predictions(0.0, 1.0)[0]).any()
    header = json.loads((tmp_path / "run" / "report.json").read_text())["header"]
    assert header["model"].endswith("float32, images normalised by mean (0.3,) and std (0.4,)")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["--config.init_from={path}", "--config.model.mean=(125.3,)", "--config.model.std=(63.0,)"],
            "item of config.model.mean must be a number in [0, 1], not 125.3: pixels lie in [0, 1].",
        ),
        (
            ["--config.init_from={path}", "--config.model.mean=(0.5,)", "--config.model.std=(0.0,)"],
            "item of config.model.std must be a number in [0.001, 1], not 0.0: pixels lie in [0, 1].",
        ),
        (
            ["--config.init_from={path}", "--config.model.mean=(0.5,)"],
            "model.mean has 1 values and model.std has 0: give as many of each, or none.",
        ),
        (
            ["--config.init_from={path}", "--config.model.mean=(0.5,0.5,0.5)", "--config.model.std=(0.2,0.2,0.2)"],
            "model.mean and model.std have 3 values for images of 1 channels: give one for each",
        ),
        (
            ["--mode=train", "--config.model.mean=(0.5,0.5,0.5)", "--config.model.std=(0.2,0.2,0.2)"],
            "model.mean and model.std have 3 values for images of 1 channels: give one for each",
        ),
        (
            ["--config.init_from={path}", "--config.model.depth=16"],
            "robal.npz: the weights are those of a WideResNet-10-1",
        ),
        (["--config.init_from=absent.npz"], "There is no file of weights absent.npz."),
        (
            ["--config.init_from={path}", "--mode=train"],
            "training starts from a run; '{path}' is only for --mode=eval.",
        ),
        (
            ["--config.init_from={path}", "--config=configs/tde.py:dataset=digits"],
            "which needs the state of method tde, but config.init_from is '{path}', a file of weights: choose another",
        ),
    ],
)
def test_weights_that_cannot_be_evaluated_are_refused(weights, answer, arguments, line):  # noqa: F811
    path, _ = weights
    assert line.format(path=path) in answer(ROBAL, *TINY, "--mode=eval", *(arg.format(path=path) for arg in arguments))


@pytest.mark.parametrize("config", ["self_distillation", "taet", "finetune_resampling"])
def test_evaluation_accepts_the_config_of_any_method(weights, config):
    """Also of methods whose training cannot start from a finished run."""

    path, _ = weights
    Experiment.from_config(
        flags.parse(["main", f"--config=configs/{config}.py:dataset=digits", f"--config.init_from={path}"]).config
    )


def test_example_of_the_docs_runs(tmp_path, monkeypatch):
    text = (ROOT / "docs" / "pytorch_weights.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    (example,) = (block for block in blocks if "torch_import" in block)
    (name,) = re.findall(r'"([\w-]+\.pth)"', example)
    state = {name: np.float32(array) for name, array in golden_state("resnet18_linear").items()}
    save_torch(tmp_path / name, state)
    monkeypatch.chdir(tmp_path)
    scope: dict = {"x": np.zeros((2, 32, 32, 3), np.float32)}
    exec(example, scope)
    assert scope["logits"].shape == (2, 10) and all("num_batches" in name for name in scope["unused"])
    assert Path(name).exists()

"""An exported network is loaded as its model card shows, in a process without this project."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.export
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from safetensors.numpy import load_file

from lt_adv import attacks, main
from lt_adv.cli import export, flags, networks
from lt_adv.cli.experiment import Experiment
from lt_adv.training import stage_builder
from tests.conftest import QUICK

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
CONFIG = [
    "--config=configs/robal.py:dataset=digits,epochs=2",
    "--config.attack.num_steps=0",
    "--config.model.mean=(0.3,)",
    "--config.model.std=(0.4,)",
    "--config.average.name=ema",
    "--config.cpu_devices=1",  # compiling for eight takes twice as long
    "--config.checkpoint.every_epochs=1",
    "--config.eval.subset_per_class=5",
    "--config.eval.only=('fgsm',)",
]
EXPORT = [*CONFIG, "--mode=export"]
# Run before and after the example of the card: hides packages that its `pip install` lacks, and saves the results.
BEFORE = """\
import sys
sys.modules.update(dict.fromkeys(["lt_adv", "flax", "optax", "orbax", "ml_collections", "etils"]))  # cannot be imported
"""
AFTER = """
with np.load(sys.argv[1]) as inputs:
    x, cotangent = inputs["x"], inputs["cotangent"]
results = {f"logits{n}": predict(weights, x[:n]) for n in (1, 3, 64)}
gradients = jax.grad(lambda weights, x: (predict(weights, x) * cotangent).sum(), argnums=(0, 1))(weights, x)
results |= {"x": gradients[1], **gradients[0]}
np.savez(sys.argv[2], logits_of_zeros=logits, gradient=gradient, **results)
"""


@pytest.fixture(scope="module")
def exported_run(tmp_path_factory):
    """Returns a working directory after training, evaluation and export."""
    workdir = tmp_path_factory.mktemp("exported") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        for mode in ("train", "export"):
            assert main.main(["main", *CONFIG, f"--workdir={workdir}", f"--mode={mode}"]) == 0
    return workdir


@pytest.fixture
def run(exported_run, tmp_path, monkeypatch):
    """Returns a copy of the exported run."""
    monkeypatch.chdir(ROOT)
    return Path(shutil.copytree(exported_run, tmp_path / "run"))


def config_of(*overrides):
    return flags.parse(["main", *CONFIG, *overrides]).config


@pytest.fixture(scope="module")
def network(exported_run):
    """Returns (apply, variables, images [64, 8, 8, 1]) of the network that lt_adv evaluates."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        config = config_of()
    experiment = Experiment.from_config(config)
    apply, variables, _ = networks.load(experiment, epath.Path(exported_run))
    return apply, variables, experiment.split.test.image[:64].astype(np.float32) / 255


def averaged_weights(workdir):
    """Returns {"params/head/kernel": array, ...} of the averaged weights in the last checkpoint, read by orbax."""
    tree = ocp.PyTreeCheckpointer().restore(workdir / "checkpoints" / "0_train" / "14" / "state")["average"]
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


def blocks(text):
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def test_example_of_the_card_gives_the_same_logits_and_gradients(exported_run, network, tmp_path):
    apply, variables, x = network
    cotangent = np.random.default_rng(0).normal(size=(64, 10)).astype(np.float32)
    np.savez(tmp_path / "inputs.npz", x=x, cotangent=cotangent)
    example, gradient = blocks((exported_run / "export" / "README.md").read_text())
    script = "\n".join([BEFORE, example, gradient, AFTER])
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_", "JAX_", "PYTHON"))}
    environment |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": QUICK}
    command = [sys.executable, "-c", script, str(tmp_path / "inputs.npz"), str(tmp_path / "results.npz")]
    result = subprocess.run(command, cwd=exported_run / "export", env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and not result.stderr, result.stderr
    results = np.load(tmp_path / "results.npz")

    logits = np.asarray(jax.jit(apply)(variables, x))
    assert np.abs(logits).max() > 1 and len(set(logits.argmax(-1))) > 3  # scaled by the adjustment, and not constant
    for n in (1, 3, 64):
        np.testing.assert_allclose(results[f"logits{n}"], logits[:n], rtol=1e-5, atol=1e-5)
    assert results["logits_of_zeros"].shape == (3, 10) and results["gradient"].shape == (3, 8, 8, 1)
    weights = {name: variables[name] for name in ("params", "batch_stats")}

    def weighted_sum(weights, x):
        return (apply({**variables, **weights}, x) * cotangent).sum()

    of_weights, of_images = jax.jit(jax.grad(weighted_sum, argnums=(0, 1)))(weights, x)
    assert np.abs(of_images).max() > 0.1
    np.testing.assert_allclose(results["x"], of_images, rtol=1e-5, atol=1e-5)
    for name, expected in export.flatten(of_weights).items():
        np.testing.assert_allclose(results[name], expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max(), err_msg=name)


def test_mean_and_std_normalise_in_training_evaluation_and_export(exported_run, network):
    """The network of the run takes pixels: it is that of a config without them on normalised images."""
    apply, variables, x = network
    split = Experiment.from_config(config_of()).split
    config = config_of()
    config.model.mean = config.model.std = ()
    plain = jax.jit(stage_builder.evaluation_apply(config, split))
    expected = np.asarray(plain(variables, (x - np.float32(0.3)) / np.float32(0.4)))
    exported = jax.export.deserialize(bytearray((exported_run / "export" / "network.jax").read_bytes()))
    logits = exported.call(load_file(exported_run / "export" / "weights.safetensors"), x)
    for actual in (logits, jax.jit(apply)(variables, x)):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert "images normalised by mean (0.3,) and std (0.4,)" in (exported_run / "export" / "README.md").read_text()
    # Training has seen normalised images: the network is less accurate without the normalisation.
    images, label = split.test.image / np.float32(255), split.test.label
    accuracy = [(f(variables, images).argmax(-1) == label).mean() for f in (jax.jit(apply), plain)]
    assert accuracy[0] > accuracy[1] + 0.1, accuracy


def test_weights_equal_the_checkpoint_bit_for_bit(exported_run):
    weights, expected = load_file(exported_run / "export" / "weights.safetensors"), averaged_weights(exported_run)
    assert weights.keys() == expected.keys() and "params/head/kernel" in weights
    for name, array in weights.items():
        assert array.dtype == expected[name].dtype and array.tobytes() == expected[name].tobytes(), name


def test_attacks_run_on_the_exported_network(exported_run, network):
    apply, variables, x = network
    exported = jax.export.deserialize(bytearray((exported_run / "export" / "network.jax").read_bytes()))
    weights, y = load_file(exported_run / "export" / "weights.safetensors"), np.arange(8) % 10
    options = {"eps": 0.1, "step_size": 0.03, "num_steps": 5}
    x_adv, expected = (
        attacks.jit(attacks.pgd, f, **options)(jax.random.key(0), v, x[:8], y)
        for f, v in ((exported.call, weights), (apply, variables))
    )
    np.testing.assert_allclose(x_adv, expected, atol=1e-5)
    assert np.abs(x_adv - x[:8]).max() == pytest.approx(0.1, abs=1e-5)


def test_network_file_is_small_and_portable(exported_run):
    """It has three platforms, no weights and no paths."""
    content = (exported_run / "export" / "network.jax").read_bytes()
    network = jax.export.deserialize(bytearray(content))
    assert network.platforms == ("cpu", "cuda", "tpu") and str(network.in_avals[-1].shape) == "(batch, 8, 8, 1)"
    assert len(content) < 200_000 and str(ROOT).encode() not in content and b".py" not in content


def test_card_describes_network_data_and_results(exported_run):
    text = (exported_run / "export" / "README.md").read_text()
    summary = json.loads((exported_run / "report.json").read_text())
    rows = {line.split("|")[1].strip(): line for line in text.splitlines()[::-1] if line.startswith("|")}
    for title, condition in (("Clean", "clean"), ("FGSM", "fgsm"), ("Worst case", "worst")):
        for figure in ("accuracy", "balanced_accuracy", "accuracy_head", "accuracy_tail"):
            assert f" {100 * summary['metrics'][f'eval/{condition}/{figure}']:.2f} " in rows[title]
    counts = summary["context"]["class_counts"]
    assert [text.count(f"| {c} | {c} | {n} |") for c, n in enumerate(counts)] == [1] * 10
    for line in (
        "- **Method:** robal (beta 6",
        "- **Network:** wide_resnet-10-1, head cosine_plus, float32",
        "- **Adjustment after training:** boundary, scale 10.0, tau_p 0.1",
        f"- **Data set:** Digits-LT, exponential profile, imbalance ratio {max(counts) / min(counts):.4g}",
        "- **Weights:** averaged; last checkpoint, step 14 of 0_train",
        f"`python -m lt_adv.main {CONFIG[0]} --config.attack.num_steps=0 ",
        f"jax {jax.__version__}",
        "class-balanced subset, 5 per class",
        "Apache-2.0",
    ):
        assert line in text, line
    assert "{" not in text.replace("{}", "") and str(exported_run) not in text
    assert json.loads((exported_run / "export" / "config.json").read_text())["optim"]["epochs"] == 2


def test_docs_show_the_example_of_the_card(exported_run):
    example, _ = blocks((exported_run / "export" / "README.md").read_text())
    assert example in blocks((ROOT / "docs" / "export.md").read_text())


def test_second_export_gives_the_same_bytes(run):
    before = {file.name: file.read_bytes() for file in (run / "export").iterdir()}
    jax.clear_caches()
    assert main.main(["main", *EXPORT, f"--workdir={run}"]) == 0
    assert {file.name: file.read_bytes() for file in (run / "export").iterdir()} == before
    assert before.keys() == {"network.jax", "weights.safetensors", "config.json", "README.md"}
    assert not [file.name for file in run.iterdir() if file.name.startswith(".") and file.name != ".lock"]


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ([], "there is no report"),
        (["--config.eval.adjustment.tau_p=0.5"], "the report is of another adjustment"),
        (["--config.eval.dtype=bfloat16"], "the report is of another model"),
    ],
)
def test_card_shows_only_results_of_this_network(run, overrides, reason):
    if not overrides:
        (run / "report.json").unlink()
    assert main.main(["main", *EXPORT, *overrides, f"--workdir={run}"]) == 0
    text = (run / "export" / "README.md").read_text()
    assert f"Not evaluated: {reason}." in text and "| Clean |" not in text
    network = jax.export.deserialize(bytearray((run / "export" / "network.jax").read_bytes()))
    assert network.out_avals[0].dtype == np.float32


def test_refusals_give_one_line(run, monkeypatch, tmp_path, capsys):
    def answer(*arguments):
        assert main.main(["main", f"--workdir={run}", *arguments]) == 2
        printed = capsys.readouterr().err
        assert printed.startswith("Error: ") and printed.count("\n") == 1, printed
        return printed

    before = {file.name: file.read_bytes() for file in (run / "export").iterdir()}
    assert "There is no checkpoint under" in answer(*EXPORT, f"--workdir={tmp_path / 'none'}")
    assert not (tmp_path / "none").exists()
    assert "only exports networks trained by lt_adv" in answer(*EXPORT, "--config.init_from=external.npz")
    assert "(seed: 0 -> 1): use another --workdir" in answer(*EXPORT, "--config.seed=1")
    (run / "report.json").write_text("{")
    assert "report.json is damaged" in answer(*EXPORT)
    (run / "report.json").unlink()
    (run / "export" / "notes.txt").touch()
    assert "export holds notes.txt, which would be lost: move it" in answer(*EXPORT)
    (run / "export" / "notes.txt").unlink()
    shutil.rmtree(run / "checkpoints" / "0_train" / "14")
    assert "is at step 7 of 14 of stage 0_train: let the training finish" in answer(*EXPORT)
    find = export.importlib.util.find_spec
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None if name == "flatbuffers" else find(name))
    assert "--mode=export needs flatbuffers: pip install -e '.[export]'" in answer(*EXPORT)
    assert {file.name: file.read_bytes() for file in (run / "export").iterdir()} == before

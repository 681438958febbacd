"""Runs processes of `lt_adv.main` on real images: killed and resumed, and trained to the accuracy of the README."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

ROOT = Path(__file__).parent.parent
SHORT = [
    "--config.average.name=ema",
    "--config.data.validation_per_class=2",
    "--config.log.every_steps=3",
    "--config.checkpoint.every_epochs=1",
    "--config.eval.only=('fgsm',)",
]

# lt_adv.main that signals its own process before a step, or while a checkpoint is written.
SIGNAL_PROGRAM = """
import os, sys
from lt_adv import main
from lt_adv.training.hooks import Hook

site, number, sign = {arguments!r}

class Signal(Hook):
    def on_step(self, stage, state):
        if site == "step" and int(state.step) == number and os.environ.get("JAX_PROCESS_ID", "1") == "1":
            os.kill(os.getpid(), sign)

    def on_log(self, event):  # orbax is still writing the checkpoint of this step
        if site == "save" and event.step == number:
            os.kill(os.getpid(), sign)

sys.exit(main.main(hooks=[Signal()]))
"""


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    cache = tmp_path_factory.mktemp("compiled")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_", "JAX_"))}
    environment |= {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(cache)}

    def start(config, workdir, *arguments, interrupt=None):
        program = ["-m", "lt_adv.main"] if interrupt is None else ["-c", SIGNAL_PROGRAM.format(arguments=interrupt)]
        command = [sys.executable, *program, f"--config={config}", f"--workdir={workdir}", *arguments]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)

    return start


def last_checkpoint(workdir):
    """Returns (step, path -> array) of the last checkpoint."""
    stage = workdir / "checkpoints" / "0_train"
    last = max((d for d in stage.iterdir() if d.name.isdigit()), key=lambda d: int(d.name))
    handler = ocp.PyTreeCheckpointHandler()
    tree = handler.metadata(last / "state").tree
    restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)  # for any number of devices
    tree = handler.restore(last / "state", args=ocp.args.PyTreeRestore(item=tree, restore_args=restore_args))
    tree["key"] = jax.random.key_data(tree["key"])
    return int(last.name), {
        jax.tree_util.keystr(p): np.asarray(a) for p, a in jax.tree_util.tree_leaves_with_path(tree)
    }


@pytest.mark.slow
def test_resume_after_kills_and_sigterm_is_bit_exact(launch, tmp_path):
    config = "configs/robal.py:dataset=digits,epochs=4"
    uninterrupted, interrupted = tmp_path / "uninterrupted", tmp_path / "interrupted"
    assert launch(config, uninterrupted, *SHORT).returncode == 0
    # 483 training images, 7 steps per epoch. Kill in the second epoch, kill while its checkpoint (14) is written,
    # terminate in the fourth epoch, which saves, then run to the end.
    for interrupt, code in ((("step", 10, 9), -9), (("save", 14, 9), -9), (("step", 24, 15), 0)):
        result = launch(config, interrupted, *SHORT, interrupt=interrupt)
        assert result.returncode == code, result.stderr
    assert "SIGTERM: saved at step 25 of 28" in result.stdout and not (interrupted / "report.json").exists()
    result = launch(config, interrupted, *SHORT)
    assert result.returncode == 0 and "Resumed 0_train at step 25 of 28" in result.stdout, result.stderr
    (step, expected), (other, actual) = last_checkpoint(uninterrupted), last_checkpoint(interrupted)
    assert step == other == 28 and expected.keys() == actual.keys()
    for name in ("params", "batch_stats", "opt_state", "average", "metric_sums", "key"):
        assert any(name in path for path in expected), name
    different = [path for path in expected if expected[path].tobytes() != actual[path].tobytes()]
    assert not different
    assert (uninterrupted / "metrics.jsonl").read_text() == (interrupted / "metrics.jsonl").read_text()
    rows = [json.loads(line) for line in (uninterrupted / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [3, 6, 7, 10, 13, 14, 17, 20, 21, 24, 27, 28]
    assert {"valid/clean/accuracy", "valid/pgd20/accuracy_tail", "train/clean/balanced_accuracy"} <= rows[-1].keys()
    reports = [json.loads((run / "report.json").read_text())["metrics"] for run in (uninterrupted, interrupted)]
    assert reports[0] == reports[1]

    validation = ("--mode=eval", "--config.eval.split=validation", "--config.eval.report=valid", *SHORT)
    result = launch(config, uninterrupted, *validation)
    assert result.returncode == 0, result.stderr
    header = json.loads((uninterrupted / "reports" / "valid" / "report.json").read_text())["header"]
    assert header["images_per_class"] == [2] * 10 and header["subset"] == "the whole validation split"
    assert header["split"] == "validation"


@pytest.mark.slow
def test_robal_lifts_the_tail_of_digits(launch, tmp_path):
    """The run of README.md: RoBal's tail under PGD-20 is at least 4 points above AT's (three seeds gave 9 to 16)."""
    metrics = {}
    for name in ("at", "robal"):
        workdir = tmp_path / name
        result = launch(f"configs/{name}.py:dataset=digits", workdir, "--config.eval.only=('pgd20','cw20')")
        assert result.returncode == 0 and not result.stderr, result.stderr
        report = json.loads((workdir / "report.json").read_text())
        assert not report["warnings"] and report["header"]["images"] == 545
        metrics[name] = report["metrics"]
        for plot in ("accuracy_by_class", "robust_error", "training_curves", "examples"):
            assert (workdir / "plots" / f"{plot}.png").stat().st_size > 10_000
        assert "PGD-20" in result.stdout
    for row in metrics.values():
        # The network learnt, and its robust accuracy is neither at chance nor saturated.
        assert row["eval/clean/balanced_accuracy"] > 0.9 and 0.5 < row["eval/pgd20/balanced_accuracy"] < 0.9
        assert row["eval/worst/accuracy"] <= min(row["eval/pgd20/accuracy"], row["eval/cw20/accuracy"])
    gain = metrics["robal"]["eval/pgd20/accuracy_tail"] - metrics["at"]["eval/pgd20/accuracy_tail"]
    assert gain >= 0.04, f"tail PGD-20: {100 * gain:+.1f} points"
    assert metrics["robal"]["eval/worst/accuracy_tail"] > metrics["at"]["eval/worst/accuracy_tail"]

"""What feedback from the test images is worth to CGRm, whose authors take it from there.

    python -m experiments.cgrm_feedback --config=configs/cgrm.py:dataset=digits --seeds=4 --name=digits

For each seed, of training and of the split, the same training images train three networks that differ only in the
images of the feedback: the validation split; all test images; and every second test image of each class, the seen half.
Each network is evaluated on all test images, without an attack and under PGD-20. The result is written to
experiments/results/cgrm_feedback/<name>.json after each seed; the accuracies are in per cent.

    test - validation   the gain in test accuracy from feedback of the test images. It has two causes: the evaluated
                        images decide the weights, and there are more of them than in the validation split.
    seen - unseen       the first cause alone: accuracy on the seen half minus that on the other half, of the network
                        with feedback from the seen half, minus the same difference with the validation split.

An estimate is the mean over seeds, with the standard error sd / sqrt(seeds).
"""

import dataclasses
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from experiments.benchmark import record
from experiments.options import Parser, name, positive, run_command
from lt_adv import attacks, data
from lt_adv.cli import flags
from lt_adv.cli.experiment import Experiment
from lt_adv.data import Split, longtail
from lt_adv.runtime import atomic_io
from lt_adv.training import stage_builder
from lt_adv.training.image_batches import ImageBatches

RESULTS = Path(__file__).parent / "results" / "cgrm_feedback"
ARMS = ("validation", "test", "half")
ATTACK = "pgd20"


def seen(split: data.LongTailed) -> np.ndarray:
    """Returns whether a test image is in the seen half, bool [n]."""
    half = np.zeros(len(split.test), bool)
    for c in range(len(split.class_names)):
        half[np.flatnonzero(split.test.label == c)[::2]] = True
    return half


def feedback_images(arm: str, split: data.LongTailed) -> Split | None:
    """Returns the images of the feedback."""
    if arm == "half":
        return split.test.take(np.flatnonzero(seen(split)))
    return split.test if arm == "test" else split.validation


def train(config: ConfigDict, arm: str) -> tuple[dict[str, np.ndarray], data.LongTailed]:
    """Trains one network: ({"clean", "pgd20": whether it classifies a test image correctly, [n]}, its split)."""
    experiment = Experiment.from_config(config)
    split = dataclasses.replace(experiment.split, validation=feedback_images(arm, experiment.split))
    experiment = Experiment.from_config(config, split=split, dataset=experiment.dataset, mesh=experiment.mesh)
    (resolved,) = experiment.resolved_stages
    stage, per_epoch = stage_builder.build(resolved, experiment.mesh), resolved.info.steps_per_epoch
    state = stage.first_state()
    with stage.pipeline.batches(0, resolved.num_steps) as batches:
        for step, batch in enumerate(batches, 1):
            state, _ = stage.step(state, batch, stage.teacher)
            if step % per_epoch == 0:
                state = stage.end_epoch(state, step // per_epoch)

    spec = config.eval.attacks[ATTACK]
    options = {"eps": spec.eps, "step_size": spec.step_size, "num_steps": spec.num_steps}
    pgd, predict = attacks.jit(attacks.pgd, stage.apply, **options), jax.jit(stage.apply)
    label = split.test.label
    images = ImageBatches(split.test.image, label, mesh=experiment.mesh, batch_size=config.eval.batch_size)
    predictions: dict[str, list[np.ndarray]] = {"clean": [], ATTACK: []}
    for x, y, keys in images.batches(jax.random.key(config.eval.seed, impl="threefry2x32")):
        for condition, inputs in (("clean", x), (ATTACK, pgd(keys, state.evaluated, x, y))):
            predictions[condition].append(np.asarray(predict(state.evaluated, inputs)).argmax(-1))
    return {name: np.concatenate(rows)[: len(label)] == label for name, rows in predictions.items()}, split


def measure(config: ConfigDict, seed: int) -> dict[str, Any]:
    """Returns the accuracies of all arms, {arm: {"pgd20/all", "pgd20/tail", "pgd20/seen", "pgd20/unseen", ...}}."""
    config = config.copy_and_resolve_references()
    config.seed = config.data.split_seed = seed
    accuracies = {}
    for arm in ARMS:
        correct, split = train(config, arm)
        half = seen(split)
        tail = np.isin(split.test.label, longtail.groups(split.class_counts)["tail"])
        parts = {"all": np.ones_like(half), "tail": tail, "seen": half, "unseen": ~half}
        accuracies[arm] = {
            f"{condition}/{part}": 100 * float(bits[member].mean())
            for condition, bits in correct.items()
            for part, member in parts.items()
        }
    return {"seed": seed, "accuracy": accuracies}


def summarize(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns {contrast: {"value", "standard_error"}} in percentage points; the error is None with one seed."""

    def estimate(differences: Sequence[float]) -> dict[str, float | None]:
        count = len(differences)
        error = statistics.stdev(differences) / count**0.5 if count > 1 else None
        return {"value": statistics.fmean(differences), "standard_error": error}

    accuracies = [run["accuracy"] for run in runs]
    contrasts = {}
    for term in (f"{ATTACK}/all", f"{ATTACK}/tail", "clean/all", "clean/tail"):
        contrasts[f"test - validation, {term}"] = estimate(
            [a["test"][term] - a["validation"][term] for a in accuracies]
        )
    for condition in (ATTACK, "clean"):
        gaps = [{arm: a[arm][f"{condition}/seen"] - a[arm][f"{condition}/unseen"] for arm in ARMS} for a in accuracies]
        contrasts[f"seen - unseen, {condition}"] = estimate([gap["half"] - gap["validation"] for gap in gaps])
    return contrasts


def command(argv: Sequence[str]) -> int:
    parser = Parser()
    parser.add_argument("--seeds", type=positive(int), default=4)
    parser.add_argument("--name", type=name, default="digits")
    options, rest = parser.parse_with_config(argv, r"--?(no)?config\b")
    config = flags.parse(["cgrm_feedback", *rest]).config
    if config.method.name != "cgrm":
        raise ValueError(f"config.method.name is {config.method.name!r}: this experiment is about cgrm.")
    Experiment.from_config(config).connect()
    atomic_io.make_folder(epath.Path(RESULTS))
    runs: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        runs.append(measure(config, seed))
        result = {
            "command": record.portable(shlex.join(["python", "-m", "experiments.cgrm_feedback", *argv])),
            "commit": record.commit(),
            "machine": record.machine(),
            "versions": record.versions(),
            "config": {**record.describe(config), "epochs": config.optim.epochs},
            "contrasts": summarize(runs),
            "runs": runs,
        }
        record.write(RESULTS / f"{options.name}.json", result)
        print(f"seed {seed}: " + ", ".join(f"{k} {v['value']:.2f}" for k, v in result["contrasts"].items()))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(command, sys.argv[1:] if argv is None else argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())

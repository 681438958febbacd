"""Accuracy during training: clean on a sample of the training images, clean and PGD-20 on the validation split."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from lt_adv import attacks
from lt_adv.data import longtail
from lt_adv.data.dataset import Images
from lt_adv.runtime import distributed
from lt_adv.runtime.distributed import PyTree
from lt_adv.training.hooks import Hook, LogEvent
from lt_adv.training.image_batches import ImageBatches
from lt_adv.training.stage_builder import StageProgram


class ValidationHook(Hook):
    """Adds accuracies to the metrics of an event at the end of an epoch.

    "train/clean/..." is the clean accuracy on a sample of the training images, "valid/clean/..." and "valid/pgd20/..."
    that on the validation split, every `config.log.validate_every_epochs`.
    """

    def __init__(self, stage: StageProgram):
        self._monitors = make_monitors(stage)

    def on_log(self, event: LogEvent) -> None:
        if not event.epoch_ended:
            return
        stage = event.stage
        validate = event.epoch % stage.config.log.validate_every_epochs == 0 or event.is_last_step
        variables = distributed.replicate(event.state.evaluated, distributed.replicated(stage.mesh))
        for name, monitor in self._monitors.items():
            if name == "train" or validate:
                event.metrics |= {f"{name}/{metric}": value for metric, value in monitor(variables).items()}


def make_monitors(stage: StageProgram) -> dict[str, "Monitor"]:
    """Returns the monitors "train" and, where there is a validation split, "valid"."""
    config, split = stage.config, stage.split
    key = jax.random.fold_in(jax.random.key(config.seed, impl="threefry2x32"), 99)
    common: dict[str, Any] = {
        "groups": longtail.groups(split.class_counts),
        "mesh": stage.mesh,
        "batch_size": config.eval.batch_size,
    }
    label = np.asarray(split.train.label)
    first_of_class = [np.flatnonzero(label == c)[: config.log.clean_per_class] for c in range(len(split.class_counts))]
    sample = np.concatenate(first_of_class)
    monitors = {}
    if len(sample):
        monitors["train"] = Monitor(key, stage.apply, split.train.image[sample], label[sample], **common)
    if split.validation is not None:
        attack = {"eps": config.attack.eps, "step_size": config.attack.step_size, "num_steps": 20}
        image, label = split.validation.image, split.validation.label
        monitors["valid"] = Monitor(key, stage.apply, image, label, attack=attack, **common)
    return monitors


class Monitor:
    """Computes `monitor(variables) -> {"clean/accuracy": ..., "pgd20/accuracy_tail": ...}` on fixed images.

    "accuracy", also by group, is the mean over images; "balanced_accuracy" the mean over the classes that have images.

    Args:
        key: key of the attack.
        apply: `apply(variables, x) -> logits`, with the post-hoc adjustment of the evaluation.
        image: uint8 [n, h, w, c].
        label: int [n].
        groups: name of a group of classes -> class ids.
        mesh: all devices.
        batch_size: over all devices. Images are padded to full batches and the padding is ignored.
        attack: options of PGD; None for clean accuracy only.
    """

    def __init__(
        self,
        key: jax.Array,
        apply: Callable[[PyTree, jax.Array], jax.Array],
        image: Images,
        label: np.ndarray,
        *,
        groups: Mapping[str, np.ndarray],
        mesh: Mesh,
        batch_size: int,
        attack: Mapping[str, Any] | None = None,
    ):
        self._key, self._label, self._groups = key, np.asarray(label), groups
        self._images = ImageBatches(image, self._label, mesh=mesh, batch_size=batch_size)
        self._replicated = distributed.replicated(mesh)
        # Predictions are gathered after all batches: programs with collectives must not run concurrently.
        self._predict = jax.jit(
            lambda variables, x: attacks.prediction(apply(variables, x)), out_shardings=self._images.over_devices
        )
        self._attacks: dict[str, Any] = {"clean": None}
        if attack is not None:
            self._attacks[f"pgd{attack['num_steps']}"] = attacks.jit(attacks.pgd, apply, **attack)

    def __call__(self, variables: PyTree) -> dict[str, float]:
        result = {}
        for name, attack in self._attacks.items():
            predictions = [
                self._predict(variables, x if attack is None else attack(keys, variables, x, y))
                for x, y, keys in self._images.batches(self._key)
            ]
            predicted = np.concatenate([np.asarray(distributed.replicate(p, self._replicated)) for p in predictions])
            correct = predicted[: len(self._label)] == self._label
            result[f"{name}/accuracy"] = float(correct.mean())
            classes = np.unique(self._label)
            result[f"{name}/balanced_accuracy"] = float(np.mean([correct[self._label == c].mean() for c in classes]))
            for group, classes in self._groups.items():
                member = np.isin(self._label, classes)
                if member.any():
                    result[f"{name}/accuracy_{group}"] = float(correct[member].mean())
        return result

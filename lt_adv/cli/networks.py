"""Loads the network to evaluate: that of a run, or external weights."""

import collections
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from etils import epath

from lt_adv import models
from lt_adv.cli import schema, workdirs
from lt_adv.cli.experiment import Experiment
from lt_adv.models import torch_import, weight_files
from lt_adv.training import checkpoint, checksums, stage_builder


class LoadedNetwork(NamedTuple):
    """A network as it is evaluated."""

    apply: Callable[[Any, jax.Array], jax.Array]  # (variables, x) -> logits: `stage_builder.evaluation_apply`
    variables: dict[str, Any]
    meta: dict[str, Any]  # metadata of the checkpoint; of external weights, their description


def load(experiment: Experiment, workdir: epath.Path) -> LoadedNetwork:
    """Returns the network that the config selects: of the run in `workdir`, or the weights in `config.init_from`.

    Raises:
      FileNotFoundError: there is no checkpoint.
      ValueError: the network was trained with another config, or is another network.
    """
    workdirs.require_same_config(experiment.config, workdir)
    if experiment.uses_external_weights:
        variables, meta = read_external(experiment)
    else:
        variables, meta = read_trained(experiment, workdir)
    extra: Any = meta.get("extra")  # of a checkpoint: an evaluation does not read the extra images
    counts = extra["class_counts"] if extra else None
    return LoadedNetwork(stage_builder.evaluation_apply(experiment.config, experiment.split, counts), variables, meta)


def read_trained(experiment: Experiment, workdir: epath.Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns (variables, metadata) of the checkpoint that `config.eval.checkpoint` selects."""
    config = experiment.config
    variables, meta = checkpoint.read_variables(workdir, config.eval.checkpoint)
    check_version(meta)
    split = experiment.split
    if meta["class_counts"] != list(split.class_counts):
        trained, configured = format_counts(meta["class_counts"]), format_counts(split.class_counts)
        raise ValueError(
            f"{workdir} was trained with class counts {trained}, this config gives {configured}; "
            f"it is at {position(meta)}: let it finish, or correct the config."
        )
    schema.validate_variables(config, split, variables, workdir)
    return variables, meta


def read_external(experiment: Experiment) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns (variables, description) of the weight file in `config.init_from`.

    The description has the file, its SHA-256, and how many of its tensors the network does not use.
    """
    path, split = experiment.config.init_from, experiment.split
    model = models.create(experiment.config.model, len(split.class_names))
    variables, unused = torch_import.variables(path, model, split.train.image.shape[1:])
    reasons = collections.Counter(unused.values())
    return dict(variables), {
        "method": "not known",
        "weights": f"{path}, SHA-256 {weight_files.sha256(path)}",
        "unused_tensors": "; ".join(f"{number}: {reason}" for reason, number in reasons.items()) or "none",
    }


def require_finished_run(run: str, description: str) -> None:
    """Raises ValueError, which begins with `description`, unless the directory holds a finished run."""
    try:
        _, meta = checkpoint.read_shapes(run)
    except FileNotFoundError as error:
        raise ValueError(f"{description}, which does not exist: train it first, or name another.") from error
    check_version(meta)
    if not is_finished(meta, "last"):
        raise ValueError(f"{description}, which is at {position(meta)}: let it finish, or name another.")


def check_version(meta: Mapping[str, Any]) -> None:
    """Raises ValueError for the metadata of a checkpoint that an earlier version has written."""
    if missing := [name for name in checksums.METADATA_TYPES if name not in meta]:
        entry = f"The checkpoint of stage {meta.get('stage')} has no entry {missing[0]}"
        raise ValueError(f"{entry}: it was written by an earlier version and cannot be read; train again.")


def is_finished(meta: Mapping[str, Any], which: str) -> bool:
    """Whether a checkpoint is the end of the last stage, or the best one of the last stage if `which` is "best"."""
    ended = meta["step"] == meta["total_steps"] or which == "best"
    return ended and meta["stage"].startswith(f"{meta['stages'] - 1}_")


def position(meta: Mapping[str, Any]) -> str:
    """Returns "step 20 of 70 of stage 0_train"."""
    return f"step {meta['step']} of {meta['total_steps']} of stage {meta['stage']}"


def format_counts(counts: Any) -> str:
    """Formats class counts in one line; of more than 20 only the first and the last six."""
    shown = [str(int(c)) for c in counts]
    return " ".join(shown if len(shown) <= 20 else [*shown[:6], "...", *shown[-6:]])

"""Loads the run that `config.eval.baseline` names and compares a network with it (`lt_adv.evaluation.masking`)."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import ml_collections
import numpy as np
from etils import epath

from lt_adv import data
from lt_adv.data import longtail
from lt_adv.evaluation import masking
from lt_adv.runtime import atomic_io, distributed
from lt_adv.training import metric_logging, sharding, stage_builder

# Entries of config.eval that each run takes from its own config; the others are those of the current evaluation.
PER_RUN = ("adjustment", "checkpoint", "dtype")
LoadTrained = Callable[[ml_collections.ConfigDict, epath.Path], tuple[Any, dict[str, Any], data.LongTailed]]


def baseline_config(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Returns the config of the baseline, with the evaluation settings, paths and devices of `config`.

    Raises:
      ValueError: when the baseline's config.json is missing or damaged.
    """
    path = epath.Path(config.eval.baseline) / "config.json"
    try:
        stored = json.loads(path.read_text(), object_hook=_lists_to_tuples)
        per_run = {name: stored["eval"][name] for name in PER_RUN}
        stored["eval"] = {**config.eval.to_dict(), **per_run, "baseline": ""}
        stored["data"] |= {name: config.data[name] for name in ("data_dir", "download", "test_split")}
        stored["cpu_devices"] = config.cpu_devices
    except FileNotFoundError as error:
        raise ValueError(
            f"config.eval.baseline: {path} does not exist; name the working directory of a finished run."
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = atomic_io.reason(path, error, atomic_io.JSON)
        raise ValueError(f"config.eval.baseline: {path} is damaged ({why}).") from error
    return ml_collections.ConfigDict(stored)


def compare(
    config: ml_collections.ConfigDict,
    workdir: epath.Path,
    network: masking.Network,
    split: data.LongTailed,
    images: data.Split,
    specs: Mapping[str, Mapping[str, Any]],
    load_trained: LoadTrained,
) -> dict[str, Any] | None:
    """Returns what `masking.compare_with_baseline` returns, and `baseline_run`; None where no baseline is named.

    Args:
      config: of the run in `workdir`.
      workdir: its working directory; diagnostics are stored there and in that of the baseline.
      network: (apply, variables) of the run.
      split: its data set.
      images: the images of the evaluation; the comparison uses a balanced sample.
      specs: the attacks of the evaluation.
      load_trained: loads the variables, the checkpoint's meta data and the data set of the baseline.

    Raises:
      ValueError: when the baseline cannot be loaded or has other classes or another image size.
    """
    if not config.eval.baseline:
        return None
    directory, stored = epath.Path(config.eval.baseline), baseline_config(config)
    try:
        variables, _, baseline_split = load_trained(stored, directory)
    except ValueError as error:
        raise ValueError(f"config.eval.baseline: the run in {directory}: {error}") from error
    shapes = [(side.class_names, side.test.image.shape[1:]) for side in (split, baseline_split)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"config.eval.baseline: the run in {directory} was trained on other classes or another image size; "
            "name a run on the same data set."
        )
    sample = images.take(masking.balanced_sample(images.label))
    attack = {**config.attack.to_dict(), **config.eval.attacks.to_dict().get("pgd20", {})}
    protocol = masking.masking_protocol(attack, specs)
    metric_logging.console.print(
        f"Gradient masking: comparing with {directory} on {len(sample.label)} images, PGD with "
        f"{protocol['num_steps']} steps.",
        soft_wrap=True,
    )
    comparison = masking.compare_with_baseline(
        masking.ComparedNetwork(*network, workdir / "eval", _identity(config, split)),
        masking.ComparedNetwork(
            stage_builder.evaluated(stored, baseline_split),
            variables,
            directory / "eval",
            _identity(stored, baseline_split),
        ),
        sample,
        protocol=protocol,
        groups=longtail.groups(np.asarray(split.class_counts), config.eval.groups),
        seed=config.eval.seed,
        batch_size=config.eval.batch_size,
        mesh=distributed.local(sharding.make_mesh()),
        console=metric_logging.console,
    )
    return {**comparison, "baseline_run": str(directory)}


def _identity(config: ml_collections.ConfigDict, split: data.LongTailed) -> list[Any]:
    """Returns what the evaluated network depends on, beside its code and weights."""
    settings = {name: config.eval.to_dict()[name] for name in PER_RUN}
    return [config.model.to_dict(), settings, list(split.class_counts)]


def _lists_to_tuples(tree: dict[str, Any]) -> dict[str, Any]:
    """JSON has lists only; configs hold tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in tree.items()}

"""Loads the run that `config.eval.baseline` names and compares a network with it (`lt_adv.evaluation.masking`)."""

import json
from collections.abc import Mapping
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from lt_adv import data
from lt_adv.cli import networks
from lt_adv.cli.experiment import Experiment
from lt_adv.cli.networks import LoadedNetwork
from lt_adv.data import longtail
from lt_adv.evaluation import masking
from lt_adv.runtime import atomic_io, distributed
from lt_adv.training import metric_logging

# Entries of config.eval that each run takes from its own config; the other entries are those of the current evaluation.
PER_RUN = ("adjustment", "checkpoint", "dtype")


def baseline_config(config: ConfigDict) -> ConfigDict:
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
    return ConfigDict(stored)


def compare(
    experiment: Experiment,
    workdir: epath.Path,
    network: LoadedNetwork,
    images: data.Split,
    specs: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any] | None:
    """Returns what `masking.compare_with_baseline` returns, and `baseline_run`; None where no baseline is named.

    Args:
      experiment: the run in `workdir`.
      workdir: its working directory; diagnostics are stored there and in that of the baseline.
      network: the network of the run.
      images: the images of the evaluation; the comparison uses a balanced sample.
      specs: the attacks of the evaluation.

    Raises:
      ValueError: when the baseline cannot be loaded or has other classes or another image size.
    """
    config = experiment.config
    if not config.eval.baseline:
        return None
    directory, stored = epath.Path(config.eval.baseline), baseline_config(config)
    try:
        baseline = Experiment.from_config(stored)
        baseline_network = networks.load(baseline, directory)
    except ValueError as error:
        raise ValueError(f"config.eval.baseline: the run in {directory}: {error}") from error
    shapes = [(side.split.class_names, side.split.test.image.shape[1:]) for side in (experiment, baseline)]
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

    def compared_network(side: Experiment, loaded: LoadedNetwork, directory: epath.Path) -> masking.ComparedNetwork:
        return masking.ComparedNetwork(loaded.apply, loaded.variables, directory / "eval", identity(side))

    comparison = masking.compare_with_baseline(
        compared_network(experiment, network, workdir),
        compared_network(baseline, baseline_network, directory),
        sample,
        protocol=protocol,
        groups=longtail.groups(experiment.split.class_counts, config.eval.groups),
        seed=config.eval.seed,
        batch_size=config.eval.batch_size,
        mesh=distributed.local(experiment.mesh),
        console=metric_logging.console,
    )
    return {**comparison, "baseline_run": str(directory)}


def identity(experiment: Experiment) -> list[Any]:
    """Returns what the evaluated network depends on, apart from its code and weights."""
    config = experiment.config
    settings = {name: config.eval.to_dict()[name] for name in PER_RUN}
    return [config.model.to_dict(), settings, list(experiment.split.class_counts)]


def _lists_to_tuples(tree: dict[str, Any]) -> dict[str, Any]:
    """Converts the lists of a JSON object to tuples, which configs have instead."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in tree.items()}

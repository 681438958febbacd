"""`--mode=train`: trains or resumes a run, then evaluates it."""

from collections.abc import Sequence

import jax
from etils import epath
from ml_collections import ConfigDict

import lt_adv
from lt_adv.cli import evaluate, networks, record_header, schema, workdirs
from lt_adv.cli.experiment import Experiment
from lt_adv.training import loop, metric_logging
from lt_adv.training.hooks import Hook


def train(config: ConfigDict, workdir: epath.Path, hooks: Sequence[Hook] = ()) -> None:
    """Trains, or resumes training, then evaluates.

    Args:
      config: see docs/configuration.md.
      workdir: all output is written there.
      hooks: called by the training loop; see `lt_adv.training.hooks`.

    Raises:
      ValueError: before anything is written, for an invalid config, or one that does not fit the data, the devices or
        the working directory.
    """
    experiment = Experiment.from_config(config)
    experiment.connect()
    check(experiment, workdir)
    with workdirs.claim(config, workdir):
        describe(experiment, workdir)
        loop.train(experiment.resolved_stages, workdir, experiment.mesh, hooks)
        evaluate.write_evaluation(experiment, workdir, networks.load(experiment, workdir))


def check(experiment: Experiment, workdir: epath.Path) -> None:
    """Raises ValueError unless the experiment can be trained and evaluated in the working directory."""
    config = experiment.config
    evaluate.check_baseline(config)
    workdirs.require_same_config(config, workdir, training=True)
    if experiment.uses_external_weights:
        raise ValueError(f"config.init_from: training starts from a run; {config.init_from!r} is only for --mode=eval.")
    for stage in experiment.stages:
        if stage.init not in ("fresh", "previous"):
            networks.require_finished_run(
                stage.init, f"Stage {stage.name!r} starts from the run in {stage.init!r} (config.init_from)"
            )
    for resolved in experiment.resolved_stages:
        schema.validate_initialization(resolved)
    evaluate.select_images(experiment)  # raises


def describe(experiment: Experiment, workdir: epath.Path) -> None:
    """Prints versions, devices, method, network and class counts."""
    config, split, mesh = experiment.config, experiment.split, experiment.mesh
    devices = f"{mesh.size} x {mesh.devices.flat[0].device_kind}  {config.parallel}"
    method = " + ".join((config.method.name, *config.addons))
    counts = f"class counts {networks.format_counts(split.class_counts)}"
    if split.class_counts_before != split.class_counts:
        counts += f" without the validation images ({networks.format_counts(split.class_counts_before)} with them)"
    ratio = max(split.class_counts) / min(split.class_counts)
    lines = [
        f"lt_adv {lt_adv.__version__}  jax {jax.__version__}  {devices}",
        f"method {method}  model {config.model.name}  data {config.data.name}  workdir {workdir}",
        f"{counts}  imbalance ratio {ratio:.1f}",
    ]
    if split.split_file:
        lines.append(f"split file {split.split_file}")
    if extra := experiment.resolved_stages[-1].describe_extra():
        lines.append(f"extra images {record_header.describe_extra(extra)}")
    for line in lines:
        metric_logging.console.print(line)

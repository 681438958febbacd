"""`--mode=eval`: attacks the network of a run, or external weights, and writes the report."""

from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from lt_adv import data, evaluation
from lt_adv.cli import baseline, networks, record_header, workdirs
from lt_adv.cli.experiment import Experiment
from lt_adv.cli.networks import LoadedNetwork
from lt_adv.runtime import distributed, environment
from lt_adv.training import metric_logging


def evaluate(config: ConfigDict, workdir: epath.Path) -> dict[str, Any]:
    """Evaluates the trained network of a working directory, or resumes that, and writes the report.

    The report is written to the working directory, or to reports/<config.eval.report> in it. External weights, a file
    in `config.init_from`, are evaluated as if they had been trained in the working directory.

    Returns:
      The summary of the report on the primary process, {} on the others.
    """
    experiment = Experiment.from_config(config)
    experiment.connect()
    check_baseline(config)
    network = networks.load(experiment, workdir)
    select_images(experiment)  # raises
    with workdirs.claim(config, workdir) if experiment.uses_external_weights else workdirs.locked(workdir):
        return write_evaluation(experiment, workdir, network)


def check_baseline(config: ConfigDict) -> None:
    """Raises ValueError if `config.eval.baseline` names a run that does not exist or is not finished."""
    if run := config.eval.baseline:
        networks.require_finished_run(run, f"The baseline is the run in {run!r} (config.eval.baseline)")


def write_evaluation(experiment: Experiment, workdir: epath.Path, network: LoadedNetwork) -> dict[str, Any]:
    """Attacks the network and writes the report, in a working directory that this process has locked.

    Returns:
      As `evaluate`.
    """
    distributed.restore_sigterm_handler()
    config, split, meta = experiment.config, experiment.split, network.meta
    options, counts = config.eval, split.class_counts
    if not experiment.uses_external_weights and not networks.is_finished(meta, options.checkpoint):
        metric_logging.console.print(
            f"Note: this evaluates {networks.position(meta)}, not the end of training.", soft_wrap=True
        )
    images, subset = select_images(experiment)
    specs = options.attacks.to_dict()
    selected = options.only or [name for name, spec in specs.items() if not evaluation.needs_all_images(spec)]
    specs = {name: spec for name, spec in specs.items() if name in selected}
    key = jax.random.key(options.seed, impl="threefry2x32")
    records = evaluation.evaluate(
        key,
        network.apply,
        network.variables,
        images,
        attacks=specs,
        batch_size=options.batch_size,
        directory=workdir / "eval",
        header=record_header.header(experiment, meta, subset),
        mesh=experiment.mesh,
        class_names=split.class_names,
        console=metric_logging.console,
    )
    summary = {}
    if distributed.is_primary():
        context = {
            "class_counts": counts,
            "class_counts_before": split.class_counts_before if split.class_counts_before != counts else None,
            "groups": options.groups,
            "training_seconds": meta.get("seconds"),
            "commit": environment.commit(),
            "metrics": workdir / "metrics.jsonl",
            "reliability": baseline.compare(experiment, workdir, network, images, specs),
            "examples": evaluation.main_examples(
                key,
                network.apply,
                network.variables,
                images,
                records,
                specs=specs,
                class_counts=counts,
                mesh=distributed.local(experiment.mesh),
            ),
        }
        directory = report_directory(config, workdir)
        summary = evaluation.write_report(directory, records, {k: v for k, v in context.items() if v is not None})
        evaluation.print_summary(summary, metric_logging.console)
        metric_logging.console.print(f"Report: {directory / 'report.md'}", soft_wrap=True)
    distributed.barrier("the report is written")
    return summary


def report_directory(config: ConfigDict, workdir: epath.Path) -> epath.Path:
    """Returns the working directory, or the directory in it of a named report."""
    return workdir / "reports" / config.eval.report if config.eval.report else workdir


def select_images(experiment: Experiment) -> tuple[data.Split, str]:
    """Returns the images to evaluate on, and their description."""
    options, split = experiment.config.eval, experiment.split
    images = split.test if options.split == "test" else split.validation
    assert images is not None, "schema.validate requires config.data.validation_per_class"
    if not options.subset_per_class:
        return images, f"the whole {options.split} split"
    subset = evaluation.balanced_subset(images.label, options.subset_per_class)
    description = f"class-balanced subset, {options.subset_per_class} per class, seed 0"
    return images.take(subset), description if options.split == "test" else f"{description}, of the validation split"

"""Training and evaluation of a config, from the command line to the report."""

import hashlib
import json
import sys
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections
from etils import epath

import lt_adv
from lt_adv import data, evaluation
from lt_adv.cli import baseline, schema, workdirs
from lt_adv.runtime import distributed, environment
from lt_adv.training import checkpoint, checksums, loop, metric_logging, sharding, stage_builder


def train(config: ml_collections.ConfigDict, workdir: epath.Path) -> None:
    """Trains, or resumes training, then evaluates.

    Raises:
      ValueError: before anything is written, for an invalid config, or one that does not fit the data, the devices or
        the working directory.
    """
    prepare(config)
    require_same_config(config)
    workdirs.compare(config, workdir, training=True)
    check_init_from(config)
    dataset, mesh = data.load(config.data), sharding.make_mesh()
    split = data.long_tailed(dataset, config.data)
    for stage in stage_builder.stages(config):
        stage_config = stage_builder.configured(config, stage)
        stage_split = data.long_tailed(dataset, stage_config.data) if stage.overrides else split
        schema.validate_stage(stage_config, stage, stage_split, mesh.size)
    _images(config.eval, split)
    with workdirs.claim(config, workdir):
        describe(config, split, workdir, mesh)
        loop.train(config, workdir, dataset, mesh)
        _evaluate(config, workdir, *load_trained(config, workdir, dataset))


def prepare(config: ml_collections.ConfigDict) -> None:
    """Validates the config, then configures jax."""
    schema.validate(config)
    environment.prepare(config.optim.batch_size, config.cpu_devices)
    if config.eval.baseline:
        require_finished_run(
            config.eval.baseline, f"The baseline is the run in {config.eval.baseline!r} (config.eval.baseline)"
        )


def require_same_config(config: ml_collections.ConfigDict) -> None:
    """Raises ValueError unless all processes have the same config; only the primary process prints from here on."""
    metric_logging.console.quiet = not distributed.is_primary()
    distributed.assert_same_everywhere(
        "The config", json.dumps(workdirs.immutable_entries(config.to_dict()), sort_keys=True)
    )


def check_init_from(config: ml_collections.ConfigDict) -> None:
    """Raises ValueError unless each run that a stage starts from exists and is finished."""
    if schema.uses_external_weights(config):
        raise ValueError(f"config.init_from: training starts from a run; {config.init_from!r} is only for --mode=eval.")
    for stage in stage_builder.stages(config):
        if stage.init in ("fresh", "previous"):
            continue
        require_finished_run(
            stage.init, f"Stage {stage.name!r} starts from the run in {stage.init!r} (config.init_from)"
        )


def require_finished_run(run: str, description: str) -> None:
    """Raises ValueError, which begins with `description`, unless the directory holds a finished run."""
    try:
        _, meta = checkpoint.look(run)
    except FileNotFoundError as error:
        raise ValueError(f"{description}, which does not exist: train it first, or name another.") from error
    if not _finished(meta, "last"):
        raise ValueError(f"{description}, which is at {_position(meta)}: let it finish, or name another.")


def describe(config, split, workdir, mesh) -> None:
    """Prints versions, devices, method, network and class counts."""
    device = mesh.devices.flat[0]
    counts_before = split.class_counts_before
    devices = f"{mesh.size} x {device.device_kind}  {config.parallel}"
    metric_logging.console.print(f"lt_adv {lt_adv.__version__}  jax {jax.__version__}  {devices}")
    method = " + ".join((config.method.name, *config.addons))
    names = f"method {method}  model {config.model.name}  data {config.data.name}"
    metric_logging.console.print(f"{names}  workdir {workdir}")
    counts = f"class counts {_short(split.class_counts)}"
    if counts_before != split.class_counts:
        counts += f" without the validation images ({_short(counts_before)} with them)"
    metric_logging.console.print(f"{counts}  imbalance ratio {max(split.class_counts) / min(split.class_counts):.1f}")


def _short(counts) -> str:
    shown = [str(int(c)) for c in counts]
    return " ".join(shown if len(shown) <= 20 else [*shown[:6], "...", *shown[-6:]])


def load_trained(
    config: ml_collections.ConfigDict, workdir: epath.Path, dataset: data.Dataset | None = None
) -> tuple[dict[str, Any], dict[str, Any], data.LongTailed]:
    """Returns (variables, meta, split) of the network that `config.eval` selects.

    Raises:
      ValueError: the network was trained with another config.
    """
    prepare(config)
    workdirs.compare(config, workdir)
    variables, meta = checkpoint.read_variables(workdir, config.eval.checkpoint)
    split = data.long_tailed(data.load(config.data) if dataset is None else dataset, config.data)
    _finished(meta, config.eval.checkpoint)  # raises for checkpoints of another version
    if meta["class_counts"] != list(split.class_counts):
        trained, configured = _short(meta["class_counts"]), _short(split.class_counts)
        raise ValueError(
            f"{workdir} was trained with class counts {trained}, this config gives {configured}; "
            f"it is at {_position(meta)}: let it finish, or correct the config."
        )
    schema.validate_variables(config, split, variables, workdir)
    return variables, meta, split


def load_external(
    config: ml_collections.ConfigDict, workdir: epath.Path, dataset: data.Dataset | None = None
) -> tuple[dict[str, Any], dict[str, Any], data.LongTailed]:
    """As `load_trained`, from the file of weights in `config.init_from`; meta has nothing of the training."""
    prepare(config)
    workdirs.compare(config, workdir)
    split = data.long_tailed(data.load(config.data) if dataset is None else dataset, config.data)
    return *stage_builder.external_variables(config, split), split


def evaluate(
    config: ml_collections.ConfigDict, workdir: epath.Path, dataset: data.Dataset | None = None
) -> dict[str, Any]:
    """Evaluates the trained network of a working directory, or resumes that, and writes the report.

    The report is written to the working directory, or to reports/<config.eval.report> in it. External weights, a file
    in `config.init_from`, are evaluated as if they had been trained in the working directory.

    Returns:
      The summary of the report on the primary process, {} on the others.
    """
    prepare(config)
    require_same_config(config)
    imports = schema.uses_external_weights(config)
    variables, meta, split = (load_external if imports else load_trained)(config, workdir, dataset)
    _images(config.eval, split)
    with workdirs.claim(config, workdir) if imports else workdirs.locked(workdir):
        return _evaluate(config, workdir, variables, meta, split)


def _evaluate(
    config: ml_collections.ConfigDict,
    workdir: epath.Path,
    variables: dict[str, Any],
    meta: dict[str, Any],
    split: data.LongTailed,
) -> dict[str, Any]:
    """`evaluate`, in a working directory that this process has locked."""
    distributed.restore_sigterm_handler()
    options, counts = config.eval, split.class_counts
    if not schema.uses_external_weights(config) and not _finished(meta, options.checkpoint):
        metric_logging.console.print(
            f"Note: this evaluates {_position(meta)}, not the end of training.", soft_wrap=True
        )
    images, subset = _images(options, split)
    specs = options.attacks.to_dict()
    selected = options.only or [name for name, spec in specs.items() if not evaluation.needs_all_images(spec)]
    specs = {name: spec for name, spec in specs.items() if name in selected}
    mesh, apply = sharding.make_mesh(), stage_builder.evaluated(config, split)
    key = jax.random.key(options.seed, impl="threefry2x32")
    records = evaluation.evaluate(
        key,
        apply,
        variables,
        images,
        attacks=specs,
        batch_size=options.batch_size,
        directory=workdir / "eval",
        header=header(config, split, meta, subset),
        mesh=mesh,
        class_names=split.class_names,
        console=metric_logging.console,
    )
    summary = {}
    if distributed.is_primary():
        network, local_mesh = (apply, variables), distributed.local(mesh)
        shown = evaluation.main_attack([name for name, spec in specs.items() if not evaluation.needs_all_images(spec)])
        context = {
            "class_counts": counts,
            "class_counts_before": split.class_counts_before if split.class_counts_before != counts else None,
            "groups": options.groups,
            "training_seconds": meta.get("seconds"),
            "commit": environment.commit(),
            "metrics": workdir / "metrics.jsonl",
            "reliability": baseline.compare(config, workdir, network, split, images, specs, load_trained),
        }
        if shown:
            context["examples"] = evaluation.examples(
                key, *network, images, records, attack=shown, spec=specs[shown], class_counts=counts, mesh=local_mesh
            )
        directory = report_directory(config, workdir)
        summary = evaluation.write_report(directory, records, {k: v for k, v in context.items() if v is not None})
        evaluation.print_summary(summary, metric_logging.console)
        metric_logging.console.print(f"Report: {directory / 'report.md'}", soft_wrap=True)
    distributed.barrier("the report is written")
    return summary


def report_directory(config: ml_collections.ConfigDict, workdir: epath.Path) -> epath.Path:
    """Returns the working directory, or the directory in it of a named report."""
    return workdir / "reports" / config.eval.report if config.eval.report else workdir


def _images(options: ml_collections.ConfigDict, split: data.LongTailed) -> tuple[data.Split, str]:
    """Returns the images to evaluate on, and their description."""
    images = split.test if options.split == "test" else split.validation
    if not options.subset_per_class:
        return images, f"the whole {options.split} split"
    subset = evaluation.balanced_subset(images.label, options.subset_per_class)
    description = f"class-balanced subset, {options.subset_per_class} per class, seed 0"
    return images.take(subset), description if options.split == "test" else f"{description}, of the validation split"


def _position(meta: Mapping[str, Any]) -> str:
    return f"step {meta['step']} of {meta['total_steps']} of stage {meta['stage']}"


def _finished(meta: Mapping[str, Any], which: str) -> bool:
    """Returns whether a checkpoint is the end of the last stage, or the best one of the last stage if `which` is so."""
    if missing := [name for name in checksums.ENTRIES if name not in meta]:
        entry = f"The checkpoint of stage {meta.get('stage')} has no entry {missing[0]}"
        raise ValueError(f"{entry}: it was written by an earlier version, which cannot be read.")
    ended = meta["step"] == meta["total_steps"] or which == "best"
    return ended and meta["stage"].startswith(f"{meta['stages'] - 1}_")


def header(config, split: data.LongTailed, meta: dict[str, Any], subset: str) -> dict[str, Any]:
    """Returns the entries that identify an evaluation, without those of the evaluator. No times: records are reused."""
    adjustment = config.eval.adjustment
    return {
        "model": _model(config),
        "dataset": f"{config.data.title}, {config.data.imbalance} profile",
        "dataset_digest": split.digest[:16],
        "split": config.eval.split,
        "subset": subset,
        "adjustment": ", ".join(f"{k} {v}" if k != "name" else str(v) for k, v in sorted(adjustment.items())),
        **(_training(config, meta) if "step" in meta else meta),  # external weights have no training
        "evaluation_seed": config.eval.seed,
        "config_digest": hashlib.sha256(json.dumps(workdirs.immutable_entries(config.to_dict())).encode()).hexdigest()[
            :16
        ],
        "lt_adv_version": lt_adv.__version__,
        "code_digest": environment.code_digest(),
        "python_version": sys.version.partition(" ")[0],
    }


def _training(config: ml_collections.ConfigDict, meta: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the entries that describe the training."""
    attack, start = config.attack, stage_builder.stages(config)[-1].method.attack_start
    return {
        "method": _method(config),
        "fidelity": config.fidelity,
        "training_attack": f"eps {attack.eps!r}, step {attack.step_size!r}, {attack.num_steps} steps, start {start}"
        + (f", in {attack.dtype}" if attack.dtype else ""),
        "epochs": config.optim.epochs,
        "checkpoint": config.eval.checkpoint,
        "checkpoint_step": meta["step"],
        "stage": meta["stage"],
        "training": "finished"
        if _finished(meta, config.eval.checkpoint)
        else f"UNFINISHED, step {meta['step']} of {meta['total_steps']}",
        "weights": "averaged" if config.average.name != "none" else "last step",
        "seed": config.seed,
    }


def _method(config: ml_collections.ConfigDict) -> str:
    """Describes the method: trades (beta 6) + robustlt (alpha 0.3, warmup 0.8) + awp (gamma 0.005)."""

    def describe_options(name: str, **options: Any) -> str:
        values = ", ".join(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in options.items())
        return name + (f" ({values})" if values else "")

    method = stage_builder.method(config)  # with the defaults of options that the config leaves out
    options = {option: getattr(method, option) for option in config.method if option != "name"}
    addons = [describe_options(name, **config[name]) for name in config.addons]
    return " + ".join([describe_options(config.method.name, **options), *addons])


def _model(config: ml_collections.ConfigDict) -> str:
    model, evaluated = config.model, config.eval.dtype
    size = f"-{model.depth}-{model.width}" if model.name == "wide_resnet" else ""
    dtype = model.dtype if model.dtype == evaluated else f"trained in {model.dtype}, evaluated in {evaluated}"
    return f"{model.name}{size}, head {model.head.name}, {dtype}"

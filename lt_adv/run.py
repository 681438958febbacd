"""A run from config to report: what `main` calls. Training and evaluation meet here and know nothing of each other."""

import difflib
import hashlib
import json
import platform
from typing import Any

import jax
import ml_collections
from etils import epath

import lt_adv
from lt_adv import data, evaluation, lookup, models
from lt_adv.models import adjustments
from lt_adv.training import checkpoint, logging, loop
from lt_adv.training import mesh as meshes

FREE = ("eval",)  # parts of a config that may change between two starts in one working directory


def train(config: ml_collections.ConfigDict, workdir: epath.Path) -> None:
    """Train (or go on), then evaluate. ValueError if the working directory belongs to another config."""
    claim(config, workdir)
    dataset = data.load(config.data)
    mesh = meshes.make_mesh()
    describe(config, dataset, workdir, mesh)
    loop.train(config, workdir, dataset, mesh)
    evaluate(config, workdir, dataset=dataset)


def claim(config: ml_collections.ConfigDict, workdir: epath.Path) -> None:
    """Store the config in a new working directory; refuse one that was started with another, and show what differs."""
    text = _text(config)
    path = workdir / "config.json"
    workdir.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        logging.write_atomically(path, text)
        return
    mine, theirs = _comparable(json.loads(text)), _comparable(json.loads(path.read_text()))
    if mine != theirs:
        changed = difflib.ndiff(theirs, mine)
        shown = "; ".join(line for line in changed if line[0] in "+-")
        raise ValueError(f"{workdir} was started with another config ({shown}). Use another --workdir, or the old values.")
    logging.write_atomically(path, text)


def _text(config: ml_collections.ConfigDict) -> str:
    return json.dumps(config.to_dict(), indent=1, sort_keys=True, default=str) + "\n"


def _comparable(config: dict[str, Any]) -> list[str]:
    kept = ml_collections.ConfigDict({k: v for k, v in config.items() if k not in FREE})
    return sorted(f"{path} = {json.dumps(value)}" for path, value in _flat(kept.to_dict()))


def _flat(tree: dict[str, Any], prefix: str = ""):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def describe(config, dataset, workdir, mesh) -> None:
    """Say once what is about to run."""
    split = data.long_tailed(dataset, config.data)
    device = mesh.devices.flat[0]
    cut = split.class_counts_before
    logging.console.print(f"lt_adv {lt_adv.__version__}  jax {jax.__version__}  {mesh.size} x {device.device_kind}  {config.parallel}")
    logging.console.print(f"method {config.method.name}  model {config.model.name}  data {dataset.name}  workdir {workdir}")
    counts = f"class counts {_short(split.class_counts)}"
    if split.validation is not None:
        counts += f" after the validation cut ({_short(cut)} before)"
    logging.console.print(f"{counts}  imbalance ratio {max(split.class_counts) / min(split.class_counts):.1f}")


def _short(counts) -> str:
    shown = [str(int(c)) for c in counts]
    return " ".join(shown if len(shown) <= 20 else [*shown[:6], "...", *shown[-6:]])


def evaluate(config: ml_collections.ConfigDict, workdir: epath.Path, dataset: data.Dataset | None = None) -> dict[str, Any]:
    """Evaluate the trained network of a working directory and write its report; interrupted, it resumes.

    The report goes to the working directory itself, or to reports/<config.eval.report> where that is named.
    """
    options = config.eval
    dataset = data.load(config.data) if dataset is None else dataset
    variables, meta = checkpoint.read_variables(workdir, options.checkpoint)
    split = data.long_tailed(dataset, config.data)
    counts = split.class_counts
    if meta["class_counts"] != list(counts):
        raise ValueError(f"{workdir} was trained with class counts {_short(meta['class_counts'])}, this config gives {_short(counts)}.")
    test, subset = split.test, "the whole test split"
    if options.subset_per_class:
        subset = f"class-balanced subset, {options.subset_per_class} per class, seed 0"
        test = test.take(evaluation.balanced_subset(test.label, options.subset_per_class))
    specs = {name: dict(spec) for name, spec in options.attacks.to_dict().items()}
    for name in options.only:
        if name not in specs:
            raise lookup.unknown("attack in config.eval.only", name, specs)
    specs = {name: spec for name, spec in specs.items() if not options.only or name in options.only}
    mesh, key, apply = meshes.make_mesh(), jax.random.key(options.seed), _adjusted(config, split)
    records = evaluation.evaluate(
        key,
        apply,
        variables,
        test,
        attacks=specs,
        batch_size=options.batch_size,
        directory=workdir / "eval",
        header=_header(config, split, meta, subset),
        mesh=mesh,
        class_names=split.class_names,
        console=logging.console,
    )
    shown = next((name for name in ("pgd20", *specs) if name in specs), None)
    context = {
        "class_counts": counts,
        "class_counts_before": split.class_counts_before if split.validation is not None else None,
        "groups": options.groups,
        "training_seconds": meta["seconds"],
        "metrics": workdir / "metrics.jsonl",
    }
    if shown:
        context["examples"] = evaluation.examples(
            key, apply, variables, test, records, attack=shown, spec=specs[shown], class_counts=counts, mesh=mesh
        )
    directory = workdir / "reports" / options.report if options.report else workdir
    summary = evaluation.write_report(directory, records, {k: v for k, v in context.items() if v is not None})
    evaluation.show(summary, logging.console)
    logging.console.print(f"Report: {directory / 'report.md'}", soft_wrap=True)
    return summary


def _adjusted(config: ml_collections.ConfigDict, split: data.LongTailed):
    """(variables, x) -> logits in evaluation mode, with the post-hoc adjustment that training never sees."""
    model = models.create(config.model, len(split.class_names))
    adjust = adjustments.create(config.eval.adjustment)

    def apply(variables, x):
        logits, out = model.apply(variables, x, train=False)
        return adjust(variables, out["features"], logits, split.class_counts)

    return apply


def _header(config, split: data.LongTailed, meta: dict[str, Any], subset: str) -> dict[str, Any]:
    """What identifies an evaluation, beside what the evaluator sees itself. No times: they would start it anew."""
    options = {k: v for k, v in config.method.to_dict().items() if k != "name"}
    return {
        "method": config.method.name + (f" ({', '.join(f'{k} {v:g}' for k, v in options.items())})" if options else ""),
        "model": _model(config.model),
        "dataset": f"{config.data.title}, {config.data.imbalance} profile",
        "dataset_digest": split.digest[:16],
        "subset": subset,
        "adjustment": ", ".join(f"{k} {v}" if k != "name" else str(v) for k, v in sorted(config.eval.adjustment.items())),
        "fidelity": config.fidelity,
        "training_attack": f"eps {config.attack.eps!r}, step {config.attack.step_size!r}, {config.attack.num_steps} steps",
        "epochs": config.optim.epochs,
        "checkpoint": config.eval.checkpoint,
        "checkpoint_step": meta["step"],
        "weights": "averaged" if config.average.name != "none" else "last step",
        "seed": config.seed,
        "evaluation_seed": config.eval.seed,
        "config_digest": hashlib.sha256("\n".join(_comparable(config.to_dict())).encode()).hexdigest()[:16],
        "lt_adv_version": lt_adv.__version__,
        "python_version": platform.python_version(),
    }


def _model(model: ml_collections.ConfigDict) -> str:
    size = f"-{model.depth}-{model.width}" if model.name == "wide_resnet" else ""
    return f"{model.name}{size}, head {model.head.name}, {model.dtype}"

"""The header of records and reports: what was evaluated, and how it was trained."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from lt_adv import evaluation
from lt_adv.cli import networks, workdirs
from lt_adv.cli.experiment import Experiment


def header(experiment: Experiment, meta: Mapping[str, Any], subset: str) -> dict[str, Any]:
    """Returns the entries that identify an evaluation, except those that the evaluator adds.

    They contain no times, since records of an equal header are reused.

    Args:
      experiment: the experiment.
      meta: metadata of the checkpoint, or the description of external weights.
      subset: description of the images that are attacked.
    """
    config = experiment.config
    adjustment = config.eval.adjustment
    selection = "split file" if config.data.split_file else f"{config.data.imbalance} profile"
    entries = json.dumps(workdirs.immutable_entries(config.to_dict()))
    return {
        "model": describe_model(config),
        "dataset": f"{config.data.title}, {selection}",
        "dataset_digest": experiment.split.digest[:16],
        **({"split_file": experiment.split.split_file} if config.data.split_file else {}),
        "split": config.eval.split,
        "subset": subset,
        "adjustment": ", ".join(f"{k} {v}" if k != "name" else str(v) for k, v in sorted(adjustment.items())),
        **(_training(experiment, meta) if "step" in meta else meta),  # external weights have no training
        "evaluation_seed": config.eval.seed,
        "config_digest": hashlib.sha256(entries.encode()).hexdigest()[:16],
        **evaluation.software(),
    }


def _training(experiment: Experiment, meta: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the entries that describe the training."""
    config, start = experiment.config, experiment.stages[-1].method.attack_start
    attack, finished = config.attack, networks.is_finished(meta, config.eval.checkpoint)
    return {
        "method": describe_method(experiment),
        "fidelity": config.fidelity,
        "training_attack": training_attack(attack, start),
        **({"extra_images": describe_extra(meta["extra"])} if meta.get("extra") else {}),
        "epochs": config.optim.epochs,
        "checkpoint": config.eval.checkpoint,
        "checkpoint_step": meta["step"],
        "stage": meta["stage"],
        "training": "finished" if finished else f"UNFINISHED, step {meta['step']} of {meta['total_steps']}",
        "weights": "averaged" if config.average.name != "none" else "last step",
        "seed": config.seed,
    }


def describe_extra(extra: Mapping[str, Any]) -> str:
    """Returns the description of the extra images, from their entry in a checkpoint."""
    parts = [
        extra["file"],
        f"{extra['images']} images",
        f"{extra['per_batch']} of {extra['batch_size']} images of a batch",
    ]
    parts += [f"prior {extra['prior']}", f"digest {extra['digest'][:16]}"]
    for split, number in extra["copies"].items():
        parts.append(f"not compared with {split} images" if number is None else f"{number} of them {split} images")
    return ", ".join(parts)


def training_attack(attack: ConfigDict, start: str) -> str:
    """Returns the description of `config.attack`: "n_fgsm, eps 0.03, step 1 eps, noise 2 eps, in bfloat16"."""
    if attack.name == "pgd":
        text = f"eps {attack.eps!r}, step {attack.step_size!r}, {attack.num_steps} steps, start {start}"
    else:
        step = attack.relative_step_size or {"fgsm": 1.0, "fgsm_rs": 1.25, "n_fgsm": 1.0}[attack.name]
        text = f"{attack.name}, eps {attack.eps!r}, step {step:g} eps"
        text += f", noise {attack.noise:g} eps" if attack.name == "n_fgsm" else ""
    return text + (f", in {attack.dtype}" if attack.dtype else "")


def describe_method(experiment: Experiment) -> str:
    """Returns "trades (beta 6) + robustlt (alpha 0.3, warmup 0.8) + awp (gamma 0.005)"."""

    def with_options(name: str, options: Mapping[str, Any]) -> str:
        values = ", ".join(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in options.items())
        return name + (f" ({values})" if values else "")

    config = experiment.config
    # From the method: its value for an option that is None in the config is that of the fidelity.
    options = {option: getattr(experiment.method, option) for option in config.method if option != "name"}
    names = [with_options(config.method.name, options)]
    return " + ".join([*names, *(with_options(addon, config[addon]) for addon in config.addons)])


def describe_model(config: ConfigDict) -> str:
    """Returns "wide_resnet-34-10, head cosine, float32", and how the network normalises its images."""
    model, evaluated = config.model, config.eval.dtype
    size = f"-{model.depth}-{model.width}" if model.name == "wide_resnet" else ""
    dtype = model.dtype if model.dtype == evaluated else f"trained in {model.dtype}, evaluated in {evaluated}"
    normalisation = f", images normalised by mean {model.mean} and std {model.std}" if model.mean else ""
    return f"{model.name}{size}, head {model.head.name}, {dtype}{normalisation}"

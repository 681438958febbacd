"""A network held against the baseline that `config.eval.baseline` names: both are probed on the same images."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath

from lt_adv import data, evaluation
from lt_adv.data import longtail
from lt_adv.evaluation.masking import diagnose
from lt_adv.runtime import atomic_io, distributed, environment
from lt_adv.training import metric_logging, sharding, stage_builder

OWN = ("adjustment", "checkpoint", "dtype")  # how a run is evaluated by its own config; all else by the one at hand
STEPS = 20  # of PGD, as in the field's tables
Trained = Callable[[ml_collections.ConfigDict, epath.Path], tuple[Any, dict[str, Any], data.LongTailed]]


def configured(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The baseline's config, as it is to be evaluated here. ValueError where its file cannot be read."""
    path = epath.Path(config.eval.baseline) / "config.json"
    try:
        stored = json.loads(path.read_text(), object_hook=_tuples)
        mine = config.eval.to_dict()
        stored["eval"] = {**mine, **{name: stored["eval"][name] for name in OWN}, "baseline": ""}
        # Of this machine, and of these images.
        stored["data"] |= {name: config.data[name] for name in ("data_dir", "download", "test_split")}
        stored["cpu_devices"] = config.cpu_devices
    except FileNotFoundError as error:
        raise ValueError(f"config.eval.baseline: there is no {path}: is it the working directory of a run?") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = atomic_io.reason(path, error, atomic_io.JSON)
        raise ValueError(f"config.eval.baseline: {path} is damaged ({why}).") from error
    return ml_collections.ConfigDict(stored)


def judge(
    config: ml_collections.ConfigDict,
    workdir: epath.Path,
    network: diagnose.Network,
    split: data.LongTailed,
    images: data.Split,
    specs: Mapping[str, Mapping[str, Any]],
    trained: Trained,
) -> dict[str, Any] | None:
    """{"verdict": ..., "network": figures, "baseline": figures, "protocol": ...}; None where no baseline is named.

    `network` is (apply, variables), evaluated on `images` of `split` under the attacks `specs`; `load_trained` loads
    the baseline. The facts of a network are stored in its working directory and reused for the same code, images,
    weights and protocol. Raises ValueError for a baseline with other classes or images.
    """
    if not config.eval.baseline:
        return None
    where, theirs = epath.Path(config.eval.baseline), configured(config)
    try:
        variables, _, other = trained(theirs, where)
    except ValueError as error:
        raise ValueError(f"config.eval.baseline: the run in {where}: {error}") from error
    same = (split.class_names, split.test.image.shape[1:]) == (other.class_names, other.test.image.shape[1:])
    if not same:
        raise ValueError(f"config.eval.baseline: the run in {where} was trained on other classes or sizes of images.")
    chosen = images.take(evaluation.probed(images.label))
    options = _protocol(config, specs)
    plain = (stage_builder.evaluated(theirs, other), variables)
    metric_logging.console.print(
        f"Held against {where}: {len(chosen.label)} images, {options['num_steps']} steps.", soft_wrap=True
    )
    sides = {"network": (config, workdir, network, split), "baseline": (theirs, where, plain, other)}
    facts = {
        side: _facts(directory / "eval", its, counted.class_counts, found, plain, chosen, config, options)
        for side, (its, directory, found, counted) in sides.items()
    }
    cut = longtail.groups(np.asarray(split.class_counts), config.eval.groups)
    verdict = evaluation.decide(
        facts["network"], facts["baseline"], {name: ids for name, ids in cut.items() if len(ids)}
    )
    figures = {side: evaluation.figures(found) for side, found in facts.items()}
    return {"verdict": verdict, "protocol": facts["network"]["protocol"], **figures, "baseline_run": str(where)}


def _protocol(config: ml_collections.ConfigDict, specs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The lengths of pgd20, or of training where the config has none; AutoAttack where the evaluation has it."""
    attack = {**config.attack.to_dict(), **config.eval.attacks.to_dict().get("pgd20", {})}
    versions = [spec.get("version") or "standard" for spec in specs.values() if evaluation.takes_all(spec)]
    lengths = {name: attack[name] for name in ("eps", "step_size")}
    return {
        **lengths,
        "num_steps": STEPS,
        "queries": diagnose.QUERIES,
        "norm": attack.get("norm") or "linf",
        "autoattack": versions[0] if versions else (),
    }


def _facts(
    directory: epath.Path,
    its: ml_collections.ConfigDict,
    class_counts: tuple[int, ...],
    network: diagnose.Network,
    plain: diagnose.Network,
    images: data.Split,
    config: ml_collections.ConfigDict,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """What `probe` finds, or found before; a file that is damaged or cannot be written costs time and nothing else."""
    identity = {
        "code": environment.code_digest(),
        "jax": jax.__version__,
        "device": str(jax.devices()),
        "seed": config.eval.seed,
        "options": options,
        "images": evaluation.split_digest(images),
        "weights": [evaluation.weights_digest(variables) for _, variables in (network, plain)],
        "network": [its.model.to_dict(), {name: its.eval.to_dict()[name] for name in OWN}, list(class_counts)],
    }
    path = directory / "reliability" / f"{evaluation.digest(identity)}.json"
    try:
        kept = json.loads(path.read_text())
        if evaluation.digest(kept["facts"]) == kept["digest"]:
            return kept["facts"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    found = diagnose.probe(
        jax.random.key(config.eval.seed, impl="threefry2x32"),
        *network,
        images.image,
        images.label,
        transfer=plain,
        mesh=distributed.local(sharding.make_mesh()),
        batch_size=config.eval.batch_size,
        **options,
    )
    try:
        atomic_io.write_atomically(path, json.dumps({"digest": evaluation.digest(found), "facts": found}))
    except OSError as error:  # somebody else's baseline
        metric_logging.console.print(
            f"warning: {path} cannot be written ({error.strerror}).", highlight=False, soft_wrap=True
        )
    return found


def _tuples(tree: dict[str, Any]) -> dict[str, Any]:
    """JSON knows lists alone, and configs tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in tree.items()}

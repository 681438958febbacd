"""Validation of a config before anything is loaded, compiled or written. Every error is one line."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import flax
from ml_collections import ConfigDict

from lt_adv import data, models
from lt_adv.attacks import initialization, norms
from lt_adv.data import augment, device_dataset, images, longtail
from lt_adv.evaluation import attack_specs
from lt_adv.evaluation.records import CLEAN, WORST
from lt_adv.methods import base
from lt_adv.models import posthoc, weight_files
from lt_adv.runtime import atomic_io, registry
from lt_adv.training import checkpoint, optimizer, sharding, stage_builder
from lt_adv.training.stage_builder import ResolvedStage

Rule = Callable[[str, Any], None]  # (path of an entry, its value); raises ValueError


def number(interval: str, hint: str = "", kind: type = float) -> Rule:
    """Rule: a number in an interval such as "(0, 1]". NaN is in no interval."""
    low, high = (float(end) for end in interval[1:-1].split(","))

    def rule(path: str, value: Any) -> None:
        if isinstance(value, (int, kind)) and not isinstance(value, bool):
            above = value > low if interval[0] == "(" else value >= low
            below = value < high if interval[-1] == ")" else value <= high
            if above and below:
                return
        name = "a whole number" if kind is int else "a number"
        raise ValueError(f"{path} must be {name} in {interval}, not {value!r}{': ' if hint else ''}{hint}.")

    return rule


def integer(interval: str) -> Rule:
    return number(interval, kind=int)


def one_of(choices: Collection[str]) -> Rule:
    def rule(path: str, value: Any) -> None:
        if not isinstance(value, str) or value not in choices:
            raise registry.unknown(path, value, choices)

    return rule


def of_type(*kinds: type) -> Rule:
    def rule(path: str, value: Any) -> None:
        if not isinstance(value, kinds):
            names = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"{path} must be of type {names}, not {value!r}.")

    return rule


def file_name(path: str, value: Any) -> None:
    if not (isinstance(value, str) and re.fullmatch(r"[\w-][\w.-]*", value)):
        raise ValueError(f"{path} must be a name, of letters, digits, '_', '-' and '.', not {value!r}.")


def path_of(path: str, value: Any) -> None:
    of_type(str)(path, value)
    atomic_io.parse_path(value, path)


def tuple_of(rule: Rule) -> Rule:
    def rules(path: str, values: Any) -> None:
        of_type(tuple)(path, values)
        for value in values:
            rule(f"each of {path}", value)

    return rules


def optional(rule: Rule) -> Rule:
    return lambda path, value: None if value is None else rule(path, value)


PIXELS = "lengths are in units of the [0, 1] pixel range, where 8/255 is 0.03137"
RATIO = "it is max count / min count, so the literature's 0.02 is ratio 50"
LENGTH, POSITIVE, NOT_NEGATIVE = number("(0, 1]", PIXELS), number("(0, inf)"), number("[0, inf)")
MOST = 1000000  # upper bound of every count: no sum of counts overflows 32 bits
ONE_OR_MORE, ZERO_OR_MORE, SEED = integer(f"[1, {MOST}]"), integer(f"[0, {MOST}]"), integer("[0, 4294967295]")

# Entries of every config. A model, head, method, adjustment or attack validates its own options.
ENTRIES: Mapping[str, Rule] = {
    "seed": SEED,
    "init_from": path_of,
    "parallel": one_of(sharding.PARALLEL),
    "sharded": tuple_of(one_of(sharding.SHARDED)),
    "cpu_devices": optional(ONE_OR_MORE),
    "fidelity": base.check_fidelity,
    "data.name": of_type(str),
    "data.title": of_type(str),
    "data.data_dir": optional(path_of),
    "data.path": optional(path_of),
    "data.image_size": optional(integer(f"[1, {images.LARGEST}]")),
    "data.download": of_type(bool),
    "data.test_split": of_type(str),
    "data.resident_gib": NOT_NEGATIVE,
    "data.imbalance": one_of(longtail.PROFILES),
    "data.imbalance_ratio": number("[1, inf)", RATIO),
    "data.balanced_fraction": number("(0, 1]"),
    "data.class_counts": tuple_of(ONE_OR_MORE),
    "data.validation_per_class": ZERO_OR_MORE,
    "data.validation_from": one_of(longtail.ORIGINS),
    "data.equalise": number("[0, 1]"),
    "data.split_seed": SEED,
    "data.sampler": one_of(device_dataset.SAMPLERS),
    "data.augment": one_of(augment.AUGMENTS),
    "data.pad": ZERO_OR_MORE,
    "model.name": of_type(str),
    "model.head.name": of_type(str),
    "method.name": of_type(str),
    "addons": tuple_of(of_type(str)),
    "robustlt.alpha": number("[0, 1]"),
    "robustlt.warmup": number("[0, 1]", "it is a fraction of the epochs"),
    "awp.gamma": NOT_NEGATIVE,
    "attack.eps": LENGTH,
    "attack.step_size": LENGTH,
    "attack.num_steps": optional(ZERO_OR_MORE),
    "attack.start": optional(one_of(initialization.STARTS)),
    "attack.dtype": optional(one_of(models.DTYPES)),
    "optim.epochs": ONE_OR_MORE,
    "optim.batch_size": ONE_OR_MORE,
    "optim.learning_rate": POSITIVE,
    "optim.momentum": number("[0, 1)"),
    "optim.nesterov": of_type(bool),
    "optim.weight_decay": NOT_NEGATIVE,
    "optim.schedule": one_of(optimizer.SCHEDULES),
    "optim.drop_epochs": tuple_of(ZERO_OR_MORE),
    "optim.drop_factor": number("(0, 1]"),
    "optim.first_epoch": integer("[0, 1]"),
    "optim.warmup_epochs": ZERO_OR_MORE,
    "average.name": one_of(("none", "ema", "swa")),
    "average.decay": number("[0, 1)"),
    "average.start_epoch": ZERO_OR_MORE,
    "log.every_steps": ONE_OR_MORE,
    "log.clean_per_class": ZERO_OR_MORE,
    "log.validate_every_epochs": ONE_OR_MORE,
    "log.tensorboard": of_type(bool),
    "checkpoint.every_epochs": ONE_OR_MORE,
    "checkpoint.keep": ONE_OR_MORE,
    "eval.batch_size": ONE_OR_MORE,
    "eval.dtype": one_of(models.DTYPES),
    "eval.split": one_of(("test", "validation")),
    "eval.subset_per_class": ZERO_OR_MORE,
    "eval.only": tuple_of(of_type(str)),
    "eval.baseline": path_of,
    "eval.report": lambda path, value: None if value == "" else file_name(path, value),
    "eval.groups": one_of(longtail.GROUPS),
    "eval.checkpoint": one_of(("last", "best")),
    "eval.seed": SEED,
    "eval.adjustment.name": of_type(str),
}
OPTIONS = ("model.", "method.", "eval.adjustment.", "eval.attacks.")  # sections whose entries depend on a name
ATTACK_OPTIONS: Mapping[str, Rule] = {
    "eps": LENGTH,
    "step_size": LENGTH,
    "num_steps": ZERO_OR_MORE,
    "start": one_of(initialization.STARTS),
    "norm": lambda path, value: norms.get(value) and None,
    "logit_scale": POSITIVE,
    "confidence": NOT_NEGATIVE,
    "decay": NOT_NEGATIVE,
}
L2 = {"eps": POSITIVE, "step_size": POSITIVE}  # an L2 distance over many pixels may exceed 1


def flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    """Flattens nested dicts: {"optim": {"epochs": 80}} -> {"optim.epochs": 80}."""
    return flax.traverse_util.flatten_dict(config, sep=".")


def validate(config: ConfigDict, stages: Sequence[base.Stage]) -> None:
    """Validates what one entry alone does not show, without the data.

    Raises:
      ValueError: an entry does not fit another one, or has no effect.
    """
    start, used = config.attack.start, stages[-1].method.attack_start
    if start not in (None, used):
        raise ValueError(
            f"config.attack.start is {start!r}, but config.fidelity or config.addons sets {used!r}: leave it out."
        )
    starts_from_run = config.init_from and not uses_external_weights(config)
    if starts_from_run and config.init_from not in {stage.init for stage in stages}:
        raise ValueError(f"config.init_from: method {config.method.name} does not start from another run.")
    models.create(config.model, num_classes=2)
    adjustment = config.eval.adjustment
    posthoc.create(adjustment, config.model.head.name)
    if adjustment.name == "tde" and config.method.name != "tde":
        raise ValueError(f"The adjustment 'tde' needs the state of method tde, and the method is {config.method.name}.")
    if adjustment.name == "tde" and uses_external_weights(config):
        raise ValueError(
            f"The adjustment 'tde' needs the state of method tde, and {config.init_from} holds only weights."
        )
    for name, spec in config.eval.attacks.items():
        _attack(name, spec, f"config.eval.attacks.{name}")
    for name in config.eval.only:
        one_of(list(config.eval.attacks))("attack in config.eval.only:", name)
    for name, value in (("checkpoint", "best"), ("split", "validation")):
        if config.eval[name] == value and not config.data.validation_per_class:
            raise ValueError(f"config.eval.{name} is {value!r}, which needs config.data.validation_per_class above 0.")
    optional(integer(f"[1, {config.optim.batch_size}]"))("config.cpu_devices", config.cpu_devices)
    if config.sharded and config.parallel == "pmap":
        raise ValueError("config.sharded: pmap replicates the state on every device, use config.parallel=shard_map.")
    if config.average.name == "ema" and config.average.start_epoch:
        raise ValueError("config.average.start_epoch applies to 'swa' only: leave it at 0 for 'ema'.")
    if config.average.name == "swa":
        integer(f"[0, {config.optim.epochs})")("config.average.start_epoch", config.average.start_epoch)


def uses_external_weights(config: ConfigDict) -> bool:
    """Returns whether `config.init_from` names a file of external weights instead of a run."""
    return weight_files.is_file(str(config.get("init_from") or ""))


def validate_entries(config: ConfigDict) -> None:
    """Validates every entry.

    Raises:
      ValueError: an entry is missing, unknown or out of range.
    """
    entries = flatten(config.to_dict())
    for path, value in entries.items():
        if path in ENTRIES:
            ENTRIES[path](f"config.{path}", value)
        elif not path.startswith(OPTIONS):
            section = path.partition(".")[0]
            near = [name for name in ENTRIES if name.partition(".")[0] == section]
            raise registry.unknown("entry of config:", path, near or {name.partition(".")[0] for name in ENTRIES})
        elif isinstance(value, float):
            number("(-inf, inf)")(f"config.{path}", value)
        elif value is not None:
            of_type(str, int, tuple, list)(f"config.{path}", value)
    if missing := [path for path in ENTRIES if path not in entries]:
        raise ValueError(f"config.{missing[0]} is missing: build configs with common.get, which sets every entry.")


def stage_config(config: ConfigDict, stage: base.Stage) -> ConfigDict:
    """Returns a copy of the config with the overrides of a stage, validated."""
    config = config.copy_and_resolve_references()
    try:
        with config.unlocked():
            config.update_from_flattened_dict(dict(stage.overrides))
        if stage.overrides:
            validate_entries(config)
        re.compile(stage.freeze or "")
    except re.error as error:
        raise ValueError(
            f"Stage {stage.name!r}: {stage.freeze!r} is not a valid regular expression ({error})."
        ) from error
    except ValueError as error:
        raise ValueError(f"Stage {stage.name!r}: {error}") from error
    return config


def _attack(name: str, spec: Any, path: str) -> None:
    of_type(ConfigDict)(path, spec)
    file_name("each key of config.eval.attacks", name)
    if name in (CLEAN, WORST):
        raise ValueError(f"{path}: the name {name!r} is reserved for the report, choose another.")
    rules = {**ATTACK_OPTIONS, **(L2 if spec.get("norm") == "l2" else {})}
    for option, value in spec.items():
        optional(rules.get(option, of_type(object)))(f"{path}.{option}", value)
    try:
        attack_specs.resolve(spec)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def validate_for_split(config: ConfigDict, split: data.LongTailed, devices: int) -> None:
    """Raises ValueError unless the config can be trained on this split with this number of devices."""
    longtail.check_no_empty_class(split.class_counts, split.class_names, config.data.name)
    if config.data.augment != "none":  # a larger padding would give crops without any pixel of the image
        integer(f"[0, {min(split.train.image.shape[1:3])})")("config.data.pad", config.data.pad)
    models.create(config.model, len(split.class_names))
    stage_builder.steps_per_epoch(config, split, devices)


def validate_initialization(stage: ResolvedStage) -> None:
    """Raises ValueError if `Stage.freeze` matches no parameter, or `Stage.init` is a run of another network."""
    shapes, init = stage.variable_shapes, stage.stage.init
    optimizer.frozen_mask(shapes["params"], stage.stage.freeze)
    if init not in ("fresh", "previous"):
        stored = {name: tree for name, tree in checkpoint.look(init)[0].items() if name in shapes}
        stage_builder.check_mergeable(_flat(shapes), _flat(stored), init)


def _flat(tree: Any) -> dict[str, Any]:
    """Flattens a tree: {"params/head/kernel": array or shape, ...}."""
    return flax.traverse_util.flatten_dict(tree, sep="/")


def validate_variables(config: ConfigDict, split: data.LongTailed, variables: Any, origin: Any) -> None:
    """Raises ValueError unless `variables`, read from `origin`, have the shapes of the configured network."""
    configured, _ = stage_builder.variable_shapes(config, split)
    stored = {name: tree for name, tree in variables.items() if name != "method_state"}
    configured, stored = (
        {name: tuple(leaf.shape) for name, leaf in _flat(tree).items()} for tree in (configured, stored)
    )
    for name in sorted({*configured, *stored}):
        if configured.get(name) != stored.get(name):
            shapes = f"{name} is {stored.get(name, 'absent')} there, {configured.get(name, 'absent')} in config.model"
            raise ValueError(f"{origin} holds another network: {shapes}.")

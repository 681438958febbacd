"""Validation of a config before anything is loaded, compiled or written. Every error is one line."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import flax
from ml_collections import ConfigDict

from lt_adv import data, models
from lt_adv.cli.entries import (
    ATTACK_OPTIONS,
    ENTRIES,
    FILE_NAME,
    L2_OPTIONS,
    OPTION_SECTIONS,
    describe_renamed,
    integer,
    number,
    of_type,
    one_of,
    optional,
)
from lt_adv.data import longtail
from lt_adv.evaluation import attack_specs
from lt_adv.evaluation.records import CLEAN, WORST
from lt_adv.methods import base
from lt_adv.models import posthoc, weight_files
from lt_adv.runtime import registry
from lt_adv.training import checkpoint, optimizer, stage_builder
from lt_adv.training.stage_builder import ResolvedStage


def flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    """Flattens nested dicts: {"optim": {"epochs": 80}} -> {"optim.epochs": 80}."""
    return flax.traverse_util.flatten_dict(config, sep=".")


def validate(config: ConfigDict, stages: Sequence[base.Stage]) -> None:
    """Validates the entries against each other, without the data.

    Raises:
      ValueError: an entry does not fit another one, or has no effect.
    """
    _validate_training_attack(config.attack)
    start, used = config.attack.start, stages[-1].method.attack_start
    if start not in (None, used):
        raise ValueError(
            f"config.attack.start is {start!r}, but config.fidelity or config.addons sets {used!r}: leave it out."
        )
    starts_from_run = config.init_from and not uses_external_weights(config)
    if starts_from_run and config.init_from not in {stage.init for stage in stages}:
        raise ValueError(f"config.init_from: method {config.method.name} starts from no other run: leave it out.")
    models.create(config.model, num_classes=2)
    adjustment = config.eval.adjustment
    posthoc.create(adjustment, config.model.head.name)
    if adjustment.name == "tde" and config.method.name != "tde":
        raise ValueError(
            "config.eval.adjustment.name is 'tde', which needs the state of method tde, but config.method.name is "
            f"{config.method.name!r}: choose another adjustment."
        )
    if adjustment.name == "tde" and uses_external_weights(config):
        raise ValueError(
            "config.eval.adjustment.name is 'tde', which needs the state of method tde, but config.init_from is "
            f"{config.init_from!r}, a file of weights: choose another adjustment."
        )
    for name, spec in config.eval.attacks.items():
        _validate_attack(name, spec, f"config.eval.attacks.{name}")
    for name in config.eval.only:
        one_of(list(config.eval.attacks))("attack in config.eval.only:", name)
    for name, value in (("checkpoint", "best"), ("split", "validation")):
        if config.eval[name] == value and not config.data.validation_per_class:
            raise ValueError(f"config.eval.{name} is {value!r}, which needs config.data.validation_per_class above 0.")
    _validate_extra(config.data)
    optional(integer(f"[1, {config.optim.batch_size}]"))("config.cpu_devices", config.cpu_devices)
    if config.sharded and config.parallel == "pmap":
        raise ValueError("config.sharded: pmap replicates the state on every device, use config.parallel=shard_map.")
    _validate_average(config)
    has_feedback = any(stage.method.feedback_every for stage in stages)
    if config.eval.split == "validation" and (has_feedback or config.average.min_class_accuracy):
        raise ValueError(
            "config.eval.split is 'validation', but training uses that split (the feedback of config.method, or "
            "config.average.min_class_accuracy): evaluate on the test split."
        )
    if has_feedback and not config.data.validation_per_class:
        raise ValueError(
            f"config.method {config.method.name!r} adapts to its accuracy on a validation split: set "
            "config.data.validation_per_class above 0, and config.data.validation_from='unused'."
        )


def _validate_average(config: ConfigDict) -> None:
    """Raises ValueError for an option that the average `average.name` does not have."""
    average = config.average
    if average.name in ("ema", "epoch_ema") and average.start_epoch:
        raise ValueError(f"config.average.start_epoch applies to 'swa' only: leave it at 0 for {average.name!r}.")
    if average.name != "epoch_ema" and average.min_class_accuracy:
        raise ValueError(
            "config.average.min_class_accuracy applies to 'epoch_ema' only, not to "
            f"config.average.name={average.name!r}: leave it at 0."
        )
    if average.min_class_accuracy and not config.data.validation_per_class:
        raise ValueError(
            "config.average.min_class_accuracy needs a validation split: set config.data.validation_per_class above 0, "
            "and config.data.validation_from='unused'."
        )
    if average.name == "swa":
        integer(f"[0, {config.optim.epochs})")("config.average.start_epoch", average.start_epoch)


def _validate_training_attack(attack: ConfigDict) -> None:
    """Raises ValueError for an option that the attack `attack.name` does not have."""
    if attack.name != "pgd" and attack.start is not None:
        raise ValueError(f"config.attack.start applies to 'pgd' only, not to {attack.name!r}: leave it out.")
    if attack.name != "n_fgsm" and attack.noise != (default := ENTRIES["attack.noise"].default):
        raise ValueError(f"config.attack.noise applies to 'n_fgsm' only: leave it at {default:g} for {attack.name!r}.")
    if attack.name not in ("fgsm_rs", "n_fgsm") and attack.relative_step_size is not None:
        raise ValueError(
            "config.attack.relative_step_size applies to 'fgsm_rs' and 'n_fgsm' only: leave it out for "
            f"{attack.name!r}."
        )


def _validate_extra(options: ConfigDict) -> None:
    """Raises ValueError if an entry for extra images has no effect."""
    if options.extra and not options.extra_fraction:
        raise ValueError("config.data.extra needs config.data.extra_fraction, the share of a batch, above 0.")
    for name in ("extra_fraction", "extra_prior"):
        if not options.extra and options[name] != (default := ENTRIES[f"data.{name}"].default):
            raise ValueError(f"config.data.{name} needs config.data.extra: set it, or leave {name} at {default!r}.")


def uses_external_weights(config: ConfigDict) -> bool:
    """Returns whether `config.init_from` names a file of external weights instead of a run."""
    return weight_files.is_file(str(config.get("init_from") or ""))


def validate_entries(config: ConfigDict) -> None:
    """Validates every entry.

    Raises:
      ValueError: an entry is missing, unknown or out of range.
    """
    entries = flatten(config.to_dict())
    if changes := describe_renamed(entries):
        raise ValueError(f"{changes}.")
    for path, value in entries.items():
        if path in ENTRIES:
            ENTRIES[path].rule(f"config.{path}", value)
        elif not path.startswith(OPTION_SECTIONS):
            section = path.partition(".")[0]
            related = [name for name in ENTRIES if name.partition(".")[0] == section]
            raise registry.unknown("entry of config:", path, related or {name.partition(".")[0] for name in ENTRIES})
        elif isinstance(value, float):
            number("(-inf, inf)")(f"config.{path}", value)
        elif value is not None:
            of_type(str, int, tuple, list)(f"config.{path}", value)
    # Options that are left out have the default of their network.
    required = [path for path in ENTRIES if path.endswith(".name") or not path.startswith(OPTION_SECTIONS)]
    if missing := [path for path in required if path not in entries]:
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


def _validate_attack(name: str, spec: Any, path: str) -> None:
    of_type(ConfigDict)(path, spec)
    FILE_NAME("each key of config.eval.attacks", name)
    if name in (CLEAN, WORST):
        raise ValueError(f"{path}: the name {name!r} is reserved for the report, choose another.")
    rules = {**ATTACK_OPTIONS, **(L2_OPTIONS if spec.get("norm") in ("l2", "l1") else {})}
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
        stored = {name: tree for name, tree in checkpoint.read_shapes(init)[0].items() if name in shapes}
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
            raise ValueError(f"{origin} holds another network: {shapes}; correct config.model.")

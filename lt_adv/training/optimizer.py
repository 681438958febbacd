"""SGD and learning rate schedules, built from optax."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import optax

from lt_adv.runtime import registry
from lt_adv.runtime.distributed import PyTree

SCHEDULES = ("step", "cosine", "constant")


def schedule(config: Mapping[str, Any], steps_per_epoch: int, epochs: int, compounding: bool = False) -> optax.Schedule:
    """Returns the learning rate as a function of the step (from 0).

    "step" multiplies the rate by `drop_factor` at the start of each epoch of `drop_epochs`. Epochs count from
    `first_epoch`: 1 in RoBal and AT-BSL, so that a drop at 60 follows 59 epochs at the first rate; 0 in REAT and TAET.
    "cosine" decays to 0 after the last step. During the first `warmup_epochs` the rate rises linearly, step by step.

    With `compounding`, "step" is the schedule of RoBal's released code, which multiplies the rate of the epoch before:
    by 0.1 in every epoch from 60 on, and by 0.01 in every epoch from 75 on. Its warm-up compounds in the same way, with
    the factors 2 / `warmup_epochs`, 3 / `warmup_epochs`, ... 1, one per epoch.
    """
    rate, name = config["learning_rate"], config["schedule"]
    warmup = config["warmup_epochs"]
    if name not in SCHEDULES:
        raise registry.unknown("config.optim.schedule", name, SCHEDULES)
    if name == "step":
        first, factor = config["first_epoch"], config["drop_factor"]
        if compounding:
            return _compounding(config, steps_per_epoch, epochs)
        drops: dict[int, float] = {}
        for epoch in config["drop_epochs"]:
            step = (epoch - first) * steps_per_epoch
            drops[step] = drops.get(step, 1.0) * factor
        main = optax.piecewise_constant_schedule(rate, drops)
    elif name == "cosine":
        main = optax.cosine_decay_schedule(rate, max(epochs * steps_per_epoch, 1))
    else:
        main = optax.constant_schedule(rate)
    if not warmup:
        return main
    ramp = optax.linear_schedule(1.0 / (warmup * steps_per_epoch), 1.0, warmup * steps_per_epoch - 1)
    return lambda step: main(step) * ramp(step)


def _compounding(config: Mapping[str, Any], steps_per_epoch: int, epochs: int) -> optax.Schedule:
    first = config["first_epoch"]
    factors = {}
    for epoch in range(first, first + epochs):
        factor = 1.0
        for drop in config["drop_epochs"]:
            factor *= config["drop_factor"] if epoch >= drop else 1.0
        if epoch < config["warmup_epochs"]:
            factor = (epoch + 1) / config["warmup_epochs"]
        factors[(epoch - first) * steps_per_epoch] = factor
    start = factors.pop(0)
    return optax.piecewise_constant_schedule(
        config["learning_rate"] * start, {k: f for k, f in factors.items() if f != 1.0}
    )


def frozen_mask(params: PyTree, freeze: str | None) -> PyTree:
    """Returns True for each parameter whose path, joined by "/", matches `freeze` from its start.

    Raises:
        ValueError: no parameter matches.
    """
    pattern = re.compile(freeze) if freeze else None
    names = jax.tree_util.tree_map_with_path(lambda path, _: "/".join(str(k.key) for k in path), params)
    mask = jax.tree.map(lambda name: bool(pattern and pattern.match(name)), names)
    if pattern and not any(jax.tree.leaves(mask)):
        raise ValueError(
            f"No parameter matches the frozen pattern {freeze!r}. There are: {', '.join(jax.tree.leaves(names))}."
        )
    return mask


def create(
    config: Mapping[str, Any], rate: optax.Schedule, params: PyTree, freeze: str | None = None
) -> optax.GradientTransformation:
    """Returns SGD in the form of PyTorch: v <- momentum v + (g + weight_decay p), p <- p - rate v.

    Weight decay applies to every parameter that is not frozen.
    """
    sgd = optax.chain(
        optax.add_decayed_weights(config["weight_decay"]),
        optax.sgd(rate, momentum=config["momentum"] or None, nesterov=config["nesterov"]),
    )
    if freeze is None:
        return sgd
    labels = jax.tree.map(lambda frozen: "frozen" if frozen else "trained", frozen_mask(params, freeze))
    return optax.multi_transform({"trained": sgd, "frozen": optax.set_to_zero()}, labels)

"""Adversarial attacks as pure functions of a key. Needs jax alone.

`attack(key, logits_fn, x, y, *, eps, ...) -> x_adv` works on any JAX function from images to logits, under jit, vmap,
pmap and shard_map; `compile` is the jitted form. Objectives are maximised: (logits, y) -> [batch].
"""

from lt_adv.attacks._apgd import apgd, apgd_targeted
from lt_adv.attacks._autoattack import autoattack
from lt_adv.attacks._fab import fab, fab_targeted
from lt_adv.attacks._jit import compile
from lt_adv.attacks._square import square
from lt_adv.attacks.gradient import cw, fgsm, mim, pgd
from lt_adv.attacks.objectives import (
    cross_entropy,
    cross_entropy_of_differences,
    difference,
    dlr,
    kl_divergence,
    margin,
    prediction,
    targeted_difference,
    targeted_dlr,
)

__all__ = [
    "apgd",
    "apgd_targeted",
    "autoattack",
    "compile",
    "cross_entropy",
    "cross_entropy_of_differences",
    "cw",
    "difference",
    "dlr",
    "fab",
    "fab_targeted",
    "fgsm",
    "kl_divergence",
    "margin",
    "mim",
    "pgd",
    "prediction",
    "square",
    "targeted_difference",
    "targeted_dlr",
]

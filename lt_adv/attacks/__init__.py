"""Adversarial attacks as pure functions of a key. Needs jax alone.

`attack(key, logits_fn, x, y, *, eps, ...) -> x_adv` works on any JAX function from images to logits, under jit, vmap,
pmap and shard_map; `jit` is the jitted form. Objectives are maximised: (logits, y) -> [batch].
"""

from lt_adv.attacks._apgd import apgd, apgd_targeted
from lt_adv.attacks._autoattack import autoattack
from lt_adv.attacks._fab import fab, fab_targeted
from lt_adv.attacks._jit import jit
from lt_adv.attacks._square import square
from lt_adv.attacks.gradient import cw, fgsm, mim, pgd
from lt_adv.attacks.objectives import (
    cross_entropy,
    cw_margin,
    dlr,
    kl_divergence,
    logit_margin,
    prediction,
    stable_cross_entropy,
    targeted_dlr,
    targeted_logit_margin,
)

__all__ = [
    "apgd",
    "apgd_targeted",
    "autoattack",
    "jit",
    "cross_entropy",
    "stable_cross_entropy",
    "cw",
    "logit_margin",
    "dlr",
    "fab",
    "fab_targeted",
    "fgsm",
    "kl_divergence",
    "cw_margin",
    "mim",
    "pgd",
    "prediction",
    "square",
    "targeted_logit_margin",
    "targeted_dlr",
]

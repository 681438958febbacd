"""Adversarial attacks as pure functions of a key. Needs jax and numpy only.

`attack(key, logits_fn, x, y, *, eps, ...) -> x_adv` works on any JAX function from images to logits, under jit, vmap,
pmap and shard_map. `jit` is the jitted form. `autoattack`, the ensemble for evaluation, and `robustness_curve` run
compiled attacks from the host and are called outside of transformations. Objectives are functions
(logits, y) -> [batch] that attacks maximise.

Examples:
  >>> import jax, jax.numpy as jnp
  >>> from lt_adv import attacks
  >>> logits_fn = lambda x: x @ jnp.array([[1.0, -1.0], [-1.0, 1.0]])
  >>> x, y = jnp.array([[0.5, 0.375]]), jnp.array([0])
  >>> attacks.pgd(jax.random.key(0), logits_fn, x, y, eps=0.125, step_size=0.0625, num_steps=5)
  Array([[0.375, 0.5  ]], dtype=float32)
"""

from lt_adv.attacks._apgd import apgd, apgd_targeted
from lt_adv.attacks._autoattack import autoattack
from lt_adv.attacks._ddn import ddn
from lt_adv.attacks._deepfool import deepfool
from lt_adv.attacks._expectation import expectation
from lt_adv.attacks._fab import fab, fab_targeted
from lt_adv.attacks._fmn import fmn
from lt_adv.attacks._jit import jit
from lt_adv.attacks._minimum_norm import minimum_norm
from lt_adv.attacks._robustness_curve import robustness_curve
from lt_adv.attacks._square import square
from lt_adv.attacks.gradient import cw, fgsm, fgsm_rs, mim, n_fgsm, pgd
from lt_adv.attacks.networks import channels_first, ensemble, normalized, select_output
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
    "ddn",
    "deepfool",
    "logit_margin",
    "dlr",
    "fab",
    "fab_targeted",
    "fgsm",
    "fmn",
    "kl_divergence",
    "cw_margin",
    "mim",
    "minimum_norm",
    "pgd",
    "prediction",
    "robustness_curve",
    "square",
    "targeted_logit_margin",
    "targeted_dlr",
    "channels_first",
    "ensemble",
    "expectation",
    "normalized",
    "select_output",
    "fgsm_rs",
    "n_fgsm",
]

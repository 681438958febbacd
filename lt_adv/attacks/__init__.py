"""Adversarial attacks as pure functions of a key. Needs jax alone.

`attack(key, logits_fn, x, y, *, eps, ...) -> x_adv` works on any JAX function from images to logits, under jit, vmap,
pmap and shard_map; `compile` is the jitted form. Objectives are maximised: (logits, y) -> [batch].
"""

from lt_adv.attacks.compiled import compile
from lt_adv.attacks.gradient import cw, fgsm, mim, pgd
from lt_adv.attacks.objectives import cross_entropy, kl_divergence, margin

__all__ = ["compile", "cross_entropy", "cw", "fgsm", "kl_divergence", "margin", "mim", "pgd"]

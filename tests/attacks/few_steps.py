"""All attacks with few steps, on a linear network of four classes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from lt_adv import attacks

KEY = jax.random.key(0)
WEIGHT = jax.random.normal(KEY, (64, 4))
X = jax.random.uniform(jax.random.key(1), (32, 8, 8, 1)).at[:, 0, 0].set(0)
STEPS = {"step_size": 0.05, "num_steps": 4}
ATTACKS = {
    "fgsm": attacks.fgsm,
    "pgd": partial(attacks.pgd, **STEPS),
    "mim": partial(attacks.mim, **STEPS),
    "cw": partial(attacks.cw, **STEPS),
    "apgd": partial(attacks.apgd, num_steps=5),
    "apgd_dlr": partial(attacks.apgd, num_steps=5, objective=attacks.dlr),
    "apgd_targeted": partial(attacks.apgd_targeted, num_steps=5, num_targets=2),
    "fab": partial(attacks.fab, num_steps=5, num_restarts=2),
    "fab_targeted": partial(attacks.fab_targeted, num_steps=5, num_targets=2),
    "square": partial(attacks.square, num_queries=20),
}


def network(x):
    return x.reshape(len(x), -1) @ WEIGHT


Y = jnp.argmax(network(X), axis=-1)


def wrong(x_adv, logits_fn=network):
    return np.asarray(attacks.prediction(logits_fn(jnp.asarray(x_adv))) != Y)

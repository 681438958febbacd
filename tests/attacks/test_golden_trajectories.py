"""x_adv - x of the attacks against the released implementations' trajectories, step for step, in float64."""

from functools import partial

import jax
import numpy as np
import pytest

from lt_adv import attacks

CASES = {
    "fgsm": attacks.fgsm,
    "pgd20": partial(attacks.pgd, num_steps=20),
    "mim20": partial(attacks.mim, num_steps=20),
    "cw20": partial(attacks.cw, num_steps=20),
    "lsa20": partial(attacks.pgd, num_steps=20, objective=partial(attacks.cross_entropy, logit_scale=10.0)),
    "trades10": partial(attacks.pgd, num_steps=10, objective=attacks.kl_divergence),
}


@pytest.mark.parametrize("head", ["linear", "cosine"])
def test_the_network_is_the_golden_one(digits, head):
    net = digits(head)
    np.testing.assert_allclose(jax.jit(net.logits_fn)(net.x), net.arrays["logits"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("head", ["linear", "cosine"])
def test_trajectory(digits, assert_golden, head, name):
    with jax.enable_x64(True):
        net = digits(head, np.float64)
        index = net.arrays["trajectory.index"]
        x, y = net.x[index], net.y[index]
        options = {"eps": net.info["eps"]}
        if name != "fgsm":
            options |= {"step_size": net.info["step_size"], "x_init": net.arrays["trajectory.start"]}
        if name == "trades10":
            y = jax.nn.softmax(net.logits_fn(x))
        attack = jax.jit(lambda key, x, y: CASES[name](key, net.logits_fn, x, y, **options))
        assert_golden(attack(jax.random.key(0), x, y) - x, net.arrays[name])

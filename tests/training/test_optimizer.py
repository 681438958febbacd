"""SGD against its equations, and frozen parameters."""

import jax.numpy as jnp
import numpy as np
import pytest

from lt_adv.training import optimizer

CONFIG = {"learning_rate": 0.1, "momentum": 0.9, "nesterov": False, "weight_decay": 0.01}


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_equals_pytorch(nesterov):
    """v <- m v + (g + wd p); p <- p - lr v, or p - lr (g + wd p + m v) with Nesterov's momentum."""
    rate = [0.1, 0.1, 0.02]
    tx = optimizer.create({**CONFIG, "nesterov": nesterov}, lambda step: jnp.asarray(rate)[step], {"w": jnp.zeros(3)})
    p, v = np.array([1.0, -2.0, 0.5]), np.zeros(3)
    params, state = {"w": jnp.asarray(p)}, tx.init({"w": jnp.asarray(p)})
    for lr, g in zip(rate, np.random.default_rng(0).normal(size=(3, 3)), strict=True):
        updates, state = tx.update({"w": jnp.asarray(g)}, state, params)
        params = {"w": params["w"] + updates["w"]}
        d = g + 0.01 * p
        v = 0.9 * v + d
        p = p - lr * (d + 0.9 * v if nesterov else v)
        np.testing.assert_allclose(params["w"], p, rtol=1e-5)


def test_frozen_parameters_get_no_update_and_no_decay():
    params = {"backbone": {"conv": jnp.ones(2)}, "head": {"kernel": jnp.ones(2)}}
    tx = optimizer.create(CONFIG, lambda _: 0.1, params, freeze="backbone/")
    updates, _ = tx.update(
        {"backbone": {"conv": jnp.ones(2)}, "head": {"kernel": jnp.ones(2)}}, tx.init(params), params
    )
    assert not updates["backbone"]["conv"].any() and (updates["head"]["kernel"] < -0.1).all()
    with pytest.raises(ValueError, match="No parameter matches .*bacbone.* There are: backbone/conv, head/kernel"):
        optimizer.create(CONFIG, lambda _: 0.1, params, freeze="bacbone/")

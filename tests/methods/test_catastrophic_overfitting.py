"""Single-step training: FGSM from the image overfits catastrophically at a radius where N-FGSM does not."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

from lt_adv import attacks

EPS, STEPS, WIDTH, BATCH = 0.24, 800, 512, 128


def initialize(key):
    """Returns the parameters of a network of two hidden layers."""
    shapes = [(64, WIDTH), (WIDTH, WIDTH), (WIDTH, 10)]
    keys = jax.random.split(key, len(shapes))
    return [(jax.random.normal(k, s) * (2 / s[0]) ** 0.5, jnp.zeros(s[1])) for k, s in zip(keys, shapes, strict=True)]


def apply(params, x):
    for kernel, bias in params[:-1]:
        x = jax.nn.relu(x @ kernel + bias)
    return x @ params[-1][0] + params[-1][1]


@partial(jax.jit, static_argnames="name")
def accuracies(key, train, test, *, name):
    """Trains on the examples of an attack. Returns the test accuracies on clean images, under FGSM and under PGD-20."""
    optimizer = optax.adam(optax.linear_schedule(0.002, 0.0, STEPS))
    params = initialize(jax.random.fold_in(key, 0))

    def step(carry, i):
        params, state = carry
        step_key = jax.random.fold_in(key, i + 1)
        chosen = jax.random.randint(step_key, (BATCH,), 0, len(train[1]))
        x, y = train[0][chosen], train[1][chosen]
        attack_key = jax.random.fold_in(step_key, 1)
        x_adv = getattr(attacks, name)(attack_key, partial(apply, params), x, y, eps=EPS)
        gradient = jax.grad(lambda params: attacks.cross_entropy(apply(params, x_adv), y).mean())(params)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(params, updates), state), None

    params = jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(STEPS))[0][0]
    (x, y), network = test, partial(apply, params)
    fgsm = attacks.fgsm(key, network, x, y, eps=EPS)
    pgd = attacks.pgd(key, network, x, y, eps=EPS, step_size=EPS / 4, num_steps=20)
    return jnp.stack([jnp.mean(attacks.prediction(network(x)) == y) for x in (x, fgsm, pgd)])


@pytest.mark.slow
@pytest.mark.extended
def test_fgsm_overfits_catastrophically_and_n_fgsm_does_not():
    """Means over three seeds, on 500 test images of digits in ten classes.

    Measured with eight seeds: trained on FGSM, an accuracy of 60 to 63 % under FGSM, but of 12 to 16 % under PGD-20;
    trained on N-FGSM, 51 to 61 % and 27 to 43 % (median 39 %). FGSM-RS lies between, 25 % under PGD-20 (two seeds).
    Unlike larger networks, these do not lose robustness suddenly: trained on FGSM they are at 11 to 18 % under PGD-20
    after every hundredth step.
    """
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    x, y = (digits.data[order] / 16).astype(np.float32), digits.target[order]
    keys, data = jax.random.split(jax.random.key(0), 3), ((x[:1297], y[:1297]), (x[1297:], y[1297:]))
    result = {}
    for name in ("fgsm", "n_fgsm"):
        seeds = jax.vmap(lambda key, name=name: accuracies(key, *data, name=name))(keys)
        print(f"{name}: clean, FGSM, PGD-20 of each seed\n{np.round(seeds, 3)}")
        result[name] = np.mean(seeds, axis=0)
    _, fgsm, pgd = result["fgsm"]
    assert fgsm > 0.5 and pgd < 0.21, "accurate under FGSM only"
    assert result["n_fgsm"][2] > 0.28

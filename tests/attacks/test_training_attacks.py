"""FGSM-RS and N-FGSM: a reference in NumPy, limits and bad input."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lt_adv import attacks
from lt_adv.evaluation import attack_specs

SHAPE, CLASSES, KEY = (4, 4, 2), 5, jax.random.key(7)
ATTACKS = {"fgsm_rs": attacks.fgsm_rs, "n_fgsm": attacks.n_fgsm}
RNG = np.random.default_rng(1)
WEIGHTS = {"hidden": RNG.normal(size=(32, 16)), "out": RNG.normal(size=(16, CLASSES))}


def images(batch, seed=0, dtype=np.float32):
    """Images of which a third of the entries is 0 or 1, so that the bounds matter."""
    return np.clip(np.random.default_rng(seed).uniform(-0.25, 1.25, size=(batch, *SHAPE)), 0, 1).astype(dtype)


def labels(batch, seed=0):
    return np.random.default_rng(seed).integers(0, CLASSES, size=batch)


def apply(weights, x):
    x = x.reshape(x.shape[0], -1)
    hidden = jnp.tanh(x @ weights["hidden"].astype(x.dtype)) if "hidden" in weights else x
    return hidden @ weights["out"].astype(x.dtype)


network = partial(apply, WEIGHTS)
LINEAR = {"out": RNG.normal(size=(32, CLASSES))}


def gradient(weights, x, y):
    """The gradient of the cross-entropy of `apply`, written out."""
    flat = x.reshape(len(x), -1)
    hidden = np.tanh(flat @ weights["hidden"]) if "hidden" in weights else flat
    z = hidden @ weights["out"]
    p = np.exp(z - z.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    by_hidden = (p - np.eye(CLASSES)[y]) @ weights["out"].T
    if "hidden" in weights:
        by_hidden = (by_hidden * (1 - hidden**2)) @ weights["hidden"].T
    return by_hidden.reshape(x.shape)


def noise(key, batch, dtype):
    """U(-1, 1) of each example, from its own key."""
    keys = jax.vmap(partial(jax.random.fold_in, key))(np.arange(batch))
    return np.stack([jax.random.uniform(k, SHAPE, dtype, minval=-1, maxval=1) for k in keys])


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("options", [{}, {"step_size": 0.07}], ids=["paper", "step"])
@pytest.mark.parametrize("weights", [LINEAR, WEIGHTS], ids=["linear", "tanh"])
def test_written_out(weights, options):
    x, y, eps, u = images(16, dtype=np.float64), labels(16), 0.1, noise(KEY, 16, np.float64)
    step = options.get("step_size", 1.25 * eps)
    x_0 = np.clip(x + eps * u, 0, 1)
    expected = x_0 + step * np.sign(gradient(weights, x_0, y))
    expected = np.clip(np.clip(expected, x - eps, x + eps), 0, 1)
    result = attacks.fgsm_rs(KEY, partial(apply, weights), x, y, eps=eps, **options)
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-14)

    for k in ({}, {"noise": 0.5}):
        step = options.get("step_size", eps)
        x_0 = np.clip(x + k.get("noise", 2) * eps * u, 0, 1)
        expected = np.clip(x_0 + step * np.sign(gradient(weights, x_0, y)), 0, 1)
        result = attacks.n_fgsm(KEY, partial(apply, weights), x, y, eps=eps, **options, **k)
        np.testing.assert_allclose(result, expected, rtol=0, atol=1e-14)


def test_limits():
    x, y = images(8), labels(8)
    fgsm = attacks.fgsm(KEY, network, x, y, eps=0.1)
    np.testing.assert_allclose(attacks.n_fgsm(KEY, network, x, y, eps=0.1, noise=0.0), fgsm, atol=1e-7)
    for attack in ATTACKS.values():
        np.testing.assert_array_equal(attack(KEY, network, x, y, eps=0.0), x)
    # Away from the bounds nothing is clipped before the step: FGSM-RS is PGD of one step.
    x = 0.3 + 0.4 * images(8)
    pgd = attacks.pgd(KEY, network, x, y, eps=0.1, step_size=0.125, num_steps=1)
    np.testing.assert_allclose(attacks.fgsm_rs(KEY, network, x, y, eps=0.1), pgd, atol=1e-7)
    delta = np.abs(attacks.n_fgsm(KEY, network, x, y, eps=0.1) - x)
    assert 0.28 < delta.max() <= 0.3 + 1e-6, "out of the ball, up to k eps + a"
    assert np.mean(delta > 0.1) == pytest.approx(0.5, abs=0.1), "|U(-2, 2) + 1| > 1 has probability 1/2"


@pytest.mark.parametrize("name", ATTACKS)
def test_radius_of_each_entry(name):
    x, y = images(4), labels(4)
    eps = np.full((1, *SHAPE), 0.1, np.float32)
    eps[..., 0] = 0
    x_adv = np.asarray(ATTACKS[name](KEY, network, x, y, eps=eps))
    np.testing.assert_array_equal(x_adv[..., 0], x[..., 0])
    assert np.mean(x_adv[..., 1] != x[..., 1]) > 0.5


@pytest.mark.parametrize("name", ATTACKS)
def test_bfloat16_networks_and_other_objectives(name):
    """The step of a bfloat16 network agrees with that of float32 where the gradient is not close to zero."""
    x, y = images(32), labels(32)
    attack = partial(ATTACKS[name], KEY, x=x, y=y, eps=0.1)
    x_adv = attack(lambda x: network(x.astype(jnp.bfloat16)))
    assert x_adv.dtype == np.float32 and np.mean(np.isclose(x_adv, attack(network), atol=1e-6)) > 0.9
    negative = attack(network, objective=lambda z, y: -attacks.cross_entropy(z, y))
    loss = lambda x: float(attacks.cross_entropy(network(x), y).mean())  # noqa: E731
    assert loss(negative) < loss(x) - 0.1 < loss(attack(network)) - 0.2


@pytest.mark.parametrize("name", ATTACKS)
def test_gradients_that_are_not_finite_and_outer_gradients(name):
    x, y = images(4), labels(4)
    nan = np.asarray(ATTACKS[name](KEY, lambda x: network(x) * jnp.nan, x, y, eps=0.1))
    zero = np.asarray(ATTACKS[name](KEY, lambda x: network(x) * 0, x, y, eps=0.1))
    np.testing.assert_array_equal(nan, zero)
    assert np.all((nan >= 0) & (nan <= 1)) and np.any(nan != x), "the noise alone"
    infinite = jax.jit(lambda eps: ATTACKS[name](KEY, network, x, y, eps=eps))(jnp.nan)
    np.testing.assert_array_equal(infinite, x)

    def outer(x):
        return jnp.sum(ATTACKS[name](KEY, network, x, y, eps=0.1) ** 2)

    np.testing.assert_array_equal(jax.grad(outer)(x), 0)


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": -0.1}, "eps must not be negative"),
        ({"eps": np.nan}, "eps must not be negative or NaN"),
        ({"eps": np.inf}, "eps must be finite"),
        ({"eps": [0.1, 0.2]}, r"eps must be a scalar or \[batch\]"),
        ({"step_size": -1.0}, "step_size must not be negative"),
        ({"step_size": "large"}, "step_size must be a number"),
        ({"objective": "ce"}, "objective must be a function"),
        ({"bounds": (1, 0)}, "low < high"),
        ({"x": 255 * images(4)}, "x must lie inside bounds"),
        ({"x": images(4).astype(np.uint8)}, "divide uint8 images by 255"),
        ({"y": labels(3)}, "same batch size"),
        ({"key": jax.random.PRNGKey(0)}, "key must be typed"),
        ({"logits_fn": lambda x: (network(x), x)}, "select_output|must return one array"),
    ],
)
def test_bad_input(name, options, message):
    arguments = {"key": KEY, "logits_fn": network, "x": images(4), "y": labels(4), "eps": 0.1} | options
    with pytest.raises(ValueError, match=message) as caught:
        ATTACKS[name](**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("noise", [-1.0, np.nan, np.inf, "loud", [1.0, 2.0]])
def test_bad_noise(noise):
    with pytest.raises(ValueError, match="noise must be") as caught:
        attacks.n_fgsm(KEY, network, images(4), labels(4), eps=0.1, noise=noise)
    assert "\n" not in str(caught.value)


def test_no_robust_accuracy_from_n_fgsm():
    with pytest.raises(ValueError, match="outside the ball of radius eps.*Evaluate with pgd or autoattack") as caught:
        attack_specs.resolve({"attack": "n_fgsm", "eps": 0.1})
    assert "\n" not in str(caught.value)

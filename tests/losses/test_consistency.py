"""Losses of two predictions: MART and the pairing of ALP against their formulas, limits, and numerical edges."""

from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lt_adv import losses

pytestmark = pytest.mark.usefixtures("float64")

RNG = np.random.default_rng(1)
CLEAN, ADVERSARIAL = RNG.normal(size=(2, 6, 4))
LABELS = np.array([0, 1, 2, 3, 3, 1])


def as_printed(clean, adversarial, beta):
    """MART as the paper has it, with probabilities and their differences."""
    p, q, rows = jax.nn.softmax(clean), jax.nn.softmax(adversarial), np.arange(len(LABELS))
    rival = q.at[rows, LABELS].set(0).max(-1)
    boosted = -jnp.log(q[rows, LABELS]) - jnp.log(1 - rival)
    return boosted + beta * jnp.sum(p * jnp.log(p / q), -1) * (1 - p[rows, LABELS])


def test_mart_values_and_gradients_match_the_formula(assert_golden):

    @partial(jax.jit, static_argnums=2)
    def values_and_gradients(p, q, loss, beta):
        values, pullback = jax.vjp(lambda p, q: loss(p, q, beta), p, q)
        return values, pullback(jnp.arange(1.0, 7.0))

    for beta in (0.0, 5.0):
        actual, expected = (
            values_and_gradients(CLEAN, ADVERSARIAL, loss, beta)
            for loss in (lambda p, q, beta: losses.mart(p, q, LABELS, beta=beta), as_printed)
        )
        assert_golden(actual[0], expected[0])
        for a, b in zip(actual[1], expected[1], strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)
        assert np.any(actual[1][0]) == (beta > 0)  # the clean logits enter only the divergence


def test_limits_of_mart():
    boosted = losses.mart(CLEAN, ADVERSARIAL, LABELS, beta=0.0)
    np.testing.assert_allclose(losses.mart(ADVERSARIAL, ADVERSARIAL, LABELS, beta=9.0), boosted, rtol=1e-12)
    certain = 200.0 * (LABELS[:, None] == np.arange(4))  # p_y = 1: what is classified needs no pairing
    np.testing.assert_allclose(losses.mart(certain, ADVERSARIAL, LABELS, beta=9.0), boosted, rtol=1e-12)
    two, label = ADVERSARIAL[:, :2], LABELS % 2  # the other class is the rival: log(1 - q_rival) = log q_y
    np.testing.assert_allclose(
        losses.mart(two, two, label), 2 * losses.cross_entropy(jnp.asarray(two), label), rtol=1e-12
    )
    assert np.all(boosted > losses.cross_entropy(jnp.asarray(ADVERSARIAL), LABELS))


def test_mart_uses_the_strongest_wrong_class():
    q = np.array([[0.5, 0.3, 0.2]])
    for label, expected in ((0, 0.5 * 0.7), (1, 0.3 * 0.5), (2, 0.2 * 0.5)):
        value = losses.mart(np.log(q), np.log(q), np.array([label]))
        assert value[0] == pytest.approx(-np.log(expected), rel=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_values_and_gradients_are_finite_for_certain_predictions(dtype):
    """p and q at exactly 0 and 1, right and wrong."""
    label = (LABELS[:, None] == np.arange(4)).astype(dtype)
    for loss in (lambda p, q: losses.mart(p, q, LABELS), losses.squared_probability_distance):
        both = jax.jit(jax.value_and_grad(lambda p, q, f=loss: f(p, q).sum(), argnums=(0, 1)))
        for clean, adversarial in product((-1e4, 0.0, 1e4), repeat=2):
            value, gradients = both(dtype(clean) * label, dtype(adversarial) * label)
            assert np.isfinite(value) and value.dtype == dtype
            assert all(np.all(np.isfinite(g)) for g in gradients), (clean, adversarial)


def test_squared_probability_distance():
    p, q = np.log([[0.5, 0.3, 0.2]]), np.log([[0.1, 0.3, 0.6]])
    assert losses.squared_probability_distance(p, q)[0] == pytest.approx(0.4**2 + 0.4**2, rel=1e-12)
    np.testing.assert_array_equal(losses.squared_probability_distance(CLEAN, CLEAN), 0)
    far = losses.squared_probability_distance(np.array([[900.0, 0.0]]), np.array([[0.0, 900.0]]))
    assert far.shape == (1,) and far[0] == pytest.approx(2)


def test_soft_cross_entropy():
    one_hot = np.eye(4)[LABELS]
    hard = losses.cross_entropy(jnp.asarray(CLEAN), LABELS)
    np.testing.assert_allclose(losses.soft_cross_entropy(CLEAN, one_hot), hard, rtol=1e-12)
    p = np.asarray(jax.nn.softmax(ADVERSARIAL))
    divergence = losses.kl_divergence(jnp.asarray(ADVERSARIAL), jnp.asarray(CLEAN))
    entropy = -np.sum(p * np.log(p), -1)
    np.testing.assert_allclose(losses.soft_cross_entropy(CLEAN, p), divergence + entropy, rtol=1e-12)

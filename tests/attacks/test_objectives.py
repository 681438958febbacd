"""Objectives: limits and cases worked by hand."""

import jax
import jax.numpy as jnp
import numpy as np

from lt_adv import attacks

LOGITS = jnp.array([[1.0, 3.0, -2.0], [0.5, 0.0, 4.0]])
Y = jnp.array([1, 0])


def test_cross_entropy():
    expected = -np.log(jax.nn.softmax(LOGITS))[np.arange(2), Y]
    np.testing.assert_allclose(attacks.cross_entropy(LOGITS, Y), expected, rtol=1e-5)
    np.testing.assert_allclose(
        attacks.cross_entropy(LOGITS, Y, logit_scale=10.0), attacks.cross_entropy(10 * LOGITS, Y), rtol=1e-5
    )


def test_cross_entropy_of_huge_logits_is_finite():
    gradient = jax.grad(lambda z: attacks.cross_entropy(z, Y).sum())(1e30 * LOGITS)
    np.testing.assert_allclose(gradient, [[0, 0, 0], [-1, 0, 1]])


def test_a_saturated_cross_entropy_has_no_gradient_of_its_own_rounding():
    """With p_y = 1 to the last bit the true class pulls by exactly zero, compiled or not, at any scale."""
    logits = jnp.array([[18.1, 0.3, -1.7]], jnp.float32)
    for scale in (1.0, 3.3, 10.0):
        gradient = jax.jit(jax.grad(lambda z: attacks.cross_entropy(z, jnp.array([0]), logit_scale=scale)[0]))  # noqa: B023
        assert gradient(logits)[0, 0] == 0
        assert np.all(gradient(logits)[0, 1:] >= 0)


def test_margin():
    np.testing.assert_allclose(attacks.margin(LOGITS, Y, confidence=0.0), [-2.0, 0.0])
    np.testing.assert_allclose(attacks.margin(LOGITS, Y), [-52.0, -46.5])
    gradient = jax.grad(lambda z: attacks.margin(z, Y, confidence=3.0).sum())(LOGITS)
    np.testing.assert_allclose(gradient, [[1, -1, 0], [0, 0, 0]])


def test_kl_divergence():
    probs = jax.nn.softmax(LOGITS)
    np.testing.assert_allclose(attacks.kl_divergence(LOGITS, probs), [0, 0], atol=1e-6)
    certain = jax.nn.one_hot(Y, 3)  # zeros: 0 log 0 = 0, and KL to certainty is the cross-entropy
    np.testing.assert_allclose(attacks.kl_divergence(LOGITS, certain), attacks.cross_entropy(LOGITS, Y), rtol=1e-5)
    other = probs[::-1]
    expected = np.sum(other * np.log(other / probs), axis=1)
    np.testing.assert_allclose(attacks.kl_divergence(LOGITS, other), expected, rtol=1e-5)

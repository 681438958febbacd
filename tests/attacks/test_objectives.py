"""Objectives: limits and cases computed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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


def test_saturated_cross_entropy_has_no_rounding_gradient():
    """With p_y = 1 to the last bit the true class pulls by exactly zero, compiled or not, at any scale."""
    logits = jnp.array([[18.1, 0.3, -1.7]], jnp.float32)
    for scale in (1.0, 3.3, 10.0):
        gradient = jax.jit(jax.grad(lambda z: attacks.cross_entropy(z, jnp.array([0]), logit_scale=scale)[0]))  # noqa: B023
        assert gradient(logits)[0, 0] == 0
        assert np.all(gradient(logits)[0, 1:] >= 0)


def test_cw_margin():
    np.testing.assert_allclose(attacks.cw_margin(LOGITS, Y, confidence=0.0), [-2.0, 0.0])
    np.testing.assert_allclose(attacks.cw_margin(LOGITS, Y), [-52.0, -46.5])
    gradient = jax.grad(lambda z: attacks.cw_margin(z, Y, confidence=3.0).sum())(LOGITS)
    np.testing.assert_allclose(gradient, [[1, -1, 0], [0, 0, 0]])


def test_kl_divergence():
    probs = jax.nn.softmax(LOGITS)
    np.testing.assert_allclose(attacks.kl_divergence(LOGITS, probs), [0, 0], atol=1e-6)
    certain = jax.nn.one_hot(Y, 3)  # zeros: 0 log 0 = 0, and KL to certainty is the cross-entropy
    np.testing.assert_allclose(attacks.kl_divergence(LOGITS, certain), attacks.cross_entropy(LOGITS, Y), rtol=1e-5)
    other = probs[::-1]
    expected = np.sum(other * np.log(other / probs), axis=1)
    np.testing.assert_allclose(attacks.kl_divergence(LOGITS, other), expected, rtol=1e-5)


def test_stable_cross_entropy_equals_cross_entropy(float64):
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(200, 7)) * 5)
    y = jnp.asarray(np.random.default_rng(1).integers(0, 7, 200))
    both = (attacks.cross_entropy, attacks.stable_cross_entropy)
    values = [objective(logits, y) for objective in both]
    gradients = [jax.grad(lambda z, objective=objective: objective(z, y).sum())(logits) for objective in both]
    np.testing.assert_allclose(values[1], values[0], rtol=1e-9, atol=1e-14)
    np.testing.assert_allclose(gradients[1], gradients[0], rtol=1e-9, atol=1e-14)


def test_stable_cross_entropy_has_zero_gradient_where_saturated():
    logits = jnp.array([[300.0, 0.0, -5.0], [0.0, 300.0, 0.0]])
    value, gradient = jax.jit(jax.value_and_grad(lambda z: attacks.stable_cross_entropy(z, jnp.array([0, 0])).sum()))(
        logits
    )
    np.testing.assert_array_equal(gradient, [[0, 0, 0], [-1, 1, 0]])
    assert value == 300


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_ratios_are_invariant_to_scale_and_shift(scale):
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(50, 6)), jnp.float32)
    y, target = (jnp.asarray(np.random.default_rng(i).integers(0, 6, 50)) for i in (1, 2))
    changed = scale * logits + 3 * scale
    np.testing.assert_allclose(attacks.dlr(changed, y), attacks.dlr(logits, y), rtol=2e-3)
    np.testing.assert_allclose(
        attacks.targeted_dlr(changed, y, target), attacks.targeted_dlr(logits, y, target), rtol=2e-3, atol=1e-5
    )
    wrong = np.asarray(logits.argmax(-1) != y)
    for objective in (attacks.dlr, attacks.logit_margin):
        np.testing.assert_array_equal(np.asarray(objective(logits, y)) > 0, wrong)
    ordered = np.sort(np.asarray(logits), axis=-1)[:, ::-1]
    z_y, z_t = np.asarray(logits)[np.arange(50), y], np.asarray(logits)[np.arange(50), target]
    other = np.where(wrong, ordered[:, 0], ordered[:, 1])
    np.testing.assert_allclose(attacks.dlr(logits, y), (other - z_y) / (ordered[:, 0] - ordered[:, 2]), rtol=1e-5)
    below = ordered[:, 0] - (ordered[:, 2] + ordered[:, 3]) / 2
    np.testing.assert_allclose(attacks.targeted_dlr(logits, y, target), (z_t - z_y) / below, rtol=1e-5, atol=1e-6)

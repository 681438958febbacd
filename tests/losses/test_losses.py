"""Limits in which the losses meet, what they do to head and tail, numerical edges, and plain errors."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from lt_adv import losses

COUNTS = (500, 100, 20, 5)
LABELS = np.array([0, 1, 2, 3, 3])
LOGITS = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
EVERY = {
    "cross_entropy": losses.cross_entropy,
    "balanced_softmax": losses.balanced_softmax,
    "logit_adjustment": losses.logit_adjustment,
    "ldam": losses.ldam,
    "robal_margin": losses.robal_margin,
    "class_dependent_temperature": losses.class_dependent_temperature,
    "focal": losses.focal,
    "focal_sigmoid": partial(losses.focal, activation="sigmoid"),
}
IS_CROSS_ENTROPY = {
    "focal gamma 0": partial(losses.focal, gamma=0.0),
    "logit_adjustment tau 0": partial(losses.logit_adjustment, tau=0.0),
    "class_dependent_temperature tau 0": partial(losses.class_dependent_temperature, tau=0.0),
    "ldam margin 0": partial(losses.ldam, max_margin=0.0),
    "robal_margin without margin, scale or prior": partial(losses.robal_margin, margin=0, scale=1, tau_b=0, tau_m=0),
    "balanced_softmax of equal counts": lambda z, y, class_counts: losses.balanced_softmax(z, y, class_counts=(7,) * 4),
}
logits_strategy = arrays.arrays(np.float32, (5, 4), elements=st.floats(-30, 30, width=32))


@pytest.mark.parametrize("name", IS_CROSS_ENTROPY)
@settings(max_examples=10, deadline=None)
@given(logits=logits_strategy)
def test_special_cases_equal_cross_entropy(name, logits):
    expected = losses.cross_entropy(logits, LABELS)
    actual = IS_CROSS_ENTROPY[name](logits, LABELS, class_counts=COUNTS)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=10, deadline=None)
@given(logits=logits_strategy)
def test_equalities_between_losses(logits):
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    adjusted = losses.logit_adjustment(logits, LABELS, class_counts=COUNTS, tau=1.0)
    close(losses.balanced_softmax(logits, LABELS, class_counts=COUNTS), adjusted)
    prior_only = partial(losses.robal_margin, margin=0, scale=1, tau_m=0, class_counts=COUNTS)
    close(prior_only(logits, LABELS, tau_b=1.0), adjusted)
    binary = np.logaddexp(0, np.where(LABELS[:, None] == np.arange(4), -logits, logits)).sum(axis=1)
    close(losses.focal(logits, LABELS, gamma=0.0, activation="sigmoid"), binary)


@settings(max_examples=10, deadline=None)
@given(p=logits_strategy, q=logits_strategy, shift=st.floats(-5, 5, width=32))
def test_kl_divergence(p, q, shift):
    divergence = losses.kl_divergence(p, q)
    assert divergence.shape == (5,) and np.all(divergence >= -1e-5)
    np.testing.assert_allclose(losses.kl_divergence(p, p + shift), 0, atol=1e-4)
    assert np.all(losses.kl_divergence(p, q, epsilon=1e-6) <= divergence + 1e-4)  # epsilon bounds it by -log epsilon
    assert np.all(losses.kl_divergence(p, q, epsilon=1e-6) <= -np.log(1e-6) + 1e-4)


def test_kl_divergence_is_not_symmetric_and_takes_p_first():
    p, q = np.log([[0.9, 0.1]]), np.log([[0.5, 0.5]])
    expected = 0.9 * np.log(0.9 / 0.5) + 0.1 * np.log(0.1 / 0.5)
    assert losses.kl_divergence(p, q)[0] == pytest.approx(expected, rel=1e-5)
    assert losses.kl_divergence(q, p)[0] != pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("name", EVERY)
def test_contract(name):
    """[batch] out, in the dtype of the logits, the same one by one, jitted or with counts of any kind."""
    loss = EVERY[name]
    values = loss(LOGITS, LABELS, class_counts=COUNTS)
    assert values.shape == (5,) and values.dtype == np.float32
    alone = [loss(LOGITS[i : i + 1], LABELS[i : i + 1], class_counts=COUNTS)[0] for i in range(5)]
    np.testing.assert_allclose(values, alone, rtol=1e-5)
    traced = jax.jit(lambda z, y, n: loss(z, y, class_counts=n))(LOGITS, LABELS, np.array(COUNTS))
    np.testing.assert_allclose(values, traced, rtol=1e-5)
    with jax.enable_x64(True):
        assert loss(LOGITS, LABELS, class_counts=np.array(COUNTS, np.int64)).dtype == np.float32


@pytest.mark.parametrize("name", EVERY)
def test_gradients_stay_finite(name):
    for size in (0.0, 1e4):
        logits = jnp.full((5, 4), -size).at[jnp.arange(5), LABELS].set(size)
        for z in (logits, -logits):
            gradient = jax.grad(lambda z: EVERY[name](z, LABELS, class_counts=COUNTS).sum())(z)
            assert np.all(np.isfinite(gradient))


def test_focal_gradient_is_finite_for_gamma_below_one():
    gradient = jax.grad(lambda z: losses.focal(z, jnp.array([0]), gamma=0.5)[0])(jnp.array([[200.0, 0.0]]))
    assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize("name", ["balanced_softmax", "logit_adjustment", "ldam", "robal_margin"])
def test_rare_classes_have_a_larger_loss(name):
    """At equal logits a rarer class has the larger loss."""
    values = EVERY[name](jnp.zeros((4, 4)), np.arange(4), class_counts=COUNTS)
    assert np.all(np.diff(values) > 0)


def test_robal_margin_by_hand():
    z, n = np.array([[0.2, -0.1]]), np.array([30.0, 10.0])
    u = 10 * z + 1.5 * np.log(n / n.sum())
    u[0, 0] -= 10 * 0.1 + 0.3 * np.log(30 / 10)
    value = losses.robal_margin(z, np.array([0]), class_counts=n, margin=0.1, scale=10, tau_b=1.5, tau_m=0.3)
    assert value[0] == pytest.approx(np.log(np.exp(u).sum()) - u[0, 0], rel=1e-5)


def test_priors():
    np.testing.assert_allclose(np.exp(losses.log_prior((1, 3))), [0.25, 0.75], rtol=1e-6)
    np.testing.assert_allclose(losses.ldam_margins((16, 1), max_margin=0.5), [0.25, 0.5], rtol=1e-6)
    np.testing.assert_allclose(losses.class_balanced_weights((10, 2), beta=0.0), [1, 1])
    np.testing.assert_allclose(losses.class_balanced_weights((2, 1), beta=0.5), np.array([0.8, 1.2]), rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: losses.balanced_softmax(LOGITS, LABELS, class_counts=(5, 0, 2, 1)), "at least 1 for every class"),
        (lambda: losses.ldam(LOGITS, LABELS, class_counts=(5, 2)), "must have shape"),
        (lambda: losses.logit_adjustment(LOGITS, LABELS, class_counts=None), "class_counts is missing"),
        (lambda: losses.focal(LOGITS, LABELS, activation="tanh"), "Unknown activation 'tanh'.*softmax, sigmoid"),
        (lambda: losses.kl_divergence(LOGITS, LOGITS, epsilon=-1.0), "epsilon must not be negative"),
    ],
)
def test_invalid_options_give_one_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)

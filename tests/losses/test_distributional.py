"""The worst distribution of FAAL: against a convex solver, its optimality conditions, limits and precision."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize

from lt_adv import losses

margins = st.lists(st.floats(-1, 1), min_size=2, max_size=12)
radii = st.floats(1e-4, 3)


@partial(jax.jit, static_argnames="radius")
def compiled(values, radius):
    return losses.worst_distribution(values, radius=radius)


def worst(values, radius, dtype=np.float64):
    with jax.enable_x64(True):
        p = losses.worst_distribution(np.asarray(values, dtype), radius=radius)
    assert p.dtype == dtype and p.shape == np.shape(values)
    return np.asarray(p)


def divergence(p):
    return -np.log(len(p)) - np.mean(np.log(p.astype(np.float64) / p.sum(dtype=np.float64)))


@pytest.mark.parametrize("radius", [0.05, 0.5])
@pytest.mark.parametrize("seed", range(4))
def test_against_a_convex_solver(seed, radius):
    rng = np.random.default_rng(seed)
    v = rng.uniform(-1, 1, 5 + seed)
    uniform = np.full(len(v), 1 / len(v))
    constraints = [
        {"type": "eq", "fun": lambda p: p.sum() - 1, "jac": lambda p: np.ones(len(p))},
        {"type": "ineq", "fun": lambda p: radius - divergence(p), "jac": lambda p: 1 / (len(p) * p) - 1 / p.sum()},
    ]
    solution = optimize.minimize(
        lambda p: -p @ v, uniform, jac=lambda p: -v, bounds=[(1e-9, 1)] * len(v), constraints=constraints,
        method="SLSQP", options={"ftol": 1e-15, "maxiter": 500},
    )  # fmt: skip
    p = worst(v, radius)
    np.testing.assert_allclose(p, solution.x, rtol=0, atol=1e-6)
    assert p @ v >= solution.x @ v - 1e-9


@settings(max_examples=40, deadline=None)
@given(margins, radii)
def test_feasible_active_and_stationary(v, radius):
    """Of a linear objective, a feasible point with an active constraint and 1 / p affine in v is the maximum."""
    v, p = np.array(v), worst(v, radius)
    assert np.all(p > 0) and p.sum() == pytest.approx(1, abs=1e-12)
    if np.ptp(v) == 0:
        np.testing.assert_allclose(p, 1 / len(v), rtol=1e-12)
        return
    assert divergence(p) == pytest.approx(radius, rel=1e-9, abs=1e-12)
    order = np.argsort(v)
    assert np.all(np.diff(p[order]) >= -1e-15), "a larger value has no smaller weight"
    inverse, best, least = 1 / p, order[-1], order[0]
    share = (v[best] - v) / (v[best] - v[least])
    np.testing.assert_allclose(inverse, inverse[best] + share * (inverse[least] - inverse[best]), rtol=1e-6)


@settings(max_examples=20, deadline=None)
@given(margins, st.floats(0.01, 10), st.floats(-5, 5), st.permutations(range(12)))
def test_scale_shift_and_order_of_the_values(v, scale, shift, order):
    v = np.round(np.array(v), 3)
    p = worst(v, 0.5)
    np.testing.assert_allclose(worst(scale * v + shift, 0.5), p, rtol=1e-6, atol=1e-12)
    order = [i for i in order if i < len(v)]
    np.testing.assert_allclose(worst(v[order], 0.5), p[order], rtol=1e-9, atol=1e-14)


LIMITS = {
    "equal": [0.3, 0.3, 0.3, 0.3],
    "margins of 1": [1.0, 1.0, -1.0, -1.0, -1.0],
    "one worst": [1.0, *[-1.0] * 9],
    "one best": [*[1.0] * 9, -1.0],
    "one class": [0.7],
    "two classes": [-1.0, 1.0],
    "nearly equal": [0.5, 0.5 + 1e-6, 0.5 - 1e-6],
    "many": np.linspace(-1, 1, 1000),
}


@pytest.mark.parametrize("radius", [0.0, 1e-12, 1e-3, 0.5, 3.0])
@pytest.mark.parametrize("name", LIMITS)
def test_single_precision(name, radius):
    v = np.asarray(LIMITS[name], np.float32)
    p, exact = worst(v, radius, np.float32), worst(v, radius)  # of the same values
    assert np.all(np.isfinite(p)) and np.all(p >= 0) and p.sum() == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(p, exact, rtol=2e-5, atol=1e-7)
    if radius == 0 or np.ptp(v) == 0:
        np.testing.assert_allclose(exact, 1 / len(v), rtol=1e-12)
    else:
        assert divergence(exact) == pytest.approx(radius, rel=1e-6, abs=1e-14)


def test_large_radius_tends_to_the_largest_values():
    np.testing.assert_allclose(worst([0.0, 1.0, 1.0], 200.0), [0, 0.5, 0.5], atol=1e-12)


def test_inside_a_trace_and_without_a_gradient():
    v = jnp.array([0.1, -0.4, 0.9], jnp.float32)
    np.testing.assert_allclose(compiled(v, 0.5), worst(v, 0.5, np.float32), rtol=1e-5)
    gradient = jax.grad(lambda v: losses.worst_distribution(v, radius=0.5) @ v)(v)
    np.testing.assert_array_equal(gradient, losses.worst_distribution(v, radius=0.5))
    batched = jax.vmap(lambda v: losses.worst_distribution(v, radius=0.5))(jnp.stack([v, 2 * v[::-1], jnp.ones(3)]))
    np.testing.assert_allclose(batched, [compiled(v, 0.5), compiled(v, 0.5)[::-1], np.full(3, 1 / 3)], rtol=1e-5)


def test_bad_input():
    with pytest.raises(ValueError, match=r"values must be \[classes\], got shape \(2, 2\)"):
        losses.worst_distribution(np.ones((2, 2)), radius=0.5)
    for radius in (-0.1, np.nan):
        with pytest.raises(ValueError, match="radius must"):
            losses.worst_distribution(np.ones(2), radius=radius)

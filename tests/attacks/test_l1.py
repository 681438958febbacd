"""The L1 ball: projection, sampling and steepest ascent, and the attacks in it."""

from functools import partial

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
from scipy import optimize

from lt_adv import attacks
from lt_adv.attacks import _apgd_l1, _fab, norms

L1 = norms.get("l1")
WEIGHTS = np.random.RandomState(0).normal(size=(48, 5))


def linear(x):
    return x.reshape(len(x), -1) @ jnp.asarray(WEIGHTS, x.dtype)


def solved_by_scipy(x, delta, eps, low=0.0, high=1.0):
    """The projection of x + delta by its dual, a scalar equation that brentq solves."""
    size, room = np.abs(delta), np.where(delta > 0, high - x, x - low)
    length = lambda t: np.clip(size - t, 0, room).sum()  # noqa: E731
    t = 0.0
    if length(0) > eps:
        t = optimize.brentq(lambda t: length(t) - eps, 0, size.max(), xtol=1e-300, rtol=1e-15, maxiter=10_000)
    return x + np.sign(delta) * np.clip(size - t, 0, room)


def test_projection_equals_the_released_code(float64, golden):
    arrays = golden("l1_projection")
    x, delta, eps = arrays["x"], arrays["y"], arrays["eps"]
    projected = L1.project(x + delta, x, eps[:, None], 0.0, 1.0) - x
    error = np.abs(projected - arrays["projected"]).max(1) / np.abs(delta).max(1).clip(1e-300)
    assert error.max() < 1e-9


def test_projection_equals_a_convex_solver(float64):
    rng = np.random.default_rng(0)
    x = rng.uniform(size=(1000, 24))
    x[:300] = x[:300].round()  # corners of the box
    delta = rng.normal(size=x.shape) * 10 ** rng.uniform(-3, 1, size=(1000, 1))
    delta[200:400] = np.round(delta[200:400], 1)  # ties and zeros
    delta[400:450] *= rng.random((50, 24)) < 0.1
    eps = 10 ** rng.uniform(-4, 1.5, size=1000)
    eps[::50] = 0
    projected = np.asarray(L1.project(x + delta, x, eps[:, None], 0.0, 1.0))
    for i in range(1000):
        expected = solved_by_scipy(x[i], (x + delta)[i] - x[i], eps[i])
        np.testing.assert_allclose(projected[i], expected, atol=1e-9, rtol=0)
    assert (np.abs(projected - x).sum(1) <= eps + 1e-9).all()


@hypothesis.given(seed=st.integers(0, 2**31), eps=st.floats(0, 10), scale=st.sampled_from([1e-3, 1.0, 30.0]))
@hypothesis.settings(max_examples=15, deadline=None)
def test_projection_is_idempotent_and_batch_independent(seed, eps, scale):
    rng = np.random.default_rng(seed)
    x = rng.uniform(size=(8, 4, 3)).astype(np.float32)
    point = (x + scale * rng.normal(size=x.shape)).astype(np.float32)
    project = jax.jit(partial(L1.project, low=0.0, high=1.0))
    projected = np.asarray(project(point, x, np.float32(eps)))
    np.testing.assert_allclose(project(projected, x, np.float32(eps)), projected, atol=1e-6 * max(scale, 1))
    assert projected.min() >= 0 and projected.max() <= 1
    assert (np.abs(projected - x).sum((1, 2)) <= eps * (1 + 1e-6) + 1e-6).all()
    alone = np.concatenate([project(point[i : i + 1], x[i : i + 1], np.float32(eps)) for i in range(8)])
    np.testing.assert_array_equal(alone, projected)


def test_samples_are_uniform_in_the_ball():
    keys = jax.random.split(jax.random.key(0), 20_000)
    points = np.asarray(jax.vmap(lambda key: L1.sample(key, (3,), jnp.float32))(keys))
    length = np.abs(points).sum(1)
    assert length.max() <= 1
    for radius in (0.3, 0.6, 0.9):  # the volume grows as radius ** 3
        assert abs((length <= radius).mean() - radius**3) < 0.015
    shares = np.abs(points) / length[:, None]  # uniform on the simplex: mean 1/3, variance 1/18
    np.testing.assert_allclose(shares.mean(0), 1 / 3, atol=0.01)
    np.testing.assert_allclose(shares.var(0), 1 / 18, atol=0.003)
    assert abs((points > 0).mean() - 0.5) < 0.01


def test_direction_has_length_one_and_the_largest_entries():
    gradient = jnp.asarray(np.random.default_rng(0).normal(size=(3, 500)).astype(np.float32)).at[2].set(0)
    direction = np.asarray(L1.direction(gradient))
    np.testing.assert_allclose(np.abs(direction).sum(1), [1, 1, 0], atol=1e-6)
    changed = direction != 0
    assert (changed.sum(1) == [5, 5, 0]).all()  # 1 % of 500
    for row in range(2):
        size = np.abs(gradient[row])
        assert size[changed[row]].min() > size[~changed[row]].max()
        np.testing.assert_array_equal(np.sign(direction[row])[changed[row]], np.sign(gradient[row])[changed[row]])


def images(number, dtype=np.float32):
    x = np.random.default_rng(1).uniform(size=(number, 4, 4, 3)).astype(dtype)
    return x, np.asarray(linear(jnp.asarray(x))).argmax(1)


def test_pgd_and_apgd_reach_the_optimum_of_a_linear_network():
    """The best point moves the entries with the largest weights to the bounds, as far as the radius allows."""
    x, y = images(32)
    eps = 0.5
    other = (y + 1) % 5
    w = WEIGHTS[:, other].T - WEIGHTS[:, y].T  # raises z_other - z_y
    best = np.array([_greedy(w[i], x[i].ravel(), eps) for i in range(32)]).reshape(x.shape)

    def objective(logits, y):
        rows = jnp.arange(len(y))
        return logits[rows, (y + 1) % 5] - logits[rows, y]

    value = lambda point: np.asarray(objective(linear(jnp.asarray(point, jnp.float32)), jnp.asarray(y)))  # noqa: E731
    gain = value(best) - value(x)
    for name, attack in {
        "pgd": partial(attacks.pgd, step_size=0.05, num_steps=60, start="zero"),
        "apgd": partial(attacks.apgd, num_steps=100),
    }.items():
        x_adv = attack(jax.random.key(0), linear, x, y, eps=eps, norm="l1", objective=objective)
        reached = (value(x_adv) - value(x)) / gain
        # APGD moves several entries by equal amounts, and returns the last wrong point, not the best one.
        right = np.asarray(linear(x_adv)).argmax(1) == y
        assert (reached[right] > 0.8).all() if name == "apgd" else (reached > 0.98).all(), name


def _greedy(w, x, eps):
    point, left = x.copy(), eps
    for i in np.argsort(-np.abs(w)):
        step = min(1 - x[i] if w[i] > 0 else x[i], left)
        point[i] += np.sign(w[i]) * step
        left -= step
    return point


def test_fab_finds_the_nearest_point_of_a_linear_network(float64):
    x, y = images(16, np.float64)
    x = 0.25 + x / 2
    y = np.asarray(linear(jnp.asarray(x))).argmax(1)
    x_adv = attacks.fab(jax.random.key(0), linear, x, y, eps=np.inf, num_steps=50, norm="l1")
    logits = np.asarray(linear(jnp.asarray(x)))
    distance = np.abs(np.asarray(x_adv) - x).sum((1, 2, 3))
    for i in range(16):
        nearest = min(_distance_to_plane(WEIGHTS[:, s] - WEIGHTS[:, y[i]], logits[i, y[i]] - logits[i, s], x[i].ravel())
                      for s in range(5) if s != y[i])  # fmt: skip
        assert nearest <= distance[i] <= 1.01 * nearest  # a step goes 5 % beyond the plane, the next ones back


def _distance_to_plane(w, gap, x):
    distance = 0.0
    for i in np.argsort(-np.abs(w)):
        step = min(1 - x[i] if w[i] > 0 else x[i], gap / abs(w[i]))
        distance, gap = distance + step, gap - step * abs(w[i])
        if gap <= 1e-12:
            return distance
    return np.inf


def test_shortest_displacement_to_a_plane_is_a_linear_program(float64):
    rng = np.random.default_rng(3)
    point, w, value = rng.uniform(size=(40, 12)), rng.normal(size=(40, 12)), rng.normal(size=40)
    d = np.asarray(_fab.to_plane("l1", jnp.asarray(point), jnp.asarray(w), jnp.asarray(value), 0.0, 1.0))
    reachable = 0
    for i in range(40):
        bounds = [(0, 1 - p) for p in point[i]] + [(0, p) for p in point[i]]
        program = optimize.linprog(np.ones(24), A_eq=[np.concatenate([w[i], -w[i]])], b_eq=[-value[i]], bounds=bounds)
        if program.success:
            reachable += 1
            assert abs(np.abs(d[i]).sum() - program.fun) < 1e-9 and abs(w[i] @ d[i] + value[i]) < 1e-9
    assert reachable > 30


def test_stages_of_apgd():
    plan = _apgd_l1.schedule(100)
    assert [int((plan.radius == r).sum()) for r in (3, 2, 1)] == [31, 31, 41] and plan.in_last_stage.sum() == 41
    assert list(np.flatnonzero(plan.is_first)) == [0, 31, 62] and list(plan.next_radius[[30, 61]]) == [2, 1]
    assert not plan.is_checkpoint[plan.is_first].any() and plan.is_checkpoint[~plan.is_first].all()
    assert len(_apgd_l1.schedule(0).radius) == 3 and len(_apgd_l1.schedule(1).radius) == 4

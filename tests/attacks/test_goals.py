"""Targets, restarts, the worst point, and a radius for each entry."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lt_adv import attacks

KEY = jax.random.key(3)
RNG = np.random.default_rng(0)
HIDDEN, OUT = RNG.normal(size=(64, 12)).astype(np.float32), RNG.normal(size=(12, 4)).astype(np.float32)
X = RNG.uniform(size=(32, 8, 8, 1)).astype(np.float32)
EPS = 0.06
STEPS = {"eps": EPS, "step_size": EPS / 4, "num_steps": 6}


def network(x):
    return jnp.tanh((x.reshape(len(x), -1) - 0.5) @ HIDDEN) @ OUT


def predicted(x):
    return np.asarray(network(x).argmax(-1))


Y = predicted(X).astype(np.int32)


def test_targeted_pgd_descends_the_objective_of_the_target():
    """On a linear network the first step is the sign of the gradient of -log softmax(z)_t, negated."""
    weights = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32)
    logits_fn = lambda x: x @ weights  # noqa: E731
    x, y, targets = np.full((4, 12), 0.5, np.float32), np.arange(4), np.array([1, 2, 3, 0])
    x_adv = attacks.fgsm(KEY, logits_fn, x, y, eps=0.1, targets=targets)
    gradient = jax.grad(lambda x: attacks.cross_entropy(logits_fn(x), targets).sum())(jnp.asarray(x))
    np.testing.assert_allclose(x_adv, x - 0.1 * np.sign(gradient), atol=1e-7)
    np.testing.assert_array_equal(
        attacks.fgsm(KEY, logits_fn, x, y, eps=0.1, targets=targets),
        attacks.fgsm(KEY, logits_fn, x, (y + 2) % 4, eps=0.1, targets=targets),  # whatever the labels
    )


def test_targeted_cw_pulls_where_the_margin_exceeds_the_confidence():
    logits_fn = lambda x: 1000 * jnp.stack([x[:, 0], x[:, 1]], -1)  # noqa: E731
    x = np.array([[0.9, 0.1]], np.float32)  # margin 800, confidence 50
    x_adv = attacks.cw(KEY, logits_fn, x, np.array([0]), **{**STEPS, "eps": 0.1}, start="zero", targets=np.array([1]))
    assert x_adv[0, 0] < 0.85 and x_adv[0, 1] > 0.15


def test_target_images_are_not_attacked_by_apgd():
    labels = (Y + 1) % 4
    np.testing.assert_array_equal(attacks.apgd(KEY, network, X, labels, eps=EPS, num_steps=3, targets=Y), X)


def losses(x):
    return np.asarray(attacks.cross_entropy(network(x), Y))


def test_restarts_keep_the_worst_point():
    attack = partial(attacks.pgd, KEY, network, X, Y, **{**STEPS, "num_steps": 2})
    single, several, more = attack(), attack(num_restarts=2), attack(num_restarts=5)
    broken = [predicted(x) != Y for x in (single, several, more)]
    assert (broken[1] >= broken[0]).all() and (broken[2] >= broken[1]).all()
    assert 0 < broken[0].sum() < broken[2].sum() < len(Y)
    assert (losses(several)[~broken[1]] >= losses(single)[~broken[1]] - 1e-5).all()
    np.testing.assert_array_equal(several[broken[1]], more[broken[1]])  # a broken image is not attacked again


def test_best_point_is_the_worst_of_those_visited():
    coarse = {"eps": EPS, "step_size": 1.9 * EPS}  # jumps over the best point
    step = jax.jit(lambda point: attacks.pgd(KEY, network, X, Y, **coarse, num_steps=1, x_init=point))
    steps = [X]  # the points visited
    for _ in range(7):
        steps.append(step(steps[-1]))
    value = np.stack([losses(x) for x in steps])
    broken = np.stack([predicted(x) != Y for x in steps])
    best = attacks.pgd(KEY, network, X, Y, **coarse, num_steps=7, start="zero", return_best=True)
    np.testing.assert_array_equal(predicted(best) != Y, broken.any(0))
    expected = np.where(broken.any(0), np.where(broken, value, -np.inf).max(0), value.max(0))
    np.testing.assert_allclose(losses(best), expected, atol=1e-5)
    assert (losses(best) > losses(steps[-1]) + 1e-3).any()


def test_a_start_outside_of_the_ball_is_not_returned():
    outside = np.clip(X + 5 * EPS, 0, 1)
    x_adv = attacks.pgd(KEY, network, X, Y, **STEPS, x_init=outside, return_best=True)
    assert (np.abs(np.asarray(x_adv) - X).max((1, 2, 3)) <= EPS + 1e-6).all()


def test_no_gradient_flows_through_restarts():
    def loss(scale):
        x_adv = attacks.pgd(KEY, lambda x: scale * network(x), X[:4], Y[:4], **STEPS, num_restarts=2, return_best=True)
        return x_adv.sum()

    assert jax.grad(loss)(1.0) == 0


PER_ENTRY = {
    "fgsm": {},
    "pgd": {"step_size": EPS / 2, "num_steps": 3},
    "apgd": {"num_steps": 6},
    "apgd_targeted": {"num_steps": 6, "num_targets": 2},
    "fab": {"num_steps": 6, "num_restarts": 2},
    "fab_targeted": {"num_steps": 6, "num_targets": 3},
    "square": {"num_queries": 50},
}


@pytest.mark.parametrize("name", PER_ENTRY)
def test_a_radius_for_each_entry(name):
    attack = jax.jit(lambda eps: getattr(attacks, name)(KEY, network, X, Y, eps=eps, **PER_ENTRY[name]))
    radius = np.full((1, 8, 8, 1), 2 * EPS, np.float32)
    radius[:, :, :3] = 0  # three columns must not change
    radius[:, :2] *= 0.25
    delta = np.abs(np.asarray(attack(radius)) - X)
    assert (delta[:, :, :3] == 0).all() and (delta <= radius + 1e-6).all()
    assert (delta.max(0) > 0.5 * radius[0]).mean() > 0.4 or name.startswith("fab")
    np.testing.assert_allclose(attack(np.full_like(radius, EPS)), attack(EPS), atol=2e-6)
    if name in ("pgd", "fab"):  # one radius for each entry of each image; it has its shape in the state of the others
        radius = np.broadcast_to(radius, X.shape).copy()
        radius[::2] = 0
        delta = np.abs(np.asarray(attack(radius)) - X)
        assert (delta[::2] == 0).all() and delta[1::2].max() > 0


def test_fab_finds_the_nearest_point_with_a_radius_for_each_entry(float64):
    """On a linear network of two classes it is gap / sum_i eps_i |w_i|, in radii."""
    weights = np.random.default_rng(0).normal(size=(20, 2))
    logits_fn = lambda x: (x - 0.5) @ weights  # noqa: E731
    x = np.full((8, 20), 0.5) + np.random.default_rng(1).normal(size=(8, 20)) / 20
    y, w = np.asarray(logits_fn(x)).argmax(1), weights[:, 1] - weights[:, 0]
    radius = np.random.default_rng(2).uniform(0, 1, size=(1, 20)) * (np.arange(20) % 3 > 0)
    x_adv = np.asarray(attacks.fab(KEY, logits_fn, x, y, eps=radius, num_steps=60))
    nearest = np.abs((x - 0.5) @ w) / (radius[0] * np.abs(w)).sum()
    moved = (x_adv != x).any(1)
    assert moved.sum() >= 6 and (nearest[moved] <= 1).all()
    delta = np.abs(x_adv - x)
    assert (delta[:, radius[0] == 0] == 0).all()
    reached = (delta[:, radius[0] > 0] / radius[0][radius[0] > 0]).max(1)[moved]
    assert (reached >= nearest[moved] - 1e-12).all() and (reached <= 1.01 * nearest[moved]).all()


def test_autoattack_with_a_radius_for_each_entry(short):
    radius = np.where(np.arange(8)[None, None, :, None] < 3, 0, np.float32(2 * EPS))
    logits_fn = jax.tree_util.Partial(lambda w, x: jnp.tanh((x.reshape(len(x), -1) - 0.5) @ w[0]) @ w[1], (HIDDEN, OUT))
    run = partial(attacks.autoattack, KEY, logits_fn, X, Y, num_queries=50)
    result, weaker = run(eps=radius), run(eps=radius / 4)
    delta = np.abs(result.x_adv - X)
    assert (delta[:, :, :3] == 0).all() and delta.max() <= 2 * EPS + 1e-6
    assert result.robust.mean() < weaker.robust.mean() < result.correct.mean()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("pgd", {"targets": np.zeros(3, int)}, "targets must have the same batch size"),
        ("pgd", {"targets": np.zeros(32)}, "targets must be integer labels"),
        ("apgd", {"targets": np.full(32, 4)}, "targets must be labels of 4 classes, got 4 to 4"),
        ("fab", {"targets": np.full((32, 2), 1)}, "targets must be integer labels"),
        ("pgd", {"num_restarts": 0}, "num_restarts must be a Python int, 1 or more"),
        ("pgd", {"num_restarts": 2, "start": "zero"}, "num_restarts needs a random start"),
        ("pgd", {"eps": np.ones((1, 8, 8, 2))}, r"eps of shape \(1, 8, 8, 2\) does not broadcast to images"),
        ("pgd", {"eps": np.ones((8, 8, 1))}, "eps must be a scalar or .* dimensions of x, such as"),
        ("pgd", {"eps": np.ones((1, 8, 8, 1)), "norm": "l2"}, "eps must be a scalar or"),
        ("apgd", {"eps": np.full((1, 1, 1, 1), np.inf)}, "eps must be finite"),
        ("fab", {"eps": np.full((1, 1, 1, 1), np.inf)}, "eps must be finite"),
        ("square", {"eps": -np.ones((1, 1, 1, 1))}, "eps must not be negative"),
    ],
)
def test_bad_arguments_give_one_line(name, change, message):
    options = {"eps": EPS} | ({"step_size": EPS, "num_steps": 2} if name == "pgd" else {})
    with pytest.raises(ValueError, match=message) as error:
        getattr(attacks, name)(KEY, network, X, Y, **{**options, **change})
    assert "\n" not in str(error.value)

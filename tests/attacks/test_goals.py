"""Targets, restarts, the worst point, and a radius for each entry."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from lt_adv import attacks
from tests.attacks.conftest import load

NET = load("linear")
X, Y = NET.x[::20], NET.y[::20].astype(np.int32)  # 50 images
EPS = float(NET.info["eps"])
STEPS = {"eps": EPS, "step_size": EPS / 4, "num_steps": 10}
KEY = jax.random.key(3)
TARGETED = {
    "fgsm": {"eps": 2 * EPS},
    "pgd": STEPS,
    "mim": STEPS,
    "cw": STEPS,
    "apgd": {"eps": EPS, "num_steps": 20},
    "apgd_targeted": {"eps": EPS, "num_steps": 20, "num_targets": 2},
    "fab": {"eps": EPS, "num_steps": 20},
}


SLOW = {"apgd", "apgd_targeted", "fab"}


def predicted(x):
    return np.asarray(NET.logits_fn(x).argmax(-1))


def second(x):
    return np.argsort(-np.asarray(NET.logits_fn(x)), axis=-1)[:, 1].astype(np.int32)


@pytest.mark.parametrize(
    "name", [*sorted(set(TARGETED) - SLOW), *(pytest.param(name, marks=pytest.mark.slow) for name in sorted(SLOW))]
)
def test_targets_are_hit_more_often_than_by_accident(name):
    attack = partial(getattr(attacks, name), KEY, NET.logits_fn, X, Y, **TARGETED[name])
    towards = jax.jit(lambda targets: attack(targets=targets))  # compiled once
    near, rare, clean, untargeted = second(X), (Y + 5) % 10, predicted(X), predicted(attack())
    x_adv = towards(near)
    hits, accidents = predicted(x_adv) == near, untargeted == near
    assert hits.sum() > (clean == near).sum() and hits.sum() >= accidents.sum() - 1  # often the nearest class
    assert (predicted(towards(rare)) == rare).sum() >= (untargeted == rare).sum()
    assert (np.abs(np.asarray(x_adv) - X).max((1, 2, 3)) <= TARGETED[name]["eps"] + 1e-6).all()


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
    targets = predicted(X).astype(np.int32)
    np.testing.assert_array_equal(attacks.apgd(KEY, NET.logits_fn, X, Y, eps=EPS, num_steps=3, targets=targets), X)


def losses(x):
    return np.asarray(attacks.cross_entropy(NET.logits_fn(x), Y))


@pytest.mark.parametrize("name", ["pgd", "cw"])
def test_restarts_keep_the_worst_point(name):
    attack = partial(getattr(attacks, name), KEY, NET.logits_fn, X, Y, **STEPS)
    single, several, more = attack(), attack(num_restarts=2), attack(num_restarts=5)
    broken = [predicted(x) != Y for x in (single, several, more)]
    assert (broken[1] >= broken[0]).all() and (broken[2] >= broken[1]).all()
    if name != "cw":
        assert (losses(several)[~broken[1]] >= losses(single)[~broken[1]] - 1e-5).all()
    np.testing.assert_array_equal(several[broken[1]], more[broken[1]])  # a broken image is not attacked again
    assert (np.abs(np.asarray(more) - X).max((1, 2, 3)) <= EPS + 1e-6).all()


def test_best_point_is_the_worst_of_those_visited():
    coarse = {"eps": EPS, "step_size": 1.9 * EPS, "num_steps": 7}  # jumps over the best point
    attack = partial(attacks.pgd, KEY, NET.logits_fn, X, Y, start="zero")
    steps = [attack(**{**coarse, "num_steps": n}) for n in range(8)]  # the points visited
    value = np.stack([losses(x) for x in steps])
    broken = np.stack([predicted(x) != Y for x in steps])
    best = attack(**coarse, return_best=True)
    np.testing.assert_array_equal(predicted(best) != Y, broken.any(0))
    expected = np.where(broken.any(0), np.where(broken, value, -np.inf).max(0), value.max(0))
    np.testing.assert_allclose(losses(best), expected, atol=1e-5)
    assert (losses(best) > losses(steps[-1]) + 1e-3).any()


def test_a_start_outside_of_the_ball_is_not_returned():
    outside = np.clip(X + 5 * EPS, 0, 1)
    x_adv = attacks.pgd(KEY, NET.logits_fn, X, Y, **STEPS, x_init=outside, return_best=True)
    assert (np.abs(np.asarray(x_adv) - X).max((1, 2, 3)) <= EPS + 1e-6).all()


def test_restarts_are_the_same_under_transformations_and_in_parts():
    options = {**STEPS, "num_steps": 4, "num_restarts": 3, "return_best": True}
    attack = lambda keys, x, y: attacks.pgd(keys, NET.logits_fn, x, y, **options)  # noqa: E731
    keys, x, y = jax.random.split(KEY, 48), X[:48], Y[:48]
    expected = np.asarray(jax.jit(attack)(keys, x, y))
    parts = np.concatenate([attack(keys[i : i + 16], x[i : i + 16], y[i : i + 16]) for i in (0, 16, 32)])
    np.testing.assert_allclose(parts, expected, atol=1e-6)
    mapped = jax.vmap(attack)(keys.reshape(3, 16), x.reshape(3, 16, 8, 8, 1), y.reshape(3, 16))
    np.testing.assert_allclose(mapped.reshape(expected.shape), expected, atol=1e-6)
    over = jax.pmap(attack)(keys.reshape(8, 6), x.reshape(8, 6, 8, 8, 1), y.reshape(8, 6))
    np.testing.assert_allclose(over.reshape(expected.shape), expected, atol=1e-6)
    mesh, spec = Mesh(jax.devices(), ("data",)), PartitionSpec("data")
    sharded = jax.shard_map(attack, mesh=mesh, in_specs=(spec, spec, spec), out_specs=spec)
    np.testing.assert_allclose(jax.jit(sharded)(keys, x, y), expected, atol=1e-6)


def test_no_gradient_flows_through_restarts():
    def loss(scale):
        x_adv = attacks.pgd(KEY, lambda x: scale * NET.logits_fn(x), X, Y, **STEPS, num_restarts=2, return_best=True)
        return x_adv.sum()

    assert jax.grad(loss)(1.0) == 0


PER_ENTRY = {
    "fgsm": {},
    "pgd": {"step_size": EPS / 4, "num_steps": 5},
    "apgd": {"num_steps": 10},
    "apgd_targeted": {"num_steps": 10, "num_targets": 2},
    "fab": {"num_steps": 10, "num_restarts": 2},
    "fab_targeted": {"num_steps": 10, "num_targets": 3},
    "square": {"num_queries": 50},
}


@pytest.mark.parametrize("name", PER_ENTRY)
def test_a_radius_for_each_entry(name):
    attack = partial(getattr(attacks, name), KEY, NET.logits_fn, X, Y, **PER_ENTRY[name])
    radius = np.full((1, 8, 8, 1), 2 * EPS, np.float32)
    radius[:, :, :3] = 0  # three columns must not change
    radius[:, :2] *= 0.25
    delta = np.abs(np.asarray(attack(eps=radius)) - X)
    assert (delta[:, :, :3] == 0).all() and (delta <= radius + 1e-6).all()
    assert (delta.max(0) > 0.5 * radius[0]).mean() > 0.4 or name.startswith("fab")
    per_example = np.broadcast_to(radius, X.shape).copy()
    per_example[::2] = 0
    delta = np.abs(np.asarray(attack(eps=per_example)) - X)
    assert (delta[::2] == 0).all() and delta[1::2].max() > 0
    same = np.full((1, 1, 1, 1), EPS, np.float32)
    np.testing.assert_allclose(attack(eps=same), attack(eps=EPS), atol=2e-6)


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
    result = attacks.autoattack(KEY, NET.logits_fn, X, Y, eps=radius, num_queries=50)
    delta = np.abs(result.x_adv - X)
    assert (
        (delta[:, :, :3] == 0).all() and delta.max() <= 2 * EPS + 1e-6 and result.robust.mean() < result.correct.mean()
    )
    weaker = attacks.autoattack(KEY, NET.logits_fn, X, Y, eps=radius / 4, num_queries=50)
    assert weaker.robust.mean() > result.robust.mean()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("pgd", {"targets": np.zeros(3, int)}, "targets must have the same batch size"),
        ("pgd", {"targets": np.zeros(50)}, "targets must be integer labels"),
        ("apgd", {"targets": np.full(50, 10)}, "targets must be labels of 10 classes, got 10 to 10"),
        ("fab", {"targets": np.full((50, 2), 1)}, "targets must be integer labels"),
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
        getattr(attacks, name)(KEY, NET.logits_fn, X, Y, **{**options, **change})
    assert "\n" not in str(error.value)

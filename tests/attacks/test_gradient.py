"""Gradient attacks: starts, steps, keys, radii and errors; test_properties.py has what holds for every attack."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lt_adv import attacks
from lt_adv.attacks.initialization import STARTS, example_keys

SHAPE, CLASSES = (4, 4, 2), 5
ITERATIVE = {"pgd": attacks.pgd, "mim": partial(attacks.mim, decay=0.9), "cw": attacks.cw}
KEY = jax.random.key(7)


def images(batch, seed=0):
    return np.random.default_rng(seed).uniform(size=(batch, *SHAPE)).astype(np.float32)


def labels(batch, seed=0):
    return np.random.default_rng(seed).integers(0, CLASSES, size=batch)


WEIGHTS = {
    "hidden": np.random.default_rng(1).normal(size=(32, 16)).astype(np.float32),
    "out": np.random.default_rng(2).normal(size=(16, CLASSES)).astype(np.float32),
}


def apply(weights, x):
    return jnp.tanh(x.reshape(x.shape[0], -1) @ weights["hidden"]) @ weights["out"]


network = partial(apply, WEIGHTS)


def distance(x_adv, x, norm):
    delta = np.abs(np.asarray(x_adv, np.float64) - x).reshape(len(x), -1)
    return delta.max(axis=1) if norm == "linf" else np.sqrt((delta**2).sum(axis=1))


@partial(jax.jit, static_argnames=("name", "norm", "start", "num_steps"))
def run(key, x, y, eps, step_size, x_init=None, *, name="pgd", norm="linf", start="uniform", num_steps=3):
    return ITERATIVE[name](
        key, network, x, y, eps=eps, step_size=step_size, num_steps=num_steps, norm=norm, start=start, x_init=x_init
    )


@pytest.mark.parametrize("num_steps", [0, 2])
@pytest.mark.parametrize("start", [start for start in STARTS if start != "uniform"])  # the default start
@pytest.mark.parametrize("norm", ["linf", "l2"])
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), eps=st.floats(0, 1, width=32), step_size=st.floats(0, 2, width=32))
def test_inside_ball_and_box(norm, start, num_steps, seed, eps, step_size):
    x, y = images(3, seed), labels(3, seed)
    x_adv = run(jax.random.key(seed), x, y, eps, step_size, norm=norm, start=start, num_steps=num_steps)
    assert x_adv.dtype == x.dtype
    assert np.all((np.asarray(x_adv) >= 0) & (np.asarray(x_adv) <= 1))
    assert np.all(distance(x_adv, x, norm) <= eps + 1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", ITERATIVE)
def test_objective_grows_and_the_radius_is_used(name, norm):
    x, y = 0.25 + images(8) / 2, labels(8)
    x_adv = run(KEY, x, y, 0.1, 0.04, name=name, norm=norm, start="zero", num_steps=6)
    objective = attacks.cw_margin if name == "cw" else attacks.cross_entropy
    assert np.all(objective(network(x_adv), y) > objective(network(x), y))
    np.testing.assert_allclose(distance(x_adv, x, norm), 0.1, rtol=1e-2)


def test_fgsm_is_one_step_of_the_radius():
    x, y = 0.25 + images(4) / 2, labels(4)
    gradient = jax.grad(lambda x: attacks.cross_entropy(network(x), y).sum())(x)
    np.testing.assert_allclose(attacks.fgsm(KEY, network, x, y, eps=0.1), x + 0.1 * np.sign(gradient), atol=1e-6)
    steepest = gradient / np.sqrt((gradient**2).sum(axis=(1, 2, 3), keepdims=True))
    np.testing.assert_allclose(attacks.fgsm(KEY, network, x, y, eps=0.1, norm="l2"), x + 0.1 * steepest, atol=1e-6)


def test_start_is_not_clipped_before_the_first_step():
    """The first gradient is taken at x_init itself: outside the ball and the box here, where the true slope differs."""
    x, x_init = jnp.full((1, 1), 0.5), jnp.full((1, 1), 2.0)

    def logits_fn(x):  # class 0 loses left of 1.5 by moving left, right of it by moving right
        return jnp.concatenate([-jnp.square(x - 1.5), jnp.zeros_like(x)], axis=1)

    options = {"eps": 0.1, "step_size": 2.0, "num_steps": 1}
    y = jnp.zeros(1, int)
    assert attacks.pgd(KEY, logits_fn, x, y, x_init=x_init, **options) == pytest.approx(0.6)
    assert attacks.pgd(KEY, logits_fn, x, y, start="zero", **options) == pytest.approx(0.4)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_distributions_of_the_starts(norm):
    x = np.full((64, *SHAPE), 0.5, np.float32)
    at = {start: run(KEY, x, labels(64), 0.2, 0.0, norm=norm, start=start, num_steps=0) - x for start in STARTS}
    assert np.all(at["zero"] == 0)
    radii = distance(at["uniform"], np.zeros_like(x), norm)
    assert 0.19 < radii.max() <= 0.2 + 1e-6 and abs(np.mean(at["uniform"])) < 0.02
    if norm == "l2":  # P(radius < r) = (r / eps)^32: the radii are not uniform, and not all eps
        assert np.mean((radii / 0.2) ** 32) == pytest.approx(0.5, abs=0.15)
    if norm == "linf":
        assert np.std(at["uniform"]) == pytest.approx(0.2 / 3**0.5, rel=0.1)
        assert at["one_sided"].min() >= 0 and np.mean(at["one_sided"]) == pytest.approx(0.1, rel=0.1)
    assert np.std(at["gaussian"]) == pytest.approx(0.001, rel=0.1)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_radius_and_step_of_each_example(norm):
    x, y, eps = images(4), labels(4), np.array([0.0, 0.05, 0.1, 0.3], np.float32)
    together = run(KEY, x, y, eps, eps / 4, norm=norm, num_steps=5)
    keys = example_keys(KEY, 4)
    for i in range(4):
        alone = run(keys[i : i + 1], x[i : i + 1], y[i : i + 1], eps[i], eps[i] / 4, norm=norm, num_steps=5)
        np.testing.assert_allclose(together[i], alone[0], atol=1e-6)
    np.testing.assert_array_equal(together[0], x[0])


def test_single_key_is_folded_with_the_index():
    x, y = images(5), labels(5)
    keys = jax.vmap(partial(jax.random.fold_in, KEY))(np.arange(5))
    np.testing.assert_array_equal(run(KEY, x, y, 0.1, 0.03), run(keys, x, y, 0.1, 0.03))
    assert not np.array_equal(run(KEY, x, y, 0.1, 0.03), run(jax.random.key(8), x, y, 0.1, 0.03))
    assert not np.array_equal(run(KEY, x, y, 0.1, 0.0)[0] - x[0], run(KEY, x, y, 0.1, 0.0)[1] - x[1])


def test_eager_and_sharded_calls():
    x, y, keys = images(16), labels(16), example_keys(KEY, 16)
    eps = np.linspace(0.05, 0.2, 16, dtype=np.float32)

    def attack(weights, keys, x, y, eps):
        return attacks.pgd(keys, partial(apply, weights), x, y, eps=eps, step_size=eps / 2, num_steps=2)

    expected = jax.jit(attack)(WEIGHTS, keys, x, y, eps)
    compare = partial(np.testing.assert_allclose, desired=np.asarray(expected), atol=1e-6)
    compare(attack(WEIGHTS, keys, x, y, eps))  # no jit at all
    mesh = Mesh(np.array(jax.devices()), ("data",))
    inputs = zip((WEIGHTS, keys, x, y, eps), (P(), *[P("data")] * 4), strict=True)
    compare(jax.jit(attack)(*(jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in inputs)))


def test_x_init_may_be_replicated_where_x_is_sharded():
    mesh = Mesh(np.array(jax.devices()), ("data",))

    def attack(x, y):
        x_init = np.full(x.shape, 0.5, np.float32)
        return attacks.pgd(KEY, network, x, y, eps=0.2, step_size=0.05, num_steps=3, x_init=x_init)

    sharded = jax.shard_map(attack, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    np.testing.assert_allclose(jax.jit(sharded)(images(8), labels(8)), attack(images(8), labels(8)), atol=1e-6)


@pytest.mark.parametrize("name", ["mim", "pgd"])
def test_no_gradient_flows_through(name):
    """An outer loss may contain an attack on its own parameters: x_adv counts as data (in L2 its steps have slopes)."""
    x, y = images(4), labels(4)

    def attack(weights):
        options = {"eps": 0.2, "step_size": 0.05, "num_steps": 3, "norm": "l2"}
        return ITERATIVE[name](KEY, partial(apply, weights), x, y, **options)

    def loss(weights, x_adv):
        return attacks.cross_entropy(apply(weights, x_adv), y).mean()

    inside = jax.jit(jax.grad(lambda weights: loss(weights, attack(weights))))(WEIGHTS)
    outside = jax.jit(jax.grad(loss))(WEIGHTS, jax.jit(attack)(WEIGHTS))
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), inside, outside)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", ITERATIVE)
def test_zero_gradient_leaves_x_unchanged(name, norm):
    x = images(2)
    options = {"eps": 0.1, "step_size": 0.1, "num_steps": 2, "norm": norm, "start": "zero"}
    x_adv = ITERATIVE[name](KEY, lambda x: jnp.zeros((2, CLASSES)), x, labels(2), **options)
    np.testing.assert_array_equal(x_adv, x)


def test_tiny_gradient_has_a_direction():
    """1e-25 survives the square root of its square in L2, where float32 squares would be zero."""
    x = np.full((2, 4), 0.5, np.float32)
    x_adv = attacks.fgsm(KEY, lambda x: 1e-25 * x, x, np.array([0, 3]), eps=0.1, norm="l2")
    np.testing.assert_allclose(distance(x_adv, x, "l2"), 0.1, rtol=1e-5)


GOOD = {"eps": 0.1, "step_size": 0.03, "num_steps": 2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"start": "unform"}, "Unknown start 'unform'.*uniform"),
        ({"norm": "l3"}, "Unknown norm 'l3'.*linf, l2, l1"),
        ({"eps": -0.1}, "eps must not be negative"),
        ({"eps": float("nan")}, "eps must not be negative or NaN"),
        ({"step_size": np.array([0.1, -0.1])}, "step_size must not be negative"),
        ({"eps": np.ones(3)}, r"eps must be a scalar or \[batch\]"),
        ({"num_steps": -1}, "num_steps must be"),
        ({"num_steps": 2.5}, "num_steps must be"),
        ({"bounds": (1.0, 0.0)}, "bounds must be"),
        ({"x_init": np.zeros((2, 3))}, "x_init must have the shape"),
        ({"x": np.zeros((2, *SHAPE), np.uint8)}, "divide uint8 images by 255"),
        ({"y": np.zeros(3, int)}, "same batch size"),
        ({"key": jax.random.PRNGKey(0)}, r"key must be typed.*jax.random.key"),
        ({"key": 0}, "key must be typed"),
        ({"key": jax.random.split(KEY, 3)}, "one key or one per example"),
        ({"logits_fn": lambda x: (network(x), {})}, "logits_fn must return one array"),
        ({"objective": lambda logits, y: attacks.cross_entropy(logits, y).mean()}, r"objective must return \[batch\]"),
    ],
)
def test_invalid_options_give_one_line(change, message):
    options = {"key": KEY, "logits_fn": network, "x": images(2), "y": labels(2)} | GOOD | change
    with pytest.raises(ValueError, match=message) as caught:
        attacks.pgd(**options)
    assert "\n" not in str(caught.value)

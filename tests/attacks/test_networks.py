"""Wrappers of networks, and the networks of every library in the table of docs/attacks.md."""

import re
from collections import namedtuple
from functools import partial
from pathlib import Path

import equinox as eqx
import flax.linen as nn
import haiku as hk
import hypothesis.strategies as st
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from jax.sharding import Mesh, PartitionSpec
from jax.tree_util import Partial

from lt_adv import attacks
from lt_adv.cli import export

KEY = jax.random.key(0)
X = jax.random.uniform(jax.random.key(1), (4, 6, 6, 3))
Y = jnp.array([0, 1, 2, 0])
MEAN, STD = jnp.array([0.49, 0.48, 0.45]), jnp.array([0.2, 0.19, 0.26])
EPS = 0.03
PGD = partial(attacks.pgd, KEY, eps=EPS, step_size=0.01, num_steps=3)


def apply(variables, x):
    """A convolution and a linear layer, channels last; it computes in the type of its variables."""
    x = x.astype(variables["conv"].dtype)
    x = jax.lax.conv_general_dilated(x, variables["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return jnp.tanh(x).reshape(x.shape[0], -1) @ variables["dense"]


def draw(seed, dtype=jnp.float32, channels=3):
    key, other = jax.random.split(jax.random.key(seed))
    conv = jax.random.normal(key, (3, 3, channels, 4), dtype)
    return {"conv": conv, "dense": jax.random.normal(other, (144, 3), dtype)}


VARIABLES, OTHER = draw(2), draw(3)


def network(x):
    return apply(VARIABLES, x)


def gradient(logits_fn, x=X):
    return jax.grad(lambda x: attacks.cross_entropy(logits_fn(x), Y).sum())(x)


def assert_same_network(actual, expected, **tolerance):
    """The same logits, gradients and points of PGD; bit-identical without a tolerance."""

    def results(logits_fn):
        return jax.jit(lambda x: (logits_fn(x), gradient(logits_fn, x), PGD(logits_fn, x, Y)))(X)

    for result, reference in zip(results(actual), results(expected), strict=True):
        np.testing.assert_allclose(result, reference, **{"rtol": 0, "atol": 0, **tolerance})


@pytest.mark.parametrize("mean, std", [(0, 1), ([0, 0, 0], jnp.ones(3))])
def test_mean_zero_and_std_one_change_no_bit(mean, std):
    assert_same_network(attacks.normalized(network, mean, std), network)


@pytest.mark.parametrize("mean, std", [(MEAN, STD), (0.5, STD), ([0.5], 0.25)])
def test_normalized_network_is_the_composition(mean, std):
    def composition(x):
        return network((x - jnp.asarray(mean)) / jnp.asarray(std))

    assert_same_network(attacks.normalized(network, mean, std), composition)


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.floats(0, 1), min_size=3, max_size=3),
    st.lists(st.floats(0.01, 1), min_size=3, max_size=3),
    st.booleans(),
)
def test_gradient_of_a_normalized_linear_network(mean, std, double):
    """f(x) = ((x - mean) / std) W: its gradient is W / std."""
    with jax.enable_x64(double):
        dtype = jnp.float64 if double else jnp.float32
        w = np.random.default_rng(0).normal(size=(3, 2)).astype(dtype)
        x = jnp.asarray(np.random.default_rng(1).uniform(size=(5, 3)), dtype)
        logits_fn = attacks.normalized(lambda x: x @ jnp.asarray(w), mean, std)
        value, grad = logits_fn(x), jax.grad(lambda x: logits_fn(x)[:, 0].sum())(x)
    assert value.dtype == grad.dtype == dtype
    mean, std = np.asarray(mean), np.asarray(std)
    tolerance = {"rtol": 1e-12 if double else 1e-5, "atol": 1e-10 if double else 1e-3}
    np.testing.assert_allclose(value, (np.asarray(x, np.float64) - mean) / std @ w.astype(np.float64), **tolerance)
    np.testing.assert_allclose(grad, np.broadcast_to(w[:, 0] / std, x.shape), rtol=tolerance["rtol"])


@pytest.mark.parametrize("norm, radius", [("linf", EPS), ("l2", 0.5)])
def test_the_radius_is_in_pixels(norm, radius):
    logits_fn = attacks.normalized(network, MEAN, STD)
    x_adv = attacks.pgd(KEY, logits_fn, X, Y, eps=radius, step_size=radius, num_steps=5, norm=norm)
    length = np.linalg.norm(np.asarray(x_adv - X).reshape(4, -1), np.inf if norm == "linf" else 2, axis=1)
    np.testing.assert_allclose(length, radius, rtol=0.05 if norm == "l2" else 1e-5)  # L2 loses what the box cuts off
    assert (length <= radius * (1 + 1e-5)).all() and (x_adv >= 0).all() and (x_adv <= 1).all()
    loss = jax.jit(lambda x: attacks.cross_entropy(logits_fn(x), Y))
    assert (loss(x_adv) > loss(X)).all()


def nchw(x):
    """`network` for channels-first images."""
    kernel = VARIABLES["conv"].transpose(3, 2, 0, 1)
    x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NCHW", "OIHW", "NCHW"))
    return jnp.tanh(x).transpose(0, 2, 3, 1).reshape(len(x), -1) @ VARIABLES["dense"]


def test_channels_first_network_is_attacked_on_channels_last_images():
    wrapped = attacks.channels_first(nchw)
    assert_same_network(wrapped, network, rtol=1e-4, atol=1e-5)
    square = partial(attacks.square, KEY, x=X, y=Y, eps=EPS, num_queries=20)
    moved = square(wrapped)
    np.testing.assert_allclose(moved, square(network), atol=1e-6)
    assert (np.asarray(moved) != X).any()
    # Gradient attacks take channels-first images as they are.
    start = {"start": "zero"}  # random numbers are drawn in the layout of the image
    x_adv = PGD(nchw, X.transpose(0, 3, 1, 2), Y, **start)
    np.testing.assert_allclose(x_adv.transpose(0, 2, 3, 1), PGD(network, X, Y, **start), atol=1e-6)


def test_wrappers_nest():
    wrapped = attacks.normalized(attacks.channels_first(lambda x: {"z": nchw(x)}), MEAN, STD)
    composition = attacks.normalized(network, MEAN, STD)
    assert_same_network(attacks.select_output(wrapped, "z"), composition, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "outputs, index",
    [
        (lambda x: (x, network(x)), 1),
        (lambda x: [network(x), x], 0),
        (lambda x: (x, network(x)), -1),
        (lambda x: {"features": x, "logits": network(x)}, "logits"),
        (lambda x: namedtuple("Output", "features logits")(x, network(x)), 1),
    ],
)
def test_selected_output(outputs, index):
    assert_same_network(attacks.select_output(outputs, index), network)


def networks(scales=(1.0, 3.0, 0.5)):
    return [lambda x, s=s, i=i: s * apply(draw(i), x) for i, s in enumerate(scales)]


@pytest.mark.parametrize("average", ["logits", "probabilities"])
def test_ensemble_of_one_network_has_its_decisions(average):
    single = attacks.ensemble([network], average)
    expected = network if average == "logits" else lambda x: jax.nn.log_softmax(network(x))
    assert_same_network(single, expected)


def test_ensembles_are_the_averages_that_they_are_called():
    every = jnp.stack([f(X) for f in networks()])
    np.testing.assert_allclose(attacks.ensemble(networks())(X), every.mean(0), rtol=1e-6, atol=1e-6)
    probabilities = jax.nn.softmax(attacks.ensemble(networks(), "probabilities")(X))
    np.testing.assert_allclose(probabilities, jax.nn.softmax(every).mean(0), atol=1e-6)


def test_mean_of_logits_and_of_log_probabilities_are_attacked_alike():
    """In float64: the sign of a gradient that vanishes depends on rounding."""
    with jax.enable_x64(True):
        every = [partial(apply, draw(i, jnp.float64)) for i in range(2)]

        def mean_log_probability(x):
            return jnp.stack([jax.nn.log_softmax(f(x)) for f in every]).mean(0)

        x = X.astype(jnp.float64)
        gradients = [jax.jit(partial(gradient, f))(x) for f in (attacks.ensemble(every), mean_log_probability)]
    np.testing.assert_allclose(*gradients, rtol=1e-9, atol=1e-12)
    assert np.abs(gradients[0]).max() > 1e-3


def test_gradient_of_mean_probabilities_does_not_underflow():
    """Both networks are certain; the probability of the other classes is zero in float32."""
    certain = [lambda x, s=s: x.sum((1, 2, 3))[:, None] * s * jnp.array([1.0, -1.0, -1.0]) for s in (50.0, 100.0)]
    grads = jax.jit(lambda x: gradient(attacks.ensemble(certain, "probabilities"), x))(X)
    assert np.isfinite(grads).all() and (np.abs(grads[1:3]).max((1, 2, 3)) > 1).all()


WRAPPERS = {
    "normalized": lambda f: attacks.normalized(f, MEAN, STD),
    "channels_first": lambda f: attacks.channels_first(f),
    "select_output": lambda f: attacks.select_output(f, "logits"),
    "ensemble": lambda f: attacks.ensemble([f, f]),
    "ensemble of probabilities": lambda f: attacks.ensemble([f, f], "probabilities"),
    "two": lambda f: attacks.normalized(attacks.channels_first(f), MEAN, STD),
}


def for_wrapper(name, apply=apply):
    """`apply` as the network that a wrapper takes."""
    if name in ("channels_first", "two"):
        return lambda variables, x, *keys: apply(variables, jnp.moveaxis(x, 1, -1), *keys)
    if name == "select_output":
        return lambda *args: {"logits": apply(*args)}
    return apply


@pytest.mark.parametrize("name", WRAPPERS)
def test_partial_remains_a_partial_of_arrays(name):
    wrap, function = WRAPPERS[name], for_wrapper(name)
    wrapped = wrap(Partial(function, VARIABLES))
    assert isinstance(wrapped, Partial) and not isinstance(wrap(partial(function, VARIABLES)), Partial)
    leaves = jax.tree.leaves(wrapped)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    assert any(leaf is VARIABLES["dense"] for leaf in leaves)
    assert jax.tree.structure(wrapped) == jax.tree.structure(wrap(Partial(function, OTHER)))
    assert jax.tree.structure(wrapped) != jax.tree.structure(wrap(Partial(lambda *args: function(*args), OTHER)))
    assert_same_network(wrapped, wrap(partial(function, VARIABLES)))
    np.testing.assert_array_equal(jax.jit(lambda f, x: f(x))(wrapped, X), jax.jit(wrapped)(X))


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("name", ["normalized", "ensemble"])
def test_autoattack_does_not_compile_again_for_other_arrays(name):
    traces, function = [], for_wrapper(name)

    def counted(variables, x):
        traces.append(x.shape)
        return function(variables, x)

    options = {"eps": EPS, "version": ["apgd-ce"], "batch_size": 4, "devices": jax.devices()[:1]}

    def run(function, variables, bind=Partial, wrap=WRAPPERS[name]):
        logits_fn = wrap(bind(function, variables))
        y = logits_fn(X).argmax(-1)  # all are right, so that as many are attacked for all variables
        traces.clear()
        return attacks.autoattack(KEY, logits_fn, X, y, **options)

    first = run(counted, VARIABLES)
    assert traces
    second = run(counted, OTHER)
    assert not traces
    if name == "normalized":
        run(counted, VARIABLES, wrap=lambda f: attacks.normalized(f, MEAN / 2, 2 * STD))
        assert not traces
    for result, variables in ((first, VARIABLES), (second, OTHER)):
        expected = run(function, variables, bind=partial)
        np.testing.assert_array_equal(result.prediction, expected.prediction)
        np.testing.assert_allclose(result.x_adv, expected.x_adv, atol=1e-6)
    assert (first.x_adv != second.x_adv).any()


def keyed(variables, x, keys):
    noise = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:], x.dtype))(keys)
    return apply(variables, x + 0.1 * noise)


KEYS = jax.random.split(jax.random.key(5), len(X))


@pytest.mark.parametrize("name", WRAPPERS)
def test_network_with_keys(name):
    wrap, function = WRAPPERS[name], for_wrapper(name, keyed)
    bound = lambda keys: wrap(lambda x: function(VARIABLES, x, keys))  # noqa: E731
    logits_fn = wrap(Partial(function, VARIABLES))
    if name.startswith("ensemble"):
        folded = [jax.vmap(jax.random.fold_in, (0, None))(KEYS, k) for k in (0, 1)]
        members = [partial(lambda keys, x: keyed(VARIABLES, x, keys), keys) for keys in folded]
        expected = attacks.ensemble(members, "probabilities" if "prob" in name else "logits")
        draws = [member(X) for member in members]
        assert np.abs(draws[0] - draws[1]).min() > 0, "the networks of an ensemble draw independently"
    else:
        expected = bound(KEYS)
    np.testing.assert_array_equal(logits_fn(X, KEYS), expected(X))
    alone = logits_fn(X[1:2], KEYS[1:2])
    np.testing.assert_allclose(alone, logits_fn(X, KEYS)[1:2], rtol=1e-4, atol=1e-4)
    assert (logits_fn(X, KEYS) != logits_fn(X, KEYS[::-1])).any()


@pytest.mark.usefixtures("short")
def test_autoattack_rand_of_a_wrapped_network_with_keys():
    options = {"eps": EPS, "version": "rand", "batch_size": 4, "devices": jax.devices()[:1]}
    wrapped = attacks.normalized(Partial(keyed, VARIABLES), MEAN, STD)
    composition = Partial(lambda variables, x, keys: keyed(variables, (x - MEAN) / STD, keys), VARIABLES)
    result, expected = (attacks.autoattack(KEY, f, X, Y, **options) for f in (wrapped, composition))
    np.testing.assert_array_equal(result.prediction, expected.prediction)
    np.testing.assert_allclose(result.x_adv, expected.x_adv, atol=1e-6)


@pytest.mark.parametrize("name", ["two", "select_output", "ensemble of probabilities"])
def test_network_in_bfloat16(name):
    """The wrapper computes in float32; the network casts."""
    variables, function, seen = draw(2, jnp.bfloat16), for_wrapper(name), []

    def low_precision(variables, x, *keys):
        seen.append(x.dtype)
        return function(variables, x, *keys)

    logits_fn = WRAPPERS[name](Partial(low_precision, variables))
    x_adv = PGD(logits_fn, X, Y)
    assert x_adv.dtype == X.dtype and set(seen) == {X.dtype}
    np.testing.assert_allclose(x_adv, np.clip(x_adv, X - EPS - 1e-6, X + EPS + 1e-6))
    loss = jax.jit(lambda x: attacks.cross_entropy(logits_fn(x).astype(jnp.float32), Y))
    assert (loss(x_adv) > loss(X)).all()


@pytest.mark.parametrize("name", ["two", "ensemble of probabilities"])
def test_under_shard_map_and_vmap(name):
    logits_fn = WRAPPERS[name](Partial(for_wrapper(name), VARIABLES))
    x, y = jnp.tile(X, (2, 1, 1, 1)), jnp.tile(Y, 2)
    keys = jax.random.split(KEY, 8)
    attack = partial(attacks.pgd, eps=EPS, step_size=0.01, num_steps=2)
    rows = PartitionSpec("data")
    mapped = jax.shard_map(
        lambda f, key, x, y: attack(key, f, x, y),
        mesh=Mesh(np.array(jax.devices()), "data"),
        in_specs=(PartitionSpec(), rows, rows, rows),
        out_specs=rows,
    )
    expected = attack(keys, logits_fn, x, y)
    np.testing.assert_allclose(jax.jit(mapped)(logits_fn, keys, x, y), expected, atol=1e-6)
    one = jax.vmap(lambda key, x, y: attack(key[None], logits_fn, x[None], y[None])[0])
    np.testing.assert_allclose(jax.jit(one)(keys, x, y), expected, atol=1e-6)


BAD = {
    "normalized is not a function": (lambda: attacks.normalized(VARIABLES, 0, 1), "logits_fn must be a function"),
    "channels_first is not a function": (lambda: attacks.channels_first(3), "logits_fn must be a function"),
    "std zero": (lambda: attacks.normalized(network, 0, [1, 0, 1]), "std must be positive, got [1 0 1]"),
    "std negative": (lambda: attacks.normalized(network, 0, -1.0), "std must be positive, got -1.0"),
    "std NaN": (lambda: attacks.normalized(network, 0, np.nan), "std must be finite, got nan"),
    "mean infinite": (lambda: attacks.normalized(network, [0, np.inf, 0], 1), "mean must be finite, got ["),
    "mean is text": (lambda: attacks.normalized(network, "0.5", 1), "mean must be an array of numbers, got str"),
    "std is missing": (lambda: attacks.normalized(network, 0.5, None), "std must be an array of numbers, got NoneType"),
    "mean of an image": (
        lambda: attacks.normalized(network, MEAN[:, None, None], 1),
        "mean must be a scalar or one value per channel, got shape (3, 1, 1)",
    ),
    "mean of other channels": (
        lambda: attacks.normalized(network, MEAN[:2], 1)(X),
        "mean has 2 values, but the last axis of x (4, 6, 6, 3) has 3: give a scalar or one value per channel",
    ),
    "std of channels first": (
        lambda: PGD(attacks.normalized(nchw, 0.5, STD), X.transpose(0, 3, 1, 2), Y),
        "std has 3 values, but the last axis of x (4, 3, 6, 6) has 6",
    ),
    "integer images": (
        lambda: attacks.normalized(network, MEAN, STD)((255 * X).astype(jnp.uint8)),
        "x must be floating, got uint8: divide uint8 images by 255",
    ),
    "vectors": (lambda: attacks.channels_first(network)(X[:, 0, 0]), "x must be images [batch, height, width, chan"),
    "one output": (
        lambda: attacks.select_output(network, 0)(X),
        "logits_fn returns one array (4, 3), not several outputs: leave select_output out",
    ),
    "absent key": (
        lambda: attacks.select_output(lambda x: {"z": x}, "logits")(X),
        "logits_fn has no output 'logits': it returns the keys ['z']",
    ),
    "absent position": (
        lambda: attacks.select_output(lambda x: (x, x), 2)(X),
        "logits_fn has no output 2: it returns a tuple of 2",
    ),
    "key of a tuple": (
        lambda: attacks.select_output(lambda x: [x, x], "logits")(X),
        "logits_fn has no output 'logits': it returns a list of 2",
    ),
    "no output": (lambda: attacks.select_output(lambda x: None, 0)(X), "no output 0: it returns a NoneType"),
    "no networks": (lambda: attacks.ensemble([]), "logits_fns must be a sequence of at least one network, got none"),
    "not a sequence": (lambda: attacks.ensemble(network), "logits_fns must be a sequence of at least one network, got"),
    "not functions": (lambda: attacks.ensemble([network, 3]), "logits_fns[1] must be a function x [batch, ...] ->"),
    "unknown average": (
        lambda: attacks.ensemble([network], "votes"),
        "Unknown average 'votes'. There are: logits, probabilities.",
    ),
    "other classes": (
        lambda: attacks.ensemble([network, lambda x: network(x)[:, :2]])(X),
        "logits_fns must have the same classes, got [3, 2]",
    ),
    "networks of tuples": (
        lambda: attacks.ensemble([lambda x: (network(x), x)])(X),
        "logits_fn must return one array [batch, classes], got tuple",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, line = BAD[name]
    with pytest.raises(ValueError) as error:
        call()
    assert line in str(error.value) and "\n" not in str(error.value)


# The table of docs/attacks.md.


class Convolution(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train)(nn.Conv(4, (3, 3))(x))
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=not train)(nn.relu(x)).mean((1, 2)))


def linen():
    model = Convolution()
    return {"model": model, "variables": model.init(KEY, X, train=False)}


class Block(nnx.Module):
    def __init__(self, width, rngs):
        self.norm1, self.norm2 = nnx.LayerNorm(width, rngs=rngs), nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, width, decode=False, rngs=rngs)
        self.hidden, self.out = nnx.Linear(width, 2 * width, rngs=rngs), nnx.Linear(2 * width, width, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.dropout(self.out(nnx.gelu(self.hidden(self.norm2(x)))))


class VisionTransformer(nnx.Module):
    """ViT (Dosovitskiy et al. 2021) for 224 x 224 images, in patches of 16."""

    def __init__(self, width, layers, classes, rngs):
        self.embedding = nnx.Linear(16 * 16 * 3, width, rngs=rngs)
        self.token = nnx.Param(jax.random.normal(rngs.params(), (1, 1, width)))
        self.position = nnx.Param(jax.random.normal(rngs.params(), (1, 14 * 14 + 1, width)))
        self.blocks = nnx.List([Block(width, rngs) for _ in range(layers)])
        self.norm, self.head = nnx.LayerNorm(width, rngs=rngs), nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, x):
        x = x.reshape(-1, 14, 16, 14, 16, 3).transpose(0, 1, 3, 2, 4, 5)
        x = self.embedding(x.reshape(-1, 14 * 14, 16 * 16 * 3))
        token = jnp.broadcast_to(self.token[...], (len(x), 1, x.shape[-1]))
        x = jnp.concatenate([token, x], axis=1) + self.position[...]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0]))


def vision_transformer():
    model = VisionTransformer(8, 2, 3, nnx.Rngs(0))
    model.eval()
    return {"model": model, "x": jax.random.uniform(KEY, (2, 224, 224, 3)), "y": Y[:2]}


class Equinox(eqx.Module):
    conv: eqx.nn.Conv2d
    dropout: eqx.nn.Dropout
    head: eqx.nn.Linear

    def __init__(self, key):
        self.conv = eqx.nn.Conv2d(3, 4, 3, key=key)
        self.dropout = eqx.nn.Dropout(0.5)
        self.head = eqx.nn.Linear(4, 3, key=key)

    def __call__(self, x):
        return self.head(self.dropout(jax.nn.relu(self.conv(x)).mean((1, 2))))


class EquinoxWithState(Equinox):
    norm: eqx.nn.BatchNorm

    def __init__(self, key):
        super().__init__(key)
        self.norm = eqx.nn.BatchNorm(4, axis_name="batch", mode="batch")

    def __call__(self, x, state):
        x, state = self.norm(self.conv(x), state)
        return self.head(self.dropout(jax.nn.relu(x).mean((1, 2)))), state


def equinox_with_state():
    model, state = eqx.nn.make_with_state(EquinoxWithState)(KEY)
    x = jnp.moveaxis(X, -1, 1)
    model_in_training = jax.vmap(eqx.nn.inference_mode(model, False).norm, (0, None), (0, None), axis_name="batch")
    _, state = model_in_training(jax.vmap(model.conv)(x), state)
    return {"model": eqx.nn.inference_mode(model), "state": state}


def haiku():
    def forward(x, is_training):
        x = hk.BatchNorm(True, True, 0.9)(hk.Conv2D(4, 3)(x), is_training)
        return hk.Linear(3)(jax.nn.relu(x).mean((1, 2)))

    model = hk.transform_with_state(forward)
    params, state = jax.jit(model.init, static_argnames="is_training")(KEY, X, is_training=True)
    return {"model": model, "params": params, "state": state}


def exported():
    weights = {name: np.asarray(array) for name, array in VARIABLES.items()}
    return {"network": jax.export.deserialize(export.serialise(apply, weights, X.shape[1:])), "weights": weights}


# Row -> what its code refers to; `x` and `y` in place of X and Y; `same` is a network with the same logits.
ROWS = {
    "plain function": lambda: {"apply": apply, "variables": VARIABLES, "same": network},
    "flax.linen": linen,
    "flax.nnx": vision_transformer,
    "equinox": lambda: {"model": Equinox(KEY)},
    "equinox with state": equinox_with_state,
    "haiku": haiku,
    "exported": lambda: {**exported(), "same": network},
    "normalised images": lambda: {
        "logits_fn": network, "mean": MEAN, "std": STD, "same": lambda x: network((x - MEAN) / STD),
    },
    "channels first": lambda: {"logits_fn": nchw, "same": network},
    "several outputs": lambda: {"logits_fn": lambda x: {"logits": network(x), "features": x}, "same": network},
    "ensemble": lambda: {
        "first": network, "second": partial(apply, OTHER), "same": lambda x: (network(x) + apply(OTHER, x)) / 2,
    },
}  # fmt: skip


def table():
    text = (Path(__file__).parents[2] / "docs" / "attacks.md").read_text()
    (rows,) = re.findall(r"^\| Network \| `logits_fn` \| Notes \|\n.*?\n((?:\|.*\n)+)", text, re.MULTILINE)
    cells = [[cell.strip() for cell in row.strip("| ").split(" | ")] for row in rows.splitlines()]
    return {name: code.strip("`") for name, code, _ in cells}


def test_table_lists_these_networks():
    assert list(table()) == list(ROWS)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("row", ROWS)
def test_network_of_the_table(row):
    scope = {"attacks": attacks, "eqx": eqx, "jax": jax, **ROWS[row]()}
    x, y = scope.get("x", X), scope.get("y", Y)
    logits_fn = eval(table()[row], scope)
    predict, loss = jax.jit(logits_fn), jax.jit(lambda x: attacks.cross_entropy(logits_fn(x), y))
    logits = predict(x)
    if "same" in scope:
        np.testing.assert_allclose(logits, scope["same"](x), rtol=1e-4, atol=1e-4)
    in_another_batch = predict(x.at[1:].set(x[:1]))
    np.testing.assert_allclose(in_another_batch[0], logits[0], rtol=1e-5, atol=1e-5)  # in evaluation mode
    x_adv = attacks.fgsm(KEY, logits_fn, x, y, eps=EPS)
    assert (loss(x_adv) > loss(x)).all() and np.abs(x_adv - x).max() == pytest.approx(EPS, abs=1e-6)
    if row in ("equinox with state", "exported"):
        options = {"eps": 0.1, "version": ["apgd-ce"], "batch_size": 4, "devices": jax.devices()[:1]}
        result = attacks.autoattack(KEY, logits_fn, X, Y, **options)
        assert not result.notes
        np.testing.assert_array_equal(predict(result.x_adv).argmax(-1) == Y, result.robust)

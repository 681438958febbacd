"""`attacks.jit`: how often it compiles, counted by XLA itself, and what it makes of a loop."""

from functools import partial

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lt_adv import attacks

KEY = jax.random.key(3)
OPTIONS = {"eps": 0.1, "step_size": 0.02}


def apply(weights, x):
    layout = ("NHWC", "HWIO", "NHWC")
    hidden = jax.lax.conv_general_dilated(x, weights["conv"], (1, 1), "SAME", dimension_numbers=layout)
    return jax.nn.relu(hidden).mean(axis=(1, 2)) @ weights["dense"]


def weights(seed):
    rng = np.random.default_rng(seed)
    shapes = {"conv": (3, 3, 2, 8), "dense": (8, 5)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


X = np.random.default_rng(0).uniform(size=(8, 6, 6, 2)).astype(np.float32)
Y = np.random.default_rng(0).integers(0, 5, size=8)


@pytest.fixture
def compilations():
    """The programs XLA compiles while the test runs, one entry each."""
    events = []

    def listen(name, *_, **__):
        if name == "/jax/core/compile/backend_compile_duration":
            events.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    jax.monitoring.unregister_event_duration_listener(listen)


def mesh():
    return Mesh(np.array(jax.devices()), ("data",))


def put(tree, *spec):
    return jax.device_put(tree, NamedSharding(mesh(), P(*spec)))


PLACES = {
    "numpy": lambda w: (KEY, w, X, Y),
    "x committed": lambda w: (KEY, w, jax.device_put(X, jax.devices()[0]), Y),
    "weights on another device": lambda w: (KEY, jax.device_put(w, jax.devices()[3]), X, Y),
    "weights replicated": lambda w: (KEY, put(w), X, Y),
    "x sharded": lambda w: (KEY, put(w), put(X, "data"), put(Y, "data")),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("num_steps", [3, 25])
def test_one_compilation_for_all_weights(compilations, num_steps, place):
    inputs = [PLACES[place](weights(seed)) for seed in (1, 2)]
    attack = attacks.jit(attacks.mim, apply, num_steps=num_steps, **OPTIONS)
    compilations.clear()
    first, second = (np.asarray(attack(*args)) for args in inputs)
    assert len(compilations) == 1
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("num_steps", [3, 20])
def test_sharded_over_devices(num_steps):
    attack = attacks.jit(attacks.mim, apply, num_steps=num_steps, **OPTIONS)
    sharded = attack(*PLACES["x sharded"](weights(1)))
    assert sharded.sharding.is_equivalent_to(NamedSharding(mesh(), P("data")), sharded.ndim)
    np.testing.assert_allclose(sharded, attack(KEY, weights(1), X, Y), atol=1e-6)


def whiles(compiled):
    """Counts the loops of the program for one key per example, which needs no loop to derive keys."""
    return compiled.lower(jax.random.split(KEY, 8), weights(1), X, Y).as_text().count("stablehlo.while")


@pytest.mark.parametrize("num_steps", [2, 100])
def test_a_loop_is_one_loop(num_steps):
    assert whiles(attacks.jit(attacks.pgd, apply, num_steps=num_steps, start="zero", **OPTIONS)) == 1


def test_inside_another_jit():
    attack = attacks.jit(attacks.pgd, apply, num_steps=20, **OPTIONS)
    np.testing.assert_allclose(jax.jit(attack)(KEY, weights(1), X, Y), attack(KEY, weights(1), X, Y), atol=1e-6)


def test_fgsm_and_custom_attacks():
    fgsm = attacks.jit(attacks.fgsm, apply, eps=0.1)(KEY, weights(1), X, Y)
    np.testing.assert_allclose(fgsm, attacks.fgsm(KEY, partial(apply, weights(1)), X, Y, eps=0.1), atol=1e-6)

    def brighten(key, logits_fn, x, y, *, eps, num_steps=50):
        return x + eps * np.sign(num_steps)

    np.testing.assert_allclose(attacks.jit(brighten, apply, eps=0.25)(KEY, weights(1), X, Y), X + 0.25)


ARRAYS = {"eps": 0.05, "step_size": np.full(8, 0.03, np.float32), "x_init": X[::-1].copy(), "targets": (Y + 1) % 5}


def test_arrays_of_a_call(compilations):
    attack = attacks.jit(attacks.pgd, apply, num_steps=3, **OPTIONS)
    for name, value in ARRAYS.items():
        expected = attacks.pgd(KEY, partial(apply, weights(0)), X, Y, **{**OPTIONS, "num_steps": 3, name: value})
        result = attack(KEY, weights(0), X, Y, **{name: value})
        np.testing.assert_allclose(result, expected, atol=1e-6)
        assert (result != attack(KEY, weights(0), X, Y)).any()
    before = len(compilations)
    attack(KEY, weights(0), X, Y, eps=0.08)
    attack(KEY, weights(0), X, Y, targets=(Y + 2) % 5)
    assert len(compilations) == before
    required = attacks.jit(attacks.pgd, apply, num_steps=3)
    np.testing.assert_array_equal(required(KEY, weights(0), X, Y, **OPTIONS), attack(KEY, weights(0), X, Y, **OPTIONS))


@pytest.mark.parametrize(
    "arrays, message",
    [
        (
            {"num_steps": 4},
            "num_steps cannot be given in a call; give it to attacks.jit. What can be is: eps, step_size",
        ),
        ({"eps": -0.1}, "eps must"),
        ({"eps": np.nan}, "eps must"),
        ({"step_size": np.ones(3)}, "step_size must"),
        ({"targets": Y + 9}, "targets must be labels of 5 classes"),
        ({"targets": Y[:3]}, "targets"),
        ({"x_init": X[:3]}, "x_init"),
        ({"x_init": X * np.nan}, "x_init"),
    ],
)
def test_bad_arrays_of_a_call(arrays, message):
    attack = attacks.jit(attacks.pgd, apply, num_steps=3, **OPTIONS)
    with pytest.raises(ValueError, match=message):
        attack(KEY, weights(0), X, Y, **arrays)


def test_unknown_option_is_refused_before_the_first_call():
    with pytest.raises(ValueError, match="pgd cannot take these options.*stepsize"):
        attacks.jit(attacks.pgd, apply, eps=0.1, stepsize=0.1, num_steps=2)
    with pytest.raises(ValueError, match="Unknown norm"):
        attacks.jit(attacks.pgd, apply, num_steps=20, norm="l3", **OPTIONS)(KEY, weights(1), X, Y)

"""Networks and keys for which an attack must not give a wrong result silently."""

import functools
import gc
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lt_adv import attacks, losses
from lt_adv.attacks import continuous_batching, norms
from lt_adv.attacks.initialization import example_keys, threefry
from tests.attacks.few_steps import ATTACKS, KEY, STEPS, WEIGHT, X, Y, network, wrong

# Gradients and logits that are not finite


def strength(name, norm):
    """The attack with a radius, and steps, that break most images."""
    eps = 0.1 if norm == "linf" else 1.0
    steps = {"step_size": eps / 2} if name in ("pgd", "mim", "cw") else {}
    return partial(ATTACKS[name], eps=eps, norm=norm, **steps)


@pytest.mark.parametrize("name", ["pgd", "apgd", "fab"])
def test_the_derivative_of_a_norm_at_zero(name):
    """NaN, at the black pixel of the clean images."""

    def norm_at_zero(x):
        return network(x) + jnp.linalg.norm(x[:, :1, :1], axis=(1, 2))

    x_adv = strength(name, "linf")(KEY, norm_at_zero, X, Y)
    assert np.isfinite(x_adv).all() and wrong(x_adv, norm_at_zero).sum() > 20


# Small ones not in APGD: as released, it adds 1e-12 to the length.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "norm", "scale"),
    [("mim", "l2", 1e36), ("mim", "linf", 1e36), ("apgd", "l2", 1e36), ("mim", "l2", 1e-20), ("pgd", "l2", 1e-20)],
)
def test_gradients_whose_squares_overflow_or_underflow(name, norm, scale):
    attack = partial(strength(name, norm), objective=attacks.logit_margin)  # a cross-entropy would be saturated
    x_adv = attack(KEY, lambda x: scale * network(x), X, Y)
    assert np.isfinite(x_adv).all() and wrong(x_adv).sum() > 20


def undefined_in_part(x):
    """No logit is a number where a pixel is bright: outside the clean images of the test below."""
    return undefined_above(0.9, x)


def undefined_above(limit, x):
    return jnp.where(x.max(axis=(1, 2)) > limit, jnp.nan, 0.0) + network(x)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ATTACKS if name not in ("fgsm", "pgd", "mim", "cw", "apgd_dlr")])
def test_non_finite_logits_count_as_wrong(name):
    x = 0.85 * X
    y = jnp.argmax(network(x), axis=-1)
    assert set(y.tolist()) == {0, 1, 2, 3}
    attack = jax.jit(lambda limit, eps: ATTACKS[name](KEY, partial(undefined_above, limit), x, y, eps=eps))
    x_adv = attack(0.9, 0.3)
    assert np.isfinite(x_adv).all() and (attacks.prediction(undefined_in_part(x_adv)) != y).all()
    np.testing.assert_array_equal(attack(-1.0, 0.1), x)  # at the clean point, too: nothing is attacked


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_objectives(value):
    """Nothing is lost: the search goes on by what is finite."""

    def objective(z, y):
        return jnp.where(attacks.logit_margin(z, y) > -0.5, value, attacks.logit_margin(z, y))

    for name in ("apgd", "square"):
        x_adv = ATTACKS[name](KEY, network, X, Y, eps=0.2, objective=objective)
        assert np.isfinite(x_adv).all() and wrong(x_adv).sum() > 10


def test_autoattack_notes_non_finite_logits(tmp_path):
    x = np.asarray(0.85 * X).copy()
    x[:3, 4, 4] = 0.95  # undefined from the start
    y = np.array(network(jnp.asarray(x)).argmax(-1))
    y[:3] = 0
    run = partial(attacks.autoattack, KEY, undefined_in_part, x, y, eps=0.1, version=("apgd-ce", "square"))
    result = run(num_queries=20, resume=tmp_path)
    assert not result.correct[:3].any() and result.correct[3:].all() and (result.prediction[:3] == -1).all()
    assert result.notes[0] == "The logits of 3 clean images are not finite: they count as wrong."
    adversarial = int((result.prediction[3:] == -1).sum())
    assert adversarial > 0 and np.isfinite(result.x_adv).all() and not result.robust[result.prediction == -1].any()
    assert result.notes[1] == f"The logits of {adversarial} adversarial images are not finite: they count as wrong."
    again = run(num_queries=20, resume=tmp_path)  # a journal of such logits is the same journal
    np.testing.assert_array_equal(again.x_adv, result.x_adv)
    none = attacks.autoattack(KEY, lambda x: network(x) / 0.0, x, 0 * y, eps=0.1, version=("apgd-ce",))
    assert not none.correct.any() and not none.robust.any() and "32 clean images" in none.notes[0]


def test_prediction():
    z = jnp.array([[0.0, 1.0], [jnp.nan, 1.0], [0.0, jnp.inf], [-jnp.inf, 0.0]])
    assert attacks.prediction(z).tolist() == [1, -1, -1, -1] and attacks.prediction(z).dtype == jnp.int32


# Precision


@pytest.mark.parametrize(
    ("name", "dtype"), [("pgd", "bfloat16"), ("cw", "bfloat16"), ("apgd_targeted", "bfloat16"), ("pgd", "float16")]
)
def test_objectives_of_low_precision_logits_are_computed_in_float32(name, dtype):
    """A saturated softmax, whose gradient bfloat16 rounds to zero."""
    seen = []

    def low(x):
        return (40 * network(x)).astype(dtype)

    def objective(z, *y):
        seen.append(z.dtype)
        return (attacks.targeted_logit_margin if len(y) > 1 else attacks.cross_entropy)(z, *y)

    attack = ATTACKS[name]
    if name != "cw":
        attack = partial(attack, objective=objective)
    x_adv = attack(KEY, low, X, Y, eps=0.1)
    assert all(seen_type == jnp.float32 for seen_type in seen)
    full = attack(KEY, lambda x: low(x).astype(jnp.float32), X, Y, eps=0.1)
    np.testing.assert_array_equal(x_adv, full)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_objectives_and_losses_of_low_precision_logits(dtype):
    z, other = network(X).astype(dtype), (network(X) + 1).astype(dtype)
    probs = jax.nn.softmax(z.astype(jnp.float32))
    counts = {"class_counts": [8, 4, 2, 1]}
    calls = [
        *(partial(getattr(attacks, name), y=Y) for name in ("cross_entropy", "cw_margin", "logit_margin", "dlr")),
        partial(attacks.kl_divergence, probs=probs),
        *(partial(getattr(losses, name), labels=Y, **counts) for name in ("cross_entropy", "ldam", "focal")),
        *(partial(getattr(losses, name), labels=Y, **counts) for name in ("robal_margin", "balanced_softmax")),
        partial(losses.distillation, teacher_logits=other),
        partial(losses.soft_cross_entropy, probs=probs),
        lambda z: losses.kl_divergence(z, other.astype(z.dtype)),
        lambda z: losses.mart(z, other.astype(z.dtype), Y),
        lambda z: losses.tail_alignment(z, Y, tail=np.arange(4) > 1, **counts),
    ]
    for call in calls:
        values = call(z)
        assert values.dtype == jnp.float32
        np.testing.assert_array_equal(values, call(z.astype(jnp.float32)))


# Keys


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_keys_of_other_implementations(impl):
    key = jax.random.key(3, impl=impl)
    attack = jax.jit(lambda keys, x, y: ATTACKS["pgd"](keys, network, x, y, eps=0.02))
    all_of_them, alone = attack(key, X, Y), attack(example_keys(key, 32)[5:6], X[5:6], Y[5:6])
    np.testing.assert_allclose(alone[0], all_of_them[5], atol=1e-6)  # the batch makes no difference
    keys = jax.random.split(key, 32)
    batch = attack(keys, X, Y)
    np.testing.assert_allclose(attack(keys[7:8], X[7:8], Y[7:8]), batch[7:8], atol=1e-6)
    start = attacks.pgd(keys, network, X * 0 + 0.5, Y, eps=0.1, step_size=0.0, num_steps=1)
    assert len(np.unique(start[:, 0, 0, 0])) == 32, "every example has a start of its own"


def test_threefry_keys_are_derived_one_from_each():
    for impl in ("rbg", "unsafe_rbg"):
        keys = jax.random.split(jax.random.key(0, impl=impl), 500).reshape(20, 25)
        derived = threefry(keys)
        assert derived.shape == keys.shape and jax.random.key_impl(derived) == "threefry2x32"
        assert len(np.unique(jax.random.key_data(derived).reshape(500, 2), axis=0)) == 500
        one = jax.random.key_data(threefry(keys[3, 4]))
        np.testing.assert_array_equal(jax.random.key_data(derived)[3, 4], one)
    assert threefry(KEY) is KEY
    with jax.default_prng_impl("rbg"):
        x_adv = attacks.pgd(jax.random.key(0), network, X, Y, eps=0.1, **STEPS)
        compiled = jax.jit(lambda k: attacks.pgd(k, network, X, Y, eps=0.1, **STEPS))(jax.random.key(0))
    np.testing.assert_allclose(x_adv, compiled, atol=1e-6)


# Images that see each other


def batch_norm(x):
    z = network(x)
    return (z - z.mean(axis=0)) / z.std(axis=0)


def by_position(x):
    return network(x) + 5.0 * jnp.arange(len(x))[:, None] * jnp.arange(4.0)


one_query = partial(attacks.autoattack, KEY, x=X, eps=0.01, version=("square",), num_queries=1)


@pytest.mark.slow
@pytest.mark.parametrize("coupled", [batch_norm, by_position])
def test_autoattack_notes_dependent_images(coupled):
    y = np.asarray(coupled(X).argmax(-1))
    result = one_query(logits_fn=coupled, y=y)
    (note,) = result.notes
    assert "change with the other images of its batch, by up to" in note and "training mode" in note


def test_autoattack_notes_nothing_for_independent_images():
    assert not one_query(logits_fn=lambda x: network(x).astype(jnp.bfloat16), y=Y).notes
    assert not one_query(logits_fn=jax.tree_util.Partial(lambda w, x: x.reshape(len(x), -1) @ w, WEIGHT), y=Y).notes


# Memory that remains after a call


def executables():
    gc.collect()
    return len(jax.devices()[0].client.live_executables())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pgd", "autoattack", "partial"])
def test_new_functions_do_not_leak_programs(kind, monkeypatch):
    few = functools.lru_cache(maxsize=2)(continuous_batching.programs.__wrapped__)
    monkeypatch.setattr(continuous_batching, "programs", few)

    def call(i):
        logits_fn = lambda x: network(x) + i  # noqa: E731
        if kind == "partial":
            logits_fn = jax.tree_util.Partial(lambda w, x: x.reshape(len(x), -1) @ w, WEIGHT)
        if kind in ("autoattack", "partial"):
            attacks.autoattack(KEY, logits_fn, X[:8], Y[:8], eps=0.01, version=("apgd-ce",), devices=jax.devices()[:1])
        else:
            ATTACKS[kind](KEY, logits_fn, X[:8], Y[:8], eps=0.01)

    for i in range(3 if kind == "partial" else 1):
        call(i)
    before = executables()
    for i in range(2):
        call(10 + i)
    assert executables() <= before


def test_partial_does_not_compile_again():
    apply, other = lambda w, x: x.reshape(len(x), -1) @ w, 2 * WEIGHT
    run = partial(attacks.autoattack, KEY, x=X[:8], y=Y[:8], eps=0.01, version=("apgd-ce",), devices=jax.devices()[:1])
    run(logits_fn=jax.tree_util.Partial(apply, WEIGHT))
    misses, compiled = continuous_batching.programs.cache_info().misses, executables()
    run(logits_fn=jax.tree_util.Partial(apply, other))
    assert (continuous_batching.programs.cache_info().misses, executables()) == (misses, compiled)


def test_network_may_close_over_traced_weights():
    """Outside a trace of the images, inside one of the weights."""

    def loss(w):
        logits_fn = lambda x: x.reshape(len(x), -1) @ w  # noqa: E731
        x_adv = attacks.pgd(KEY, logits_fn, X, Y, eps=0.1, **STEPS)
        return losses.cross_entropy(logits_fn(x_adv), Y).mean()

    eager, compiled = jax.grad(loss)(WEIGHT), jax.jit(jax.grad(loss))(WEIGHT)
    np.testing.assert_allclose(eager, compiled, atol=1e-6)
    assert (eager != 0).any()


def test_the_mean_of_magnitudes_does_not_overflow():
    array = jnp.full((2, 4, 4, 1), 3e38).at[1].set(0)
    np.testing.assert_allclose(norms.unit_mean(array)[0], 1, rtol=1e-6)
    np.testing.assert_array_equal(norms.unit_mean(array)[1], 0)

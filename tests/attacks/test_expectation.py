"""Randomised networks: means over draws of the objective, the gradient and the class probabilities."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from lt_adv import attacks
from lt_adv.attacks._expectation import FIRST_DRAW

KEY = jax.random.key(7)
KEYS = jax.vmap(jax.random.fold_in, (None, 0))(KEY, jnp.arange(16))
RANDOM = np.random.default_rng(0)
WEIGHTS = RANDOM.normal(size=(8, 4)).astype(np.float32)
X = RANDOM.uniform(0.2, 0.8, size=(16, 8)).astype(np.float32)
Y = (X @ WEIGHTS).argmax(-1).astype(np.int32)
EPS = 0.1
STEPS = {"eps": EPS, "step_size": EPS / 4, "num_steps": 5}
OPTIONS = {
    "fgsm": {"eps": EPS},
    "pgd": STEPS,
    "pgd restarts": {**STEPS, "num_restarts": 3},
    "mim": {**STEPS, "return_best": True},
    "cw": STEPS,
    "fgsm_rs": {"eps": EPS},
    "n_fgsm": {"eps": EPS},
    "apgd": {"eps": EPS, "num_steps": 5, "num_restarts": 2},
    "apgd l1": {"eps": EPS, "num_steps": 5, "norm": "l1"},
    "apgd_targeted": {"eps": EPS, "num_steps": 5, "num_targets": 2},
}


def attack(name, logits_fn, key=KEY, x=X, y=Y, **options):
    return getattr(attacks, name.split()[0])(key, logits_fn, x, y, **(OPTIONS[name] | options))


def normal(keys, shape):
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def plain(x):
    return jnp.tanh(x) @ WEIGHTS


def noisy(x, keys):
    return plain(x + 0.3 * normal(keys, x.shape[1:]))


@pytest.mark.parametrize("name", OPTIONS)
def test_a_network_that_ignores_its_keys_is_attacked_like_a_plain_one(name):
    randomised = attacks.expectation(lambda x, keys: plain(x), num_samples=4)
    np.testing.assert_allclose(attack(name, randomised), attack(name, plain), atol=1e-6)


def draw_keys(restart, step, s):
    """The keys of a draw of a gradient attack, [16]."""
    keys = KEYS
    for number in (FIRST_DRAW, restart, step, s):
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys, number)
    return keys


def test_gradient_is_the_mean_over_the_draws():
    """A step along the gradient in L2, against draws computed one by one."""
    x_adv = attacks.pgd(
        KEY, attacks.expectation(noisy, 3), X, Y, eps=EPS, step_size=EPS, num_steps=1, norm="l2", start="zero"
    )

    def gradient(keys):
        return jax.grad(lambda x: attacks.cross_entropy(noisy(x, keys), Y).sum())(jnp.asarray(X))

    mean = np.mean([gradient(draw_keys(0, 0, s)) for s in range(3)], axis=0)
    expected = X + EPS * mean / np.linalg.norm(mean, axis=-1, keepdims=True)
    np.testing.assert_allclose(x_adv, expected, atol=1e-6)


def test_each_step_draws_anew():
    """Against a loop over steps and draws."""
    options = {"eps": 1.0, "step_size": 0.01, "num_steps": 4, "start": "zero", "bounds": (-9.0, 9.0)}
    x_adv = attacks.pgd(KEY, attacks.expectation(noisy, 2), X, Y, **options)
    gradient = jax.jit(jax.grad(lambda x, keys: attacks.cross_entropy(noisy(x, keys), Y).sum()))
    steps = []
    for k in range(4):
        point = X + 0.01 * sum(steps, np.zeros_like(X))
        steps.append(np.sign(np.mean([gradient(point, draw_keys(0, k, s)) for s in range(2)], axis=0)))
    np.testing.assert_allclose(x_adv, X + 0.01 * sum(steps), atol=1e-6)
    assert (steps[0] != steps[1]).any()


def unreliable(x, keys):
    """Class 0 in about 70 % of the draws, whatever the image; probabilities 0.73 and 0.27."""
    wrong = jax.vmap(jax.random.uniform)(keys) > 0.7
    return jnp.stack([jnp.where(wrong, -1.0, 0.0), jnp.where(wrong, 0.0, -1.0)], -1) + 0 * x.sum(-1, keepdims=True)


@pytest.mark.parametrize("name", ["apgd-ce", "apgd-dlr"])
def test_autoattack_judges_by_the_mean_probability(name, short):
    x, y = np.full((16, 8), 0.5, np.float32), np.zeros(16, np.int32)
    several = attacks.autoattack(KEY, attacks.expectation(unreliable, 200), x, y, eps=EPS, version=(name,))
    assert several.correct.all() and several.robust.all(), "the network is right on average"
    np.testing.assert_array_equal(several.x_adv, x)
    single = attacks.autoattack(KEY, attacks.expectation(unreliable, 1), x, y, eps=EPS, version=(name,))
    assert 0.4 < single.correct.mean() < 1


def test_acceptance_by_the_mean_probability():
    x, y = np.full((16, 8), 0.5, np.float32), np.zeros(16, np.int32)
    several, single = (attacks.expectation(unreliable, n) for n in (200, 1))
    options = {"eps": EPS, "step_size": EPS / 4, "num_steps": 2, "num_restarts": 2, "return_best": True}
    # The objective has no gradient, so that images stay where they started, unless a point counts as wrong.
    first = attacks.pgd(KEY, several, x, y, **options | {"num_restarts": 1})
    judged = np.asarray(several(first, KEYS))
    assert (judged.argmax(-1) == 0).all() and np.allclose(judged.sum(-1), 1, atol=1e-5)
    untouched = attacks.apgd(KEY, single, x, y, eps=EPS, num_steps=2)
    attacked = attacks.apgd(KEY, several, x, y, eps=EPS, num_steps=2)
    same = (np.asarray(untouched) == x).all(-1)
    assert same.any() and not same.all(), "one draw leaves images out that are wrong in it"
    assert (np.asarray(attacked) != x).any(-1).all(), "200 draws find all images right, so that all are attacked"


def test_undefined_draws():
    """The gradient of a draw that is not finite counts as zero; logits that are not finite count as wrong."""

    def pole(x, keys):
        is_pole = jax.vmap(jax.random.uniform)(keys)[:, None] < 0.5
        root = jnp.sqrt(jnp.where(is_pole, 0 * x[:, :1], 1.0))  # gradient NaN
        return plain(x) + root

    x_adv = np.asarray(attack("pgd", attacks.expectation(pole, 8)))
    assert np.isfinite(x_adv).all() and (np.abs(x_adv - X).max(-1) > EPS / 2).all()

    def undefined(x, keys):
        return plain(x) + jnp.where(jax.vmap(jax.random.uniform)(keys)[:, None] < 0.5, jnp.nan, 0.0)

    result = attacks.autoattack(KEY, attacks.expectation(undefined, 20), X, Y, eps=EPS, version=("apgd-ce",))
    assert not result.correct.any() and any("not finite" in note for note in result.notes)


@pytest.mark.parametrize("name", ["pgd restarts", "apgd"])
def test_same_under_every_transformation_and_alone(name):
    network = attacks.expectation(noisy, 2)
    expected = attack(name, network, KEYS)

    def run(keys, x, y):
        return attack(name, network, keys, x, y)

    mesh, spec = Mesh(jax.devices(), "d"), PartitionSpec("d")
    split = lambda a: jnp.reshape(a, (8, 2, *a.shape[1:]))  # noqa: E731
    for result in (
        jax.jit(run)(KEYS, X, Y),
        jax.vmap(lambda k, x, y: run(k[None], x[None], y[None])[0])(KEYS, X, Y),
        jax.pmap(run)(split(KEYS), split(X), split(Y)).reshape(X.shape),
        jax.jit(jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec))(KEYS, X, Y),
        jnp.concatenate([run(KEYS[:3], X[:3], Y[:3]), run(KEYS[3:], X[3:], Y[3:])]),
    ):
        np.testing.assert_allclose(result, expected, atol=1e-6)
    np.testing.assert_array_equal(attack(name, network, KEY), expected, "one key is one per example")
    assert (attack(name, network, jax.random.key(8)) != expected).any()


def test_more_draws_make_a_stronger_attack():
    """FGSM on a network that is misleading in 40 % of its draws, judged by new draws."""

    def misleading(x, keys):
        factor = jnp.where(jax.vmap(jax.random.uniform)(keys) < 0.6, 2.0, -1.0)
        return factor[:, None] * ((x - 0.5) @ WEIGHTS)

    x = np.random.default_rng(1).uniform(0, 1, size=(400, 8)).astype(np.float32)
    y = ((x - 0.5) @ WEIGHTS).argmax(-1).astype(np.int32)

    def accuracy(num_samples):
        x_adv = attacks.fgsm(KEY, attacks.expectation(misleading, num_samples), x, y, eps=EPS)
        judged = attacks.expectation(misleading, 200)(x_adv, jax.random.split(jax.random.key(99), len(x)))
        return np.mean(judged.argmax(-1) == y)

    single, several = accuracy(1), accuracy(32)
    error = np.sqrt((single * (1 - single) + several * (1 - several)) / len(x))
    assert several < single - 4 * error, (single, several)


def test_network_is_traced_once_for_all_draws():
    def calls(num_samples):
        count = []

        def counted(x, keys):
            count.append(0)
            return noisy(x, keys)

        attack("pgd", attacks.expectation(counted, num_samples))
        return len(count)

    assert calls(2) == calls(100)


def test_jit_takes_variables_and_compiles_once():
    traces = []

    def apply(variables, x, keys):
        traces.append(0)
        return jnp.tanh(x + 0.3 * normal(keys, x.shape[1:])) @ variables

    run = attacks.jit(attacks.pgd, attacks.expectation(apply, 2), **STEPS)
    np.testing.assert_allclose(run(KEY, WEIGHTS, X, Y), attack("pgd", attacks.expectation(noisy, 2)), atol=1e-6)
    number = len(traces)
    assert (run(KEY, 2 * WEIGHTS[::-1], X, Y) != run(KEY, WEIGHTS, X, Y)).any() and len(traces) == number
    with pytest.raises(ValueError, match="4 classes"):
        run(KEY, WEIGHTS, X, Y + 4)


def test_autoattack_rand_is_the_expectation_of_twenty_draws(short):
    run = partial(attacks.autoattack, KEY, x=X, y=Y, eps=EPS, batch_size=16)
    result, expected = run(noisy, version="rand"), run(attacks.expectation(noisy, 20), version="rand")
    np.testing.assert_array_equal(result.x_adv, expected.x_adv)
    assert result.evaluations == expected.evaluations
    fewer = run(attacks.expectation(noisy, 5), version="rand")
    assert fewer.evaluations["apgd-ce"][0] % 5 == 0 and fewer.evaluations["apgd-ce"] != result.evaluations["apgd-ce"]


NETWORK = attacks.expectation(noisy, 2)
UNSUPPORTED = {
    "fab": lambda: attacks.fab(KEY, NETWORK, X, Y, eps=EPS),
    "fab_targeted": lambda: attacks.fab_targeted(KEY, NETWORK, X, Y, eps=EPS),
    "square": lambda: attacks.square(KEY, NETWORK, X, Y, eps=EPS),
    "ddn": lambda: attacks.ddn(KEY, NETWORK, X, Y),
    "fmn": lambda: attacks.fmn(KEY, NETWORK, X, Y, norm="l2"),
    "deepfool": lambda: attacks.deepfool(KEY, NETWORK, X, Y, norm="l2"),
    "minimum_norm": lambda: attacks.minimum_norm(attacks.fab)(KEY, NETWORK, X, Y, norm="l2"),
    "robustness_curve": lambda: attacks.robustness_curve(KEY, NETWORK, X, Y, [0.1], norm="linf"),
    "normalized": lambda: attack("pgd", attacks.normalized(NETWORK, 0.5, 0.5)),
    "ensemble": lambda: attack("pgd", attacks.ensemble([NETWORK, plain])),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_does_not_support_randomised_networks_says_so(name):
    with pytest.raises(ValueError, match="does not support randomised networks. fgsm, pgd, mim"):
        UNSUPPORTED[name]()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: attacks.expectation(noisy, 0), "num_samples must be"),
        (lambda: attacks.expectation(noisy, 2.5), "num_samples must be"),
        (lambda: attacks.expectation(None, 2), "logits_fn must be a function"),
        (lambda: attacks.expectation(NETWORK, 2), "an expectation already"),
        (lambda: attack("pgd", attacks.expectation(plain, 2)), r"must be a function of \(x, keys\)"),
        (lambda: attack("apgd", noisy), r"function of \(x\): a randomised network is given as attacks.expectation"),
        (lambda: attack("fgsm_rs", noisy), r"function of \(x\): a randomised network"),
        (lambda: attacks.autoattack(KEY, plain, X, Y, eps=EPS, version="rand"), r"function of \(x, keys\)"),
        (
            lambda: attacks.jit(attacks.pgd, attacks.expectation(noisy, 2), **STEPS)(KEY, WEIGHTS, X, Y),
            "variables, x, k",
        ),
        (lambda: NETWORK(X, KEYS[:3]), "one key or one per example"),
        (lambda: attacks.autoattack(KEY, NETWORK, X, Y, eps=EPS), "fab-t, square cannot attack a randomised network"),
        (lambda: attack("pgd", attacks.expectation(lambda x, keys: x[0], 2)), "one array"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)

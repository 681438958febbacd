"""Every public attack, objective and loss outside a trace, under each of JAX's strict modes."""

import contextlib
import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lt_adv import attacks, losses

KEY = jax.random.key(0)
WEIGHT = jax.random.normal(KEY, (75, 4))
X = jax.random.uniform(jax.random.key(1), (6, 5, 5, 3)).at[:, 0, 0].set(0)
COUNTS = [40, 20, 10, 5]
STRICT = (  # all at once: each of them only forbids something
    lambda: jax.numpy_rank_promotion("raise"),
    lambda: jax.numpy_dtype_promotion("strict"),
    lambda: jax.transfer_guard("disallow"),
    lambda: jax.debug_infs(True),
    lambda: jax.debug_nans(True),
    jax.checking_leaks,
)


@contextlib.contextmanager
def strict():
    with contextlib.ExitStack() as stack:
        for mode in STRICT:
            stack.enter_context(mode())
        yield


@contextlib.contextmanager
def float64():
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        yield


MODES = {"strict": strict, "float64": float64, "no jit": jax.disable_jit}


def network(x):
    return x.reshape(len(x), -1) @ WEIGHT


def noisy(x, keys):
    return network(x + jax.vmap(lambda key: 0.1 * jax.random.normal(key, x.shape[1:], x.dtype))(keys))


Z, Y = network(X), jnp.argmax(network(X), axis=-1)
OTHER = (Y + 1) % 4
LENGTHS = {"eps": 0.1, "step_size": 0.05, "num_steps": 2}
ATTACKS = {
    "fgsm": {"eps": 0.1},
    "fgsm_rs": {"eps": 0.1},
    "n_fgsm": {"eps": 0.1},
    "pgd": LENGTHS,
    "mim": LENGTHS,
    "cw": LENGTHS,
    "apgd": {"eps": 0.1, "num_steps": 3},
    "apgd_targeted": {"eps": 0.1, "num_steps": 3, "num_targets": 2},
    "fab": {"eps": 0.1, "num_steps": 2, "num_restarts": 2},
    "fab_targeted": {"eps": 0.1, "num_steps": 2, "num_targets": 2},
    "square": {"eps": 0.1, "num_queries": 5},
}
MINIMUM_NORM = {
    "ddn": {"num_steps": 3, "norm": "l2"},
    "fmn": {"num_steps": 3, "norm": "linf"},
    "deepfool": {"num_steps": 10, "norm": "l2"},
}
PROBS = jax.nn.softmax(Z)
FUNCTIONS = {
    **{
        f"attacks.{name}": partial(getattr(attacks, name), Z, Y)
        for name in ("cross_entropy", "cw_margin", "logit_margin")
    },
    "attacks.stable_cross_entropy": partial(attacks.stable_cross_entropy, Z, Y),
    "attacks.dlr": partial(attacks.dlr, Z, Y),
    "attacks.targeted_logit_margin": partial(attacks.targeted_logit_margin, Z, Y, OTHER),
    "attacks.targeted_dlr": partial(attacks.targeted_dlr, Z, Y, OTHER),
    "attacks.kl_divergence": partial(attacks.kl_divergence, Z, PROBS),
    "attacks.prediction": partial(attacks.prediction, Z),
    "attacks.normalized": lambda: attacks.normalized(network, [0.5, 0.4, 0.3], 0.25)(X),
    "attacks.channels_first": lambda: attacks.channels_first(network)(X),
    "attacks.select_output": lambda: attacks.select_output(lambda x: (x, network(x)), 1)(X),
    "attacks.ensemble": lambda: attacks.ensemble([network, network])(X),
    "attacks.expectation": lambda: attacks.expectation(noisy, 2)(X, jax.random.split(KEY, len(X))),
    "attacks.expectation in pgd": lambda: attacks.pgd(KEY, attacks.expectation(noisy, 2), X, Y, **LENGTHS),
    "attacks.expectation in apgd": lambda: attacks.apgd(KEY, attacks.expectation(noisy, 2), X, Y, eps=0.1, num_steps=2),
    "attacks.ensemble of probabilities": lambda: attacks.ensemble([network, network], "probabilities")(X),
    **{
        f"losses.{name}": partial(getattr(losses, name), Z, Y, class_counts=COUNTS)
        for name in ("cross_entropy", "balanced_softmax", "logit_adjustment", "ldam", "robal_margin", "focal")
    },
    "losses.class_dependent_temperature": partial(losses.class_dependent_temperature, Z, Y, class_counts=COUNTS),
    "losses.focal of sigmoids": partial(losses.focal, Z, Y, activation="sigmoid"),
    "losses.kl_divergence": partial(losses.kl_divergence, Z, 2 * Z),
    "losses.kl_divergence with epsilon": partial(losses.kl_divergence, Z, 2 * Z, epsilon=1e-12),
    "losses.distillation": partial(losses.distillation, Z, 2 * Z, temperature=2.0),
    "losses.squared_probability_distance": partial(losses.squared_probability_distance, Z, 2 * Z),
    "losses.soft_cross_entropy": partial(losses.soft_cross_entropy, Z, PROBS),
    "losses.mart": partial(losses.mart, Z, 2 * Z, Y),
    **{
        f"losses.{name}": partial(getattr(losses, name), Z, Y, class_counts=COUNTS, tail=np.arange(4) >= 2)
        for name in ("tail_alignment", "tail_alignment_released")
    },
    "losses.hierarchical_equalisation": partial(losses.hierarchical_equalisation, jnp.abs(Z[:, 0]), Y, num_classes=4),
    "losses.log_prior": partial(losses.log_prior, COUNTS),
    "losses.ldam_margins": partial(losses.ldam_margins, COUNTS),
    "losses.class_balanced_weights": partial(losses.class_balanced_weights, COUNTS),
    "losses.class_balanced_weights, beta 0": partial(losses.class_balanced_weights, COUNTS, beta=0.0),
    "losses.worst_distribution": partial(losses.worst_distribution, Z[0], radius=0.5),
    "losses.rebalanced_weights": partial(losses.rebalanced_weights, COUNTS, [0, 1, 2, 30]),
}


def test_every_public_function_is_tested():
    named = {
        f"attacks.{name}" for name in (*ATTACKS, *MINIMUM_NORM, "autoattack", "jit", "minimum_norm", "robustness_curve")
    }
    named |= {name.partition(" ")[0].rstrip(",") for name in FUNCTIONS}
    public = {f"attacks.{name}" for name in attacks.__all__} | {f"losses.{name}" for name in losses.__all__}
    assert named == public


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_goals_and_restarts(mode):
    options = {"num_restarts": 2, "return_best": True, "targets": OTHER, "norm": "l1", **LENGTHS}
    with MODES[mode]():
        x_adv = jax.block_until_ready(attacks.pgd(KEY, network, X, Y, **options))
        radius = attacks.fab(KEY, network, X, Y, eps=np.full((1, 5, 5, 1), 0.2, np.float32), num_steps=2, targets=OTHER)
    assert np.isfinite(x_adv).all() and np.isfinite(radius).all()


# Types and ranks in a program depend on the norm; test_properties.py has float64 in other norms.
LINF_ONLY = ("fgsm_rs", "n_fgsm")
MODES_OF_NORM = {"linf": tuple(MODES), "l2": ("strict",), "l1": ("strict",)}


@pytest.mark.slow
@pytest.mark.parametrize(("norm", "mode"), [(norm, mode) for norm, modes in MODES_OF_NORM.items() for mode in modes])
@pytest.mark.parametrize("name", ATTACKS)
def test_attacks(name, mode, norm):
    attack, options = getattr(attacks, name), {**ATTACKS[name], "norm": norm}
    if name in LINF_ONLY:
        if norm != "linf":
            return
        del options["norm"]
    assert ("norm" in inspect.signature(attack).parameters) == ("norm" in options)
    with MODES[mode]():
        x_adv = jax.block_until_ready(attack(KEY, network, X, Y, **options))
    assert np.isfinite(x_adv).all() and (np.asarray(x_adv) != np.asarray(X)).any()


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MINIMUM_NORM)
def test_minimum_norm_attacks(name, mode):
    with MODES[mode]():
        result = jax.block_until_ready(getattr(attacks, name)(KEY, network, X, Y, **MINIMUM_NORM[name]))
    assert np.isfinite(result.distance).all() and (np.asarray(result.x_adv) != np.asarray(X)).any()


@pytest.mark.slow
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "no jit"])  # it runs compiled programs
def test_robustness_curve(mode):
    with MODES[mode]():
        curve = attacks.robustness_curve(
            KEY, network, X, Y, [0.0, 0.01], attack=attacks.minimum_norm(attacks.fab_targeted), check_radii=[0.01]
        )
    assert curve.accuracy[0] == 1 and np.isfinite(curve.distances).all()


@pytest.mark.slow
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "no jit"])  # it runs compiled programs
def test_autoattack(mode):
    version = "plus" if mode == "strict" else ("apgd-ce", "fab-t", "square")
    with MODES[mode]():
        result = attacks.autoattack(
            KEY, network, X, Y, eps=0.01, version=version, num_queries=20, devices=jax.devices()[:1]
        )
    assert result.correct.all() and not result.robust.all() and not result.notes
    assert all(passes > 0 for passes, _ in result.evaluations.values()), "every attack has images to work on"


@pytest.mark.parametrize("mode", MODES)
def test_jitted_attack(mode):
    compiled = attacks.jit(attacks.pgd, lambda _, x: network(x), **LENGTHS)
    with MODES[mode]():
        assert np.isfinite(compiled(KEY, None, X, Y)).all()


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_objectives_and_losses(name, mode):
    with MODES[mode]():
        values = jax.block_until_ready(FUNCTIONS[name]())
    assert np.isfinite(values).all()

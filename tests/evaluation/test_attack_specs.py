import jax.numpy as jnp
import numpy as np
import pytest

from lt_adv import attacks
from lt_adv.evaluation import attack_specs

PGD = {"attack": "pgd", "eps": 0.031, "step_size": 0.0078, "num_steps": 20}


def test_defaults_are_filled_in():
    assert attack_specs.resolve(PGD) == (
        "pgd",
        {k: v for k, v in PGD.items() if k != "attack"} | {"norm": "linf", "start": "uniform"},
    )
    assert (
        attack_specs.resolve({"attack": "cw", **{k: v for k, v in PGD.items() if k != "attack"}})[1]["confidence"]
        == 50.0
    )
    assert attack_specs.resolve({**PGD, "attack": "mim", "start": None})[1]["decay"] == 1.0
    assert attack_specs.resolve({"attack": "fgsm", "eps": 0.1})[1] == {"eps": 0.1, "norm": "linf", "start": "zero"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attack": "pdg"}, "Unknown attack 'pdg'. Did you mean 'pgd'"),
        ({"attack": "compile"}, "There are: autoattack, cw, fgsm, mim, pgd"),
        ({"attack": None}, "Unknown attack None"),
        ({"stepsize": 0.1}, "Unknown option of pgd 'stepsize'. Did you mean 'step_size'"),
        ({"attack": "cw", "logit_scale": 10.0}, "Unknown option of cw 'logit_scale'"),
        ({"step_size": None}, "needs step_size, in units of the"),
        ({"eps": 8}, "eps 8 of 'pgd' is not in the .0, 1. pixel range; is 8/255 meant"),
        ({"eps": -0.1}, "eps -0.1 of 'pgd'"),
    ],
)
def test_bad_entries_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        attack_specs.resolve({**PGD, **change})


def test_l2_radii_may_exceed_one():
    assert attack_specs.resolve({**PGD, "norm": "l2", "eps": 2.0})[1]["eps"] == 2.0


def test_the_header_entry_has_exact_lengths():
    entry = attack_specs.describe({**PGD, "logit_scale": 10})
    assert (entry["eps"], entry["eps_255"]) == (0.031, 7.905)
    assert (entry["step_size_255"], entry["logit_scale"], entry["num_steps"]) == (1.989, 10, 20)
    assert attack_specs.describe({**PGD, "eps": 8 / 255})["eps_255"] == 8.0


def test_the_logit_scale_reaches_the_objective(monkeypatch):
    arguments = {}
    monkeypatch.setattr(attacks, "jit", lambda attack, apply, **options: arguments.update(options, attack=attack))
    attack_specs._cached_jit.cache_clear()
    attack_specs.jit_attack(len, {**PGD, "logit_scale": 10.0})
    logits, y = jnp.array([[1.0, 2.0, 0.5]]), jnp.array([0])
    np.testing.assert_allclose(arguments["objective"](logits, y), attacks.cross_entropy(10 * logits, y), rtol=1e-6)
    assert arguments["attack"] is attacks.pgd and arguments["num_steps"] == 20 and "logit_scale" not in arguments
    arguments.clear()
    attack_specs.jit_attack(len, PGD)
    assert "objective" not in arguments
    attack_specs._cached_jit.cache_clear()


def test_weights_digest_depends_on_values_names_and_types():
    kernel = np.arange(6, dtype=np.float32).reshape(2, 3)
    trees = (
        {"a": kernel},
        {"b": kernel},
        {"a": kernel.T.copy()},
        {"a": kernel + 1e-6},
        {"a": kernel.astype(jnp.bfloat16)},
    )
    assert len({attack_specs.weights_digest(tree) for tree in trees}) == len(trees)
    assert attack_specs.weights_digest({"a": jnp.asarray(kernel)}) == attack_specs.weights_digest({"a": kernel})


def test_the_attacks_of_rand_are_valid_for_a_deterministic_network():
    """The version "rand" itself is not."""
    spec = {"attack": "autoattack", "eps": 0.03, "version": ("apgd-ce", "apgd-dlr")}
    assert attack_specs.resolve(spec)[1]["version"] == ("apgd-ce", "apgd-dlr")
    with pytest.raises(ValueError, match="The version 'rand' of autoattack is for randomised networks"):
        attack_specs.resolve({**spec, "version": "rand"})

"""Networks on which a table alone would be wrong: what the records, the report and the diagnosis say of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lt_adv.evaluation import read, summarise
from lt_adv.evaluation.masking import diagnose, verdict
from tests.evaluation.conftest import PGD, apply

COUNTS = [12, 6, 3]


def undefined_at_bright(variables, x):
    """Not a number for every image with a pixel that is nearly white."""
    logits = apply(variables, x)
    return jnp.where((x > 0.9).any(axis=(1, 2, 3))[:, None], jnp.nan, logits)


def test_logits_that_are_not_finite_count_as_wrong(toy, run, tmp_path):
    results, _ = run(apply=undefined_at_bright, attacks={"pgd": {**PGD, "eps": 0.3, "step_size": 0.1}})
    bright = (toy.split.image > 0.9 * 255).any(axis=(1, 2, 3))
    np.testing.assert_array_equal(results.clean == -1, bright)
    assert not results.correct("clean")[bright].any() and (results.attacks["pgd"] == -1).sum() > bright.sum()
    np.testing.assert_array_equal(read(tmp_path).attacks["pgd"], results.attacks["pgd"])
    lines = summarise(results, COUNTS)["warnings"]
    assert "clean: the logits of 1 images are not finite: they count as wrong." in lines
    assert (
        f"pgd: the logits of {(results.attacks['pgd'] == -1).sum()} images are not finite: they count as wrong."
        in lines
    )


@pytest.mark.usefixtures("short")
def test_what_autoattack_notes_is_in_the_report(run, tmp_path):
    """Also when the column is read and not computed."""

    def centred(variables, x):
        logits = apply(variables, x)
        return logits - logits.mean(axis=0, keepdims=True)

    options = {"apply": centred, "attacks": {"pgd": PGD, "autoattack": {"attack": "autoattack", "eps": 0.05}}}
    _, printed = run(**options)
    results, _ = run(**options)
    warnings = summarise(results, COUNTS)["warnings"]
    for words in (
        "autoattack: The logits of an image change with the other images of its batch",
        "autoattack: apgd-t: the targeted DLR needs four classes",
    ):
        assert sum(line.startswith(words) for line in warnings) == 1, warnings
    assert "The logits of an image change with the other images" in printed
    assert read(tmp_path).notes == results.notes


def probe(network, variables, toy, **options):
    x, y = toy.split.image, toy.split.label
    options = {"eps": 0.05, "step_size": 0.02, "num_steps": 2, "queries": 5, **options}
    return diagnose.probe(jax.random.key(0), network, variables, x, y, **options)


def test_the_diagnosis_of_logits_that_are_not_finite(toy):
    facts = probe(undefined_at_bright, toy.variables, toy)
    assert facts["not_finite"] == 1 and facts["right"]["clean"][4] == "0" and np.isfinite(facts["logit_lead"])
    assert facts["logits_change"] == facts["batch_change"] == 0
    assert verdict.decide(facts, None)["notes"][0] == (
        "The logits of 1 clean images are not finite: they count as wrong."
    )


def test_the_diagnosis_of_images_that_are_not_independent(toy):
    def centred(variables, x):
        logits = apply(variables, x)
        return logits - logits.mean(axis=0, keepdims=True)

    facts = probe(centred, toy.variables, toy, batch_size=8)
    assert facts["batch_change"] > 0.1
    (reason,) = verdict.decide(facts, None)["reasons"]
    assert reason.startswith("The logits of an image change with the other images of its batch")


def test_the_diagnosis_computes_objectives_in_float32(toy):
    """A network with bfloat16 logits, large enough for bfloat16 to round its gradient to zero."""

    def low(variables, x):
        return (40 * apply(variables, x)).astype(jnp.bfloat16)

    def widened(variables, x):
        return low(variables, x).astype(jnp.float32)

    facts, expected = probe(low, toy.variables, toy), probe(widened, toy.variables, toy)
    assert facts == expected


def test_images_outside_the_box_are_refused(toy):
    with pytest.raises(ValueError, match=r"inside bounds \(0.0, 1.0\)"):
        diagnose.probe(
            jax.random.key(0), apply, toy.variables, toy.split.image.astype(np.float32), toy.split.label,
            eps=8.0, step_size=2.0,
        )  # fmt: skip


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_keys_of_other_implementations(toy, run, impl):
    """A result depends neither on the batch size nor on the devices."""
    call = functools.partial(run, key=jax.random.key(7, impl=impl), directory=None, attacks={"pgd": PGD})
    one, other = call(batch_size=7, devices=8)[0], call(batch_size=20, devices=1)[0]
    np.testing.assert_array_equal(one.attacks["pgd"], other.attacks["pgd"])

"""Networks that break an assumption (NaN logits, coupled images, low precision): records, report and diagnostics."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lt_adv.evaluation import masking, read_records, summarise
from tests.evaluation.conftest import PGD, apply

COUNTS = [12, 6, 3]


def nan_on_bright_images(variables, x):
    """Returns NaN for every image with a pixel that is nearly white."""
    logits = apply(variables, x)
    return jnp.where((x > 0.9).any(axis=(1, 2, 3))[:, None], jnp.nan, logits)


def test_logits_that_are_not_finite_count_as_wrong(toy, run, tmp_path):
    results, _ = run(apply=nan_on_bright_images, attacks={"pgd": {**PGD, "eps": 0.3, "step_size": 0.1}})
    bright = (toy.split.image > 0.9 * 255).any(axis=(1, 2, 3))
    np.testing.assert_array_equal(results.clean == -1, bright)
    assert not results.correct("clean")[bright].any() and (results.attacks["pgd"] == -1).sum() > bright.sum()
    np.testing.assert_array_equal(read_records(tmp_path).attacks["pgd"], results.attacks["pgd"])
    lines = summarise(results, COUNTS)["warnings"]
    assert "clean: the logits of 1 images are not finite: they count as wrong." in lines
    assert (
        f"pgd: the logits of {(results.attacks['pgd'] == -1).sum()} images are not finite: they count as wrong."
        in lines
    )


@pytest.mark.slow
@pytest.mark.usefixtures("short")
def test_notes_of_autoattack_are_in_the_report(run, tmp_path):
    """Also when the column is read from the records."""

    def centred(variables, x):
        logits = apply(variables, x)
        return logits - logits.mean(axis=0, keepdims=True)

    options = {"apply": centred, "attacks": {"pgd": PGD, "autoattack": {"attack": "autoattack", "eps": 0.05}}}
    _, printed = run(**options)
    results, _ = run(**options)
    warning_list = summarise(results, COUNTS)["warnings"]
    for words in (
        "autoattack: The logits of an image change with the other images of its batch",
        "autoattack: apgd-t: the targeted DLR needs four classes",
    ):
        assert sum(line.startswith(words) for line in warning_list) == 1, warning_list
    assert "The logits of an image change with the other images" in printed
    assert read_records(tmp_path).notes == results.notes


def run_diagnostics(network, variables, toy, **options):
    x, y = toy.split.image, toy.split.label
    options = {"eps": 0.05, "step_size": 0.02, "num_steps": 2, "queries": 5, **options}
    return masking.run_diagnostics(jax.random.key(0), network, variables, x, y, **options)


def test_diagnostics_of_logits_that_are_not_finite(toy):
    diagnostics = run_diagnostics(nan_on_bright_images, toy.variables, toy)
    assert diagnostics["not_finite"] == 1 and diagnostics["correct"]["clean"][4] == "0"
    assert np.isfinite(diagnostics["logit_lead"])
    assert diagnostics["logits_change"] == diagnostics["batch_change"] == 0
    assert masking.masking_verdict(diagnostics, None)["notes"][0] == (
        "The logits of 1 clean images are not finite: they count as wrong."
    )


def test_diagnostics_of_a_network_that_couples_images(toy):
    def centred(variables, x):
        logits = apply(variables, x)
        return logits - logits.mean(axis=0, keepdims=True)

    diagnostics = run_diagnostics(centred, toy.variables, toy, batch_size=8)
    assert diagnostics["batch_change"] > 0.1
    (reason,) = masking.masking_verdict(diagnostics, None)["reasons"]
    assert reason.startswith("The logits of an image change with the other images of its batch")


def test_diagnostics_compute_objectives_in_float32(toy):
    """A network with bfloat16 logits so large that bfloat16 rounds its gradient to zero."""

    def bfloat16_logits(variables, x):
        return (40 * apply(variables, x)).astype(jnp.bfloat16)

    def float32_logits(variables, x):
        return bfloat16_logits(variables, x).astype(jnp.float32)

    low, high = (run_diagnostics(apply, toy.variables, toy) for apply in (bfloat16_logits, float32_logits))
    assert low == high


def test_images_outside_the_box_are_refused(toy):
    with pytest.raises(ValueError, match=r"inside bounds \(0.0, 1.0\)"):
        masking.run_diagnostics(
            jax.random.key(0), apply, toy.variables, toy.split.image.astype(np.float32), toy.split.label,
            eps=8.0, step_size=2.0,
        )  # fmt: skip


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_keys_of_other_implementations_work(toy, run, impl):
    """A result depends neither on the batch size nor on the devices."""
    call = functools.partial(run, key=jax.random.key(7, impl=impl), directory=None, attacks={"pgd": PGD})
    first, second = call(batch_size=7, devices=8)[0], call(batch_size=20, devices=1)[0]
    np.testing.assert_array_equal(first.attacks["pgd"], second.attacks["pgd"])

"""The table and the JSON of AutoAttack's result, on results made by hand and on one of AutoAttack."""

import doctest
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lt_adv import attacks
from lt_adv.attacks import result as module
from lt_adv.attacks._autoattack import Result


@pytest.fixture
def hand_made():
    """2,000 images: 100 wrong, 900 broken by APGD, none by FAB, 250 by Square."""
    broken_by = np.repeat([0, 1, 3, -1], [100, 900, 250, 750]).astype(np.int32)
    robust = broken_by == -1
    x = np.zeros((2000, 2, 2, 1), np.float32)
    return Result(
        x_adv=x,
        robust=robust,
        correct=broken_by != 0,
        prediction=np.zeros(2000, np.int32),
        broken_by=broken_by,
        accuracy={"clean": 0.95, "apgd-ce": 0.5, "fab-t": 0.5, "square": np.float32(0.375)},
        evaluations={"apgd-ce": (np.int64(192000), 190000), "fab-t": (1_800_000, 900_000), "square": (5_000_000, 0)},
        notes=("The logits of 3 clean images are not finite: they count as wrong.",),
    )


def test_the_table(hand_made):
    assert module.as_table(hand_made).splitlines() == [
        "          accuracy   broken   forward passes   gradients",
        "clean      95.00 %      100",
        "apgd-ce    50.00 %      900          192,000     190,000",
        "fab-t      50.00 %        0        1,800,000     900,000",
        "square     37.50 %      250        5,000,000           0",
        "Robust accuracy: 37.50 % (750 of 2,000 images)",
        "note: The logits of 3 clean images are not finite: they count as wrong.",
    ]


def test_numbers_survive_json_and_hold_no_images(hand_made):
    numbers = module.to_dict(hand_made)
    text = json.dumps(numbers)
    assert json.loads(text) == numbers and len(text) < 1000
    assert numbers["images"] == 2000 == numbers["robust"] + sum(numbers["broken"].values())
    assert numbers["accuracy"] == {"clean": 0.95, "apgd-ce": 0.5, "fab-t": 0.5, "square": 0.375}
    assert numbers["broken"] == {"clean": 100, "apgd-ce": 900, "fab-t": 0, "square": 250}
    assert numbers["evaluations"]["apgd-ce"] == {"forward": 192000, "gradient": 190000}
    assert numbers["notes"] == list(hand_made.notes)


def test_every_image_broken_and_no_notes(hand_made):
    wrong = np.zeros(4, np.int32)
    none = hand_made._replace(
        robust=wrong.astype(bool), broken_by=wrong, accuracy={"clean": 0.0, "square": 0.0}, evaluations={}, notes=()
    )
    assert module.as_table(none).splitlines() == [
        "         accuracy   broken   forward passes   gradients",
        "clean      0.00 %        4",
        "square     0.00 %        0",
        "Robust accuracy: 0.00 % (0 of 4 images)",
    ]


def test_a_result_of_autoattack():
    logits_fn = lambda x: x @ jnp.array([[1.0, -1.0], [-1.0, 1.0]])  # noqa: E731
    x, y = jnp.array([[0.5, 0.375], [1.0, 0.0], [0.0, 1.0]]), jnp.array([0, 0, 0])
    options = {"eps": 0.125, "version": ("square",), "num_queries": 100, "devices": jax.devices()[:1]}
    result = attacks.autoattack(jax.random.key(0), logits_fn, x, y, **options)
    numbers = module.to_dict(result)
    assert numbers["robust"] == 1 and numbers["broken"] == {"clean": 1, "square": 1}
    assert numbers["accuracy"] == pytest.approx({"clean": 2 / 3, "square": 1 / 3})
    assert numbers["evaluations"]["square"]["gradient"] == 0 < numbers["evaluations"]["square"]["forward"]
    assert module.as_table(result).splitlines()[-1] == "Robust accuracy: 33.33 % (1 of 3 images)"


def test_example_runs():
    failures, tried = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert tried and not failures


WEIGHTS = np.random.default_rng(0).normal(size=(16, 4)).astype(np.float32)


def linear(x):
    return (x - 0.5).reshape(len(x), -1) @ WEIGHTS


NETWORKS = {
    "plain": (linear, None),
    "probabilities": (lambda x: jax.nn.softmax(linear(x)), "logits_fn returns probabilities"),
    "rounded": (lambda x: linear(jnp.round(20 * x) / 20), "Square broke"),
}


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("name", NETWORKS)
def test_notes_on_gradients(name):
    logits_fn, start = NETWORKS[name]
    x = np.random.default_rng(1).uniform(0.2, 0.8, size=(40, 4, 4, 1)).astype(np.float32)
    y = np.asarray(linear(x).argmax(-1))
    result = attacks.autoattack(jax.random.key(0), logits_fn, x, y, eps=0.1, version=("apgd-ce", "square"))
    starts = [note for note in result.notes if start and note.startswith(start)]
    assert list(result.notes) == starts and len(starts) == (start is not None)
    randomised = attacks.expectation(lambda x, keys: logits_fn(x), 2)
    assert not attacks.autoattack(jax.random.key(0), randomised, x, y, eps=0.1, version=("apgd-ce",)).notes

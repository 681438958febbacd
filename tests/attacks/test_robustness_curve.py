"""Robustness curves: equal to brute force from distances, monotone, checked by APGD, independent of batches."""

import json
import sys
from functools import partial

import jax
import numpy as np
import pytest

from lt_adv import attacks

KEY = jax.random.key(3)
RNG = np.random.default_rng(0)
WEIGHT = RNG.normal(size=(12, 2)).astype(np.float32)
X = RNG.uniform(size=(19, 12)).astype(np.float32)  # not a multiple of the number of devices
BOUNDS = (-2, 3)  # which no attack reaches
RADII = np.linspace(0, 0.5, 26)


def network(x):
    return x @ WEIGHT


Y = np.where(np.arange(19) % 5 == 0, 0, np.asarray(network(X).argmax(-1)))
CLEAN = np.mean(np.asarray(network(X).argmax(-1)) == Y)


def exact_distances():
    """The L-inf distances of the network of two classes, 0 where an image is classified wrongly."""
    z = X.astype(np.float64) @ WEIGHT
    difference = WEIGHT.T[None] - WEIGHT.T[Y][:, None]
    slope = np.where(np.arange(2) == Y[:, None], 1, np.abs(difference).sum(-1))
    lead = z[np.arange(19), Y][:, None] - z
    return np.where(np.arange(2) == Y[:, None], np.inf, np.maximum(lead / slope, 0)).min(1)


@pytest.fixture(scope="module")
def curve():
    return attacks.robustness_curve(KEY, network, X, Y, RADII, bounds=BOUNDS)


def test_curve_of_a_linear_network_is_exact(curve):
    np.testing.assert_allclose(curve.distances, exact_distances(), rtol=5e-3)
    np.testing.assert_allclose(
        curve.accuracy, [np.mean(exact_distances() > r * (1 + 1e-9)) for r in RADII], atol=1.01 / 19
    )


def test_curve_is_monotone_equals_brute_force_and_starts_at_the_clean_accuracy(curve):
    assert curve.accuracy[0] == CLEAN < 1 and curve.accuracy[-1] < CLEAN and np.all(np.diff(curve.accuracy) <= 0)
    np.testing.assert_array_equal(curve.accuracy, [np.mean(curve.distances > radius) for radius in RADII])
    assert 1 <= len(curve.checked_radii) <= 3 and set(curve.checked_radii) <= set(RADII[1:])
    at_checked = curve.accuracy[np.isin(RADII, curve.checked_radii)]
    assert np.all(at_checked <= np.minimum(curve.attack_accuracy, curve.apgd_accuracy))
    np.testing.assert_allclose(curve.attack_accuracy, curve.apgd_accuracy, atol=1.01 / 19)


def test_independent_of_batches_and_repeatable(curve):
    small = attacks.robustness_curve(KEY, network, X, Y, RADII[::-1], batch_size=8, bounds=BOUNDS)
    np.testing.assert_array_equal(small.radii, RADII)
    np.testing.assert_allclose(small.distances, curve.distances, atol=1e-6)
    keys = jax.vmap(partial(jax.random.fold_in, KEY))(np.arange(19))
    part = attacks.robustness_curve(keys[3:7], network, X[3:7], Y[3:7], RADII, bounds=BOUNDS, check_radii=())
    np.testing.assert_allclose(part.distances, curve.distances[3:7], rtol=5e-3, atol=1e-6)


def test_apgd_finds_what_a_weak_attack_misses():
    """An attack without a step finds nothing: APGD lowers the curve, and the table shows both."""

    def weak(key, logits_fn, x, y, *, norm, bounds):
        return attacks.deepfool(key, logits_fn, x, y, norm=norm, bounds=bounds, num_steps=0)

    curve = attacks.robustness_curve(
        KEY, network, X, Y, [0.0, 0.2, 0.4], attack=weak, check_radii=[0.3, 0.1], bounds=BOUNDS
    )
    np.testing.assert_array_equal(curve.checked_radii, [0.1, 0.3])
    np.testing.assert_allclose(curve.attack_accuracy, CLEAN)
    exact = [np.mean(exact_distances() > radius) for radius in (0.1, 0.3)]
    np.testing.assert_allclose(curve.apgd_accuracy, exact, atol=1.01 / 19)
    assert set(curve.distances) <= {0.0, 0.1, 0.3, np.inf} and curve.accuracy[1] == np.mean(curve.distances > 0.2)
    text = str(curve)
    assert "weak alone" in text and "apgd alone" in text
    missing = np.isinf(curve.distances).sum()
    assert (f"No adversarial example was found for {missing} images." in text) == (missing > 0)


@pytest.mark.parametrize(
    ("norm", "attack"),
    [
        ("l2", attacks.ddn),
        ("l1", partial(attacks.fmn, num_steps=50)),
        ("l2", attacks.minimum_norm(partial(attacks.fab, num_steps=10))),
    ],
)
def test_other_norms_and_attacks(norm, attack):
    curve = attacks.robustness_curve(
        KEY, network, X, Y, [0.0, 3.0], norm=norm, attack=attack, check_radii=(), bounds=BOUNDS
    )
    assert curve.accuracy[0] == CLEAN > curve.accuracy[1] and curve.checked_radii.size == 0
    assert "alone" not in str(curve)


def test_dict_table_and_plot(curve, monkeypatch):
    restored = json.loads(json.dumps(curve.to_dict(), allow_nan=False))
    assert restored["norm"] == "linf" and restored["attack"] == "fmn"
    np.testing.assert_array_equal(restored["accuracy"], curve.accuracy)
    np.testing.assert_array_equal(restored["distances"], curve.distances)
    lines = str(curve).splitlines()
    assert lines[0].startswith("Robust accuracy of 19 images, L-inf; median distance 0.")
    assert len(lines) == 2 + len(RADII) and lines[2].split() == ["0", f"{100 * CLEAN:.2f}"]
    assert sum(len(line.split()) == 4 for line in lines[2:]) == len(curve.checked_radii)
    monkeypatch.setenv("MPLBACKEND", "agg")
    ax = curve.plot()
    np.testing.assert_allclose(ax.lines[0].get_xydata(), np.stack([RADII, 100 * curve.accuracy], axis=1))
    np.testing.assert_allclose(ax.lines[1].get_ydata(), 100 * curve.apgd_accuracy)
    assert curve.plot(ax) is ax
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match="plot needs Matplotlib: pip install matplotlib"):
        curve.plot()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"radii": []}, "radii must be at least one radius"),
        ({"radii": 0.1}, "radii must be a list"),
        ({"radii": [-0.1]}, "radii must be a list of finite radii"),
        ({"radii": ["a"]}, "radii must be an array of numbers"),
        ({"check_radii": [np.inf]}, "check_radii must be a list of finite radii"),
        ({"norm": "l3"}, "Unknown norm 'l3'"),
        ({"attack": attacks.ddn}, "Unknown norm 'linf'. There are: l2"),
        ({"attack": "fmn"}, "attack must be a minimum-norm attack"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"x": X[:0], "y": Y[:0]}, "no images"),
        ({"y": Y + 2}, "y must be labels of 2 classes"),
        ({"key": 0}, "key must be typed"),
        ({"logits_fn": lambda x: (network(x), 0)}, "logits_fn must return one array"),
    ],
)
def test_invalid_arguments_give_one_line(change, message):
    arguments = {"key": KEY, "logits_fn": network, "x": X, "y": Y, "radii": [0.1]} | change
    with pytest.raises(ValueError, match=message) as caught:
        attacks.robustness_curve(**arguments)
    assert "\n" not in str(caught.value)


def test_pixels_from_0_to_255():
    scaled = attacks.robustness_curve(
        KEY, lambda x: network(x / 255), 255 * X, Y, 255 * RADII[::6], bounds=(-510, 765), check_radii=(),
        attack=partial(attacks.fmn, step_size=255.0),
    )  # fmt: skip
    np.testing.assert_allclose(scaled.distances, 255 * exact_distances(), rtol=1e-2, atol=1e-4)

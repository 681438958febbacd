"""Metrics against values computed by hand from the six images of `hand_made`, and against scikit-learn."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, balanced_accuracy_score, recall_score

from lt_adv.evaluation import (
    Records,
    accuracy,
    balanced_accuracy,
    compute_metrics,
    error_decomposition,
    find_warnings,
    summarise,
)

COUNTS = (10, 100, 1)  # bee is the head, ant the body, cat the tail


def random_records(seed, classes=5, images=60, attacks=2):
    rng = np.random.default_rng(seed)
    draw = lambda: rng.integers(0, classes, images, dtype=np.int32)  # noqa: E731
    names = [f"attack{i}" for i in range(attacks)]
    header = {"class_names": [f"class {c}" for c in range(classes)], "attacks": {name: {} for name in names}}
    label = draw()
    clean = np.where(rng.random(images) < 0.7, label, draw())
    columns = {name: np.where(rng.random(images) < 0.6, clean, draw()) for name in names}
    return Records(header, np.arange(images), label, clean, columns)


def test_overall_and_balanced_accuracy(hand_made):
    assert accuracy(hand_made, "clean") == 4 / 6
    assert accuracy(hand_made, "fgsm") == 4 / 6
    assert accuracy(hand_made, "pgd20") == 2 / 6
    assert accuracy(hand_made, "worst") == 1 / 6  # the third image is correct under attack, but wrong clean
    assert balanced_accuracy(hand_made, "clean") == pytest.approx(5 / 9, rel=1e-15)
    assert balanced_accuracy(hand_made, "fgsm") == pytest.approx(13 / 18, rel=1e-15)
    assert balanced_accuracy(hand_made, "pgd20") == pytest.approx(5 / 18, rel=1e-15)
    assert balanced_accuracy(hand_made, "worst") == pytest.approx(1 / 6, rel=1e-15)


def test_error_decomposition(hand_made):
    assert error_decomposition(hand_made) == {
        "images": 6, "natural_errors": 2, "boundary_errors": 3, "robust_errors": 5,
        "natural_error": 2 / 6, "boundary_error": 3 / 6, "robust_error": 5 / 6,
    }  # fmt: skip
    errors = lambda c: [error_decomposition(hand_made, [c])[f"{k}_errors"] for k in ("natural", "boundary", "robust")]  # noqa: E731
    assert [errors(c) for c in range(3)] == [[1, 2, 3], [0, 1, 1], [1, 0, 1]]
    assert error_decomposition(hand_made, [0, 1])["boundary_error"] == 3 / 5


def test_summary(hand_made):
    summary = summarise(hand_made, COUNTS)
    assert summary["groups"] == {"definition": "thirds", "head": ["bee"], "body": ["ant"], "tail": ["cat"]}
    figures = summary["metrics"]
    assert figures["eval/pgd20/accuracy"] == 2 / 6
    assert figures["eval/pgd20/balanced_accuracy"] == pytest.approx(5 / 18)
    assert [figures[f"eval/pgd20/accuracy_{group}"] for group in ("head", "body", "tail")] == [1 / 2, 1 / 3, 0.0]
    assert [figures[f"eval/worst/accuracy_{group}"] for group in ("head", "body", "tail")] == [1 / 2, 0.0, 0.0]
    assert figures["eval/natural_error"] == 2 / 6 and figures["eval/boundary_error_body"] == 2 / 3
    assert [row["name"] for row in summary["classes"]] == ["bee", "ant", "cat"]  # by training images
    assert [row["class_count"] for row in summary["classes"]] == [100, 10, 1]
    assert summary["classes"][1]["accuracy"] == {"clean": 2 / 3, "fgsm": 2 / 3, "pgd20": 1 / 3, "worst": 0.0}
    assert summary["classes"][2]["robust_errors"] == 1
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


@pytest.mark.parametrize("seed", range(3))
def test_metrics_agree_with_scikit_learn(seed):
    records = random_records(seed)
    for condition in ("clean", "attack0", "attack1"):
        prediction = records.prediction(condition)
        assert accuracy(records, condition) == pytest.approx(accuracy_score(records.label, prediction), rel=1e-12)
        expected = balanced_accuracy_score(records.label, prediction)
        assert balanced_accuracy(records, condition) == pytest.approx(expected, rel=1e-12)
    rows = {row["class"]: row for row in summarise(records, (5, 4, 3, 2, 1))["classes"]}
    recall = recall_score(records.label, records.clean, average=None)
    np.testing.assert_allclose([rows[c]["accuracy"]["clean"] for c in range(5)], recall, rtol=1e-12)
    worst = np.where(records.correct("worst"), records.label, -1)
    wrong = (records.clean != records.label) | np.any([a != records.label for a in records.attacks.values()], axis=0)
    np.testing.assert_array_equal(worst == -1, wrong)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), attacks=st.integers(0, 3), images=st.integers(1, 40))
def test_natural_plus_boundary_is_robust_error(seed, attacks, images):
    records = random_records(seed, images=images, attacks=attacks)
    np.testing.assert_array_equal(records.natural_error | records.boundary_error, records.robust_error)
    assert not np.any(records.natural_error & records.boundary_error)
    summary = summarise(records, (50, 40, 30, 20, 10))
    for part in (*summary["decomposition"].values(), *summary["classes"]):
        assert part["natural_errors"] + part["boundary_errors"] == part["robust_errors"]
    total = summary["decomposition"]["all"]
    for error in ("natural_errors", "boundary_errors", "robust_errors", "images"):
        assert sum(row[error] for row in summary["classes"]) == total[error]
    assert total["robust_errors"] == images - records.correct("worst").sum()
    for name in records.attacks:
        assert accuracy(records, "worst") <= min(accuracy(records, "clean"), accuracy(records, name))


def test_classes_without_test_images_are_left_out(hand_made):
    records = hand_made.take(hand_made.label != 2)
    assert len(records) == 5
    assert balanced_accuracy(records, "clean") == pytest.approx(5 / 6)  # (2/3 + 1) / 2
    summary = summarise(records, COUNTS)
    assert summary["metrics"]["eval/clean/accuracy_tail"] is None
    assert summary["classes"][2]["accuracy"]["clean"] is None and summary["classes"][2]["robust_error"] is None
    json.dumps(summary, allow_nan=False)


def test_other_group_definitions_and_bad_counts(hand_made):
    figures = summarise(hand_made, COUNTS, "robustlt")
    assert figures["groups"]["definition"] == "robustlt" and "body" not in figures["groups"]
    with pytest.raises(ValueError, match="group definition 'third'"):
        summarise(hand_made, COUNTS, "third")
    with pytest.raises(ValueError, match="has 2 entries, the records have 3 classes"):
        summarise(hand_made, COUNTS[:2])


def test_metric_names(hand_made):
    names = compute_metrics(hand_made, {"tail": [2]})
    conditions = ("clean", "fgsm", "pgd20", "worst")
    expected = {f"eval/{c}/{n}" for c in conditions for n in ("accuracy", "balanced_accuracy", "accuracy_tail")}
    expected |= {f"eval/{e}_error{s}" for e in ("natural", "boundary", "robust") for s in ("", "_tail")}
    assert set(names) == expected


def test_warnings_on_six_images(hand_made):
    lines = find_warnings(hand_made)
    # 1/3 + 3 sqrt(2/9 (1/3 + 1/2 + 1)) / 3 = 0.9716
    assert lines[0] == (
        "clean: balanced accuracy 55.56 % is not above chance level (1/3 plus 3 standard errors = 97.16 %)."
    )
    assert lines[1].startswith("worst: balanced accuracy 16.67 %")
    assert lines[2] == "clean: 1 of 3 classes are never predicted on 6 images: cat."
    assert len(lines) == 3


def test_no_warning_for_a_good_network_and_one_for_an_idle_attack():
    label = np.repeat(np.arange(3), 100).astype(np.int32)
    attacked = np.where(np.arange(300) % 3 == 0, (label + 1) % 3, label)
    header = {"class_names": ["ant", "bee", "cat"], "attacks": {"pgd20": {}}}
    good = Records(header, np.arange(300), label, label, {"pgd20": attacked})
    assert find_warnings(good) == []
    idle = Records(header, np.arange(300), label, label, {"pgd20": label})
    assert find_warnings(idle) == ["pgd20: the attack changed no prediction at all; check its radius and the gradient."]
    constant = Records({**header, "attacks": {}}, np.arange(300), label, 0 * label, {})
    assert [warning.split(":")[0] for warning in find_warnings(constant)] == ["clean", "clean"]


def test_one_image_is_not_compared_with_chance(hand_made):
    """Its threshold is 1/3 + 3 sqrt(2/9) = 175 %."""
    for image in range(6):
        assert not any("chance level" in line for line in find_warnings(hand_made.take(np.arange(6) == image)))

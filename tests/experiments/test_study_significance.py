"""Tests of differences against written-out formulas, simulations and limits."""

import json

import numpy as np
import pytest
from scipy import stats

from experiments.study import significance
from experiments.study.outcomes import Outcomes
from experiments.study.significance import difference, estimate, holm
from lt_adv.evaluation.records import Records

GROUPS = {"head": [0, 1], "tail": [2, 3]}
LABEL = np.repeat(np.arange(4), 50)


def outcomes(clean, worst=None, images="a", label=LABEL):
    worst = clean if worst is None else worst
    return Outcomes(images, label, {"clean": np.asarray(clean, bool), "worst": np.asarray(worst, bool)})


def draw(rng, accuracy, label=LABEL):
    return rng.random(len(label)) < accuracy


@pytest.fixture
def runs():
    rng = np.random.default_rng(0)
    return {
        row: [outcomes(draw(rng, clean), draw(rng, worst)) for _ in range(seeds)]
        for row, clean, worst, seeds in (("at", 0.5, 0.3, 2), ("robal", 0.7, 0.4, 3), ("reat", 0.6, 0.35, 1))
    }


def accuracies(runs, row, condition, classes=range(4)):
    return np.array([run.correct[condition][np.isin(LABEL, list(classes))].mean() for run in runs[row]])


@pytest.mark.parametrize(("group", "classes"), [("all", range(4)), ("tail", (2, 3))])
def test_difference_of_two_rows_is_the_written_out_formula(runs, group, classes):
    result = estimate(difference("robal", "at", "worst", group), runs, GROUPS)
    a, b = (accuracies(runs, row, "worst", classes) for row in ("robal", "at"))
    assert result.value == pytest.approx(100 * (a.mean() - b.mean()), abs=1e-12)

    member = np.isin(LABEL, list(classes))
    means = [np.mean([run.correct["worst"] for run in runs[row]], axis=0) for row in ("robal", "at")]
    d = (means[0] - means[1]) * member * len(LABEL) / member.sum()
    images = sum(np.var(d[c == LABEL], ddof=1) / 50 / 16 for c in range(4))
    pooled = (2 * a.var(ddof=1) + b.var(ddof=1)) / 3  # "reat" has one seed
    seeds = pooled / 3 + pooled / 2
    assert result.standard_error == pytest.approx(100 * np.sqrt(images + seeds), rel=1e-12)
    freedom = 3 * ((images + seeds) / seeds) ** 2
    t = (a.mean() - b.mean()) / np.sqrt(images + seeds)
    assert result.p_value == pytest.approx(2 * stats.t.sf(abs(t), freedom), rel=1e-9)


def test_contrast_of_several_conditions_uses_their_covariance(runs):
    """Two conditions that vary together between seeds cancel in their difference."""
    same = {row: [outcomes(run.correct["clean"]) for run in row_runs] for row, row_runs in runs.items()}
    contrast = difference("robal", "at", "clean") | {
        term: -weight for term, weight in difference("robal", "at", "worst").items()
    }
    result = estimate(contrast, same, GROUPS)
    assert (result.value, result.p_value) == (pytest.approx(0), 1.0) and result.standard_error < 1e-6
    assert estimate(difference("robal", "at", "clean"), same, GROUPS).standard_error > 1


def test_networks_that_rows_share_are_pooled_once(runs):
    """A row that evaluates the networks of another adds no degree of freedom."""
    copies = runs | {f"posthoc_{i}": runs["at"] for i in range(5)}
    contrast = difference("robal", "at", "worst")
    alone, pooled = estimate(contrast, runs, GROUPS), estimate(contrast, copies, GROUPS, pooled=["at", "robal", "reat"])
    assert pooled == alone and estimate(contrast, copies, GROUPS) != alone


def test_pairing_removes_what_images_share():
    """Rows that are right on almost the same images differ by less noise than rows that are right on others."""
    rng = np.random.default_rng(1)
    easy = draw(rng, 0.5)
    almost = easy.copy()
    almost[:4] = ~almost[:4]
    paired = {"a": [outcomes(easy)] * 2, "b": [outcomes(almost)] * 2}
    unpaired = {"a": [outcomes(easy)] * 2, "b": [outcomes(draw(rng, 0.5))] * 2}
    errors = [estimate(difference("a", "b", "clean"), runs, {}).standard_error for runs in (paired, unpaired)]
    assert errors[0] < errors[1] / 3


def test_p_values_are_uniform_where_rows_do_not_differ():
    """Images of different difficulty, networks that vary between seeds: 5 % of the tests at most are significant."""
    rng = np.random.default_rng(2)
    p_values = []
    for _ in range(400):
        difficulty = rng.normal(size=len(LABEL))
        runs = {
            row: [outcomes(difficulty + 0.2 * rng.normal() + 0.5 * rng.normal(size=len(LABEL)) < 0) for _ in range(2)]
            for row in "abcdef"
        }
        p_values.append(estimate(difference("a", "b", "clean"), runs, {}).p_value)
    rejected = np.mean(np.array(p_values) < 0.05)
    assert 0.005 <= rejected <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 400)


def test_a_real_difference_is_found():
    rng = np.random.default_rng(3)
    label = np.repeat(np.arange(10), 1000)
    runs = {row: [outcomes(draw(rng, p, label), label=label) for _ in range(2)] for row, p in (("a", 0.35), ("b", 0.3))}
    assert estimate(difference("a", "b", "clean"), runs, {}).p_value < 0.01


def test_nothing_is_estimated_without_the_measurements(runs):
    one_seed = {row: row_runs[:1] for row, row_runs in runs.items()}
    assert estimate(difference("robal", "at", "worst"), one_seed, GROUPS) is None
    assert estimate(difference("robal", "trades", "worst"), runs, GROUPS) is None
    assert estimate(difference("robal", "at", "autoattack"), runs, GROUPS) is None
    others = runs | {"at": [outcomes(run.correct["clean"], images="b") for run in runs["at"]]}
    assert estimate(difference("robal", "at", "worst"), others, GROUPS) is None
    label = np.arange(200)
    single = {row: [outcomes(run.correct["clean"], label=label) for run in runs[row]] for row in ("robal", "at")}
    assert estimate(difference("robal", "at", "clean"), single, {}) is None


def test_holm():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0] and holm([]) == [] and holm([0.02]) == [0.02]
    assert significance.LEVEL == 0.05


def test_outcomes_of_records_survive_json():
    rng = np.random.default_rng(4)
    label, n = rng.integers(0, 300, 101), 101
    header = {"class_names": [str(c) for c in range(300)]}
    predictions = [np.where(rng.random(n) < p, label, -1) for p in (0.8, 0.5, 0.4)]
    attacks = {"pgd20": predictions[1], "lsa": predictions[2]}
    records = Records(header, np.arange(n) * 7, label, predictions[0], attacks)
    stored = Outcomes.of(records)
    loaded = Outcomes.from_json(json.loads(json.dumps(stored.to_json())))
    assert loaded.images == stored.images and np.array_equal(loaded.label, label)
    assert set(loaded.correct) == {"clean", "pgd20", "lsa", "worst"}
    for condition in loaded.correct:
        assert np.array_equal(loaded.correct[condition], records.correct(condition))
    moved = Outcomes.of(Records(header, np.arange(n), label, predictions[0], {}))
    assert moved.images != stored.images and "pgd20" not in moved.correct

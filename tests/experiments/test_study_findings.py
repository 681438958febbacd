"""Findings follow the outcomes: a claim holds or fails only if a test says so."""

import numpy as np
import pytest

from experiments.study import findings, published
from experiments.study.findings import FAILS, HOLDS, UNKNOWN
from experiments.study.outcomes import Outcomes
from experiments.study.rows import ROWS
from experiments.study.summary import spread
from lt_adv.evaluation.report import table

GROUPS = {"head": [0, 1, 2], "tail": [7, 8, 9]}
# Accuracy clean, under PGD-20, and in the worst case, of all classes; and in the worst case of the tail.
PUBLISHED_PATTERN = {  # figures with which the claims of the papers hold
    "at": (0.30, 0.20, 0.19, 0.01),
    "cosine": (0.35, 0.20, 0.19, 0.02),
    "cdt": (0.36, 0.24, 0.17, 0.02),
    "tau_norm": (0.37, 0.25, 0.18, 0.03),
    "robal": (0.40, 0.28, 0.25, 0.15),
    "at_bsl": (0.40, 0.25, 0.22, 0.05),
    "reat": (0.40, 0.25, 0.22, 0.055),
    "self_distillation": (0.40, 0.25, 0.22, 0.20),
}


def outcomes(clean, pgd, worst, tail, images=10_000, shift=0.0):
    """Returns outcomes with these accuracies, plus `shift`. All rows are wrong on the same hard images of a class."""
    label = np.repeat(np.arange(10), images // 10)
    position = np.tile(np.arange(images // 10), 10) / (images // 10)  # difficulty within the class
    in_worst_case = np.where(np.isin(label, GROUPS["tail"]), tail, (worst - 0.3 * tail) / 0.7) + shift
    accuracies = {"clean": clean, "pgd20": pgd, "worst": worst}
    correct = {name: position < in_worst_case + accuracy - worst for name, accuracy in accuracies.items()}
    return Outcomes("a", label, correct)


def runs(accuracies, seeds=2, **options):
    """Returns the outcomes of rows whose accuracies differ by half a point from seed to seed."""
    return {
        row: [outcomes(*values, shift=0.005 * seed, **options) for seed in range(seeds)]
        for row, values in accuracies.items()
    }


def verdicts(accuracies, **options):
    return {finding["claim"]: finding["verdict"] for finding in findings.test(runs(accuracies, **options), GROUPS)}


def test_claims_of_the_papers_hold():
    result = verdicts(PUBLISHED_PATTERN)
    assert result == {
        "Long-tail methods gain more natural than robust accuracy": HOLDS,
        "Temperatures and rescaled classifiers gain more under PGD than in the worst case": HOLDS,
        "RoBal-N is the most robust of the study's methods": HOLDS,
        "RoBal-N has the most robust tail of the study's methods": HOLDS,
        "REAT lifts the tail above AT-BSL": UNKNOWN,
        "The self-teacher lifts the tail above AT-BSL": HOLDS,
    }


@pytest.mark.parametrize(
    ("claim", "rows", "verdict"),
    [
        ("Long-tail methods gain more", {row: (0.2, 0.2, 0.19, 0.01) for row in ("cosine", "cdt", "tau_norm")}, FAILS),
        ("Temperatures", {"cdt": (0.36, 0.24, 0.24, 0.02)}, FAILS),
        ("Temperatures", {"cdt": (0.36, 0.20, 0.19, 0.02)}, UNKNOWN),
        ("RoBal-N is", {"robal": (0.40, 0.28, 0.10, 0.1)}, FAILS),
        ("RoBal-N is", {"robal": (0.40, 0.28, 0.192, 0.01)}, UNKNOWN),
        ("RoBal-N has", {"cosine": (0.35, 0.20, 0.19, 0.3)}, FAILS),
        ("REAT", {"reat": (0.40, 0.25, 0.22, 0.12)}, HOLDS),
        ("The self-teacher", {"self_distillation": (0.40, 0.25, 0.22, 0.01)}, FAILS),
    ],
)
def test_verdict_follows_the_outcomes(claim, rows, verdict):
    result = verdicts({**PUBLISHED_PATTERN, **rows})
    assert [value for text, value in result.items() if text.startswith(claim)] == [verdict]


def test_one_seed_or_few_images_tell_nothing():
    assert set(verdicts(PUBLISHED_PATTERN, seeds=1).values()) == {UNKNOWN}
    few = verdicts({"at": (0.30, 0.20, 0.19, 0.10), "robal": (0.4, 0.3, 0.24, 0.2)}, images=100)
    assert set(few.values()) == {UNKNOWN}


def test_our_recipe_is_compared_with_every_row():
    ours = {**PUBLISHED_PATTERN, "lt_adv": (0.40, 0.30, 0.28, 0.30)}
    made = findings.test(runs(ours), GROUPS)[-2:]
    assert [(len(finding["comparisons"]), finding["verdict"]) for finding in made] == [(8, HOLDS)] * 2
    smallest = min(made[0]["comparisons"], key=lambda c: c["value"])
    assert smallest["text"] == "worst case, difference to RoBal-N" and smallest["value"] == pytest.approx(3, abs=0.1)
    ours["lt_adv"] = (0.40, 0.30, 0.28, 0.19)
    assert [finding["verdict"] for finding in findings.test(runs(ours), GROUPS)[-2:]] == [HOLDS, FAILS]


def test_robustness_is_also_compared_under_autoattack():
    """On its own images, for the rows that have it, and counted among the comparisons."""
    rows = {name: PUBLISHED_PATTERN[name] for name in ("at", "at_bsl", "self_distillation", "cosine", "robal")}
    autoattack = {
        row: [Outcomes("b", run.label, {"autoattack": run.correct["worst"]}) for run in row_runs]
        for row, row_runs in runs({name: rows[name] for name in list(rows)[:3]}, images=2_000).items()
    }
    alone, made = (findings.test(runs(rows), GROUPS, other) for other in ({}, autoattack))
    (under_autoattack,) = made[len(alone) :]
    assert under_autoattack["claim"] == "The self-teacher lifts the tail above AT-BSL, under AutoAttack"
    (comparison,) = under_autoattack["comparisons"]
    assert comparison["text"] == "AutoAttack tail, difference to AT-BSL" and under_autoattack["verdict"] == HOLDS
    assert comparison["value"] == pytest.approx(15, abs=0.1)
    for finding, expected in zip(made, alone, strict=False):
        for one, other in zip(finding["comparisons"], expected["comparisons"], strict=True):
            assert one["p_value"] == other["p_value"] and one["adjusted_p_value"] >= other["adjusted_p_value"]
    one_seed = {row: row_runs[:1] for row, row_runs in autoattack.items()}
    assert findings.test(runs(rows), GROUPS, one_seed)[-1]["verdict"] == UNKNOWN


def test_more_comparisons_need_a_larger_difference():
    """The same two rows, alone and beside two rows that do not differ."""
    accuracies = {"at_bsl": (0.4, 0.25, 0.22, 0.05), "reat": (0.4, 0.25, 0.22, 0.0585)}
    (alone,) = findings.test(runs(accuracies), GROUPS)
    rows = {**accuracies, "at": PUBLISHED_PATTERN["at"], "robal": PUBLISHED_PATTERN["at"]}
    among = {finding["claim"]: finding for finding in findings.test(runs(rows), GROUPS)}
    (one,), (other,) = alone["comparisons"], among[alone["claim"]]["comparisons"]
    assert len(among) == 3 and one["value"] == pytest.approx(other["value"]) == pytest.approx(0.85, abs=0.05)
    assert one["adjusted_p_value"] == one["p_value"] and 0.001 < one["p_value"] < 0.2
    assert other["adjusted_p_value"] == pytest.approx(3 * other["p_value"])


def test_what_was_not_measured_is_left_out():
    assert len(verdicts({name: PUBLISHED_PATTERN[name] for name in ("at", "cosine")})) == 1
    assert verdicts({"robal": PUBLISHED_PATTERN["robal"]}) == {} and findings.test({}, GROUPS) == []
    without_attack = {
        row: [Outcomes(run.images, run.label, {"clean": run.correct["clean"]}) for run in row_runs]
        for row, row_runs in runs({name: PUBLISHED_PATTERN[name] for name in ("at_bsl", "reat")}).items()
    }
    (finding,) = findings.test(without_attack, GROUPS)
    assert finding == {"claim": "REAT lifts the tail above AT-BSL", "comparisons": [], "verdict": UNKNOWN}


def test_findings_are_a_table_of_a_study():
    (made,) = findings.tables({"findings": findings.test(runs(PUBLISHED_PATTERN), GROUPS)})
    lines = table(*made).splitlines()
    assert lines[0] == "| Claim | Measured | Difference, points | Adjusted p | Verdict |" and len(lines) == 8
    assert lines[1] == "| :-- | :-- | --: | --: | --: |"
    assert lines[-1].startswith(
        "| The self-teacher lifts the tail above AT-BSL | worst case tail, difference to AT-BSL | +15.0 ± "
    )
    assert lines[-1].endswith("| < 0.001 | holds |")
    assert (
        "RoBal-N is the most robust of the study's methods | worst case, difference to AT (of 4 comparisons) |"
        in "".join(lines)
    )
    (made,) = findings.tables({"findings": findings.test(runs(PUBLISHED_PATTERN, seeds=1), GROUPS)})
    assert made[1][0][1:] == ["one seed, or different images", "", "", UNKNOWN]
    assert findings.tables({"findings": []}) == findings.tables({}) == []


@pytest.mark.parametrize(
    ("comparisons", "verdict", "shown"),
    [
        ([(1.0, 0.001), (2.0, 0.4)], UNKNOWN, 2.0),
        ([(-3.0, 0.4), (-1.0, 0.001)], FAILS, -1.0),
        ([(5.0, 0.01), (3.0, 0.02)], HOLDS, 3.0),
        ([(2.0, 1.0), (1.0, 1.0)], UNKNOWN, 1.0),
    ],
)
def test_the_comparison_that_decides_is_shown(comparisons, verdict, shown):
    made = [
        {"text": "", "value": value, "standard_error": 1.0, "p_value": p, "adjusted_p_value": p}
        for value, p in comparisons
    ]
    assert findings.verdict(made) == verdict
    assert findings.deciding({"comparisons": made, "verdict": verdict})["value"] == shown


def test_published_rows_exist_and_their_configs_have_the_numbers():
    import ast
    from pathlib import Path

    for row in published.ROBAL_FIGURE:
        text = ast.get_docstring(ast.parse(Path(f"configs/{ROWS[row].config}.py").read_text()))
        expected = " ".join(text.partition("Expected")[2].split())
        assert f"{published.SETTING}: " in expected and published.in_words(row) in expected, row


def test_rank_correlation_with_the_published_order():
    rows = {
        name: {"figures": {"eval/clean/accuracy": spread([clean / 100]), "eval/worst/accuracy": spread([1 - robust])}}
        for name, (clean, robust) in published.ROBAL_FIGURE.items()
    }
    clean, worst = published.rank_correlations({**rows, "natural": rows["at"]})
    assert (clean["condition"], clean["published"], clean["rows"]) == ("clean", "clean", 19)
    assert clean["correlation"] == pytest.approx(1) and clean["p_value"] < 1e-10
    assert (worst["condition"], worst["published"]) == ("worst", "robust")
    assert worst["correlation"] == pytest.approx(-1)
    few = {name: rows[name] for name in list(rows)[: published.FEWEST_ROWS - 1]}
    assert published.rank_correlations(few) == []

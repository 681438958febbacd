"""Findings follow the figures: each test changes the figures that a verdict depends on."""

import copy

import pytest

from experiments.study import findings
from experiments.study.rows import ROWS
from lt_adv.evaluation.report import table

AT = {"clean": 0.30, "pgd20": 0.20, "cw20": 0.20, "worst": 0.19, "tail": 0.01}
PUBLISHED_PATTERN = {  # figures with which all claims of the papers hold
    "at": AT,
    "cosine": {"clean": 0.35, "pgd20": 0.20, "cw20": 0.20, "worst": 0.19, "tail": 0.02},
    "cdt": {"clean": 0.36, "pgd20": 0.24, "cw20": 0.19, "worst": 0.18, "tail": 0.02},
    "tau_norm": {"clean": 0.37, "pgd20": 0.23, "cw20": 0.18, "worst": 0.17, "tail": 0.03},
    "robal": {"clean": 0.40, "pgd20": 0.26, "cw20": 0.25, "worst": 0.24, "tail": 0.15},
    "at_bsl": {"clean": 0.40, "pgd20": 0.25, "cw20": 0.22, "worst": 0.21, "tail": 0.05},
    "reat": {"clean": 0.40, "pgd20": 0.25, "cw20": 0.22, "worst": 0.21, "tail": 0.06},
    "self_distillation": {"clean": 0.40, "pgd20": 0.25, "cw20": 0.22, "worst": 0.21, "tail": 0.20},
}


OURS = {"clean": 0.40, "pgd20": 0.30, "cw20": 0.28, "worst": 0.27, "tail": 0.25}


def summary(accuracies, images=10000, seeds=1):
    rows = {}
    for name, values in accuracies.items():
        metrics = {f"eval/{c}/accuracy": values[c] for c in ("clean", "pgd20", "cw20", "worst")}
        metrics |= {"eval/worst/accuracy_tail": values["tail"], "eval/natural_error": 1 - values["clean"]}
        metrics["eval/boundary_error"] = values["clean"] - values["worst"]
        figures = {metric: {"mean": value} for metric, value in metrics.items()}
        rows[name] = {"title": ROWS[name].title, "figures": figures, "seeds": [*range(seeds)], "classes": [{}] * 10}
    return {"rows": rows, "about": {"images": images}}


def verdicts(accuracies, **options):
    return [verdict for _, _, verdict in findings.findings(summary(accuracies, **options))]


def changed(**rows):
    accuracies = copy.deepcopy(PUBLISHED_PATTERN)
    for name, values in rows.items():
        accuracies[name] |= values
    return accuracies


def test_claims_of_the_papers_hold():
    results = findings.findings(summary(PUBLISHED_PATTERN))
    assert [verdict for *_, verdict in results] == [*["held"] * 5, "undecided", "held"]
    text = {claim: measured for claim, measured, _ in results}
    assert text["Natural accuracy is easy to gain, robust accuracy is not"] == (
        "of 3 long-tail methods on AT 3 gain clean accuracy (mean +6.0), 0 worst-case robust accuracy (mean -1.0)"
    )
    assert "CDT: PGD-20 +4.0, CW-20 -1.0, worst case -1.0; Tau-normalisation" in "".join(text.values())
    assert "(mean -6.0 and +7.0)" in text["What is gained in natural error is lost in boundary error"]
    assert text["RoBal-N is the most robust of the study's methods"] == "worst case 24.0, AT 19.0"
    assert text["The self-teacher lifts the tail above AT-BSL"] == "worst case 20.0, AT-BSL 5.0"


@pytest.mark.parametrize(
    ("position", "rows", "verdict"),
    [
        (0, {name: {"clean": 0.2} for name in ("cosine", "cdt", "tau_norm")}, "not held"),
        (0, {name: {"worst": 0.28} for name in ("cosine", "cdt", "tau_norm")}, "not held"),
        (1, {"cdt": {"worst": 0.2}, "tau_norm": {"worst": 0.2}}, "not held"),
        (1, {"cdt": {"worst": 0.2}}, "partly held"),
        (1, {"cdt": {"pgd20": 0.1}, "tau_norm": {"pgd20": 0.1}}, "undecided"),
        (2, {name: {"worst": 0.32} for name in ("cosine", "cdt", "tau_norm")}, "not held"),
        (3, {"robal": {"worst": 0.1}}, "not held"),
        (3, {"robal": {"worst": 0.195}}, "undecided"),
        (4, {"cosine": {"tail": 0.3}}, "not held"),
        (5, {"reat": {"tail": 0.12}}, "held"),
        (6, {"self_distillation": {"tail": 0.01}}, "not held"),
    ],
)
def test_verdict_follows_its_figures(position, rows, verdict):
    assert verdicts(changed(**rows))[position] == verdict


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, ["held", "held"]),
        ({"worst": 0.25}, ["undecided", "held"]),
        ({"worst": 0.20}, ["not held", "held"]),
        ({"tail": 0.15}, ["held", "not held"]),
    ],
)
def test_our_recipe_is_compared_with_the_best_other_row(change, expected):
    made = findings.findings(summary({**PUBLISHED_PATTERN, "lt_adv": {**OURS, **change}}))
    assert [verdict for *_, verdict in made[-2:]] == expected
    assert [text.partition(", ")[2] for _, text, _ in made[-2:]] == ["RoBal-N 24.0", "Self-distillation 20.0"]


def test_more_images_and_seeds_decide_a_verdict():
    small = changed(reat={"tail": 0.08})
    assert [verdicts(small, images=n, seeds=s)[5] for n, s in ((1000, 1), (1000, 8), (8000, 1))] == [
        *("undecided", "held", "held")
    ]


def test_what_was_not_measured_is_left_out():
    assert len(verdicts({name: PUBLISHED_PATTERN[name] for name in ("at", "cosine")})) == 2
    assert verdicts({"robal": PUBLISHED_PATTERN["robal"]}) == []
    partly = summary(PUBLISHED_PATTERN)
    del partly["rows"]["reat"]["figures"]["eval/worst/accuracy_tail"]
    assert len(findings.findings(partly)) == 6


def test_findings_are_a_table_of_a_study():
    (made,) = findings.tables(summary(PUBLISHED_PATTERN))
    text = table(*made)
    assert text.splitlines()[1] == "| :-- | :-- | :-- |" and len(text.splitlines()) == 9
    assert text.endswith("| worst case 20.0, AT-BSL 5.0 | held |")
    assert findings.tables(summary({"robal": PUBLISHED_PATTERN["robal"]})) == []

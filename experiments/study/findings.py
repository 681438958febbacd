"""Claims of the papers and our own, tested on the outcomes of a study."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.study import significance
from experiments.study.rows import ROWS
from experiments.study.significance import Runs, Term, difference
from lt_adv.evaluation.metrics import title
from lt_adv.evaluation.records import CLEAN, WORST

BASELINE, OURS = "at", "lt_adv"
AUTOATTACK = "autoattack"
HOLDS, FAILS, UNKNOWN = "holds", "does not hold", "cannot be told at this scale"
RESCALING = ("cdt", "posthoc_cdt", "tau_norm")
LONG_TAIL = (  # methods of long-tailed recognition combined with AT, as in the study of RoBal
    *("cosine", "margin", "ldam", "cdt", "logit_adjustment", "focal", "class_balanced_focal", "resampling"),
    *("deferred_reweighting", "deferred_margin", "finetune_resampling", "finetune_reweighting", "lws"),
    *("posthoc_cdt", "tau_norm", "posthoc_logit_adjustment", "tde"),
)


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim: it holds if all its contrasts are above 0, and does not hold if one is below."""

    text: str
    contrasts: Mapping[str, Mapping[Term, float]]  # what is measured, in words -> contrast


def claims(runs: Runs, condition: str = WORST) -> list[Claim]:
    """Returns the claims about the rows of a study; those about missing rows are left out.

    Args:
        runs: outcomes of the rows.
        condition: what robustness is, the worst case or AutoAttack. Only claims that compare robustness among rows are
            made under AutoAttack, which evaluates fewer images.
    """
    rows = [row for row in runs if not ROWS[row].varies]
    candidates = [*(gains(rows) if condition == WORST else ()), *comparisons_of_robustness(rows, condition)]

    def measured(claim: Claim) -> bool:
        terms = [term for contrast in claim.contrasts.values() for term in contrast]
        return bool(terms) and all(row in rows for row, _, _ in terms)

    return [claim for claim in candidates if measured(claim)]


def gains(rows: Sequence[str]) -> list[Claim]:
    """Returns the claims about gains over AT, clean and under several attacks."""
    long_tail = [row for row in LONG_TAIL if row in rows]
    return [
        Claim(
            "Long-tail methods gain more natural than robust accuracy",
            {
                "mean gain over AT, clean": mean_gain(long_tail, CLEAN),
                "mean gain over AT, clean less worst case": minus(
                    mean_gain(long_tail, CLEAN), mean_gain(long_tail, WORST)
                ),
            },
        ),
        Claim(
            "Temperatures and rescaled classifiers gain more under PGD than in the worst case",
            {
                f"{ROWS[row].title}, gain over AT, PGD-20 less worst case": minus(
                    mean_gain([row], "pgd20"), mean_gain([row], WORST)
                )
                for row in RESCALING
                if row in rows
            },
        ),
    ]


def comparisons_of_robustness(rows: Sequence[str], condition: str) -> list[Claim]:
    """Returns the claims that one row is more robust than others."""
    studied, others = [BASELINE, *(row for row in LONG_TAIL if row in rows)], [row for row in rows if row != OURS]

    def exceeds(text: str, row: str, others: Sequence[str], group: str = "all") -> Claim:
        where = title(condition).lower() if condition == WORST else title(condition)
        where += "" if group == "all" else f" {group}"
        return Claim(
            text if condition == WORST else f"{text}, under {title(condition)}",
            {
                f"{where}, difference to {ROWS[other].title}": difference(row, other, condition, group)
                for other in others
                if other in rows
            },
        )

    return [
        exceeds("RoBal-N is the most robust of the study's methods", "robal", studied),
        exceeds("RoBal-N has the most robust tail of the study's methods", "robal", studied, "tail"),
        exceeds("REAT lifts the tail above AT-BSL", "reat", ["at_bsl"], "tail"),
        exceeds("The self-teacher lifts the tail above AT-BSL", "self_distillation", ["at_bsl"], "tail"),
        exceeds("DAFA lifts the tail of self-distillation", "self_distillation_dafa", ["self_distillation"], "tail"),
        exceeds("Our recipe is the most robust of all rows", OURS, others),
        exceeds("Our recipe has the most robust tail of all rows", OURS, others, "tail"),
    ]


def mean_gain(rows: Sequence[str], condition: str) -> dict[Term, float]:
    """Returns the contrast "mean over `rows` minus the baseline"; {} without rows."""
    gains = {(row, condition, "all"): 1 / len(rows) for row in rows}
    return gains | {(BASELINE, condition, "all"): -1.0} if rows else {}


def minus(first: Mapping[Term, float], second: Mapping[Term, float]) -> dict[Term, float]:
    """Returns the difference of two contrasts."""
    return {term: first.get(term, 0.0) - second.get(term, 0.0) for term in {**first, **second}}


def test(runs: Runs, groups: Mapping[str, Sequence[int]], autoattack: Runs | None = None) -> list[dict[str, Any]]:
    """Returns the findings of a study as JSON: claim, its comparisons and verdict.

    The p-values are adjusted for the number of comparisons of all claims (Holm); a difference is significant below 5 %.

    Args:
        runs: outcomes of the main evaluation.
        groups: "tail" -> its classes.
        autoattack: outcomes of AutoAttack, on fewer images.
    """
    tested = []
    for condition, outcomes in {WORST: runs, AUTOATTACK: autoattack or {}}.items():
        pooled = [row for row in outcomes if ROWS[row].base is None]  # others share networks with their base
        for claim in claims(outcomes, condition):
            estimates = {
                text: significance.estimate(contrast, outcomes, groups, pooled)
                for text, contrast in claim.contrasts.items()
            }
            tested.append((claim, estimates))
    p_values = [estimate.p_value for _, estimates in tested for estimate in estimates.values() if estimate]
    adjusted = iter(significance.holm(p_values))
    findings = []
    for claim, estimates in tested:
        comparisons = [
            {"text": text, **dataclasses.asdict(estimate), "adjusted_p_value": next(adjusted)}
            for text, estimate in estimates.items()
            if estimate
        ]
        complete = len(comparisons) == len(estimates)
        findings.append(
            {"claim": claim.text, "comparisons": comparisons, "verdict": verdict(comparisons) if complete else UNKNOWN}
        )
    return findings


def verdict(comparisons: Sequence[Mapping[str, Any]]) -> str:
    significant = [c["adjusted_p_value"] < significance.LEVEL for c in comparisons]
    if any(s and c["value"] < 0 for s, c in zip(significant, comparisons, strict=True)):
        return FAILS
    return HOLDS if all(significant) else UNKNOWN


def deciding(finding: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the comparison that decides a verdict: the one with the largest p-value, or against a claim that does
    not hold the one with the smallest."""
    comparisons = finding["comparisons"]
    if finding["verdict"] == FAILS:
        return min((c for c in comparisons if c["value"] < 0), key=lambda c: c["p_value"])
    return max(comparisons, key=lambda c: (c["p_value"], -c["value"]))


def tables(summary: Mapping[str, Any]) -> list[tuple[list[str], list[list[str]], int]]:
    """Returns the table of all findings with its number of left-aligned columns, or nothing without a finding.

    Of the comparisons of a claim it shows the one that decides.
    """
    rows = []
    for finding in summary.get("findings", []):
        number = len(finding["comparisons"])
        if not number:
            rows.append([finding["claim"], "one seed, or different images", "", "", finding["verdict"]])
            continue
        shown = deciding(finding)
        text = shown["text"] + (f" (of {number} comparisons)" if number > 1 else "")
        value = f"{shown['value']:+.1f} ± {shown['standard_error']:.1f}"
        rows.append([finding["claim"], text, value, p_value(shown["adjusted_p_value"]), finding["verdict"]])
    head = ["Claim", "Measured", "Difference, points", "Adjusted p", "Verdict"]
    return [(head, rows, 2)] if rows else []


def p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"

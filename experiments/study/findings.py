"""Checks claims of the papers and our own against the summary of a study: held, not held or undecided."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

Rows = Mapping[str, Mapping[str, Any]]
Finding = tuple[str, str, str]  # (claim, measurement in words, verdict)

BASELINE, OURS, WORST = "at", "lt_adv", "eval/worst/accuracy"
RESCALING = ("cdt", "posthoc_cdt", "tau_norm")
LONG_TAIL = (  # methods of long-tailed recognition combined with AT, as in the study of RoBal
    *("cosine", "margin", "ldam", "cdt", "logit_adjustment", "focal", "class_balanced_focal", "resampling"),
    *("deferred_reweighting", "deferred_margin", "finetune_resampling", "finetune_reweighting", "lws"),
    *("posthoc_cdt", "tau_norm", "posthoc_logit_adjustment", "tde"),
)


def findings(summary: Mapping[str, Any]) -> list[Finding]:
    """Returns the findings of a summary; a claim about missing rows is left out, a family counts its measured rows."""
    rows: Rows = summary["rows"]
    if BASELINE not in rows:
        return []
    images, classes = summary["about"]["images"], len(rows[BASELINE]["classes"])
    overall, tail = Noise(images), Noise(images * (classes // 3) / classes)  # the tail is the last third of the classes
    candidates: list[Finding | None] = [
        natural_gains_exceed_robust(rows),
        rescaling_gains_only_under_pgd(rows),
        natural_error_becomes_boundary_error(rows),
        exceeds_long_tail_methods(rows, overall, "robal", "RoBal-N is the most robust of the study's methods", WORST),
        exceeds_long_tail_methods(
            rows, tail, "robal", "RoBal-N has the most robust tail of the study's methods", f"{WORST}_tail"
        ),
        lifts_tail_above_at_bsl(rows, tail, "reat", "REAT lifts the tail above AT-BSL"),
        lifts_tail_above_at_bsl(rows, tail, "self_distillation", "The self-teacher lifts the tail above AT-BSL"),
        exceeds_all_rows(rows, overall, "Our recipe is the most robust of all rows", WORST),
        exceeds_all_rows(rows, tail, "Our recipe has the most robust tail of all rows", f"{WORST}_tail"),
    ]
    return [finding for finding in candidates if finding]


class Noise:
    """Compares accuracies over `images` images; differences below two standard errors are undecided."""

    def __init__(self, images: float):
        self.images = images

    def verdict(self, accuracy: float, other: float, seeds: int) -> str:
        """Returns whether `accuracy` exceeds `other`; both are taken as independent."""
        variance = (accuracy * (1 - accuracy) + other * (1 - other)) / max(self.images * seeds, 1)
        if abs(accuracy - other) <= 2 * math.sqrt(variance):
            return "undecided"
        return "held" if accuracy > other else "not held"


def mean(rows: Rows, name: str, metric: str) -> float:
    return rows[name]["figures"][metric]["mean"]


def gain(rows: Rows, name: str, metric: str) -> float:
    """Returns the gain over the baseline in percentage points."""
    return 100 * (mean(rows, name, metric) - mean(rows, BASELINE, metric))


def measured(rows: Rows, names: Sequence[str], *metrics: str) -> list[str]:
    """Returns those of `names` that have these metrics, or none if the baseline lacks one."""
    complete = [
        name for name in (BASELINE, *names) if name in rows and all(m in rows[name]["figures"] for m in metrics)
    ]
    return complete[1:] if BASELINE in complete else []


def natural_gains_exceed_robust(rows: Rows) -> Finding | None:
    metrics = ("eval/clean/accuracy", WORST)
    if not (names := measured(rows, LONG_TAIL, *metrics)):
        return None
    gains = {metric: [gain(rows, name, metric) for name in names] for metric in metrics}
    up = {metric: sum(value > 0 for value in values) for metric, values in gains.items()}
    average = {metric: sum(values) / len(values) for metric, values in gains.items()}
    clean, worst = metrics
    text = f"of {len(names)} long-tail methods on AT {up[clean]} gain clean accuracy (mean {average[clean]:+.1f}), "
    text += f"{up[worst]} worst-case robust accuracy (mean {average[worst]:+.1f})"
    held = 2 * up[clean] > len(names) and average[clean] > average[worst]
    return "Natural accuracy is easy to gain, robust accuracy is not", text, "held" if held else "not held"


def rescaling_gains_only_under_pgd(rows: Rows) -> Finding | None:
    """Undecided unless some row gains under PGD."""
    names = measured(rows, RESCALING, "eval/pgd20/accuracy", "eval/cw20/accuracy", WORST)
    if not names:
        return None
    parts, real = [], []
    for name in names:
        pgd, cw, worst = (gain(rows, name, m) for m in ("eval/pgd20/accuracy", "eval/cw20/accuracy", WORST))
        parts.append(f"{rows[name]['title']}: PGD-20 {pgd:+.1f}, CW-20 {cw:+.1f}, worst case {worst:+.1f}")
        if pgd > 0:
            real.append(worst > 0)
    verdict = "undecided" if not real else "held" if not any(real) else "not held" if all(real) else "partly held"
    return "Temperatures and rescaled classifiers gain under PGD only", "; ".join(parts), verdict


def natural_error_becomes_boundary_error(rows: Rows) -> Finding | None:
    metrics = ("eval/natural_error", "eval/boundary_error")
    names = [name for name in measured(rows, LONG_TAIL, *metrics) if gain(rows, name, metrics[0]) < 0]
    if not names:
        return None
    up = sum(gain(rows, name, metrics[1]) > 0 for name in names)
    natural, edge = (sum(gain(rows, name, m) for name in names) / len(names) for m in metrics)
    text = f"of {len(names)} methods with less natural error than AT {up} have more boundary error "
    text += f"(mean {natural:+.1f} and {edge:+.1f})"
    claim = "What is gained in natural error is lost in boundary error"
    return claim, text, "held" if 2 * up > len(names) and edge > 0 else "not held"


def exceeds_long_tail_methods(rows: Rows, noise: Noise, name: str, claim: str, metric: str) -> Finding | None:
    others = measured(rows, LONG_TAIL, metric)
    if not others or name not in measured(rows, [name], metric):
        return None
    best = max([BASELINE, *others], key=lambda other: mean(rows, other, metric))
    return claim, *_against(rows, noise, name, best, metric)


def exceeds_all_rows(rows: Rows, noise: Noise, claim: str, metric: str) -> Finding | None:
    names = measured(rows, [name for name in rows if name not in (OURS, BASELINE)], metric)
    if not measured(rows, [OURS], metric):
        return None
    return claim, *_against(rows, noise, OURS, max([BASELINE, *names], key=lambda row: mean(rows, row, metric)), metric)


def lifts_tail_above_at_bsl(rows: Rows, noise: Noise, name: str, claim: str) -> Finding | None:
    metric = f"{WORST}_tail"
    if len(measured(rows, [name, "at_bsl"], metric)) < 2:
        return None
    return claim, *_against(rows, noise, name, "at_bsl", metric)


def _against(rows: Rows, noise: Noise, name: str, other: str, metric: str) -> tuple[str, str]:
    accuracy, other_accuracy = mean(rows, name, metric), mean(rows, other, metric)
    text = f"worst case {100 * accuracy:.1f}, {rows[other]['title']} {100 * other_accuracy:.1f}"
    return text, noise.verdict(accuracy, other_accuracy, min(len(rows[name]["seeds"]), len(rows[other]["seeds"])))


def tables(summary: Mapping[str, Any]) -> list[tuple[list[str], list[list[str]], int]]:
    """Returns the table of all findings with its number of left-aligned columns, or nothing without a finding."""
    rows = [list(finding) for finding in findings(summary)]
    return [(["Claim", "Measured here, in points", "Verdict"], rows, 3)] if rows else []

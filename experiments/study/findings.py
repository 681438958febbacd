"""Checks claims of the papers and our own against the summary of a study: held, not held or undecided."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

Rows = Mapping[str, Mapping[str, Any]]
Finding = tuple[str, str, str]  # (claim, measurement in words, verdict)

BASELINE, OURS, WORST, WORST_TAIL = "at", "lt_adv", "eval/worst/accuracy", "eval/worst/accuracy_tail"
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
    long_tail = [name for name in LONG_TAIL if name in rows]
    studied, others = [BASELINE, *long_tail] if long_tail else [], [name for name in rows if name != OURS]
    candidates: list[Finding | None] = [
        natural_gains_exceed_robust(rows),
        rescaling_gains_only_under_pgd(rows),
        natural_error_becomes_boundary_error(rows),
        exceeds(rows, overall, "RoBal-N is the most robust of the study's methods", "robal", studied, WORST),
        exceeds(rows, tail, "RoBal-N has the most robust tail of the study's methods", "robal", studied, WORST_TAIL),
        exceeds(rows, tail, "REAT lifts the tail above AT-BSL", "reat", ["at_bsl"], WORST_TAIL),
        exceeds(
            rows, tail, "The self-teacher lifts the tail above AT-BSL", "self_distillation", ["at_bsl"], WORST_TAIL
        ),
        exceeds(rows, overall, "Our recipe is the most robust of all rows", OURS, others, WORST),
        exceeds(rows, tail, "Our recipe has the most robust tail of all rows", OURS, others, WORST_TAIL),
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
    complete = [name for name, row in rows.items() if all(metric in row["figures"] for metric in metrics)]
    return [name for name in names if name in complete] if BASELINE in complete else []


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


def exceeds(rows: Rows, noise: Noise, claim: str, name: str, others: Sequence[str], metric: str) -> Finding | None:
    """Compares a row with the best of `others`."""
    others = measured(rows, others, metric)
    if not others or not measured(rows, [name], metric):
        return None
    best = max(others, key=lambda other: mean(rows, other, metric))
    accuracy, other_accuracy = mean(rows, name, metric), mean(rows, best, metric)
    text = f"worst case {100 * accuracy:.1f}, {rows[best]['title']} {100 * other_accuracy:.1f}"
    seeds = min(len(rows[name]["seeds"]), len(rows[best]["seeds"]))
    return claim, text, noise.verdict(accuracy, other_accuracy, seeds)


def tables(summary: Mapping[str, Any]) -> list[tuple[list[str], list[list[str]], int]]:
    """Returns the table of all findings with its number of left-aligned columns, or nothing without a finding."""
    rows = [list(finding) for finding in findings(summary)]
    return [(["Claim", "Measured here, in points", "Verdict"], rows, 3)] if rows else []

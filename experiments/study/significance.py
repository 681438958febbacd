"""Tests of differences between rows, paired over the test images, with the variation between seeds."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence

import numpy as np
from scipy import stats

from experiments.study.outcomes import Outcomes

LEVEL = 0.05  # of the tests of a study together
Term = tuple[str, str, str]  # (row, condition, group of classes: "all", "head", "body" or "tail")
Runs = Mapping[str, Sequence[Outcomes]]  # row -> its outcomes, one per seed


@dataclasses.dataclass(frozen=True)
class Estimate:
    """An estimated contrast.

    Attributes:
        value: in percentage points.
        standard_error: of training again with new seeds and drawing other test images, in percentage points.
        p_value: two-sided, of no difference.
    """

    value: float
    standard_error: float
    p_value: float


def difference(row: str, other: str, condition: str, group: str = "all") -> dict[Term, float]:
    """Returns the contrast "accuracy of `row` minus that of `other`"."""
    return {(row, condition, group): 1.0, (other, condition, group): -1.0}


def estimate(
    contrast: Mapping[Term, float],
    runs: Runs,
    groups: Mapping[str, Sequence[int]],
    pooled: Collection[str] | None = None,
) -> Estimate | None:
    """Estimates a contrast, a weighted sum of accuracies.

    With a_rs the accuracies of row r with seed s under the terms of the contrast, w_r their weights and S_r the number
    of seeds, the value is sum_r w_r . mean_s a_rs, with the variance

        sum_c (n_c / n)^2 var_c(z) / n_c  +  sum_r w_r' V w_r / S_r.

    The first part is the variation over test images: z is the contrast of a single image, averaged over seeds, and
    var_c its variance over the n_c images of class c, since a test set has fixed numbers of images by class. Rows are
    paired in it. The second is the variation between seeds: V is the covariance of the a_rs over seeds around the mean
    of their row, pooled over the rows with several seeds, as two or three seeds of one row say little. It assumes that
    training varies equally for all rows, and independently: rows that share a network, such as a post-hoc adjustment
    and its base, differ by less. The p-value is that of Student's t with the degrees of freedom of Welch and
    Satterthwaite.

    Args:
        contrast: (row, condition, group) -> weight.
        runs: outcomes of all rows of the study.
        groups: "tail" -> its classes; "all" need not be among them.
        pooled: rows from which V is estimated, whose networks must be independent; by default all.

    Returns:
        None if a term was not measured, if outcomes are not on the same images or on one image of a class, or if no row
        has two seeds: what training again would change is then unknown.
    """
    rows = {row for row, _, _ in contrast}
    if not all(runs.get(row) for row in rows):
        return None
    images = {outcome.images for row in rows for outcome in runs[row]}
    conditions = {condition for _, condition, _ in contrast}
    outcomes_of_rows = [outcome for row in rows for outcome in runs[row]]
    measured = all(condition in outcome.correct for outcome in outcomes_of_rows for condition in conditions)
    label = outcomes_of_rows[0].label
    sizes = np.unique(label, return_counts=True)[1]
    if len(images) != 1 or not measured or min(sizes) < 2:
        return None

    def values(outcome: Outcomes, condition: str, group: str) -> np.ndarray:
        """Returns [n], whose mean is the accuracy of the group."""
        member = np.ones(len(label), bool) if group == "all" else np.isin(label, groups[group])
        return np.where(member, outcome.correct[condition], 0) * (len(label) / member.sum())

    # Images: the contrast of each.
    z = sum(
        weight * np.mean([values(outcome, condition, group) for outcome in runs[row]], axis=0)
        for (row, condition, group), weight in contrast.items()
    )
    by_class = [z[label == c] for c in np.unique(label)]
    image_variance = sum((len(part) / len(z)) ** 2 * np.var(part, ddof=1) / len(part) for part in by_class)

    # Seeds: residuals of the accuracies around the mean of their row.
    kinds = sorted({(condition, group) for _, condition, group in contrast})
    residuals, freedom = [], 0
    for outcomes in (runs[row] for row in runs if pooled is None or row in pooled):
        complete = all(condition in outcome.correct for outcome in outcomes for condition, _ in kinds)
        if len(outcomes) > 1 and complete and {outcome.images for outcome in outcomes} == images:
            accuracies = np.array([[values(outcome, *kind).mean() for kind in kinds] for outcome in outcomes])
            residuals.append(accuracies - accuracies.mean(axis=0))
            freedom += len(outcomes) - 1
    if not freedom:
        return None
    stacked = np.concatenate(residuals)
    covariance = stacked.T @ stacked / freedom
    seed_variance = 0.0
    for row in rows:
        w = np.array([contrast.get((row, *kind), 0.0) for kind in kinds])
        seed_variance += w @ covariance @ w / len(runs[row])

    variance = image_variance + seed_variance
    if variance == 0:
        return Estimate(100 * float(np.mean(z)), 0.0, 1.0 if not np.any(z) else 0.0)
    freedom_of_sum = freedom * (variance / seed_variance) ** 2 if seed_variance else np.inf
    t = np.mean(z) / np.sqrt(variance)
    p_value = 2 * stats.t.sf(abs(t), freedom_of_sum)
    return Estimate(100 * float(np.mean(z)), 100 * float(np.sqrt(variance)), float(p_value))


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns m p-values adjusted for their number (Holm, 1979): p_(i) <- min(max_{j <= i} (m - j + 1) p_(j), 1)."""
    order = np.argsort(p_values, kind="stable")
    adjusted = np.empty(len(p_values))
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted.tolist()

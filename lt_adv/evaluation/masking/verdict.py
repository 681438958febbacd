"""Verdict on gradient masking: compares the diagnostics of a network with those of a baseline.

No threshold is fixed in advance. Every value is compared with that of the baseline, image by image, and is significant
if the mean of the paired differences is more than three standard errors above zero, their standard error if there were
no difference.

A gap between PGD and stronger attacks alone is not a sign of gradient masking: heads and losses differ in it without
any masking, and with enough images every difference exceeds its noise. The verdict tests the claim of a table, a gain
under PGD or CW, and rejects a gain that gradient masking explains: most of it vanishes in the worst case over all
attacks. A gain under LSA is not tested: LSA targets networks with small logits and is weak on large ones.

References: Athalye, Carlini and Wagner, "Obfuscated gradients give a false sense of security", ICML 2018 (section 3.1
lists the signs); Carlini et al., "On evaluating adversarial robustness", 2019.
"""

from collections.abc import Mapping, Sequence
from typing import TypedDict

import numpy as np

from lt_adv.attacks._autoattack import DEPENDENCE
from lt_adv.evaluation.masking.diagnose import Diagnostics, correct_by_attack, text_to_bits
from lt_adv.evaluation.metrics import title
from lt_adv.evaluation.records import Columns

STANDARD_ERRORS = 3.0
MASKED = "Signs of gradient masking: robustness is overestimated"
NOT_MASKED = "No sign of gradient masking"
ROUNDING = float(np.sqrt(np.finfo(np.float32).eps))  # of logits between two passes, as a share of the largest
# Attacks that do not follow the gradient of the attacked network, or not only.
OTHER_ATTACKS = {"square": "Square", "autoattack": "AutoAttack", "transfer": "Transfer from the baseline"}


class Gain(TypedDict):
    """The gain over the baseline under one attack, on all images or those of one group; accuracies are in [0, 1]."""

    group: str  # "" for all images
    attack: str
    accuracy: float
    baseline: float
    worst: float  # accuracy in the worst case over all attacks
    baseline_worst: float
    gain: float  # accuracy - baseline
    noise: float  # three standard errors of `gain`; so for `lost` and `left`
    lost: float  # the part of the gain that vanishes in the worst case
    lost_noise: float
    strongest: str  # the single attack of lowest accuracy
    strongest_accuracy: float
    left: float  # gain in the worst case
    left_noise: float
    real: bool  # False: most of the gain is due to gradient masking


class Verdict(TypedDict):
    """The result of `masking_verdict`, which describes the entries."""

    trustworthy: bool | None
    words: str
    reasons: list[str]
    notes: list[str]
    gains: list[Gain]


class DiagnosticsSummary(TypedDict):
    """Diagnostics of a network, averaged over images; accuracies are in [0, 1]."""

    classes: int
    logits_change: float
    probabilities: bool
    logit_lead: float
    zero_gradient: float  # share of the images
    accuracy: dict[str, float]  # by attack
    worst: float
    by_lead: list[list[float]]  # [lead, accuracy] for each of LEADS
    by_radius: list[list[float]]  # [radius, accuracy]


def mean_and_noise(values: np.ndarray) -> tuple[float, float]:
    """Returns (mean, three standard errors) of one value per image.

    The standard error is that of no difference, sqrt(E v^2 / n): equal values of fewer than ten images are noise.
    """
    values = np.asarray(values, float)
    return float(values.mean()), STANDARD_ERRORS * float(np.sqrt(np.mean(values**2) / len(values)))


def significantly_larger(values: np.ndarray, baseline_values: np.ndarray) -> bool:
    """Whether the mean of the paired differences, values - baseline_values, is above its noise."""
    mean, noise = mean_and_noise(np.asarray(values, float) - baseline_values)
    return mean > noise


def masking_verdict(
    diagnostics: Diagnostics,
    baseline: Diagnostics | None,
    groups: Mapping[str, Sequence[int] | np.ndarray] | None = None,
) -> Verdict:
    """Returns the verdict on a network, from its diagnostics and those of a baseline on the same images.

    The result holds
      trustworthy: whether `reasons` is empty; without a baseline None instead of True
      words: the verdict in one line
      reasons: one sentence for each of
        - a random forward pass, probabilities instead of logits (both as AutoAttack's official checks), or logits that
          depend on the other images of a batch;
        - a gain over the baseline under PGD or CW, on all images or those of one group, that is above its noise and
          most of which vanishes in the worst case, by more than the noise of what vanishes;
        - more input gradients that are exactly zero than the baseline has;
        - more images than on the baseline that withstand every gradient attack but not Square or the transfer attack;
        - more images than on the baseline that are classified correctly at a radius that covers the full pixel range.
        Without a baseline there is no gain to test, and the last three compare with zero images
      notes: further sentences
      gains: one row per group and attack, as `gain_over_baseline` returns it

    Args:
      diagnostics: the result of `run_diagnostics` for the network.
      baseline: the same for the baseline, or None.
      groups: name -> classes; gains are also tested on the images of each group.

    Raises:
      ValueError: where the two diagnostics differ in protocol, images or number of classes.
    """
    reasons, notes = _forward_pass_reasons(diagnostics), _notes(diagnostics)
    if baseline is None:
        return _verdict_without_baseline(diagnostics, reasons, notes)
    for name in ("protocol", "label", "classes"):
        if diagnostics.get(name) != baseline.get(name):
            raise ValueError(
                f"The diagnostics of the network and its baseline differ in {name!r}: use the same images and protocol."
            )
    label = np.asarray(diagnostics["label"])
    correct, baseline_correct = correct_by_attack(diagnostics), correct_by_attack(baseline)
    masks = {"": np.ones(len(label), bool)}
    masks |= {name: np.isin(label, ids) for name, ids in (groups or {}).items() if np.isin(label, ids).any()}
    steps = diagnostics["protocol"]["num_steps"]
    gains = [
        gain_over_baseline(group, attack, _select(correct, mask), _select(baseline_correct, mask))
        for group, mask in masks.items()
        for attack in (f"pgd{steps}", f"cw{steps}")
    ]
    for group in masks:
        if rejected := [row for row in gains if row["group"] == group and not row["real"]]:
            reasons.append(_rejected_gain(rejected))
    reasons += _masking_signs(diagnostics, baseline, correct, baseline_correct)
    notes += _gap_notes(gains, diagnostics, baseline)
    row = next(row for row in gains if not row["group"])
    accuracies = f"{title(row['attack'])} {_percent(row['accuracy'])}, worst case {_percent(row['worst'])}"
    accuracies += f"; baseline {_percent(row['baseline'])} and {_percent(row['baseline_worst'])}"
    return {
        "trustworthy": not reasons,
        "words": f"{MASKED if reasons else NOT_MASKED} ({accuracies}).",
        "reasons": reasons,
        "notes": notes,
        "gains": gains,
    }


def _verdict_without_baseline(diagnostics: Diagnostics, reasons: list[str], notes: list[str]) -> Verdict:
    """Returns the verdict on a network alone, from `reasons` and `notes` on its forward pass and its attacks."""
    correct, steps = correct_by_attack(diagnostics), diagnostics["protocol"]["num_steps"]
    pgd, cw, worst = f"pgd{steps}", f"cw{steps}", worst_case_correct(correct)
    reasons = [*reasons, *_masking_signs(diagnostics, None, correct, {})]
    gaps = {
        name: correct[name].mean() - worst.mean() for name in (pgd, cw) if significantly_larger(correct[name], worst)
    }
    notes = [
        *notes,
        *(
            f"The accuracy under {title(name)} is {100 * gap:.1f} points above the worst case: report the worst case."
            for name, gap in gaps.items()
        ),
        f"Median gap between the largest and the second logit: {diagnostics['logit_lead']:.3g}.",
    ]
    accuracies = f"{title(pgd)} {_percent(correct[pgd].mean())}, worst case {_percent(worst.mean())}"
    words = f"{MASKED if reasons else NOT_MASKED} ({accuracies})."
    if not reasons:
        words += " Without a baseline, a gain over another network is not tested."
    return {"trustworthy": False if reasons else None, "words": words, "reasons": reasons, "notes": notes, "gains": []}


def worst_case_correct(columns: Columns) -> np.ndarray:
    """bool [n]: correct on the clean image and under every attack at the evaluated radius."""
    return np.logical_and.reduce([column for name, column in columns.items() if not name.startswith("radius_")])


def gradient_attacks_correct(columns: Columns) -> np.ndarray:
    """bool [n]: correct on the clean image and under every attack that follows the gradient of the attacked network."""
    return worst_case_correct({name: column for name, column in columns.items() if name not in OTHER_ATTACKS})


def gain_over_baseline(group: str, attack: str, correct: Columns, baseline_correct: Columns) -> Gain:
    """Returns the gain over the baseline under an attack, and the part of it that is left in the worst case.

    The gain is rejected (`real` is False) if all of these hold: the gain and the lost part exceed their noise; the lost
    part is larger than the rest; and the rest is within its noise, or the difference of both parts exceeds its noise.
    """
    gain_per_image = np.asarray(correct[attack], float) - baseline_correct[attack]
    left_per_image = np.asarray(worst_case_correct(correct), float) - worst_case_correct(baseline_correct)
    gain, noise = mean_and_noise(gain_per_image)
    lost, lost_noise = mean_and_noise(gain_per_image - left_per_image)
    left, left_noise = mean_and_noise(left_per_image)
    excess, excess_noise = mean_and_noise(gain_per_image - 2 * left_per_image)  # of lost over left
    rejected = gain > noise and lost > lost_noise and excess > 0 and (left <= left_noise or excess > excess_noise)
    strongest = min((name for name in correct if not name.startswith("radius_")), key=lambda name: correct[name].mean())
    return {
        "group": group,
        "attack": attack,
        "accuracy": float(correct[attack].mean()),
        "baseline": float(baseline_correct[attack].mean()),
        "worst": float(worst_case_correct(correct).mean()),
        "baseline_worst": float(worst_case_correct(baseline_correct).mean()),
        "gain": gain,
        "noise": noise,
        "lost": lost,
        "lost_noise": lost_noise,
        "strongest": strongest,
        "strongest_accuracy": float(correct[strongest].mean()),
        "left": left,
        "left_noise": left_noise,
        "real": not rejected,
    }


def summarise_diagnostics(diagnostics: Diagnostics) -> DiagnosticsSummary:
    """Returns the diagnostics averaged over images, for a report."""
    columns, protocol = correct_by_attack(diagnostics), diagnostics["protocol"]
    radii = [columns[f"pgd{protocol['num_steps']}"], *(c for name, c in columns.items() if name.startswith("radius_"))]
    leads = [columns[name] for name in diagnostics["scales"]]
    return {
        "classes": diagnostics["classes"],
        "logits_change": diagnostics["logits_change"],
        "probabilities": diagnostics["probabilities"],
        "logit_lead": diagnostics["logit_lead"],
        "zero_gradient": float(text_to_bits(diagnostics["zero_gradient"]).mean()),
        "accuracy": {name: float(column.mean()) for name, column in columns.items() if "_" not in name},
        "worst": float(worst_case_correct(columns).mean()),
        "by_lead": [[lead, float(c.mean())] for lead, c in zip(protocol["leads"], leads, strict=bool(leads))],
        "by_radius": [[radius, float(c.mean())] for radius, c in zip(protocol["radii"], radii, strict=True)],
    }


def _select(columns: Columns, mask: np.ndarray) -> Columns:
    return {name: column[mask] for name, column in columns.items()}


def _forward_pass_reasons(diagnostics: Diagnostics) -> list[str]:
    reasons = []
    if not diagnostics["logits_change"] <= ROUNDING:
        reasons.append(
            f"The forward pass is random (stochastic gradients): between two passes the logits of an image change by "
            f"{diagnostics['logits_change']:.2g} of the largest. Use attacks that average over passes "
            "(attacks.expectation, and AutoAttack's version 'rand')."
        )
    if diagnostics["batch_change"] > max(DEPENDENCE, diagnostics["logits_change"]):
        reasons.append(
            "The logits of an image change with the other images of its batch, by "
            f"{diagnostics['batch_change']:.2g} of the largest: the accuracies depend on the batches. Is the network "
            "in training mode?"
        )
    if diagnostics["probabilities"]:
        reasons.append(
            "The logits are probabilities: they add up to one, and the cross-entropy of an attack applies a second "
            "softmax (vanishing gradients). Return the logits before the softmax."
        )
    return reasons


def _notes(diagnostics: Diagnostics) -> list[str]:
    classes, notes = diagnostics["classes"], []
    if diagnostics["not_finite"]:
        notes.append(f"The logits of {diagnostics['not_finite']} clean images are not finite: they count as wrong.")
    if classes < 4:
        notes.append(
            f"There are {classes} classes: AutoAttack's targeted loss, a ratio, needs four and is replaced by a "
            "difference of logits."
        )
    return notes


def _rejected_gain(rejected: Sequence[Gain]) -> str:
    """Returns one sentence on the rejected gains of one group."""
    accuracies = ", ".join(
        f"{title(row['attack'])} {_percent(row['accuracy'])} against {_percent(row['baseline'])} "
        f"({100 * row['gain']:+.1f} points, noise {100 * row['noise']:.1f})"
        for row in rejected
    )
    row = rejected[0]
    subset = f"in the {row['group']} " if row["group"] else ""
    return (
        f"Most of the gain {subset}over the baseline vanishes in the worst case: {accuracies}; worst case "
        f"{_percent(row['worst'])} against {_percent(row['baseline_worst'])} ({100 * row['left']:+.1f} points, noise "
        f"{100 * row['left_noise']:.1f}). Strongest single attack: {_attack_name(row['strongest'])} "
        f"({_percent(row['strongest_accuracy'])})."
    )


def _masking_signs(
    diagnostics: Diagnostics, baseline: Diagnostics | None, correct: Columns, baseline_correct: Columns
) -> list[str]:
    """Returns one sentence for each sign of gradient masking that is stronger than on the baseline.

    Without a baseline a sign counts if it is stronger than on a network that shows it on no image.
    """
    signs, none = [], np.zeros(len(diagnostics["label"]), bool)

    def with_baseline(share: str, baseline_values: np.ndarray) -> str:
        return share if baseline is None else f"{share} (baseline {_percent(baseline_values.mean())})"

    zero = text_to_bits(diagnostics["zero_gradient"])
    baseline_zero = none if baseline is None else text_to_bits(baseline["zero_gradient"])
    if significantly_larger(zero, baseline_zero):
        share = with_baseline(f"{_percent(zero.mean())} of the images", baseline_zero)
        signs.append(f"The input gradient is exactly zero on {share}: gradient attacks cannot move these images.")
    for name, subject in (("square", "Square"), ("transfer", "The transfer attack from the baseline")):
        if name not in correct or (baseline is not None and name not in baseline_correct):
            continue
        broken, baseline_broken = (
            gradient_attacks_correct(columns) & ~columns[name] if columns else none
            for columns in (correct, baseline_correct)
        )
        if significantly_larger(broken, baseline_broken):
            subset = "of the images that withstand all attacks that follow the network's gradient"
            share = with_baseline(f"{_percent(broken.mean())} {subset}", baseline_broken)
            signs.append(f"{subject} breaks {share}: the gradient does not lead to adversarial examples that exist.")
    largest = max(
        (name for name in correct if name.startswith("radius_")), key=lambda name: float(name[7:]), default=None
    )
    baseline_largest = baseline_correct.get(largest, none) if largest else none
    if largest and significantly_larger(correct[largest], baseline_largest):
        radius = f"a radius of {diagnostics['protocol']['radii'][-1]:g}, which covers the full pixel range"
        share = _percent(correct[largest].mean())
        signs.append(
            f"{share} of the images withstand PGD at {with_baseline(radius, baseline_largest)}: the attack fails where "
            "adversarial examples must exist."
        )
    return signs


def _gap_notes(gains: Sequence[Gain], diagnostics: Diagnostics, baseline: Diagnostics) -> list[str]:
    """Returns notes on gaps between PGD or CW and the worst case that exceed the baseline's, and on the logit lead."""
    wide_gaps = [row for row in gains if not row["group"] and row["real"] and row["lost"] > row["lost_noise"]]
    notes = [
        f"The accuracy under {title(row['attack'])} is {100 * (row['accuracy'] - row['worst']):.1f} points above the "
        f"worst case (baseline {100 * (row['baseline'] - row['baseline_worst']):.1f}): report the worst case."
        for row in wide_gaps
    ]
    leads = f"{diagnostics['logit_lead']:.3g} (baseline {baseline['logit_lead']:.3g})"
    return [*notes, f"Median gap between the largest and the second logit: {leads}."]


def _attack_name(column: str) -> str:
    """Returns the name of a column in a sentence; `scale_0.1` is PGD on rescaled logits."""
    if column.startswith("scale_"):
        return f"PGD on logits rescaled to a median gap of {column.removeprefix('scale_')}"
    return OTHER_ATTACKS.get(column, title(column))


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"

"""Whether a network's gain over the baseline is real: arithmetic on what `diagnose.probe` found of both.

No threshold is a number of ours. Every figure is held against the baseline's own, image by image, and counts where the
mean of the paired differences is more than three standard errors above zero.

A gap between PGD and stronger attacks is no reason by itself: heads and losses differ in it honestly, and on enough
images every difference is beyond the noise. What is judged is the claim that a table makes, a gain under PGD or CW: it
is not real where most of it is gone in the worst case. LSA makes no such claim: it is there to break small logits, and
weak on large ones.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lt_adv.attacks._autoattack import DEPENDENCE
from lt_adv.evaluation.masking.diagnose import rows, unpacked
from lt_adv.evaluation.metrics import title

STANDARD_ERRORS = 3.0
ROUNDING = float(np.sqrt(np.finfo(np.float32).eps))  # of logits between two passes, as a share of the largest
OTHERS = {"square": "Square", "autoattack": "AutoAttack", "transfer": "examples made on the baseline"}

Rows = Mapping[str, np.ndarray]


def beyond(values: np.ndarray) -> tuple[float, float]:
    """(mean, noise) of one value per image; noise is three standard errors of the mean."""
    values = np.asarray(values, float)
    return float(values.mean()), STANDARD_ERRORS * float(
        values.std(ddof=min(1, len(values) - 1)) / np.sqrt(len(values))
    )


def exceeds(mine: np.ndarray, theirs: np.ndarray) -> bool:
    """Whether the mean of the paired differences, mine - theirs, is above the noise."""
    mean, noise = beyond(np.asarray(mine, float) - theirs)
    return mean > noise


def decide(
    facts: Mapping[str, Any], baseline: Mapping[str, Any] | None, groups: Mapping[str, Sequence[int]] | None = None
) -> dict[str, Any]:
    """The verdict on a network, from its facts and those of the baseline on the same images.

    `trustworthy`: whether there is no reason against it; None without a baseline, where no gain can be judged.
    `words`: the verdict in a line. `reasons`: sentences, one for each of
      - what the official checks of AutoAttack warn of: a random forward pass, probabilities instead of logits; and
        logits that change with the other images of a batch;
      - a gain under an attack, on all images or those of a group of classes (`groups`: name -> classes), that is beyond
        the noise, and most of which is gone in the worst case, by more than the noise;
      - more input gradients that are exactly zero than the baseline has;
      - more images than with the baseline that no attack by gradient breaks, and Square or examples of another network
        do, or that are right at any radius.
    `notes`: what a reader should know beside. `gains`: a row per group and attack, with the figures that were compared.
    Errors: ValueError where the two were probed in different ways.
    """
    reasons, notes = _forward(facts), _notes(facts)
    if baseline is None:
        words = "No verdict: whether a gain is real needs a baseline to compare with (config.eval.baseline)."
        return {"trustworthy": None, "words": words, "reasons": reasons, "notes": notes, "gains": []}
    for name in ("protocol", "label", "classes"):
        if facts[name] != baseline[name]:
            raise ValueError(f"The network and its baseline were probed in different ways: see {name!r}.")
    label, mine, theirs = np.asarray(facts["label"]), rows(facts), rows(baseline)
    parts = {"": np.ones(len(label), bool)}
    parts |= {name: np.isin(label, ids) for name, ids in (groups or {}).items() if np.isin(label, ids).any()}
    steps = facts["protocol"]["num_steps"]
    gains = [
        gain(group, attack, *({name: column[part] for name, column in side.items()} for side in (mine, theirs)))
        for group, part in parts.items()
        for attack in (f"pgd{steps}", f"cw{steps}")
    ]
    for group in parts:
        if unreal := [row for row in gains if row["group"] == group and not row["real"]]:
            reasons.append(_unreal(unreal))
    reasons += _masked(facts, baseline, mine, theirs)
    notes += _gaps(gains, facts, baseline)
    whole = next(row for row in gains if not row["group"])
    figures = f"{title(whole['attack'])} {_share(whole['accuracy'])}, worst case {_share(whole['worst'])}"
    figures += f"; baseline {_share(whole['baseline'])} and {_share(whole['baseline_worst'])}"
    words = f"Not trustworthy ({figures})." if reasons else f"Trustworthy ({figures})."
    return {"trustworthy": not reasons, "words": words, "reasons": reasons, "notes": notes, "gains": gains}


def worst(columns: Rows) -> np.ndarray:
    """bool [n]: right clean and under every attack at the radius that is evaluated."""
    return np.logical_and.reduce([column for name, column in columns.items() if not name.startswith("radius_")])


def by_gradient(columns: Rows) -> np.ndarray:
    """bool [n]: right clean and under every attack that follows the network's own gradient."""
    return worst({name: column for name, column in columns.items() if name not in OTHERS})


def gain(group: str, attack: str, mine: Rows, theirs: Rows) -> dict[str, Any]:
    """What is gained over the baseline under an attack, and what of it is left in the worst case; shares of images.

    Not real: the gain and what is lost of it are beyond their noise; more is lost than left; and what is left is within
    its noise, or the difference is beyond.
    """
    under = np.asarray(mine[attack], float) - theirs[attack]
    left = np.asarray(worst(mine), float) - worst(theirs)
    (gained, noise), (lost, lost_noise), (kept, kept_noise) = beyond(under), beyond(under - left), beyond(left)
    more, more_noise = beyond(under - 2 * left)  # lost than left
    unreal = gained > noise and lost > lost_noise and more > 0 and (kept <= kept_noise or more > more_noise)
    strongest = min((name for name in mine if not name.startswith("radius_")), key=lambda name: mine[name].mean())
    return {
        "group": group,
        "attack": attack,
        "accuracy": float(mine[attack].mean()),
        "baseline": float(theirs[attack].mean()),
        "worst": float(worst(mine).mean()),
        "baseline_worst": float(worst(theirs).mean()),
        "gain": gained,
        "noise": noise,
        "lost": lost,
        "lost_noise": lost_noise,
        "strongest": strongest,
        "strongest_accuracy": float(mine[strongest].mean()),
        "left": kept,
        "left_noise": kept_noise,
        "real": not unreal,
    }


def figures(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts without a value per image, for a report: accuracies in [0, 1], lists for the two curves."""
    columns, protocol = rows(facts), facts["protocol"]
    radii = [columns[f"pgd{protocol['num_steps']}"], *(c for name, c in columns.items() if name.startswith("radius_"))]
    leads = [columns[name] for name in facts["scales"]]
    single = ("classes", "logits_change", "probabilities", "logit_lead")
    return {name: facts[name] for name in single} | {
        "zero_gradient": float(unpacked(facts["zero_gradient"]).mean()),
        "accuracy": {name: float(column.mean()) for name, column in columns.items() if "_" not in name},
        "worst": float(worst(columns).mean()),
        "by_lead": [[lead, float(c.mean())] for lead, c in zip(protocol["leads"], leads, strict=True)],
        "by_radius": [[radius, float(c.mean())] for radius, c in zip(protocol["radii"], radii, strict=True)],
    }


def _forward(facts: Mapping[str, Any]) -> list[str]:
    found = []
    if not facts["logits_change"] <= ROUNDING:
        found.append(
            f"The forward pass is random: the logits of the same image differ by {facts['logits_change']:.2g} of the "
            "largest between two passes, and an attack on one of them is none on the other (AutoAttack's version "
            "'rand' averages)."
        )
    if facts["batch_change"] > max(DEPENDENCE, facts["logits_change"]):
        found.append(
            f"The logits of an image change with the other images of its batch, by {facts['batch_change']:.2g} of the "
            "largest: what is measured depends on the batches. Is the network in training mode?"
        )
    if facts["probabilities"]:
        found.append(
            "The logits are probabilities: they add up to one, and an attack on their cross-entropy applies a second "
            "softmax. Return what comes before the first."
        )
    return found


def _notes(facts: Mapping[str, Any]) -> list[str]:
    classes, notes = facts["classes"], []
    if facts["not_finite"]:
        notes.append(f"The logits of {facts['not_finite']} clean images are not finite: they count as wrong.")
    if classes < 4:
        notes.append(f"There are {classes} classes, and AutoAttack's targeted ratio needs four: it takes differences.")
    return notes


def _unreal(unreal: Sequence[Mapping[str, Any]]) -> str:
    """One sentence on the gains of one group that are not real."""
    under = ", ".join(
        f"{title(row['attack'])} {_share(row['accuracy'])} against {_share(row['baseline'])} "
        f"({100 * row['gain']:+.1f} points, noise {100 * row['noise']:.1f})"
        for row in unreal
    )
    row = unreal[0]
    where = f"in the {row['group']} " if row["group"] else ""
    return (
        f"The gain {where}over the baseline is not real: {under}; in the worst case {_share(row['worst'])} against "
        f"{_share(row['baseline_worst'])} ({100 * row['left']:+.1f} points, noise {100 * row['left_noise']:.1f}). The "
        f"strongest single attack, {_named(row['strongest'])}, leaves {_share(row['strongest_accuracy'])}."
    )


def _masked(facts: Mapping[str, Any], baseline: Mapping[str, Any], mine: Rows, theirs: Rows) -> list[str]:
    """Signs that the attacks by gradient do not see the network, each above what the baseline shows."""
    found = []
    zero, zeros = (unpacked(side["zero_gradient"]) for side in (facts, baseline))
    if exceeds(zero, zeros):
        found.append(
            f"The input gradient is exactly zero on {_share(zero.mean())} of the images (baseline "
            f"{_share(zeros.mean())}): attacks that follow it see nothing there."
        )
    for name, said in {"square": "Square breaks", "transfer": "Examples made on the baseline break"}.items():
        if name not in mine or name not in theirs:
            continue
        broken, usual = (by_gradient(side) & ~side[name] for side in (mine, theirs))
        if exceeds(broken, usual):
            found.append(
                f"{said} {_share(broken.mean())} of the images, which no attack on the network's own gradient "
                f"breaks (baseline {_share(usual.mean())}): the gradient does not lead where the network fails."
            )
    last = max((name for name in mine if name.startswith("radius_")), key=lambda name: float(name[7:]), default=None)
    if last and exceeds(mine[last], theirs[last]):
        found.append(
            f"{_share(mine[last].mean())} of the images stay right at a radius of {facts['protocol']['radii'][-1]:g}, "
            f"where every image can become any other (baseline {_share(theirs[last].mean())}): the attack fails."
        )
    return found


def _gaps(gains: Sequence[Mapping[str, Any]], facts: Mapping[str, Any], baseline: Mapping[str, Any]) -> list[str]:
    """Real gains, or none, whose gap to the worst case is wider than the baseline's: honest, but to be quoted so."""
    wide = [row for row in gains if not row["group"] and row["real"] and row["lost"] > row["lost_noise"]]
    found = [
        f"{title(row['attack'])} says {100 * (row['accuracy'] - row['worst']):.1f} points more than the worst case "
        f"(baseline {100 * (row['baseline'] - row['baseline_worst']):.1f}): quote the worst case."
        for row in wide
    ]
    leads = f"{facts['logit_lead']:.3g} (baseline {baseline['logit_lead']:.3g})"
    return [*found, f"The largest logit leads the second by {leads}, in the median over the images."]


def _named(column: str) -> str:
    """How a column is called in a sentence: scale_0.1 is an attack on rescaled logits."""
    if column.startswith("scale_"):
        return f"PGD on logits rescaled to lead by {column.removeprefix('scale_')}"
    return OTHERS.get(column, title(column))


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"

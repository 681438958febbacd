"""The report as arithmetic on records: pure functions, no attack, no network, no file."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lt_adv.data import longtail
from lt_adv.evaluation.records import CLEAN, WORST, Records, plain

CHANCE_SIGMAS = 3.0  # a balanced accuracy within this many standard errors of 1/C counts as chance level


TITLES = {CLEAN: "Clean", WORST: "Worst case", "autoattack": "AutoAttack"}


def title(condition: str) -> str:
    """How a condition is printed: `pgd20` as PGD-20, `lsa` as LSA; long names as they are."""
    if condition in TITLES:
        return TITLES[condition]
    letters, digits = re.fullmatch(r"(.*?)(\d*)", condition, re.DOTALL).groups()  # type: ignore[union-attr]
    short = len(letters) <= 4 and letters.isalpha()
    return "-".join(filter(None, (letters.upper(), digits))) if short else condition


UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """A text in one line: control characters, such as line breaks, as in Python's repr."""
    return UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def share(part: float, whole: float) -> float | None:
    """part / whole; None (null in JSON) of nothing, for example of a class without test images."""
    return float(part) / float(whole) if whole else None


def class_accuracy(records: Records, condition: str) -> np.ndarray:
    """Accuracy of each class [C], NaN for a class without images."""
    with np.errstate(invalid="ignore"):
        return records.count(records.correct(condition)) / records.images_per_class


def accuracy(records: Records, condition: str, classes: Sequence[int] | None = None) -> float | None:
    """Share of images that are right under a condition (clean, an attack, worst), of all or of some classes' images."""
    chosen = slice(None) if classes is None else np.asarray(classes, int)
    return share(records.count(records.correct(condition))[chosen].sum(), records.images_per_class[chosen].sum())


def balanced_accuracy(records: Records, condition: str) -> float:
    """Mean over classes of the class accuracy; classes without test images are left out."""
    return float(np.nanmean(class_accuracy(records, condition)))


def decomposition(records: Records, classes: Sequence[int] | None = None) -> dict[str, Any]:
    """Images and shares of natural + boundary = robust error, over all or some classes.

    natural: wrong clean; boundary: right clean, wrong under an attack; robust: wrong in the worst case. The counts add
    up exactly, because an image that is wrong clean counts as wrong (Zhang et al., ICML 2019, eq. 1).
    """
    chosen = slice(None) if classes is None else np.asarray(classes, int)
    images = int(records.images_per_class[chosen].sum())
    errors = {
        "natural": int(records.count(records.natural_error)[chosen].sum()),
        "boundary": int(records.count(records.boundary_error)[chosen].sum()),
        "robust": int(records.count(records.robust_error)[chosen].sum()),
    }
    return {
        "images": images,
        **{f"{name}_errors": count for name, count in errors.items()},
        **{f"{name}_error": share(count, images) for name, count in errors.items()},
    }


def compute_metrics(records: Records, groups: Mapping[str, Sequence[int]]) -> dict[str, float | None]:
    """All figures under their public names: `eval/pgd20/accuracy`, `.../balanced_accuracy`, `.../accuracy_tail`, ..."""
    figures: dict[str, float | None] = {}
    for condition in records.conditions:
        figures[f"eval/{condition}/accuracy"] = accuracy(records, condition)
        figures[f"eval/{condition}/balanced_accuracy"] = balanced_accuracy(records, condition)
        for group, classes in groups.items():
            figures[f"eval/{condition}/accuracy_{group}"] = accuracy(records, condition, classes)
    for suffix, classes in {"": None, **{f"_{group}": ids for group, ids in groups.items()}}.items():
        parts = decomposition(records, classes)
        for error in ("natural_error", "boundary_error", "robust_error"):
            figures[f"eval/{error}{suffix}"] = parts[error]
    return figures


def warnings(records: Records) -> list[str]:
    """What a reader must know before believing the figures: facts of the records with their thresholds."""
    found = []
    present = records.images_per_class[records.images_per_class > 0]
    chance = 1 / records.num_classes
    deviation = float(np.sqrt(np.sum(chance * (1 - chance) / present))) / len(present)
    threshold = chance + CHANCE_SIGMAS * deviation
    for condition in (CLEAN, WORST) if records.attacks else (CLEAN,):
        value = balanced_accuracy(records, condition)
        if value <= threshold:
            found.append(
                f"{condition}: balanced accuracy {100 * value:.2f} % is not above chance level "
                f"(1/{records.num_classes} plus {CHANCE_SIGMAS:g} standard errors = {100 * threshold:.2f} %)."
            )
    for condition in (CLEAN, *records.attacks):
        if undefined := int((records.prediction(condition) < 0).sum()):
            found.append(f"{condition}: the logits of {undefined} images are not finite: they count as wrong.")
    found += [f"{name}: {note}" for name, notes in records.notes.items() for note in notes]
    predicted = np.bincount(records.clean[records.clean >= 0], minlength=records.num_classes)
    never = [records.class_names[c] for c in np.flatnonzero((predicted == 0) & (records.images_per_class > 0))]
    if never:
        more = f" and {len(never) - 10} more" if len(never) > 10 else ""
        found.append(
            f"clean: {len(never)} of {records.num_classes} classes are never predicted on {len(records)} images: "
            f"{', '.join(map(printable, never[:10]))}{more}."
        )
    for name in records.attacks:
        if records.correct(CLEAN).any() and np.array_equal(records.clean, records.attacks[name]):
            found.append(f"{name}: the attack changed no prediction at all; check its radius and the gradient.")
    return found


def summarise(records: Records, class_counts: Sequence[int], definition: str = "thirds") -> dict[str, Any]:
    """The whole report as a plain dict (JSON): header, groups, metrics, classes, decomposition, warnings.

    Groups are cut by training `class_counts` [C] with the named `definition` (data.longtail.groups); figures of a group
    count its images, so on a balanced test set they are the mean over its classes. Accuracies and errors are in [0, 1].
    `classes` stands in order of training count. Errors: ValueError where `class_counts` and the class names differ in
    number.
    """
    if len(class_counts) != records.num_classes:
        raise ValueError(
            f"class_counts has {len(class_counts)} entries, the records have {records.num_classes} classes."
        )
    cut = longtail.groups(np.asarray(class_counts), definition)
    groups = {name: np.asarray(ids, int) for name, ids in cut.items() if len(ids)}
    parts = {"all": None, **groups}
    by_class = {condition: class_accuracy(records, condition) for condition in records.conditions}
    classes = []
    for c in np.argsort(-np.asarray(class_counts), kind="stable"):
        figures = {name: None if np.isnan(values[c]) else float(values[c]) for name, values in by_class.items()}
        classes.append(
            {
                "class": int(c),
                "name": records.class_names[c],
                "class_count": int(class_counts[c]),
                "accuracy": figures,
                **decomposition(records, [c]),
            }
        )
    return plain(
        {
            "header": records.header,
            "conditions": records.conditions,
            "groups": {
                "definition": definition,
                **{name: [records.class_names[c] for c in ids] for name, ids in groups.items()},
            },
            "metrics": compute_metrics(records, groups),
            "decomposition": {name: decomposition(records, ids) for name, ids in parts.items()},
            "classes": classes,
            "warnings": warnings(records),
        }
    )

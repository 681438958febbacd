"""Metrics of records: accuracies, error decomposition and warnings, as pure functions."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lt_adv.data import longtail
from lt_adv.evaluation.records import CLEAN, WORST, Records, as_json

Summary = dict[str, Any]  # the content of report.json, from `summarise` and `report.write_report`

CHANCE_SIGMAS = 3.0  # a balanced accuracy within this many standard errors of 1/C counts as chance level
TITLES = {CLEAN: "Clean", WORST: "Worst case", "autoattack": "AutoAttack"}


def title(condition: str) -> str:
    """Returns the printed name of a condition: PGD-20 for `pgd20`, LSA for `lsa`; long names are unchanged."""
    if condition in TITLES:
        return TITLES[condition]
    letters, digits = re.fullmatch(r"(.*?)(\d*)", condition, re.DOTALL).groups()  # type: ignore[union-attr]
    short = len(letters) <= 4 and letters.isalpha()
    return "-".join(filter(None, (letters.upper(), digits))) if short else condition


UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Returns a text in one line, with control characters such as line breaks escaped as in Python's repr."""
    return UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def ratio(part: float, total: float) -> float | None:
    """Returns part / total; None (null in JSON) when the total is zero, such as for a class without test images."""
    return float(part) / float(total) if total else None


def class_accuracy(records: Records, condition: str) -> np.ndarray:
    """Returns the accuracy of each class [C], NaN for a class without images."""
    with np.errstate(invalid="ignore"):
        return records.count(records.correct(condition)) / records.images_per_class


def accuracy(records: Records, condition: str, classes: Sequence[int] | None = None) -> float | None:
    """Returns the share of correct images under a condition (clean, an attack, worst), over all or some classes."""
    chosen = slice(None) if classes is None else np.asarray(classes, int)
    return ratio(records.count(records.correct(condition))[chosen].sum(), records.images_per_class[chosen].sum())


def balanced_accuracy(records: Records, condition: str) -> float:
    """Returns the mean of the class accuracies over the classes that have test images."""
    return float(np.nanmean(class_accuracy(records, condition)))


def error_decomposition(records: Records, classes: Sequence[int] | None = None) -> dict[str, float | None]:
    """Returns counts and shares of natural, boundary and robust error over all or some classes.

    natural: wrong on the clean image; boundary: correct on the clean image and wrong under an attack; robust: wrong in
    the worst case. Robust = natural + boundary holds exactly, as an image that is wrong without an attack counts as
    wrong in the worst case (Zhang et al., ICML 2019, eq. 1).
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
        **{f"{name}_error": ratio(count, images) for name, count in errors.items()},
    }


def compute_metrics(records: Records, groups: Mapping[str, Sequence[int]]) -> dict[str, float | None]:
    """Returns all metrics by name: `eval/pgd20/accuracy`, `.../balanced_accuracy`, `.../accuracy_tail`, ..."""
    metrics: dict[str, float | None] = {}
    for condition in records.conditions:
        metrics[f"eval/{condition}/accuracy"] = accuracy(records, condition)
        metrics[f"eval/{condition}/balanced_accuracy"] = balanced_accuracy(records, condition)
        for group, classes in groups.items():
            metrics[f"eval/{condition}/accuracy_{group}"] = accuracy(records, condition, classes)
    subsets: dict[str, Sequence[int] | None] = {"": None, **{f"_{group}": ids for group, ids in groups.items()}}
    for suffix, subset in subsets.items():
        errors = error_decomposition(records, subset)
        for name in ("natural_error", "boundary_error", "robust_error"):
            metrics[f"eval/{name}{suffix}"] = errors[name]
    return metrics


def find_warnings(records: Records) -> list[str]:
    """Returns sentences on suspicious results: chance level, NaN logits, unpredicted classes, ineffective attacks."""
    lines = []
    present = records.images_per_class[records.images_per_class > 0]
    chance = 1 / records.num_classes
    deviation = float(np.sqrt(np.sum(chance * (1 - chance) / present))) / len(present)
    threshold = chance + CHANCE_SIGMAS * deviation
    for condition in (CLEAN, WORST) if records.attacks else (CLEAN,):
        value = balanced_accuracy(records, condition)
        if value <= threshold < 1:  # with a threshold of 1 there are too few images to tell
            lines.append(
                f"{condition}: balanced accuracy {100 * value:.2f} % is not above chance level "
                f"(1/{records.num_classes} plus {CHANCE_SIGMAS:g} standard errors = {100 * threshold:.2f} %)."
            )
    for condition in (CLEAN, *records.attacks):
        if not_finite := int((records.prediction(condition) < 0).sum()):
            lines.append(f"{condition}: the logits of {not_finite} images are not finite: they count as wrong.")
    lines += [f"{name}: {note}" for name, notes in records.notes.items() for note in notes]
    predicted = np.bincount(records.clean[records.clean >= 0], minlength=records.num_classes)
    unpredicted = [records.class_names[c] for c in np.flatnonzero((predicted == 0) & (records.images_per_class > 0))]
    if unpredicted:
        more = f" and {len(unpredicted) - 10} more" if len(unpredicted) > 10 else ""
        lines.append(
            f"clean: {len(unpredicted)} of {records.num_classes} classes are never predicted on {len(records)} images: "
            f"{', '.join(map(printable, unpredicted[:10]))}{more}."
        )
    for name in records.attacks:
        if records.correct(CLEAN).any() and np.array_equal(records.clean, records.attacks[name]):
            lines.append(f"{name}: the attack changed no prediction at all; check its radius and the gradient.")
    return lines


def by_frequency(class_counts: Sequence[int] | None, num_classes: int) -> np.ndarray:
    """Returns the classes, most frequent first, int [C]; in the order of their numbers if the counts are not known."""
    counts = np.zeros(num_classes) if class_counts is None else np.asarray(class_counts)
    return np.argsort(-counts, kind="stable")


def summarise(records: Records, class_counts: Sequence[int] | None, definition: str = "thirds") -> Summary:
    """Returns the content of a report as JSON: header, groups, metrics, decomposition, classes, warnings.

    Accuracies and errors are in [0, 1]. The accuracy of a group is the share of its images; on a balanced test set that
    is the mean over its classes. `classes` is sorted by training images, most frequent first.

    Args:
      records: of an evaluation.
      class_counts: training images of each class [C]; None for a balanced training set, which has no groups.
      definition: how classes are grouped by their counts, a name that `data.longtail.groups` knows.

    Raises:
      ValueError: when `class_counts` and the class names differ in number.
    """
    if class_counts is not None and len(class_counts) != records.num_classes:
        raise ValueError(
            f"class_counts has {len(class_counts)} entries, the records have {records.num_classes} classes."
        )
    members = {} if class_counts is None else longtail.groups(class_counts, definition)
    groups = {name: [int(c) for c in ids] for name, ids in members.items() if len(ids)}
    by_class = {condition: class_accuracy(records, condition) for condition in records.conditions}
    classes = []
    for c in by_frequency(class_counts, records.num_classes):
        accuracies = {name: None if np.isnan(values[c]) else float(values[c]) for name, values in by_class.items()}
        classes.append(
            {
                "class": int(c),
                "name": records.class_names[c],
                "class_count": None if class_counts is None else int(class_counts[c]),
                "accuracy": accuracies,
                **error_decomposition(records, [c]),
            }
        )
    return as_json(
        {
            "header": records.header,
            "conditions": records.conditions,
            "groups": {
                "definition": None if class_counts is None else definition,
                **{name: [records.class_names[c] for c in ids] for name, ids in groups.items()},
            },
            "metrics": compute_metrics(records, groups),
            "decomposition": {
                "all": error_decomposition(records),
                **{name: error_decomposition(records, ids) for name, ids in groups.items()},
            },
            "classes": classes,
            "warnings": find_warnings(records),
        }
    )

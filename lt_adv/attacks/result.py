"""The result of AutoAttack as a table and as numbers for JSON, without images. Needs numpy only."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np


class AttackResult(Protocol):
    """What the functions below read of `autoattack`'s result."""

    @property
    def robust(self) -> np.ndarray: ...
    @property
    def broken_by(self) -> np.ndarray: ...
    @property
    def accuracy(self) -> Mapping[str, float]: ...
    @property
    def evaluations(self) -> Mapping[str, tuple[int, int]]: ...
    @property
    def notes(self) -> Sequence[str]: ...


def to_dict(result: AttackResult) -> dict[str, Any]:
    """Returns the numbers of a result as Python numbers, strings, lists and dicts, to be stored as JSON.

    images: number of images
    robust: number of images that no attack broke
    accuracy: "clean", then the accuracy after each attack, in [0, 1]
    broken: number of images that are wrong without an attack ("clean"), and that each attack broke
    evaluations: attack -> {"forward": passes, "gradient": gradients}, over all images
    notes: deviations from the version, and reasons to doubt the result
    """
    broken = np.bincount(result.broken_by[result.broken_by >= 0], minlength=len(result.accuracy))
    return {
        "images": len(result.robust),
        "robust": int(np.sum(result.robust)),
        "accuracy": {name: float(share) for name, share in result.accuracy.items()},
        "broken": {name: int(count) for name, count in zip(result.accuracy, broken, strict=True)},
        "evaluations": {
            name: {"forward": int(forward), "gradient": int(gradient)}
            for name, (forward, gradient) in result.evaluations.items()
        },
        "notes": [str(note) for note in result.notes],
    }


def as_table(result: AttackResult) -> str:
    """Returns the result as a table of text: one row per attack, then the robust accuracy and the notes.

    Examples:
      >>> from types import SimpleNamespace
      >>> accuracy, evaluations = {"clean": 0.75, "apgd-ce": 0.5}, {"apgd-ce": (1200, 1100)}
      >>> robust, broken_by = np.array([True, False, True, False]), np.array([-1, 0, -1, 1])
      >>> fields = {"accuracy": accuracy, "evaluations": evaluations, "robust": robust, "broken_by": broken_by}
      >>> print(as_table(SimpleNamespace(**fields, notes=("square is left out.",))))
                accuracy   broken   forward passes   gradients
      clean      75.00 %        1
      apgd-ce    50.00 %        1            1,200       1,100
      Robust accuracy: 50.00 % (2 of 4 images)
      note: square is left out.
    """
    numbers = to_dict(result)
    images, robust = numbers["images"], numbers["robust"]
    rows = [("", "accuracy", "broken", "forward passes", "gradients")]
    for name, share in numbers["accuracy"].items():
        passes = numbers["evaluations"].get(name, {}).values()
        counts = [f"{count:,}" for count in (numbers["broken"][name], *passes)]
        rows.append((name, f"{100 * share:.2f} %", *counts, *[""] * (3 - len(counts))))
    name_width, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = [
        "   ".join([name.ljust(name_width), *(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))])
        for name, *cells in rows
    ]
    share = f"{100 * robust / images:.2f} %" if images else "n/a"
    lines.append(f"Robust accuracy: {share} ({robust:,} of {images:,} images)")
    lines += [f"note: {note}" for note in numbers["notes"]]
    return "\n".join(line.rstrip() for line in lines)

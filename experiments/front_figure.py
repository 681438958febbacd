"""The figure of README.md and docs/index.md: robust accuracy of each class, from head to tail, AT and RoBal.

    python -m experiments.front_figure      write docs/assets/robust_accuracy_by_class.png

The numbers are those of the records in experiments/results/jpeg_rows/: PGD-20 on the full test split.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lt_adv.evaluation import plots

ROOT = Path(__file__).parents[1]
RESULTS, OUT = ROOT / "experiments" / "results" / "jpeg_rows", ROOT / "docs" / "assets" / "robust_accuracy_by_class.png"
METHODS = {"at": ("adversarial training (AT)", plots.ACCENT), "robal": ("RoBal", plots.DARK)}
ATTACK = "pgd20"


def read(results: Path = RESULTS) -> dict[str, Sequence[Mapping[str, Any]]]:
    """Method -> its classes from the most frequent to the rarest, as its report has them."""
    reports = {name: json.loads((results / f"{name}-seed0-full.json").read_text())["report"] for name in METHODS}
    return {name: report["classes"] for name, report in reports.items()}


def figure(classes: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Bars of robust accuracy for each class and method; the class names are above their training images."""
    chart = plots.blank(8.0, 3.1)
    axes = chart.subplots()
    rows = next(iter(classes.values()))
    place, width = np.arange(len(rows)), 0.4
    for i, (name, (_, colour)) in enumerate(METHODS.items()):
        values = [100 * row["accuracy"][ATTACK] for row in classes[name]]
        axes.bar(place + (i - 0.5) * width, values, width, color=colour)
        for x, value in zip(place + (i - 0.5) * width, values, strict=True):
            axes.text(x, value + 1, f"{value:.0f}", ha="center", va="bottom", fontsize=7.5, color=colour)
    axes.set_xticks(place, [f"{row['name']}\n{row['class_count']:,}" for row in rows], fontsize=8)
    axes.set_xlabel("class, and its number of training images", fontsize=8, color=plots.SOFT)
    axes.set_ylabel("robust accuracy in %", fontsize=8, color=plots.SOFT)
    axes.set_ylim(0, 85)
    plots.style(axes)
    plots.headline(axes, "Robust accuracy by class (PGD-20)", list(METHODS.values()))
    return chart


def main() -> None:
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_bytes(plots.png(figure(read())))


if __name__ == "__main__":
    main()

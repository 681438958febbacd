"""The picture of a reliability check: robust accuracy against the scale of the logits and against the radius."""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from lt_adv.evaluation.plots import DARK, MIDDLE, SOFT, blank, headline, style


def curves(found: Mapping[str, Any]) -> Figure:
    """Of the network and its baseline, `found` as `baseline.judge` returns it.

    Left: PGD on rescaled logits, against how far the largest then leads in the median; a ring is the network's own
    scale. Right: PGD at growing radii; whoever stays up where every image can become any other is not seen by it.
    """
    figure = blank(8.4, 3.3)
    left, right = figure.subplots(1, 2, sharey=True)
    steps = found["protocol"]["num_steps"]
    for side, colour in (("baseline", MIDDLE), ("network", DARK)):
        figures = found[side]
        own = (figures["logit_lead"], figures["accuracy"][f"pgd{steps}"])
        for axes, points in ((left, figures["by_lead"]), (right, figures["by_radius"])):
            if points:
                axes.plot(*_columns(points), color=colour, linewidth=1.6, marker="o", markersize=3.5)
        if own[0] > 0:
            left.plot([own[0]], [100 * own[1]], color=colour, marker="o", markersize=8, fillstyle="none", linestyle="")
    for axes, words in ((left, "lead of the largest logit when attacked (ring: as it is)"), (right, "radius")):
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_ylim(-2, 102)
        axes.set_yticks([0, 25, 50, 75, 100])
        axes.set_xlabel(words, fontsize=8, color=SOFT)
        style(axes)
    radii = [radius for radius, _ in found["network"]["by_radius"]]
    right.set_xticks(radii, [f"{radius:.3g}" for radius in radii])
    headline(left, f"PGD-{steps}, accuracy in %", [])
    headline(right, "", [("baseline", MIDDLE), ("this network", DARK)])
    return figure


def _columns(points: list[list[float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [100 * y for _, y in points]

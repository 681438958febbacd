"""Plot of a gradient masking check: robust accuracy against the scale of the logits and against the radius."""

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from lt_adv.evaluation.masking.compare import Comparison
from lt_adv.evaluation.plots import DARK, MIDDLE, SOFT, blank, headline, style


def masking_curves(comparison: Comparison) -> Figure:
    """Draws PGD accuracy of a network and its baseline, if there is one, from the result of `compare_with_baseline`.

    Left: PGD on rescaled logits, against their median gap between the two largest logits; a ring marks the unscaled
    network. Right: PGD at growing radii. A curve that does not reach zero at the last radius, which covers the full
    pixel range, is a sign of gradient masking.
    """
    figure = blank(8.4, 3.3)
    left, right = figure.subplots(1, 2, sharey=True)
    steps = comparison["protocol"]["num_steps"]
    sides = [("this network", comparison["network"], DARK)]
    if "baseline" in comparison:
        sides.insert(0, ("baseline", comparison["baseline"], MIDDLE))
    for _, summary, colour in sides:
        for axes, points in ((left, summary["by_lead"]), (right, summary["by_radius"])):
            if points:
                axes.plot(*_columns(points), color=colour, linewidth=1.6, marker="o", markersize=3.5)
        lead, accuracy = summary["logit_lead"], 100 * summary["accuracy"][f"pgd{steps}"]
        if lead > 0:
            left.plot([lead], [accuracy], color=colour, marker="o", markersize=8, fillstyle="none", linestyle="")
    for axes, label in ((left, "median gap of the two largest logits (ring: not rescaled)"), (right, "radius")):
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_ylim(-2, 102)
        axes.set_yticks([0, 25, 50, 75, 100])
        axes.set_xlabel(label, fontsize=8, color=SOFT)
        style(axes)
    radii = [radius for radius, _ in comparison["network"]["by_radius"]]
    right.set_xticks(radii, [f"{radius:.3g}" for radius in radii])
    headline(left, f"Gradient masking: PGD-{steps} accuracy in %", [])
    headline(right, "", [(name, colour) for name, _, colour in sides])
    return figure


def _columns(points: list[list[float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [100 * y for _, y in points]

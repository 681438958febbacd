"""Plots of a study's summary, in the style of a report."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.transforms import Bbox

from lt_adv.evaluation.metrics import title
from lt_adv.evaluation.plots import ACCENT, DARK, INK, LIGHT, MIDDLE, PALE, SOFT, blank, headline, style
from lt_adv.evaluation.records import CLEAN, WORST

BASELINE = "at"
COLUMNS = 5  # of small panels in a figure
GROUPS = {"": "all", "_head": "head", "_body": "body", "_tail": "tail"}
STRONGEST = ("autoattack", WORST)  # by preference; the first that all rows have is plotted

Rows = Mapping[str, Mapping[str, Any]]


def draw(summary: Mapping[str, Any]) -> dict[str, Figure]:
    """Returns file name -> figure, without that of the sweep if no row was swept."""
    rows = summary["rows"]
    drawn = {"robustness": robustness(rows), "classes": classes(rows), "errors": errors(rows)}
    return drawn | ({"logit_scale": scales(rows)} if any(row["scales"] for row in rows.values()) else {})


def strongest(rows: Rows) -> str:
    """Returns the strongest attack that all rows have."""
    return next(c for c in STRONGEST if all(f"eval/{c}/accuracy" in row["figures"] for row in rows.values()))


def robustness(rows: Rows) -> Figure:
    """Plots accuracy under the strongest attack against clean accuracy, for all classes and for the tail."""
    attack = strongest(rows)
    metrics = {"all classes": "accuracy"}
    if all(f"eval/{attack}/accuracy_tail" in row["figures"] for row in rows.values()):
        metrics["tail classes"] = "accuracy_tail"
    figure = blank(6.2 * len(metrics), 5.4)
    panels = figure.subplots(1, len(metrics), squeeze=False)[0]
    for axes, (name, metric) in zip(panels, metrics.items(), strict=True):
        for key, row in rows.items():
            x, y = (row["figures"][f"eval/{c}/{metric}"] for c in (CLEAN, attack))
            colour = ACCENT if key == BASELINE else DARK
            axes.errorbar(
                100 * x["mean"], 100 * y["mean"], 100 * (y["deviation"] or 0), 100 * (x["deviation"] or 0), fmt="o",
                color=colour, markerfacecolor="white" if row["evaluates"] else colour, markersize=5,
                elinewidth=0.8, ecolor=LIGHT,
            )  # fmt: skip
        axes.margins(0.12)
        style(axes, "both")
        axes.set_xlabel("Clean accuracy in %", fontsize=8, color=SOFT)
        axes.set_ylabel(f"{title(attack)} accuracy in %", fontsize=8, color=SOFT)
        headline(axes, f"Robustness, {name}", [])
    kinds = {"trained": DARK}
    if any(row["evaluates"] for row in rows.values()):
        kinds["another row's network, adjusted"] = "white"
    point = {"marker": "o", "markersize": 5, "color": DARK, "linestyle": ""}
    _legend(figure, [Line2D([], [], label=kind, markerfacecolor=fill, **point) for kind, fill in kinds.items()])
    figure.canvas.draw()  # computes the layout, which the labels need
    figure.set_layout_engine("none")
    for axes, metric in zip(panels, metrics.values(), strict=True):
        points = {
            row["title"]: [100 * row["figures"][f"eval/{c}/{metric}"]["mean"] for c in (CLEAN, attack)]
            for row in rows.values()
        }
        _label(axes, points)
    return figure


def _label(axes: Axes, points: Mapping[str, Sequence[float]]) -> None:
    """Labels each point where the label covers the least of other labels and points; distant labels get a line."""
    places = {name: axes.transData.transform(point) for name, point in points.items()}
    occupied = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in places.values()]
    frame, pixels = axes.get_window_extent(), axes.get_figure().dpi / 72
    for name in sorted(points, key=lambda name: -points[name][1]):
        probe = axes.annotate(name, points[name], fontsize=7.5)
        size = probe.get_window_extent()
        probe.remove()
        candidates = []
        for distance, angle in itertools.product((6, 14, 26, 42, 62, 86), np.arange(0, 2 * np.pi, np.pi / 12)):
            shift = np.array([size.width / 2 + distance * pixels, size.height / 2 + distance * pixels])
            centre = places[name] + shift * [np.cos(angle), np.sin(angle)]
            box = Bbox.from_bounds(centre[0] - size.width / 2, centre[1] - size.height / 2, size.width, size.height)
            covered = sum(_overlap(box, other) for other in occupied) + size.width * size.height - _overlap(box, frame)
            candidates.append((covered, distance, box))
            if covered < 1:
                break
        _, distance, box = min(candidates, key=lambda candidate: candidate[:2])
        offset = (np.array([(box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2]) - places[name]) / pixels
        axes.annotate(
            name, points[name], offset, textcoords="offset points", ha="center", va="center", fontsize=7.5, color=INK,
            arrowprops={"arrowstyle": "-", "color": PALE, "linewidth": 0.6} if distance > 6 else None,
        )  # fmt: skip
        occupied.append(box)


def _overlap(a: Bbox, b: Bbox) -> float:
    both = Bbox.intersection(a, b)
    return both.width * both.height if both is not None else 0.0


def classes(rows: Rows) -> Figure:
    """Plots accuracy by class, the most frequent first: clean and worst case of each row and of the baseline."""

    def panel(axes: Axes, row: Mapping[str, Any], baseline: Mapping[str, Any]) -> None:
        for condition, colour in ((CLEAN, MIDDLE), (WORST, DARK)):
            for shown, line in ((baseline, {"color": LIGHT}), (row, {"color": colour})):
                values = [100 * c["accuracy"].get(condition, np.nan) for c in shown["classes"]]
                few = len(values) <= 20
                axes.plot(values, linewidth=1.4, marker="o" if few else "", markersize=2.5, **line)
        axes.set_ylim(0, 100)
        axes.set_xticks([])

    words = [(title(CLEAN), MIDDLE), (title(WORST), DARK), (f"{_baseline(rows)['title']}, both", PALE)]
    return _panels(rows, panel, "Accuracy in % by class, from the most frequent to the rarest", words)


def scales(rows: Rows) -> Figure:
    """Plots PGD-20 on rescaled logits: a line below its value at scale 1 shows gradient masking by the scale."""
    swept = {name: row for name, row in rows.items() if row["scales"]}
    attack = strongest(swept)

    def panel(axes: Axes, row: Mapping[str, Any], baseline: Mapping[str, Any]) -> None:
        for shown, line in ((baseline, LIGHT), (row, DARK)):
            x, y = np.array(shown["scales"]).T
            axes.plot(x, 100 * y, color=line, linewidth=1.4, marker="o", markersize=2.5)
        axes.axhline(100 * row["figures"][f"eval/{attack}/accuracy"]["mean"], color=ACCENT, linewidth=1, linestyle="--")
        axes.axvline(1, color=PALE, linewidth=0.7)
        axes.set_xscale("log")
        axes.minorticks_off()
        axes.set_xticks([0.1, 1, 10, 100], ["0.1", "1", "10", "100"])

    baseline = f"PGD-20, {_baseline(swept)['title']}"
    words = [("PGD-20 on scaled logits", DARK), (baseline, PALE), (title(attack), ACCENT)]
    return _panels(swept, panel, "Accuracy in % against the scale of the attacked logits", words)


def _baseline(rows: Rows) -> Mapping[str, Any]:
    return rows.get(BASELINE) or next(iter(rows.values()))


def _panels(rows: Rows, panel: Callable[..., None], text: str, words: Sequence[tuple[str, str]]) -> Figure:
    """Draws a small panel per row with shared axes, COLUMNS in a line."""
    columns = min(COLUMNS, max(len(rows), 3))  # at least three, to fit the title
    lines = -(-len(rows) // columns)
    figure = blank(2.5 * columns, 0.5 + 1.9 * lines)
    grid = list(figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).flat)
    for axes, row in zip(grid, rows.values(), strict=False):
        panel(axes, row, _baseline(rows))
        style(axes)
        axes.tick_params(labelsize=7)
        if axes in grid[len(rows) - columns : len(rows)]:
            axes.tick_params(labelbottom=True)  # the last panel of its column
        axes.set_title(row["title"], loc="left", fontsize=8.5, color=INK)
    for axes in grid[len(rows) :]:
        axes.set_axis_off()
    figure.suptitle(text, x=0.01, ha="left", fontsize=11, color=INK, fontweight="bold")
    _legend(figure, [Line2D([], [], color=colour, label=word) for word, colour in words])
    return figure


def _legend(figure: Figure, handles: Sequence[Artist]) -> None:
    figure.legend(
        handles=handles, loc="outside lower left", ncols=len(handles), frameon=False, fontsize=8, labelcolor=SOFT
    )


def errors(rows: Rows) -> Figure:
    """Plots natural and boundary error of each row, stacked to the robust error, for all images and each group."""
    common = set.intersection(*(set(row["figures"]) for row in rows.values()))
    groups = {group: word for group, word in GROUPS.items() if f"eval/natural_error{group}" in common}
    figure = blank(2 + 2.6 * len(groups), 1.2 + 0.27 * len(rows))
    panels = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
    for axes, (group, word) in zip(panels, groups.items(), strict=True):
        for i, row in enumerate(rows.values()):
            natural, boundary = (
                100 * row["figures"][f"eval/{error}_error{group}"]["mean"] for error in ("natural", "boundary")
            )
            axes.barh(i, natural, 0.68, color=LIGHT)
            axes.barh(i, boundary, 0.68, left=natural, color=ACCENT)
            for left, width, colour in ((0, natural, INK), (natural, boundary, "white")):
                if width >= 9:
                    axes.text(left + width / 2, i, f"{width:.0f}", ha="center", va="center", fontsize=7, color=colour)
        axes.set_xlim(0, 100)
        axes.set_xticks([0, 25, 50, 75, 100])
        style(axes, "x")
        headline(axes, word, [])
        axes.set_xlabel("error in %", fontsize=8, color=SOFT)
    panels[0].set_yticks(range(len(rows)), [row["title"] for row in rows.values()], fontsize=8)
    panels[0].invert_yaxis()
    parts = {"natural error": LIGHT, "+ boundary error = robust error": ACCENT}
    _legend(figure, [Patch(color=colour, label=part) for part, colour in parts.items()])
    return figure

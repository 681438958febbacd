"""Plots of a report: matplotlib figures built without pyplot, which would keep global state."""

import io
import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from etils import epath
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter
from matplotlib.transforms import Transform

from lt_adv.evaluation.metrics import Summary, printable, title
from lt_adv.evaluation.records import Examples

INK, SOFT, RULE = "#22303c", "#6b7a88", "#dfe4e8"  # text, secondary text, grid lines
LIGHT, MIDDLE, DARK, ACCENT = "#c3d1de", "#6d97bd", "#1e3a5c", "#c4553b"
LINES = (DARK, MIDDLE, ACCENT, "#d29a3a", "#5f8a6b", "#8a6d9e", SOFT)
PALE = "#9db0c2"  # LIGHT, darker, for text
DPI = 150
PER_ROW = 50  # classes side by side before their names become unreadable

LoggedMetrics = Mapping[str, Any]  # a line of metrics.jsonl: step, epoch, stage, and values by name


def png(figure: Figure) -> bytes:
    """Returns the figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, facecolor="white")
    return buffer.getvalue()


def blank(width: float, height: float) -> Figure:
    """Returns an empty figure, sizes in inches."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def style(axes: Axes, grid: Literal["x", "y"] | None = "y") -> None:
    """Sets spines, ticks and grid lines in the style of the report."""
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(RULE)
    axes.tick_params(which="both", length=0, labelsize=8, colors=INK)
    axes.set_axisbelow(True)
    if grid:
        axes.grid(axis=grid, color=RULE, linewidth=0.7)


def headline(axes: Axes, text: str, words: Sequence[tuple[str, str]], pad: float = 8.0) -> None:
    """Sets a title, with a legend of coloured words (word, colour) at its right end."""
    axes.set_title(text, loc="left", fontsize=11, color=INK, fontweight="bold", pad=pad)
    anchor: Transform | Artist = axes.transAxes
    point, offset = (1.0, 1.0), (0.0, pad)
    for word, colour in reversed(words):  # each word stands left of the one before
        anchor = axes.annotate(
            word, point, xycoords=anchor, xytext=offset, textcoords="offset points", ha="right", va="bottom",
            fontsize=9, color=colour, fontweight="bold",
        )  # fmt: skip
        point, offset = (0.0, 0.0), (-12.0, 0.0)


def _shorten(name: str, length: int = 18) -> str:
    """Returns a name in one line of at most `length` characters, with dollar signs escaped for matplotlib."""
    name = printable(name)
    return (name if len(name) <= length else name[: length - 1] + "…").replace("$", r"\$")


def main_attack(conditions: Sequence[str]) -> str | None:
    """Returns the attack to show where there is room for one: pgd20 if present, else the first."""
    attacks = [name for name in conditions if name not in ("clean", "worst")]
    return "pgd20" if "pgd20" in attacks else next(iter(attacks), None)


def accuracy_by_class(summary: Summary) -> Figure:
    """Draws clean, main-attack and worst-case accuracy of every class, above the number of its training images.

    The lower part is left out if the numbers of training images are not known.
    """
    rows, attack = summary["classes"], main_attack(summary["conditions"])
    layers = [("clean", "clean", LIGHT, 0.86)]
    if attack:
        layers += [(attack, title(attack), MIDDLE, 0.58), ("worst", "worst case", DARK, 0.28)]
    lines = -(-len(rows) // PER_ROW)
    per_line = -(-len(rows) // lines)
    figure = blank(min(14.0, 3.5 + 0.55 * per_line), 4.6 if lines == 1 else 3.5 * lines)
    counts = [row["class_count"] for row in rows]
    ratios = [3, 1] if counts[0] is not None else [1]
    grid = figure.subplots(len(ratios) * lines, 1, squeeze=False, gridspec_kw={"height_ratios": ratios * lines})[:, 0]
    # A list and not a dict by name: class names need not be unique.
    groups = [group for group, names in summary["groups"].items() if group != "definition" for _ in names]
    for line in range(lines):
        part = rows[line * per_line : (line + 1) * per_line]
        part_groups = groups[line * per_line : (line + 1) * per_line]
        upper, *lower = grid[line * len(ratios) : (line + 1) * len(ratios)]
        positions = np.arange(len(part))
        for name, _, colour, width in layers:
            values = [np.nan if row["accuracy"][name] is None else 100 * row["accuracy"][name] for row in part]
            upper.bar(positions, values, width, color=colour)
        if len(part) <= 12:
            _values(upper, part, [(name, colour) for name, _, colour, _ in layers])
        upper.set_ylim(0, 100)
        upper.set_yticks([0, 25, 50, 75, 100])
        upper.set_xticks([])
        upper.set_ylabel("accuracy in %", fontsize=8, color=SOFT)
        style(upper)
        _groups(upper, part_groups)
        for axes in lower:
            _training_images(axes, [row["class_count"] for row in part], counts, per_line)
        last = (upper, *lower)[-1]
        crowded = per_line > 12 or max(len(row["name"]) for row in part) > 12
        last.set_xticks(positions, [_shorten(row["name"]) for row in part], rotation=90 if crowded else 0)
        last.tick_params(axis="x", labelsize=8 if per_line <= 30 else 6.5)
        for axes in (upper, *lower):
            axes.set_xlim(-0.7, per_line - 0.3)
    words = [(label, PALE if colour == LIGHT else colour) for _, label, colour, _ in layers]
    headline(grid[0], "Accuracy by class", words, pad=18.0)
    return figure


def _training_images(axes: Axes, part: Sequence[int], counts: Sequence[int], per_line: int) -> None:
    """Draws the numbers of training images of some classes, on one scale for all classes."""
    axes.plot(np.arange(len(part)), part, color=SOFT, linewidth=0.8, marker="o", markersize=3)
    axes.set_yscale("log")
    axes.set_ylim(min(counts) / 2.5, max(counts) * (5 if per_line <= 20 else 2))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel("training\nimages", fontsize=8, color=SOFT)
    if per_line <= 20:
        for i, count in enumerate(part):
            axes.annotate(
                f"{count:,}", (i, count), (0, 4), textcoords="offset points", ha="center", fontsize=7, color=SOFT
            )
    style(axes)


def _values(axes: Axes, rows: Sequence[Mapping[str, Any]], layers: Sequence[tuple[str, str]]) -> None:
    """Writes the value of each bar below its top, unless the next bar covers that place."""
    for i, row in enumerate(rows):
        heights = [100 * (row["accuracy"][name] or 0.0) for name, _ in layers]
        for (_, colour), height, inner in zip(layers, heights, [*heights[1:], 0.0], strict=True):
            if height - inner >= 6:
                ink = INK if colour == LIGHT else "white"
                axes.text(i, height - 1, f"{height:.0f}", ha="center", va="top", fontsize=7.5, color=ink)


def _groups(axes: Axes, groups: list[str]) -> None:
    """Draws lines between the groups, head, body and tail, with their names on top; nothing without groups."""
    if not groups:
        return
    starts = [i for i, group in enumerate(groups) if i == 0 or group != groups[i - 1]]
    for start, end in zip(starts, [*starts[1:], len(groups)], strict=True):
        if start:
            axes.axvline(start - 0.5, color=SOFT, linewidth=0.8, linestyle=(0, (2, 2)))
        axes.text((start + end - 1) / 2, 101.5, groups[start], ha="center", va="bottom", fontsize=8, color=SOFT)


def robust_error(summary: Summary) -> Figure:
    """Draws natural and boundary error, stacked to the robust error, for all images and each group."""
    parts = summary["decomposition"]
    figure = blank(7.5, 1.3 + 0.5 * len(parts))
    axes = figure.subplots()
    for i, part in enumerate(parts.values()):
        if part["robust_error"] is None:
            continue
        natural, boundary, robust = (100 * part[f"{name}_error"] for name in ("natural", "boundary", "robust"))
        axes.barh(i, natural, 0.62, color=LIGHT)
        axes.barh(i, boundary, 0.62, left=natural, color=ACCENT)
        for left, width, colour in ((0, natural, INK), (natural, boundary, "white")):
            if width >= 6:
                axes.text(left + width / 2, i, f"{width:.1f}", ha="center", va="center", fontsize=8, color=colour)
        axes.text(natural + boundary + 1, i, f"{robust:.1f}", va="center", fontsize=9, color=INK, fontweight="bold")
    axes.set_yticks(range(len(parts)), list(parts), fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 108)
    axes.set_xticks([0, 25, 50, 75, 100])
    axes.set_xlabel("share of images in %", fontsize=8, color=SOFT)
    style(axes, grid="x")
    headline(axes, "Robust error", [("natural", PALE), ("+ boundary", ACCENT), ("= robust", INK)])
    return figure


def read_metrics(path: epath.PathLike) -> list[LoggedMetrics]:
    """Returns the entries of a metrics.jsonl.

    Leaves out lines that are not JSON objects (cut off by a crash) or have an invalid step, epoch or stage.
    """
    entries: list[LoggedMetrics] = []
    for line in epath.Path(path).read_bytes().splitlines() if epath.Path(path).exists() else ():
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict) and _has_position(entry):
            entries.append(entry)
    return entries


def _has_position(entry: LoggedMetrics) -> bool:
    """Whether step and epoch are numbers and the stage is a string, where present."""
    position = [entry.get(name, 0) for name in ("step", "epoch")]
    valid = all(isinstance(value, int | float) and abs(value) < 1e15 for value in position)  # False for NaN
    return valid and isinstance(entry.get("stage", ""), str)


def _times(history: Sequence[LoggedMetrics]) -> tuple[list[float], str]:
    """Returns the time of each entry and its unit: epochs in fractions, stage after stage; steps without epochs."""
    if not any("epoch" in entry for entry in history):
        return [float(entry.get("step", i)) for i, entry in enumerate(history)], "step"
    stages: dict[str | None, list[LoggedMetrics]] = {}
    for entry in history:
        stages.setdefault(entry.get("stage"), []).append(entry)
    start, times = 0.0, {}
    for entries in stages.values():
        # Epoch e ends at step e n, with n steps per epoch, so the largest step / epoch is n.
        rates = [entry["step"] / entry["epoch"] for entry in entries if entry.get("step") and entry.get("epoch")]
        steps_per_epoch = max(rates, default=None)
        for entry in entries:
            by_step = steps_per_epoch and "step" in entry
            times[id(entry)] = start + (entry["step"] / steps_per_epoch if by_step else entry.get("epoch", 0))
        start = max(times[id(entry)] for entry in entries)
    return [times[id(entry)] for entry in history], "epoch"


def _series(history: Sequence[LoggedMetrics], name: str, times: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the times and values of a metric where it is finite."""
    rows = [
        (t, entry[name]) for t, entry in zip(times, history, strict=True) if isinstance(entry.get(name), int | float)
    ]
    time, values = np.array(rows, float).reshape(-1, 2).T
    finite = np.isfinite(values)
    return time[finite], values[finite]


PANELS = {  # title -> (pattern of the metrics, words left out of the line labels)
    "Training loss": (r"train/loss.*", ""),
    "Robust training accuracy in %": (r"train/accuracy(_head|_body|_tail)?", "accuracy"),
    "Clean training accuracy in %": (r"train/clean/(balanced_accuracy|accuracy_(head|body|tail))", "clean accuracy"),
    "Validation accuracy in %": (r"valid/.*/accuracy(_tail)?", "accuracy"),
}


def training_curves(history: Sequence[LoggedMetrics]) -> Figure:
    """Draws loss, training and validation accuracy over epochs; a panel without data is left out."""
    present = {name for entry in history for name in entry}
    # Groups come last, so that each has the same colour in all panels.
    names = sorted(present, key=lambda name: (name.endswith(("_head", "_body", "_tail")), name))
    times, unit = _times(history)
    panels = {}
    for head, (pattern, omitted) in PANELS.items():
        matching = [n for n in names if re.fullmatch(pattern, n) and len(_series(history, n, times)[0])]
        if matching:
            panels[head] = [(n, _series(history, n, times), omitted.split()) for n in matching]
    panels = panels or {"No metrics yet": []}
    figure = blank(4.6 * len(panels), 3.4)
    for axes, (head, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        factor, ends = 1.0 if "loss" in head else 100.0, []
        for (name, (time, values), left_out), colour in zip(lines, LINES, strict=False):
            few = len(time) < 15
            axes.plot(time, factor * values, color=colour, linewidth=1.6, marker="o" if few else "", markersize=3)
            label = " ".join(w for w in re.split("[/_ ]", name.split("/", 1)[1]) if w not in left_out)
            ends.append((float(factor * values[-1]), label or "all", colour))
        style(axes)
        axes.set_title(head, loc="left", fontsize=10, color=INK, fontweight="bold")
        axes.set_xlabel(unit, fontsize=8, color=SOFT)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        _label_ends(axes, ends)
    return figure


def _label_ends(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Writes the label of each line at its right end, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    gap, last = 0.065, -1.0
    for value, name, colour in sorted(ends):
        height = last = max((value - low) / (high - low), last + gap)
        axes.annotate(
            name, (1, height), (4, 0), xycoords="axes fraction", textcoords="offset points", va="center", fontsize=8,
            color=colour,
        )  # fmt: skip


def example_images(examples: Examples, class_names: Sequence[str], class_counts: Sequence[int] | None) -> Figure:
    """Draws clean image, perturbation and adversarial image, one column per class from head to tail.

    `examples` is the result of `evaluation.examples`. Perturbations are drawn around grey, all magnified by the factor
    in the label.
    """
    number, eps = len(examples["label"]), float(examples["eps"])
    figure = blank(1.25 * number + 0.6, 5.0)
    grid = figure.subplots(3, number, squeeze=False)
    clean, adversarial = examples["clean"], examples["adversarial"]
    largest = float(np.abs(adversarial - clean).max())
    scale = 0.4 / largest if largest else 1.0
    shown = (clean, np.clip(0.5 + scale * (adversarial - clean), 0, 1), adversarial)
    for column in range(number):
        label = int(examples["label"][column])
        before, after = int(examples["clean_prediction"][column]), int(examples["prediction"][column])
        for row in range(3):
            axes, image = grid[row, column], shown[row][column]
            axes.imshow(image[..., 0] if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=1)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
        class_name = _shorten(class_names[label], 14)
        count = "" if class_counts is None else f"\n{class_counts[label]:,} images"
        grid[0, column].set_title(class_name + count, fontsize=8, color=INK)
        for row, prediction in ((0, before), (2, after)):
            colour = DARK if prediction == label else ACCENT
            name = class_names[prediction] if prediction >= 0 else "not finite"
            grid[row, column].set_xlabel(_shorten(name, 14), fontsize=8, color=colour, fontweight="bold")
    labels = ("clean", f"perturbation\n× {scale:.3g} around grey", f"{title(examples['attack'])}\neps {eps:.6g}")
    for row, text in enumerate(labels):
        grid[row, 0].set_ylabel(text, fontsize=8, color=SOFT)
    caption = (
        "True class above, prediction below (red: wrong). Shown: the first image of each class whose prediction the "
        "attack changes, if there is one."
    )
    figure.suptitle(textwrap.fill(caption, max(20 * number, 30)), fontsize=8, color=SOFT, x=0.01, ha="left")
    return figure

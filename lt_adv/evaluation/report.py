"""The report for readers: markdown for the paper, a table for the terminal, and the files of a report directory."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import rich.console
import rich.table
import rich.text
from etils import epath

from lt_adv.evaluation import metrics, plots, records
from lt_adv.evaluation.masking import plot
from lt_adv.evaluation.metrics import printable, title
from lt_adv.evaluation.records import WORST, Records
from lt_adv.runtime import atomic_io

UNITS = {"eps": "radius", "step_size": "step"}


def percent(value: float | None) -> str:
    return "n/a" if value is None else f"{100 * value:.2f}"


def radius(value: float) -> str:
    """A length to full precision and in /255: `0.031 = 7.905/255`, which is not 8/255."""
    return f"{value!r} = {value * 255:.12g}/255"


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def attack_line(attack: Mapping[str, Any]) -> str:
    """One attack's protocol in words, from its header entry."""
    parts = [attack["attack"].upper()]
    parts += [f"{word} {radius(attack[length])}" for length, word in UNITS.items() if length in attack]
    skipped = ("attack", *UNITS, *(f"{length}_255" for length in UNITS))
    parts += [f"{name.replace('_', ' ')} {value}" for name, value in attack.items() if name not in skipped]
    return ", ".join(parts)


def literal(text: str) -> str:
    """Markdown that shows a name as it is, in one line; a blank one in quotes."""
    return re.sub(r"[\\`*\[\]<>|$~&]|(?<!\w)_|_(?!\w)", r"\\\g<0>", printable(text) if text.strip() else repr(text))


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A markdown table; the first `left` columns stand to the left, the others to the right."""
    rule = [":--" if i < left else "--:" for i in range(len(head))]
    return "\n".join("| " + " | ".join(map(_cell, row)) + " |" for row in (head, rule, *rows))


def _cell(text: str) -> str:
    """In one line, with a backslash before each bar that would end the cell."""
    return re.sub(r"(\\.)|\|", lambda match: match[1] or r"\|", printable(text))


def _counts(counts: Sequence[int] | None) -> str | None:
    """Training images per class; of many classes the range, for the table of classes names them all."""
    if counts is None:
        return None
    listed = ", ".join(map(str, counts)) if len(counts) <= 20 else f"{max(counts)} to {min(counts)}"
    return f"{listed} (total {sum(counts)}, ratio {max(counts) / max(min(counts), 1):.4g})"


def facts(summary: Mapping[str, Any]) -> dict[str, str]:
    """The header lines of the report: what was evaluated, how and with what; further plain entries come last."""
    known = dict(summary["header"]) | dict(summary["context"])
    sizes = sorted(set(known["images_per_class"]))
    per_class = f"{sizes[0]} per class" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]} per class"
    seconds = known.pop("training_seconds", None)
    versions = [f"{name.removesuffix('_version')} {known[name]}" for name in sorted(known) if name.endswith("_version")]
    lines = {
        "Model": known.pop("model", None),
        "Method": known.pop("method", None),
        "Dataset": known.pop("dataset", None),
        "Images": f"{known['images']} ({per_class}), {known.pop('subset', None) or 'the whole test split'}",
        "Class counts": _counts(known.pop("class_counts")),
        "Class counts before the validation cut": _counts(known.pop("class_counts_before", None)),
        "Checkpoint step": known.pop("checkpoint_step", None),
        "Training time": None if seconds is None else duration(seconds),
        "Seed": known.pop("seed", None),
        "Device": known.pop("device"),
        "Versions": ", ".join(versions),
    }
    shown = ("attacks", "images", "images_per_class", "class_names")
    rest = {name: value for name, value in known.items() if name not in shown and not name.endswith("_version")}
    lines |= {name.replace("_", " ").capitalize(): value for name, value in rest.items()}
    return {name: str(value) for name, value in lines.items() if value is not None}


def _figures(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the main table: a row per condition; a column for all, balanced and each group."""
    groups = [name for name in summary["groups"] if name != "definition"]
    columns = {"Accuracy": "accuracy", "Balanced": "balanced_accuracy"}
    columns |= {group.capitalize(): f"accuracy_{group}" for group in groups}
    rows = [
        [title(name), *(percent(summary["metrics"][f"eval/{name}/{column}"]) for column in columns.values())]
        for name in summary["conditions"]
    ]
    return ["", *columns], rows


def warned(summary: Mapping[str, Any]) -> list[str]:
    """The warnings, as lines of markdown."""
    return [f"> **Warning.** {literal(warning)}" for warning in summary["warnings"]] + [""] * bool(summary["warnings"])


def accuracies(summary: Mapping[str, Any]) -> list[str]:
    """The sections on accuracy and on the attacks, as lines of markdown."""
    groups = {name: ids for name, ids in summary["groups"].items() if name != "definition"}
    cut = "; ".join(f"{name}: {', '.join(map(literal, ids))}" for name, ids in groups.items())
    attacks = [[title(name), attack_line(attack)] for name, attack in summary["header"]["attacks"].items()]
    return [
        "## Accuracy",
        "",
        table(*_figures(summary)),
        "",
        "In per cent. Worst case: right on the clean image and under every attack above. Balanced: mean over classes. "
        f"Groups by training count (definition: {summary['groups']['definition']}). {cut}.",
        "",
        "## Attacks",
        "",
        table(["", "Protocol"], attacks, left=2),
        "",
        "Lengths in units of the [0, 1] pixel range. Every adversarial image was checked against both.",
        "",
    ]


def reliability(summary: Mapping[str, Any]) -> list[str]:
    """The section on whether a gain over the baseline is real, as lines of markdown; none without a baseline."""
    found = summary.get("reliability")
    if found is None:
        return []
    verdict, protocol, sides = found["verdict"], found["protocol"], [found[side] for side in ("network", "baseline")]
    rows = [[_attacked(name), *(percent(side["accuracy"][name]) for side in sides)] for name in sides[0]["accuracy"]]
    rows += [[title(WORST), *(percent(side["worst"]) for side in sides)]]
    last = f"{protocol['radii'][-1]:g}"
    rows += [[f"PGD-{protocol['num_steps']}, radius {last}", *(percent(side["by_radius"][-1][1]) for side in sides)]]
    rows += [["Images with zero input gradient", *(percent(side["zero_gradient"]) for side in sides)]]
    rows += [["Largest logit minus second, median", *(f"{side['logit_lead']:.4g}" for side in sides)]]
    return [
        "## Is the gain real?",
        "",
        f"**{verdict['words']}**",
        "",
        *(f"- {line}" for line in (*verdict["reasons"], *verdict["notes"])),
        "",
        table(["", "This network", "Baseline"], rows),
        "",
        f"In per cent, on {protocol['images']} images that both networks were attacked on; radius "
        f"{radius(protocol['eps'])}. The baseline is the run in {found['baseline_run']}. Worst case: here also under "
        "PGD on rescaled logits. A figure counts where it is above the baseline's by three standard errors of the "
        "paired differences.",
        "",
    ]


def _attacked(name: str) -> str:
    return {"square": "Square", "transfer": "Examples made on the baseline"}.get(name, title(name))


def markdown(summary: Mapping[str, Any], pictures: Mapping[str, str] | None = None) -> str:
    """The paper-ready report of `report.summarise`, with `context` in it; accuracies in per cent."""
    lines = ["# Robustness under long-tailed data", "", *warned(summary)]
    lines += [f"- **{name}:** {printable(value)}" for name, value in facts(summary).items()]
    lines += ["", *accuracies(summary), *reliability(summary), "## Natural + boundary = robust error", ""]
    errors = ("natural_error", "boundary_error", "robust_error")
    rows = [
        [name.capitalize(), str(part["images"]), *(percent(part[error]) for error in errors)]
        for name, part in summary["decomposition"].items()
    ]
    lines += [table(["", "Images", "Natural", "Boundary", "Robust"], rows)]
    lines += ["", "Boundary error: right on the clean image, wrong under an attack.", "", "## Classes", ""]
    head = ["Class", "Training images", "Evaluated images", *map(title, summary["conditions"])]
    head += ["Natural", "Boundary", "Robust"]
    rows = [
        [literal(row["name"]), str(row["class_count"]), str(row["images"])]
        + [percent(value) for value in row["accuracy"].values()]
        + [percent(row[error]) for error in errors]
        for row in summary["classes"]
    ]
    lines += [table(head, rows), ""]
    for caption, picture in (pictures or {}).items():
        lines += [f"## {caption}", "", f"![{caption}]({picture})", ""]
    return "\n".join(lines)


def terminal(summary: Mapping[str, Any]) -> rich.table.Table:
    """The main table for a terminal."""
    head, rows = _figures(summary)
    images = summary["header"]["images"]
    shown = rich.table.Table(title=f"Accuracy in per cent, {images} images", title_justify="left")
    for i, column in enumerate(head):
        shown.add_column(rich.text.Text(column), justify="left" if i == 0 else "right")
    for row in rows:
        shown.add_row(*map(rich.text.Text, row), style="bold" if row[0] == title(WORST) else None)
    return shown


def show(summary: Mapping[str, Any], console: rich.console.Console | None = None) -> None:
    """Print the table and the warnings."""
    console = console or rich.console.Console()
    console.print(terminal(summary))
    for warning in summary["warnings"]:
        console.print(f"warning: {warning}", highlight=False, markup=False, soft_wrap=True)
    if found := summary.get("reliability"):
        for line in (found["verdict"]["words"], *found["verdict"]["reasons"], *found["verdict"]["notes"]):
            console.print(line, highlight=False, markup=False, soft_wrap=True)


def write_report(directory: epath.PathLike, results: Records, context: Mapping[str, Any]) -> dict[str, Any]:
    """Write `report.json`, `report.md` and `plots/*.png` into `directory`; returns what report.json holds.

    `context`: class_counts [C] of the training set (needed); optional class_counts_before (the validation cut), groups
    (name of the definition, "thirds"), model, method, dataset, training_seconds, metrics (path of metrics.jsonl for the
    training curves), examples (evaluate.examples, for the picture grid), reliability (what `baseline.judge` found); any
    further plain entry becomes a line of the header.
    """
    context = dict(context)
    curves, examples = context.pop("metrics", None), context.pop("examples", None)
    summary = metrics.summarise(results, context["class_counts"], context.pop("groups", "thirds"))
    if (found := context.pop("reliability", None)) is not None:
        summary["reliability"] = records.plain(found)
    summary["context"] = records.plain(context)
    drawn = {"Accuracy by class": plots.classes(summary), "Robust error": plots.errors(summary)}
    if curves is not None and (history := plots.read_metrics(curves)):
        drawn["Training curves"] = plots.curves(history)
    if examples is not None:
        drawn["Examples"] = plots.examples(examples, results.class_names, context["class_counts"])
    if found is not None:
        drawn["Reliability"] = plot.curves(found)
    directory = epath.Path(directory)
    pictures = {caption: f"plots/{caption.lower().replace(' ', '_')}.png" for caption in drawn}
    for caption, figure in drawn.items():
        atomic_io.write_atomically(directory / pictures[caption], plots.png(figure))
    atomic_io.write_atomically(directory / "report.md", markdown(summary, pictures))
    atomic_io.write_atomically(directory / "report.json", json.dumps(summary, indent=1, allow_nan=False))
    return summary

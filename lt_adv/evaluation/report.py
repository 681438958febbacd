"""Reports of an evaluation: markdown, a table for the terminal, and the files of a report directory."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import rich.console
import rich.table
import rich.text
from etils import epath

from lt_adv.evaluation import metrics, plots, records
from lt_adv.evaluation.attack_specs import AttackSpec
from lt_adv.evaluation.masking.plot import masking_curves
from lt_adv.evaluation.metrics import Summary, printable, title
from lt_adv.evaluation.records import WORST, Records
from lt_adv.runtime import atomic_io

LENGTHS = {"eps": "radius", "step_size": "step"}  # option of an attack -> its name in the report


def percent(value: float | None) -> str:
    """Returns a share in per cent, "n/a" for None."""
    return "n/a" if value is None else f"{100 * value:.2f}"


def format_length(value: float) -> str:
    """Returns a length to full precision and in /255: 0.031 becomes `0.031 = 7.905/255`, which is not 8/255."""
    return f"{value!r} = {value * 255:.12g}/255"


def format_duration(seconds: float) -> str:
    """Returns a duration as `1 h 02 min` or `2 min 03 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def attack_line(attack: AttackSpec) -> str:
    """Returns the protocol of an attack in one line, from its header entry."""
    parts = [attack["attack"].upper()]
    parts += [f"{label} {format_length(attack[option])}" for option, label in LENGTHS.items() if option in attack]
    printed = ("attack", *LENGTHS, *(f"{option}_255" for option in LENGTHS))
    parts += [f"{name.replace('_', ' ')} {value}" for name, value in attack.items() if name not in printed]
    return ", ".join(parts)


def escape_markdown(text: str) -> str:
    """Returns markdown that shows a name literally, in one line; a blank name gets quotes."""
    return re.sub(r"[\\`*\[\]<>|$~&]|(?<!\w)_|_(?!\w)", r"\\\g<0>", printable(text) if text.strip() else repr(text))


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Returns a markdown table; the first `left` columns are aligned left, the others right."""
    rule = [":--" if i < left else "--:" for i in range(len(head))]
    return "\n".join("| " + " | ".join(map(_cell, row)) + " |" for row in (head, rule, *rows))


def _cell(text: str) -> str:
    """Returns a cell in one line, with a backslash before each bar that would end it."""
    return re.sub(r"(\\.)|\|", lambda match: match[1] or r"\|", printable(text))


def _counts(counts: Sequence[int] | None) -> str | None:
    """Returns the training images per class; for many classes the range, as the table of classes has all counts."""
    if counts is None:
        return None
    listed = ", ".join(map(str, counts)) if len(counts) <= 20 else f"{max(counts)} to {min(counts)}"
    return f"{listed} (total {sum(counts)}, imbalance ratio {max(counts) / max(min(counts), 1):.4g})"


def header_fields(summary: Summary) -> dict[str, str]:
    """Returns the header of the report: field -> text. Entries of `context` without a field come last."""
    entries = dict(summary["header"]) | dict(summary["context"])
    sizes = sorted(set(entries["images_per_class"]))
    per_class = f"{sizes[0]} per class" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]} per class"
    seconds = entries.pop("training_seconds", None)
    versions = [
        f"{name.removesuffix('_version')} {entries[name]}" for name in sorted(entries) if name.endswith("_version")
    ]
    fields = {
        "Model": entries.pop("model", None),
        "Method": entries.pop("method", None),
        "Dataset": entries.pop("dataset", None),
        "Images": f"{entries['images']} ({per_class}), {entries.pop('subset', None) or 'the whole test split'}",
        "Training images per class": _counts(entries.pop("class_counts")),
        "Training images per class before the validation split": _counts(entries.pop("class_counts_before", None)),
        "Checkpoint step": entries.pop("checkpoint_step", None),
        "Training time": None if seconds is None else format_duration(seconds),
        "Seed": entries.pop("seed", None),
        "Device": entries.pop("device"),
        "Versions": ", ".join(versions),
    }
    printed = ("attacks", "images", "images_per_class", "class_names")
    rest = {name: value for name, value in entries.items() if name not in printed and not name.endswith("_version")}
    fields |= {name.replace("_", " ").capitalize(): value for name, value in rest.items()}
    return {name: str(value) for name, value in fields.items() if value is not None}


def _accuracy_table(summary: Summary) -> tuple[list[str], list[list[str]]]:
    """Returns head and rows of the main table: one row per condition; columns for all, balanced and each group."""
    groups = [name for name in summary["groups"] if name != "definition"]
    columns = {"Accuracy": "accuracy", "Balanced": "balanced_accuracy"}
    columns |= {group.capitalize(): f"accuracy_{group}" for group in groups}
    rows = [
        [title(name), *(percent(summary["metrics"][f"eval/{name}/{column}"]) for column in columns.values())]
        for name in summary["conditions"]
    ]
    return ["", *columns], rows


def warning_lines(summary: Summary) -> list[str]:
    """Returns the warnings as lines of markdown."""
    lines = [f"> **Warning.** {escape_markdown(warning)}" for warning in summary["warnings"]]
    return [*lines, ""] if lines else []


def accuracy_sections(summary: Summary) -> list[str]:
    """Returns the sections on accuracy and on the attacks as lines of markdown."""
    groups = {name: names for name, names in summary["groups"].items() if name != "definition"}
    members = "; ".join(f"{group}: {', '.join(map(escape_markdown, names))}" for group, names in groups.items())
    attacks = [[title(name), attack_line(attack)] for name, attack in summary["header"]["attacks"].items()]
    description = (
        "In per cent. Clean: clean accuracy; all other rows: robust accuracy. Worst case: correct on the clean image "
        "and under every attack above. Balanced: mean over classes."
    )
    if groups:
        definition = summary["groups"]["definition"]
        description += f" Groups of classes by number of training images (definition: {definition}). {members}."
    return [
        "## Accuracy",
        "",
        table(*_accuracy_table(summary)),
        "",
        description,
        "",
        "## Attacks",
        "",
        table(["", "Protocol"], attacks, left=2),
        "",
        "Radius and step in units of the [0, 1] pixel range. Every adversarial image was checked to lie within the "
        "radius and the pixel range.",
        "",
    ]


def masking_section(summary: Summary) -> list[str]:
    """Returns the section on gradient masking as lines of markdown; empty without diagnostics."""
    comparison = summary.get("reliability")
    if comparison is None:
        return []
    verdict, protocol = comparison["verdict"], comparison["protocol"]
    sides = [comparison[side] for side in ("network", "baseline") if side in comparison]
    images = f"{protocol['images']} images with radius {format_length(protocol['eps'])}"
    if "baseline" in comparison:
        run = comparison.get("baseline_run")
        baseline = f"the run in {run}" if run else "the network that was given as one"
        where = f"of both networks on the same {images}. Baseline: {baseline}"
        significant = "A difference is significant if the mean of the paired differences"
    else:
        where, significant = f"on {images}", "A share of the images is significant if it"
    rows = [
        [_attack_title(name), *(percent(side["accuracy"][name]) for side in sides)] for name in sides[0]["accuracy"]
    ]
    rows += [[title(WORST), *(percent(side["worst"]) for side in sides)]]
    largest = f"{protocol['radii'][-1]:g}"
    rows += [[f"PGD-{protocol['num_steps']}, radius {largest}", *(percent(side["by_radius"][-1][1]) for side in sides)]]
    rows += [["Images with zero input gradient", *(percent(side["zero_gradient"]) for side in sides)]]
    rows += [["Median gap of the two largest logits", *(f"{side['logit_lead']:.4g}" for side in sides)]]
    return [
        "## Gradient masking",
        "",
        f"**{verdict['words']}**",
        "",
        *(f"- {line}" for line in (*verdict["reasons"], *verdict["notes"])),
        "",
        table(["", "This network", "Baseline"][: 1 + len(sides)], rows),
        "",
        "Gradient masking (obfuscated gradients; Athalye et al., ICML 2018) makes gradient attacks fail although "
        f"adversarial examples exist. Accuracies in per cent, {where}. Worst case: here also over PGD on rescaled "
        f"logits. {significant} is more than three standard errors above zero.",
        "",
    ]


def _attack_title(name: str) -> str:
    return {"square": "Square", "transfer": "Transfer from the baseline"}.get(name, title(name))


def markdown_report(summary: Summary, plot_paths: Mapping[str, str] | None = None) -> str:
    """Returns the report as markdown, of `metrics.summarise` and its `context`; `plot_paths` has paths by caption."""
    long_tailed = summary["context"]["class_counts"] is not None
    lines = ["# Robustness under long-tailed data" if long_tailed else "# Adversarial robustness", ""]
    lines += warning_lines(summary)
    lines += [f"- **{name}:** {printable(value)}" for name, value in header_fields(summary).items()]
    lines += ["", *accuracy_sections(summary), *masking_section(summary), "## Error decomposition", ""]
    errors = ("natural_error", "boundary_error", "robust_error")
    rows = [
        [name.capitalize(), str(part["images"]), *(percent(part[error]) for error in errors)]
        for name, part in summary["decomposition"].items()
    ]
    lines += [table(["", "Images", "Natural error", "Boundary error", "Robust error"], rows)]
    lines += [
        "",
        "In per cent of the images. Robust error = natural error + boundary error. Natural: wrong on the clean image. "
        "Boundary: correct on the clean image, wrong under an attack.",
        "",
        "## Classes",
        "",
    ]
    head = ["Class", *["Training images"] * long_tailed, "Evaluated images", *map(title, summary["conditions"])]
    head += ["Natural error", "Boundary error", "Robust error"]
    rows = [
        [escape_markdown(row["name"]), *[str(row["class_count"])] * long_tailed, str(row["images"])]
        + [percent(value) for value in row["accuracy"].values()]
        + [percent(row[error]) for error in errors]
        for row in summary["classes"]
    ]
    lines += [table(head, rows), ""]
    for caption, path in (plot_paths or {}).items():
        lines += [f"## {caption}", "", f"![{caption}]({path})", ""]
    return "\n".join(lines)


def terminal_table(summary: Summary) -> rich.table.Table:
    """Returns the main table for a terminal."""
    head, rows = _accuracy_table(summary)
    images = summary["header"]["images"]
    accuracy_table = rich.table.Table(title=f"Accuracy in per cent, {images} images", title_justify="left")
    for i, column in enumerate(head):
        accuracy_table.add_column(rich.text.Text(column), justify="left" if i == 0 else "right")
    for row in rows:
        accuracy_table.add_row(*map(rich.text.Text, row), style="bold" if row[0] == title(WORST) else None)
    return accuracy_table


def print_summary(summary: Summary, console: rich.console.Console | None = None) -> None:
    """Prints the main table, the warnings and the verdict on gradient masking."""
    console = console or rich.console.Console()
    console.print(terminal_table(summary))
    for warning in summary["warnings"]:
        console.print(f"warning: {warning}", highlight=False, markup=False, soft_wrap=True)
    if comparison := summary.get("reliability"):
        verdict = comparison["verdict"]
        for line in (verdict["words"], *verdict["reasons"], *verdict["notes"]):
            console.print(line, highlight=False, markup=False, soft_wrap=True)


FOR_PLOTS = ("metrics", "examples")  # entries of the context of a report that its summary does not have


def summarise_with_context(results: Records, context: Mapping[str, Any]) -> Summary:
    """Returns the content of report.json, from the `context` of `write_report`."""
    context = {name: value for name, value in context.items() if name not in FOR_PLOTS}
    summary = metrics.summarise(results, context["class_counts"], context.pop("groups", "thirds"))
    if (comparison := context.pop("reliability", None)) is not None:
        summary["reliability"] = records.as_json(comparison)
    summary["context"] = records.as_json(context)
    return summary


def write_report(directory: epath.PathLike, results: Records, context: Mapping[str, Any]) -> Summary:
    """Writes `report.json`, `report.md` and `plots/*.png` into `directory`; returns the content of report.json.

    `context` needs class_counts, the number of training images of each class [C], or None for a balanced training set.
    Optional entries are
      class_counts_before: the same before a validation split was taken
      groups: the name of a definition of groups ["thirds"]
      model, method, dataset, training_seconds
      metrics: path of a metrics.jsonl, for the training curves
      examples: the result of `examples`, for the grid of images
      reliability: the result of `masking.compare_with_baseline`, with `baseline_run` if the baseline is a run
    Each further entry becomes a line of the header.
    """
    metrics_path, examples, comparison = (context.get(name) for name in (*FOR_PLOTS, "reliability"))
    summary = summarise_with_context(results, context)
    figures = {"Accuracy by class": plots.accuracy_by_class(summary), "Robust error": plots.robust_error(summary)}
    if metrics_path is not None and (history := plots.read_metrics(metrics_path)):
        figures["Training curves"] = plots.training_curves(history)
    if examples is not None:
        figures["Examples"] = plots.example_images(examples, results.class_names, context["class_counts"])
    if comparison is not None:
        figures["Gradient masking"] = masking_curves(comparison)
    directory = epath.Path(directory)
    plot_paths = {caption: f"plots/{caption.lower().replace(' ', '_')}.png" for caption in figures}
    for caption, figure in figures.items():
        atomic_io.write_atomically(directory / plot_paths[caption], plots.png(figure))
    atomic_io.write_atomically(directory / "report.md", markdown_report(summary, plot_paths))
    atomic_io.write_atomically(directory / "report.json", json.dumps(summary, indent=1, allow_nan=False))
    return summary

"""Tables of a study's summary, each (head, rows of text), and the markdown page of them."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.study import published as robal_study
from lt_adv.evaluation.metrics import title
from lt_adv.evaluation.records import CLEAN, WORST
from lt_adv.evaluation.report import table

CONDITIONS = (CLEAN, "fgsm", "pgd20", "pgd100", "mim20", "cw20", "lsa", "autoattack")
GROUPS = ("head", "body", "tail")
SLICES = {  # caption -> metric
    "Balanced: mean over classes": "balanced_accuracy",
    **{group.capitalize(): f"accuracy_{group}" for group in GROUPS},
}
Summary = Mapping[str, Any]
Table = tuple[list[str], list[list[str]]]


def percent(spread: Mapping[str, Any] | None) -> str:
    """Formats per cent as 42.0 ± 1.4; None is ""."""
    return "" if spread is None else _spread(spread, 100, 1)


def _spread(spread: Mapping[str, Any], factor: float, digits: int) -> str:
    deviation = spread["deviation"]
    tail = "" if deviation is None else f" ± {factor * deviation:.{digits}f}"
    return f"{factor * spread['mean']:.{digits}f}{tail}"


def ordered(conditions: Sequence[str]) -> list[str]:
    """Sorts conditions as in CONDITIONS, then others, the worst case last, without duplicates."""
    distinct = set(conditions)
    others = [condition for condition in dict.fromkeys(conditions) if condition not in (*CONDITIONS, WORST)]
    return [c for c in (*CONDITIONS, *others, WORST) if c in distinct]


def conditions(summary: Summary) -> list[str]:
    """Returns the conditions under which at least one row was evaluated."""
    names = [name.split("/") for row in summary["rows"].values() for name in row["figures"]]
    return ordered([name[1] for name in names if name[-1] == "accuracy"])


def accuracies(summary: Summary, caption: str, metrics: Mapping[str, str]) -> Table:
    """Returns a table with a row per method and a column for each of `metrics` (head -> name) that some row has."""
    rows = summary["rows"].values()
    columns = {head: name for head, name in metrics.items() if any(name in row["figures"] for row in rows)}
    body = [[row["title"], *(percent(row["figures"].get(name)) for name in columns.values())] for row in rows]
    return [caption, *columns], body


def all_images(summary: Summary, published: bool = True) -> Table:
    """Returns accuracies on all images under every condition, with signs of gradient masking, seeds, seconds and
    published numbers."""
    head, rows = accuracies(summary, "All images", {title(c): f"eval/{c}/accuracy" for c in conditions(summary)})
    has_verdicts = any(row.get("verdict") for row in summary["rows"].values())
    head += ["Gradient masking"] * has_verdicts
    for cells, row in zip(rows, summary["rows"].values(), strict=True):
        cells += [masking(row.get("verdict"))] * has_verdicts
        cells += [str(len(row["seeds"])), _spread(row["training_seconds"], 1, 0)]
        cells += [row["published"] or "–"] * published
    return [*head, "Seeds", "Training in s", *["Published (source: the config)"] * published], rows


def masking(verdict: Mapping[str, Any] | None) -> str:
    """Describes signs of gradient masking, with the groups of classes whose robustness PGD overestimates."""
    if not verdict or verdict["trustworthy"]:
        return "no sign" if verdict else ""
    groups = dict.fromkeys(gain["group"] or "all" for gain in verdict["gains"] if not gain["real"])
    return f"**robustness overestimated: {', '.join(groups)}**" if groups else "**signs**"


def masking_reasons(summary: Summary) -> list[Table]:
    """Returns a table with all signs of gradient masking, or nothing."""
    rows = [(row["title"], row["verdict"]["reasons"]) for row in summary["rows"].values() if row.get("verdict")]
    signs = [[title, " ".join(reasons)] for title, reasons in rows if reasons]
    return [(["Gradient masking", "Signs"], signs)] if signs else []


def published(summary: Summary) -> list[Table]:
    """Returns the rows beside the published results of RoBal's study, and the rank correlations; [] without a row."""
    rows = {name: row for name, row in summary["rows"].items() if name in robal_study.ROBAL_FIGURE}
    if not summary.get("rank_correlations"):
        return []
    shown = [c for c in (CLEAN, "pgd20", "cw20", "autoattack", WORST) if c in conditions(summary)]
    body = [
        [
            row["title"],
            *(f"{value:g}" for value in robal_study.ROBAL_FIGURE[name]),
            *(percent(row["figures"].get(f"eval/{c}/accuracy")) for c in shown),
        ]
        for name, row in rows.items()
    ]
    head = ["Beside RoBal's figure", "Published, clean", "Published, robust", *(f"Here, {title(c)}" for c in shown)]
    correlations = [
        [
            f"{title(c['condition'])} here, {c['published']} published",
            str(c["rows"]),
            f"{c['correlation']:+.2f}",
            f"{c['p_value']:.3f}",
        ]
        for c in summary["rank_correlations"]
    ]
    return [(head, body), (["Order of the rows", "Rows", "Spearman's correlation", "p"], correlations)]


def slices(summary: Summary) -> list[Table]:
    """Returns the balanced accuracy and that of each group of classes, under every condition."""
    names = conditions(summary)
    tables = [
        accuracies(summary, caption, {title(c): f"eval/{c}/{metric}" for c in names})
        for caption, metric in SLICES.items()
    ]
    return [(head, rows) for head, rows in tables if len(head) > 1]


def groups(summary: Summary) -> Table:
    """Returns accuracies of head, body and tail, in the worst case and under PGD-20."""
    metrics = {f"{title(c)}, {group}": f"eval/{c}/accuracy_{group}" for c in (WORST, "pgd20") for group in GROUPS}
    return accuracies(summary, "By group", metrics)


def choices(summary: Summary) -> Table:
    """Returns accuracies of all images and of the tail, with the variants of a row below it."""
    rows = summary["rows"]
    ordered = {name: rows[name] for name in sorted(rows, key=lambda name: rows[name].get("varies") or name)}
    metrics = {title(c): f"eval/{c}/accuracy" for c in (CLEAN, "pgd20", "cw20", WORST)}
    metrics |= {f"{title(c)}, tail": f"eval/{c}/accuracy_tail" for c in ("pgd20", "cw20", WORST)}
    return accuracies({"rows": ordered}, "Row", metrics)


def page(summary: Summary, tables: Iterable[Table], pictures: Iterable[str] = ()) -> str:
    """Returns a markdown page: the sentence, the tables, failures, and links to the pictures."""
    blocks = [sentence(summary), *(table(*columns) for columns in tables)]
    if summary["failed"]:
        blocks.append(table(["Failed", "Reason"], [list(item) for item in summary["failed"].items()], left=2))
    blocks += [f"![{Path(picture).stem.replace('_', ' ')}]({picture})" for picture in pictures]
    return "\n\n".join(blocks)


def sentence(summary: Summary) -> str:
    """Returns one paragraph about data, network, budget, attacks and device of the study."""
    about = summary["about"]
    if not about:
        return "No row has a result."
    eps = f", eps {about['eps']!r} = {255 * about['eps']:.6g}/255" if "eps" in about else ""
    text = f"{about['dataset']}; {about['network']}, {about['epochs']} epochs{eps}; "
    text += f"{about['images']} images ({about['subset']}); {about['device']}, jax {about['jax_version']}."
    if "autoattack_images" in about:
        seeds = about["autoattack_seeds"]
        text += f" AutoAttack on {about['autoattack_images']} of them, {seeds if seeds > 1 else 'one'} "
        text += f"seed{'s' * (seeds > 1)}; it is not in the worst case."
    if "baseline" in about:
        text += f" Gradient masking: checks of the gain over {about['baseline']}, on {about['judged_images']} images, "
        text += "one seed."
    if about["different"]:
        text += f" Not the same for all rows: {', '.join(about['different']).replace('_', ' ')}."
    return text + " Accuracy in per cent; ± is the standard deviation over the seeds."

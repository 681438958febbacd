"""The summary of a study as tables: heads and rows of text."""

from collections.abc import Mapping
from typing import Any

CONDITIONS = {"clean": "clean", "fgsm": "FGSM", "pgd20": "PGD-20", "cw20": "CW-20", "lsa": "LSA"}
CONDITIONS |= {"autoattack": "AutoAttack", "worst": "worst case"}
SLICES = {  # what is counted -> the metric's name
    "All images": "accuracy",
    "Balanced: mean over classes": "balanced_accuracy",
    "Head": "accuracy_head",
    "Body": "accuracy_body",
    "Tail": "accuracy_tail",
}
Table = tuple[list[str], list[list[str]]]


def percent(spread: Mapping[str, Any] | None) -> str:
    """42.0 ± 1.4, or "" for what was not measured."""
    return "" if spread is None else _spread(spread, 100, 1)


def _spread(spread: Mapping[str, Any], factor: float, digits: int) -> str:
    deviation = spread["deviation"]
    tail = "" if deviation is None else f" ± {factor * deviation:.{digits}f}"
    return f"{factor * spread['mean']:.{digits}f}{tail}"


def accuracies(summary: Mapping[str, Any], metric: str = "accuracy", everything: bool = True) -> Table:
    """A row per method, a column per condition; with the number of seeds, seconds and what is published."""
    rows = summary["rows"]
    conditions = [c for c in CONDITIONS if any(f"eval/{c}/{metric}" in row["figures"] for row in rows.values())]
    head, body = ["", *(CONDITIONS[c] for c in conditions)], []
    for row in rows.values():
        cells = [row["title"], *(percent(row["figures"].get(f"eval/{c}/{metric}")) for c in conditions)]
        if everything:
            cells += [str(len(row["seeds"])), _spread(row["training_seconds"], 1, 0), row["published"] or "–"]
        body.append(cells)
    return head + ["Seeds", "Training in s", "Published (source: the config)"] * everything, body


def slices(summary: Mapping[str, Any]) -> dict[str, Table]:
    """The same for all images, for the mean over classes, and for each group that there is."""
    found = {caption: accuracies(summary, metric, metric == "accuracy") for caption, metric in SLICES.items()}
    return {caption: made for caption, made in found.items() if len(made[0]) > 1}


def sentence(summary: Mapping[str, Any]) -> str:
    """What was measured, in words."""
    about = summary["about"]
    if not about:
        return "No row has a result."
    eps = f", eps {about['eps']!r} = {255 * about['eps']:.6g}/255" if "eps" in about else ""
    text = f"{about['dataset']}; {about['network']}, {about['epochs']} epochs{eps}; "
    text += f"{about['images']} images ({about['subset']}); {about['device']}, jax {about['jax_version']}."
    if about["different"]:
        text += f" Not the same for all rows: {', '.join(about['different']).replace('_', ' ')}."
    return text + " Accuracy in per cent; ± is the standard deviation over the seeds."

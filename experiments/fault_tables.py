"""Table of docs/reliability.md, from the records of campaigns."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lt_adv.evaluation.report import table

COMMAND = "pytest -m faults --faults=10"


def page(folder: Path) -> str:
    """A sentence for each campaign, and a row per point for those that verify digests."""
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    if not records:
        return f"Faults: not measured yet; `{COMMAND}` measures them."
    return "\n\n".join(block for record in sorted(records, key=lambda r: not r["digest"]) for block in blocks(record))


def blocks(record: Mapping[str, Any]) -> list[str]:
    points, machine = record["points"], record["machine"]
    total, runs = sum(row["faults"] for row in points.values()), record["runs"]
    failed = sum(row["failed"] for row in points.values())
    ended = sum(run["end"] == "the same" for run in runs)
    text = (
        f"{total} faults at {len(points)} points, {failed} of them failed; {ended} of {len(runs)} runs ended like the "
    )
    text += f"run without faults ({machine['cores']} cores of {machine['cpu']}, jax {record['versions']['jax']}, "
    text += f"commit {record['commit']})."
    if not record["digest"]:
        return [f"With the digest of checkpoints switched off: {text} A run that diverged fails at each later fault."]
    head = ["Point", "What happens", "Faults", "Failed", "Fell back to an earlier checkpoint", "Steps lost at most"]
    rows = [[f"`{name}`", row["words"], *map(_cell, _figures(row))] for name, row in points.items()]
    return [text, table(head, rows, left=2)]


def _figures(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["faults"], row["failed"], row["fell_back"] or None, row["lost"]


def _cell(value: Any) -> str:
    return "" if value is None else str(value)

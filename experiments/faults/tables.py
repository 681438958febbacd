"""Table of docs/reliability.md, from the records of campaigns."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lt_adv.evaluation.report import table

COMMAND = "python -m experiments.faults"


def page(folder: Path) -> str:
    """Of each campaign a sentence, and of the one with the digest on a row per point."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    if not found:
        return f"Faults: not measured yet; `{COMMAND}` measures them."
    return "\n\n".join(block for record in sorted(found, key=lambda r: not r["digest"]) for block in blocks(record))


def blocks(record: Mapping[str, Any]) -> list[str]:
    points, machine = record["points"], record["machine"]
    total, runs = sum(row["faults"] for row in points.values()), record["runs"]
    failed = sum(row["failed"] for row in points.values())
    ended = sum(run["end"] == "the same" for run in runs)
    text = f"`{record['command']}` ({machine['cores']} cores of {machine['cpu']}, jax {record['versions']['jax']}, "
    drawn = sum(map(len, record["drawn"]))
    text += f"commit {record['commit']}): {total} faults{f' of {drawn} so far' if total < drawn else ''} "
    text += f"at {len(points)} points, {failed} of them failed; "
    text += f"{ended} of {len(runs)} runs ended as the unbroken one."
    if not record["digest"]:
        return [
            f"With the digest of checkpoints switched off, {text} A run that went astray fails at each fault after it."
        ]
    head = ["Point", "What happens", "Faults", "Failed", "Fell back to an earlier checkpoint", "Steps lost at most"]
    rows = [[f"`{name}`", row["words"], *map(_cell, _figures(row))] for name, row in points.items()]
    return [text, table(head, rows, left=2)]


def _figures(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["faults"], row["failed"], row["fell_back"] or None, row["lost"]


def _cell(value: Any) -> str:
    return "" if value is None else str(value)

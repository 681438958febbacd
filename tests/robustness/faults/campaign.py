"""Faults drawn from a seed and injected into runs, and the comparison of each run with one without faults."""

import dataclasses
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmark import record
from lt_adv.runtime.environment import code_digest, commit
from tests.robustness.faults import compare
from tests.robustness.faults.points import POINTS, Fault
from tests.robustness.faults.run import (
    KILLED,
    REFUSED,
    TERMINATED,
    Outcome,
    Run,
    UnusableRun,
    last_line,
    refusal_problem,
)

PER_RUN = 5  # faults injected into one run, which has enough steps for them


@dataclasses.dataclass(frozen=True)
class Reference:
    """Digests of the results of a run without faults, and of its state before every step."""

    results: dict[str, str]
    steps: dict[int, str]


def reference_run(run: Run) -> Reference:
    """Returns the results of a run without faults; RuntimeError if that fails."""
    trained = run.start()
    exported = run.start(mode="export")
    for outcome in (trained, exported):
        if outcome.code != 0:
            raise RuntimeError(f"The run without faults fails: {last_line(outcome.err)}")
    return Reference(compare.result_digests(run), trained.steps)


def inject_faults(
    run: Run, names: Iterable[str], rng: np.random.Generator, reference: Reference
) -> tuple[list[dict[str, Any]], str]:
    """Injects one fault per start, then starts the run without faults until it is finished.

    Returns:
      (rows, end): a row for each fault, and "the same" or how the results differ from the reference. If they differ
      although no fault has failed, the responsible fault is unknown, and all faults of the run count as failed.
    """
    rows: list[dict[str, Any]] = []
    for name in names:
        row: dict[str, Any] = {"point": name, "done": "", "problems": []}
        rows.append(row)
        try:
            inject_fault(run, name, rng, reference, row)
        except UnusableRun as error:
            row["problems"].append(str(error))
    problems = finish(run, reference)
    if problems and not any(row["problems"] for row in rows):
        for row in rows:
            row["problems"] += problems
    return rows, "; ".join(problems) or "the same"


def inject_fault(run: Run, name: str, rng: np.random.Generator, reference: Reference, row: dict[str, Any]) -> None:
    """Injects one fault; writes into `row` the fault, the lost steps and the problems."""
    point = POINTS[name]
    run.ensure_checkpoints(point.checkpoints)
    before = run.checkpoints()
    fault = point.draw(rng, run)
    row["done"] = "; ".join(filter(None, (fault.damage, *(_describe(name, i) for i in fault.injections))))
    with fault.context():
        outcome = run.start(fault.mode, fault.injections, fault.delay, fault.second_start)
    after = run.checkpoints()
    row["problems"] += [
        *answer_problems(fault, outcome),
        *resumption_problems(fault, outcome, before),
        *state_mismatches(outcome, reference),
    ]
    if fault.code == KILLED and outcome.steps:
        row["lost"] = max(0, max(outcome.steps) - max([0, *after]))
        row["problems"] += lost_checkpoints(outcome, before, after)
    if fault.may_fall_back and outcome.resumed < max(before):
        row["fell_back"] = True


def answer_problems(fault: Fault, outcome: Outcome) -> list[str]:
    """Returns what is wrong with the exit code or the message."""
    if fault.code == REFUSED:
        return [text] if (text := refusal_problem(outcome)) else []
    if outcome.code != fault.code:
        ending = "did not end" if outcome.code is None else f"exit code {outcome.code}"
        return [f"{ending} instead of {fault.code}: {last_line(outcome.err) or last_line(outcome.out)}"]
    if not re.search(fault.message, outcome.out + outcome.err):
        return [f"no message that matches {fault.message!r}"]
    return ["a traceback"] if "Traceback" in outcome.err else []


def resumption_problems(fault: Fault, outcome: Outcome, before: list[int]) -> list[str]:
    """Training must resume from the newest checkpoint; it may skip a damaged one with a message."""
    if not outcome.steps:
        return []
    newest = max([0, *before])
    if outcome.resumed == newest:
        return []
    if fault.may_fall_back and outcome.resumed == ([0, 0, *before])[-2]:
        message = f"going on from checkpoint {outcome.resumed}" in outcome.err
        return [] if message else [f"resumed from step {outcome.resumed} instead of {newest} without a message"]
    return [f"resumed from step {outcome.resumed} instead of {newest}"]


def state_mismatches(outcome: Outcome, reference: Reference) -> list[str]:
    """Reports the first step before which the state differs from that of the reference."""
    other = [step for step, digest in sorted(outcome.steps.items()) if reference.steps.get(step) != digest]
    return [f"the state before step {other[0]} differs from that of the run without faults"] if other else []


def lost_checkpoints(outcome: Outcome, before: list[int], after: list[int]) -> list[str]:
    """Only the steps after the last finished save may be lost."""
    ended = max([0, *before[-1:], *outcome.saves[:-1]])
    if max([0, *after]) < ended:
        return [f"the newest checkpoint is {max([0, *after])}, though the save of step {ended} had ended"]
    return []


def finish(run: Run, reference: Reference) -> list[str]:
    """Runs training, evaluation and export to their ends; returns what differs from the reference."""
    problems = []
    for mode in ("train", "export"):
        outcome = run.start(mode)
        if outcome.code != TERMINATED:
            return [*problems, f"the run cannot be finished, exit code {outcome.code}: {last_line(outcome.err)}"]
        problems += state_mismatches(outcome, reference)
    if other := compare.mismatches(compare.result_digests(run), reference.results):
        problems.append(f"{len(other)} results differ, such as {other[0]}")
    return problems


def _describe(name: str, injection: Any) -> str:
    text = f"{injection.action} at {injection.site} {injection.count}"
    text += f" of {injection.pattern}" if injection.pattern else ""
    text += f" in process {injection.process}" if POINTS[name].processes > 1 else ""
    return text + (f", {injection.amount:.3g}" if injection.amount else "")


def max_lost_steps(rows: Iterable[dict[str, Any]]) -> int | None:
    """Returns the largest number of steps lost to one fault; None if no fault loses steps."""
    return max((row["lost"] for row in rows if "lost" in row), default=None)


def summary(name: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Counts for one point: faults, failures, fall-backs to an earlier checkpoint, largest number of lost steps."""
    return {
        "description": POINTS[name].description,
        "faults": len(rows),
        "failed": sum(bool(row["problems"]) for row in rows),
        "fell_back": sum(row.get("fell_back", False) for row in rows),
        "lost": max_lost_steps(rows),
    }


def write_results(path: Path, name: str, runs: Sequence[dict[str, Any]], *, faults: int, seed: int) -> None:
    """Writes the runs of one point into the record of the campaign.

    Other points of the record stay if they were measured with the same code, seed and number of faults.
    """
    identity = {"code": code_digest(), "seed": seed, "digest": True}
    results = {
        "command": f"pytest -m faults --faults={faults} --faults-seed={seed}",
        "commit": commit(),
        "machine": record.machine(),
        "versions": record.versions(),
        **identity,
        "points": {},
        "runs": [],
    }
    if path.exists():
        earlier = json.loads(path.read_text())
        if earlier["command"] == results["command"] and identity.items() <= earlier.items():
            results = earlier
    rows = [row for run in runs for row in run["faults"]]
    points = results["points"] | {name: summary(name, rows)}
    results["points"] = {point: points[point] for point in POINTS if point in points}
    results["runs"] = [run for run in results["runs"] if run["faults"][0]["point"] != name] + list(runs)
    record.write(path, results)


def write_digits(path: Path) -> None:
    """Writes the digits to an .npz file, once: the cache of decoded images depends on its modification time."""
    from lt_adv import data

    if path.exists():
        return
    digits = data.load({"name": "digits"})
    path.parent.mkdir(parents=True, exist_ok=True)
    splits = {"train": digits.train, "test": digits.test}
    arrays = {f"{name}_{field}": getattr(s, field) for name, s in splits.items() for field in ("image", "label")}
    np.savez(path, **arrays)

"""Faults drawn from a seed, done to runs one after the other, and each run held against an unbroken one."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.faults import compare
from experiments.faults.points import POINTS, Fault, order
from experiments.faults.run import KILLED, REFUSED, TERMINATED, Outcome, Run, Unfit, last, refusal

PER_RUN = 8  # faults of one run, which has steps enough for them


@dataclasses.dataclass(frozen=True)
class Reference:
    """The unbroken run: what it ended with, and the digest of its state before every step."""

    end: dict[str, str]
    steps: dict[int, str]


def draw(points: Sequence[str], faults: int, seed: int) -> list[list[str]]:
    """The points of each run: every one equally often, at most one fault more or less, in an order that changes."""
    rng = np.random.default_rng(seed)
    rounds = [list(rng.permutation(points)) for _ in range(-(-faults // len(points)))]
    drawn = [str(name) for names in rounds for name in names][:faults]
    alike = [[name for name in drawn if POINTS[name].processes == count] for count in (1, 2)]
    return [sorted(names[i : i + PER_RUN], key=order) for names in alike for i in range(0, len(names), PER_RUN)]


def reference_run(run: Run) -> Reference:
    """The reference; RuntimeError where there is none, or nothing to go by."""
    trained = run.start()
    exported = run.start(mode="export")
    for found in (trained, exported):
        if found.code != 0:
            raise RuntimeError(f"The unbroken run fails: {last(found.err)}")
    return Reference(compare.end(run), trained.steps)


def inject_faults(
    run: Run, names: Iterable[str], rng: np.random.Generator, reference: Reference, tell: Callable
) -> tuple[list[dict[str, Any]], str]:
    """(a row for each fault, "the same" or what the run ended with instead), `tell` is called with each row.

    Where the end is another and no fault was seen to fail, the fault that did it is not known: all of the run failed.
    """
    made: list[dict[str, Any]] = []
    for name in names:
        row: dict[str, Any] = {"point": name, "done": "", "problems": []}
        made.append(row)
        try:
            one(run, name, rng, reference, row)
        except Unfit as error:
            row["problems"].append(str(error))
        tell(row)
    problems = ending(run, reference)
    if problems and not any(row["problems"] for row in made):
        for row in made:
            row["problems"] += problems
    return made, "; ".join(problems) or "the same"


def one(run: Run, name: str, rng: np.random.Generator, reference: Reference, row: dict[str, Any]) -> None:
    """One fault, into `row`: what was done, the steps that it cost, and what is wrong with what came of it."""
    point = POINTS[name]
    run.reaches(point.checkpoints)
    before = run.checkpoints()
    fault = point.draw(rng, run)
    row["done"] = "; ".join(filter(None, (fault.done, *(_words(name, i) for i in fault.injections))))
    with fault.around():
        found = run.start(fault.mode, fault.injections, fault.slow, fault.beside)
    after = run.checkpoints()
    row["problems"] += [*answered(fault, found), *went_on(fault, found, before), *state_mismatches(found, reference)]
    if fault.code == KILLED and found.steps:
        row["lost"] = max(0, max(found.steps) - max([0, *after]))
        row["problems"] += kept(found, before, after)
    if fault.falls_back and found.resumed < max(before):
        row["fell_back"] = True


def answered(fault: Fault, found: Outcome) -> list[str]:
    """Whether it ended as it must, and said what it must."""
    if fault.code == REFUSED:
        return [text] if (text := refusal(found)) else []
    if found.code != fault.code:
        ending = "did not end" if found.code is None else f"exit code {found.code}"
        return [f"{ending} instead of {fault.code}: {last(found.err) or last(found.out)}"]
    if not re.search(fault.says, found.out + found.err):
        return [f"does not say {fault.says!r}"]
    return ["a traceback"] if "Traceback" in found.err else []


def went_on(fault: Fault, found: Outcome, before: list[int]) -> list[str]:
    """Whether training went on from the newest checkpoint; one that was damaged may be passed over, in words."""
    if not found.steps:
        return []
    newest = max([0, *before])
    if found.resumed == newest:
        return []
    if fault.falls_back and found.resumed == ([0, 0, *before])[-2]:
        said = f"going on from checkpoint {found.resumed}" in found.err
        return [] if said else [f"went on from step {found.resumed} instead of {newest} without a word"]
    return [f"went on from step {found.resumed} instead of {newest}"]


def state_mismatches(found: Outcome, reference: Reference) -> list[str]:
    """Whether each state was that of the reference, bit for bit."""
    other = [step for step, digest in sorted(found.steps.items()) if reference.steps.get(step) != digest]
    return [f"the state before step {other[0]} is another than that of the unbroken run"] if other else []


def kept(found: Outcome, before: list[int], after: list[int]) -> list[str]:
    """Whether nothing is lost but the steps since the last save that is known to have ended."""
    ended = max([0, *before[-1:], *found.saves[:-1]])
    if max([0, *after]) < ended:
        return [f"the newest checkpoint is {max([0, *after])}, though the save of step {ended} had ended"]
    return []


def ending(run: Run, reference: Reference) -> list[str]:
    """Starts until training, evaluation and export are through; what is not as in the reference."""
    problems = []
    for mode in ("train", "export"):
        found = run.start(mode)
        if found.code != TERMINATED:
            return [*problems, f"the run cannot be ended, exit code {found.code}: {last(found.err)}"]
        problems += state_mismatches(found, reference)
    if other := compare.differing(compare.end(run), reference.end):
        problems.append(f"ended otherwise in {len(other)} respects, such as {other[0]}")
    return problems


def _words(name: str, injection: Any) -> str:
    text = f"{injection.act} at {injection.site} {injection.count}"
    text += f" of {injection.pattern}" if injection.pattern else ""
    text += f" in process {injection.process}" if POINTS[name].processes > 1 else ""
    return text + (f", {injection.amount:.3g}" if injection.amount else "")


def lost_at_most(rows: Iterable[dict[str, Any]]) -> int | None:
    """The most steps that a fault cost."""
    return max((row["lost"] for row in rows if "lost" in row), default=None)


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of each point: faults, those that failed, those that fell back, steps lost at most."""
    found = {}
    for name in POINTS:
        mine = [row for row in rows if row["point"] == name]
        if mine:
            found[name] = {
                "words": POINTS[name].words,
                "faults": len(mine),
                "failed": sum(bool(row["problems"]) for row in mine),
                "fell_back": sum(row.get("fell_back", False) for row in mine),
                "lost": lost_at_most(mine),
            }
    return found


def write_digits(path: Path) -> None:
    """The digits as an .npz, once: its time is part of what the cache goes by."""
    from lt_adv import data

    if path.exists():
        return
    digits = data.load({"name": "digits"})
    path.parent.mkdir(parents=True, exist_ok=True)
    splits = {"train": digits.train, "test": digits.test}
    arrays = {f"{name}_{field}": getattr(s, field) for name, s in splits.items() for field in ("image", "label")}
    np.savez(path, **arrays)

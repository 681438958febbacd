"""One input, how `main` answered it, and the tally of many."""

import contextlib
import dataclasses
import io
import os
import re
import shutil
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

import numpy as np

from experiments.benchmark.record import portable
from experiments.fuzz.box import FENCE, Box
from lt_adv import evaluation, main
from lt_adv.training import loop

ACCEPTED, REFUSED, ELSE = "accepted", "refused", "anything else"
LONGEST = 1200  # characters of a line that a person still reads


@dataclasses.dataclass(frozen=True)
class Case:
    """`kind` in a word or two, for the tally; `words` say it exactly. `argv` is what `main` gets. `expected`: True
    where it must be accepted, False where it must be refused, None where damage may happen to be harmless. A refusal
    must say one of `named`."""

    kind: str
    words: str
    argv: Sequence[str]
    expected: bool | None
    named: Sequence[str] = ()


class Surface(Protocol):
    """A kind of input. `shared` is a folder for what all its cases need."""

    def __init__(self, shared: Path) -> None: ...

    def case(self, rng: np.random.Generator, box: Box, valid: bool) -> Case:
        """An input, written into the box; one that is valid by construction where that is asked for."""

    def running(self) -> contextlib.AbstractContextManager[Any]:
        """Entered around `main`: what is not computed."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    kind: str
    words: str
    valid: bool
    answer: str  # ACCEPTED, REFUSED or ELSE
    line: str  # the refusal, or what went wrong


@contextlib.contextmanager
def no_computation() -> Iterator[None]:
    """Training and evaluation that are reached, after all that is checked before them, and go no further."""

    def reached(*_: Any, **__: Any) -> None:
        raise loop.Preempted("reached")

    with mock.patch.object(loop, "train", reached), mock.patch.object(evaluation, "evaluate", reached):
        yield


def examine(surface: Surface, seed: int, number: int, scratch: Path, drawn: Any = lambda case: None) -> Outcome:
    """Input `number` of a surface, tried; every fourth is valid. `drawn(case)` is called before it is tried."""
    rng, valid = np.random.default_rng((seed, number)), number % 4 == 0
    root = scratch / f"{number}"
    box, here = Box(root), os.getcwd()
    try:
        case = surface.case(rng, box, valid)
        drawn(case)
        os.chdir(box.start)
        answer, line = _answer(surface, case, box)
    finally:
        os.chdir(here)
        shutil.rmtree(root, ignore_errors=True)
    said = [" ".join(portable(text.replace(str(scratch), "...")).split()) for text in (case.words, line)]
    return Outcome(case.kind, said[0][:300], case.expected is True, answer, said[1][:400])


def _answer(surface: Surface, case: Case, box: Box) -> tuple[str, str]:
    # As a terminal takes them: text that is no UTF-8 fails on the one, and is escaped on the other.
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", errors) for errors in ("strict", "backslashreplace"))
    before = box.state()
    with contextlib.ExitStack() as stack:
        seen = stack.enter_context(FENCE.watch(box.root, Path(tempfile.gettempdir())))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        try:
            with surface.running():
                code = main.main(["main", *case.argv])
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{os.path.basename(last.filename)}:{last.lineno}"
            return ELSE, f"traceback: {type(error).__name__}: {error} ({where})"
        except SystemExit as error:
            return ELSE, f"ended by itself with {error.code}"
    err.flush()
    said = err.buffer.getvalue().decode()  # type: ignore[attr-defined]
    said = re.sub(r"[^\n]*\r|\x1b\[\w|^ *\n", "", said, flags=re.MULTILINE)  # without the bars of a progress display
    if code == 2:
        wrong = _unclear(said, case)
    else:
        wrong = f"exit code {code}: {said[-200:]}" if code else None
        wrong = wrong or ("a bad input is accepted" if case.expected is False else None)
    if seen:
        wrong = f"{seen[0]} beyond the box"
    wrong = wrong or box.wrong(before, refused=code == 2)
    if wrong:
        return ELSE, wrong
    return (REFUSED, said.removeprefix("Error: ").strip()) if code == 2 else (ACCEPTED, "")


def _unclear(said: str, case: Case) -> str | None:
    """What keeps a refusal from being one clear line, in words."""
    if case.expected:
        return f"a valid input is refused: {said}"
    # Warnings of what is passed over may stand before the refusal.
    if not re.fullmatch(r"(?:(?!Error: |Traceback).*\n)*Error: .{5,}\n", said):
        return f"no single line: {said!r}"
    if len(said.splitlines()[-1]) > LONGEST:
        return f"a line of {len(said)} characters: {said[:200]}"
    if case.named and not any(name in said for name in case.named):
        return f"the line names nothing of {', '.join(case.named)[:100]}: {said}"
    return None


def tally(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The figures of a surface, and of each kind of input in it; whatever was neither accepted nor refused in full."""
    answers = [outcome.answer for outcome in outcomes]
    kinds: dict[str, dict[str, Any]] = {}
    for outcome in outcomes:
        row = kinds.setdefault(outcome.kind, {ACCEPTED: 0, REFUSED: 0, ELSE: 0})
        row[outcome.answer] += 1
        if outcome.answer == REFUSED:
            row.setdefault("for example", outcome.line)
    return {
        "tried": len(outcomes),
        "valid": sum(outcome.valid for outcome in outcomes),
        "valid_accepted": sum(outcome.valid and outcome.answer == ACCEPTED for outcome in outcomes),
        "accepted": answers.count(ACCEPTED),
        "refused": answers.count(REFUSED),
        "else": answers.count(ELSE),
        "kinds": dict(sorted(kinds.items())),
        "causes": [dataclasses.asdict(outcome) for outcome in outcomes if outcome.answer == ELSE],
    }

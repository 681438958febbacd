"""Hypothesis strategies for bad input, and the check that `main` accepts an input or refuses it in one line.

    pytest tests/robustness --hypothesis-profile=thorough --hypothesis-show-statistics

tries 300 random inputs per test instead of a few fixed ones, and counts the answers to each kind of input.
"""

import contextlib
import dataclasses
import io
import math
import os
import re
import resource
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from hypothesis import HealthCheck, Phase, currently_in_test_context, event, settings
from hypothesis import strategies as st

from lt_adv import evaluation, main
from lt_adv.training import loop
from lt_adv.training.hooks import Hook
from tests.bad_input.conftest import RaiseBeforeTraining
from tests.robustness.sandbox import FENCE, Sandbox

ROOT = Path(__file__).parents[2]
MAX_LINE_LENGTH = 1200  # characters of an error message
MEMORY = 6 << 30  # bytes that one input may take in addition to the size of the process
SECONDS = 120  # time limit of one input
THOROUGH = "thorough"
settings.register_profile(THOROUGH, max_examples=300, derandomize=False)

Draw = Callable[[st.SearchStrategy], Any]


def inputs(number: int) -> settings:
    """Settings of a test: `number` inputs, the same in every run; with the profile "thorough" 300 random ones."""
    thorough = settings.get_current_profile_name() == THOROUGH
    return settings(
        max_examples=300 if thorough else number,
        derandomize=not thorough,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink] if thorough else [Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


# --- strategies

NAMES = ("", " ", "x", "no such", "None", "True", "nan", "1e9", "../../x", "a/b", "[/b]", "%s{0}", "ä\u202e", "x" * 300)
NUMBERS = (0, 1, -1, 2, 3, 10**6, 10**6 + 1, 2**31, 2**32, 2**63, 10**30, -(10**30))
NUMBERS += (0.0, -0.0, 0.5, -0.5, 1e-320, 1e308)
NOT_FINITE = (math.nan, math.inf, -math.inf)
SCALARS = (
    st.sampled_from(NAMES)
    | st.sampled_from(NUMBERS)
    | st.sampled_from(NOT_FINITE)
    | st.sampled_from((None, True, False))
    | st.integers(-100, 1000)
    | st.floats(-1e5, 1e5)
)
# Python literals, and the numbers that are not finite.
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3).map(tuple)
        | st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(NAMES), inner, max_size=2)
    ),
    max_leaves=6,
)
DAMAGE = ("empty", "truncated", "bits flipped", "a piece zeroed", "a piece cut out", "random bytes", "bytes before")
DAMAGE += ("bytes behind", "text", "not UTF-8", "deep")


def choose(draw: Draw, choices: Sequence[Any]) -> Any:
    return draw(st.sampled_from(list(choices)))


def value(draw: Draw) -> Any:
    return draw(VALUES)


def below(draw: Draw, end: int) -> int:
    """Draws an integer in [0, end)."""
    return draw(st.integers(0, end - 1))


def damaged(draw: Draw, content: bytes) -> tuple[str, bytes]:
    """Returns (kind of damage, damaged bytes)."""
    kind, size = choose(draw, DAMAGE), len(content)
    at = below(draw, size) if size else 0
    to = min(size, at + draw(st.integers(1, max(1, size // 4))))
    if kind == "bits flipped":
        flipped = bytearray(content)
        for _ in range(draw(st.integers(1, 4)) if size else 0):
            flipped[below(draw, size)] ^= 1 << below(draw, 8)
        return kind, bytes(flipped)
    if kind == "random bytes":
        return kind, draw(st.binary(min_size=1, max_size=256))
    if kind == "bytes before":
        return kind, draw(st.binary(min_size=1, max_size=8)) + content
    if kind == "bytes behind":
        return kind, content + draw(st.binary(min_size=1, max_size=8))
    return kind, {
        "empty": b"",
        "truncated": content[:at],
        "a piece zeroed": content[:at] + bytes(to - at) + content[to:],
        "a piece cut out": content[:at] + content[to:],
        "text": b"<html>404 Not Found</html>",
        "not UTF-8": b"\xff\xfe\x80" + content,
        "deep": b"[" * 100_000,
    }[kind]


# --- the check


STOP_BEFORE_TRAINING = (RaiseBeforeTraining(loop.Preempted("training is reached")),)


def no_evaluation() -> Any:
    """Stops a run where the evaluation would begin, after all checks before it."""

    def reached(*_: Any, **__: Any) -> None:
        raise loop.Preempted("evaluation is reached")

    return mock.patch.object(evaluation, "evaluate", reached)


@dataclasses.dataclass(frozen=True)
class Case:
    """One input.

    Args:
      kind: kind of input, for statistics.
      description: the drawn input, for the message of a failed test.
      argv: arguments of `main`.
      expected: True if it must be accepted, False if it must be refused, None if both are right (harmless damage).
      named: texts; a refusal must contain one of them.
      context: entered around `main`.
      hooks: hooks of the training loop.
    """

    kind: str
    description: str
    argv: Sequence[str]
    expected: bool | None
    named: Sequence[str] = ()
    context: Callable[[], contextlib.AbstractContextManager[Any]] = no_evaluation
    hooks: Sequence[Hook] = STOP_BEFORE_TRAINING


class TimeLimit(BaseException):
    """The time limit is exceeded. `main` does not catch it, since it is not an Exception."""


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """Limits memory, so that an input that needs too much raises MemoryError, and time."""

    def raise_time_limit(*_: Any) -> None:
        raise TimeLimit(f"no answer in {SECONDS} s")

    statm, (soft, hard) = Path("/proc/self/statm"), resource.getrlimit(resource.RLIMIT_AS)
    if statm.exists():
        size = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, hard))
    previous = signal.signal(signal.SIGALRM, raise_time_limit)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def attempt(make: Callable[[Draw, Sandbox], Case], draw: Draw, folder: Path) -> str | None:
    """Runs `main` on the input that `make` draws and writes into a sandbox below `folder`.

    Returns:
      The line of a refusal, or None if the input is accepted.

    Raises:
      AssertionError: the input is neither accepted nor refused in one clear line: a traceback, another exit code, a
        refused valid input, an accepted invalid input, a line that does not name the cause, executed code of the input,
        a file that is changed, left half written or written outside of the sandbox, a working directory that is left
        after a refusal, or an exceeded time limit.
    """
    root, start = Path(tempfile.mkdtemp(dir=folder)), os.getcwd()
    try:
        sandbox = Sandbox(root / "box")
        case = make(draw, sandbox)
        os.chdir(sandbox.cwd)
        problem, line = _answer(case, sandbox)
    finally:
        os.chdir(start)
        shutil.rmtree(root, ignore_errors=True)
    assert problem is None, f"{problem}\ninput: {case.kind}: {case.description}\nargv: {case.argv}"
    if currently_in_test_context():
        event(f"{case.kind}: {'accepted' if line is None else 'refused'}")
    return line


def _answer(case: Case, sandbox: Sandbox) -> tuple[str | None, str | None]:
    """Returns (problem or None, line of a refusal or None)."""
    # As in a terminal: stdout fails on text that is not UTF-8, stderr escapes it.
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", errors) for errors in ("strict", "backslashreplace"))
    before = sandbox.state()
    with contextlib.ExitStack() as stack:
        compiled = Path(os.environ.get("JAX_COMPILATION_CACHE_DIR", sandbox.root))
        outside = stack.enter_context(FENCE.watch(sandbox.root, Path(tempfile.gettempdir()), compiled))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        try:
            with case.context(), limits():
                code = main.main(["main", *case.argv], case.hooks)
        except (Exception, TimeLimit) as error:
            return f"traceback: {type(error).__name__}: {error}", None
        except SystemExit as error:
            return f"SystemExit with {error.code}", None
    err.flush()
    text = err.buffer.getvalue().decode()  # type: ignore[attr-defined]
    text = re.sub(r"[^\n]*\r|\x1b\[\w|^ *\n", "", text, flags=re.MULTILINE)  # removes progress bars
    if outside:
        return f"{outside[0]} outside of the sandbox", None
    problem = _unclear(text, case) if code == 2 else None
    if code not in (0, 2):
        problem = f"exit code {code}: {text[-200:]}"
    elif code == 0 and case.expected is False:
        problem = "a bad input is accepted"
    problem = problem or sandbox.problem(before, refused=code == 2)
    return problem, text.removeprefix("Error: ").strip() if code == 2 else None


def _unclear(text: str, case: Case) -> str | None:
    """Returns why a refusal is not one clear line, or None."""
    if case.expected:
        return f"a valid input is refused: {text}"
    # Warnings about skipped files may come before the refusal.
    if not re.fullmatch(r"(?:(?!Error: |Traceback).*\n)*Error: .{5,}\n", text):
        return f"no single line: {text!r}"
    if len(text.splitlines()[-1]) > MAX_LINE_LENGTH:
        return f"a line of {len(text)} characters: {text[:200]}"
    if case.named and not any(name in text for name in case.named):
        return f"the line names none of {', '.join(case.named)[:100]}: {text}"
    return None

"""Other files of a working directory: the config, the log of training, records, the figures of a baseline.

An evaluation that has nothing to compute reads them; some inputs have a file where a folder is expected, or vice versa.
"""

import contextlib
import functools
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lt_adv import evaluation, main
from lt_adv.evaluation import plots
from lt_adv.evaluation.masking import diagnose
from tests.robustness.inputs import Case, Draw, attempt, below, choose, damaged, inputs, value
from tests.robustness.runs import AT, TINY
from tests.robustness.sandbox import Sandbox
from tests.robustness.test_npz import Hidden

pytestmark = pytest.mark.slow  # a run is trained first

ATTACKS = "--config.eval.attacks={'pgd':{'attack':'pgd','eps':0.1,'step_size':0.1,'num_steps':1}}"
WRITTEN = ("report.md", "report.json", "plots", "config.json", "plots/examples.png", "eval", "reports")
JSON_FILES = ("config.json", "metrics.jsonl", "timing.jsonl")


def evaluation_flags(workdir: Path) -> list[str]:
    return [AT, *TINY, ATTACKS, "--mode=eval", f"--workdir={workdir}"]


@pytest.fixture(scope="module")
def computed_once():
    """Returns a context manager that makes evaluations fast.

    Examples and the diagnostics of gradient masking are computed once, the latter of a linear network, and pictures are
    not encoded.
    """
    results: dict[str, Any] = {}

    def once(name: str, original: Any, *args: Any, **options: Any) -> Any:
        if name not in results:
            results[name] = original(*args, **options)
        return results[name]

    def linear(weights: Any, x: Any) -> Any:
        return x.reshape(len(x), -1) @ weights

    def probe(key: Any, apply: Any, variables: Any, images: Any, labels: Any, **options: Any) -> Any:
        weights = np.eye(images[0].size, 10, dtype=np.float32)
        options["transfer"] = (linear, weights)
        return once("probe", original, key, linear, weights, images, labels, **options)

    original = diagnose.run_diagnostics
    examples = functools.partial(once, "examples", evaluation.main_examples)

    @contextlib.contextmanager
    def context() -> Iterator[None]:
        with (
            mock.patch.object(evaluation, "main_examples", examples),
            mock.patch.object(diagnose, "run_diagnostics", probe),
            mock.patch.object(diagnose, "QUERIES", 10),
            mock.patch.object(plots, "png", lambda figure: b"a picture"),
        ):
            yield

    return context


@pytest.fixture(scope="module")
def evaluated(trained, computed_once, tmp_path_factory):
    """A run evaluated with an attack and with itself as the baseline; it must not be changed."""
    workdir = tmp_path_factory.mktemp("evaluated") / "run"
    shutil.copytree(trained, workdir)
    with computed_once():
        assert main.main(["main", *evaluation_flags(workdir), f"--config.eval.baseline={workdir}"]) == 0
    return workdir


def case(draw: Draw, box: Sandbox, run: Path, context: Any, valid: bool) -> Case:
    shutil.copytree(run, box.run)
    argv = evaluation_flags(box.run)
    place, compared = box.run, draw(st.integers(0, 2)) == 0
    if compared:
        place = box.cwd / "earlier"
        shutil.copytree(run, place)
        argv.append(f"--config.eval.baseline={place}")
    if valid:
        return Case("valid", _valid_change(draw, box.run, compared), argv, True, context=context)
    change = choose(draw, (_json, _json, _entry, _records, _records, _place))
    kind, description, expected = change(draw, place, box)
    if compared:
        description, expected = f"{description}, of the baseline", None
    return Case(kind, description, argv, expected, [str(place)], context)


def _valid_change(draw: Draw, place: Path, compared: bool) -> str:
    missing = choose(draw, (None, "report.md", "plots", "metrics.jsonl", "timing.jsonl"))
    if missing:
        path = place / missing
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return f"without {missing}" + ", compared with a baseline" * compared


def _json(draw: Draw, place: Path, box: Sandbox) -> tuple[str, str, bool | None]:
    """Damages the bytes of a text file."""
    records = sorted(place.glob("eval/*/*/header.json")) + sorted(place.glob("eval/gradient_masking/*.json"))
    path = choose(draw, [place / name for name in JSON_FILES] + records)
    what, content = damaged(draw, path.read_bytes())
    path.write_bytes(content)
    return "damaged text", f"{path.relative_to(place)}: {what}", None


def _entry(draw: Draw, place: Path, box: Sandbox) -> tuple[str, str, bool | None]:
    """Changes a random value of a JSON file."""
    path = choose(draw, [place / name for name in JSON_FILES] + sorted(place.glob("eval/*/*.json")))
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    number, drawn = below(draw, len(lines)), value(draw)
    tree = json.loads(lines[number])
    inside, where = tree, []
    while isinstance(inside, (dict, list)) and inside and (not where or draw(st.integers(0, 2))):
        where.append(choose(draw, list(inside)) if isinstance(inside, dict) else below(draw, len(inside)))
        last, inside = inside, inside[where[-1]]
    last[where[-1]] = drawn
    lines[number] = json.dumps(tree)
    path.write_text("\n".join(lines))
    return "another value", f"{path.relative_to(place)}: {where} = {drawn!r}", None


def _records(draw: Draw, place: Path, box: Sandbox) -> tuple[str, str, bool | None]:
    """Damages records, changes their values, or adds hidden code."""
    path = choose(draw, sorted(place.glob("eval/records/*/batch-*.npz")))
    columns: dict[str, Any] = dict(np.load(path))
    name = choose(draw, list(columns))
    forged = {
        "bytes": lambda: None,
        "out of range": lambda: columns[name] + choose(draw, (10, 10**6, -1, -(10**6))),
        "another shape": lambda: columns[name][:, None],
        "fewer": lambda: columns[name][1:],
        "another type": lambda: columns[name].astype(choose(draw, ("f8", "U3", "?", "M8[s]", "c16", "u8", "S1"))),
        "not finite": lambda: np.full(columns[name].shape, np.nan),
        "hidden code": lambda: np.array([Hidden(box.code())] * len(columns[name]), object),
        "a column more": lambda: columns[name],
    }
    what = choose(draw, list(forged))
    if what == "bytes":
        what, content = damaged(draw, path.read_bytes())
        path.write_bytes(content)
    else:
        columns["attack/other" if what == "a column more" else name] = forged[what]()
        buffer = io.BytesIO()
        np.savez(buffer, **columns)
        path.write_bytes(buffer.getvalue())
    return "records", f"{name}: {what}", None


def _place(draw: Draw, place: Path, box: Sandbox) -> tuple[str, str, bool | None]:
    """Puts a folder in the place of a file, or a file in the place of a folder."""
    path = place / choose(draw, WRITTEN)
    was_file = path.is_file()
    shutil.rmtree(path, ignore_errors=True)
    path.unlink(missing_ok=True)
    if was_file:
        (path / "mine").mkdir(parents=True)
    else:
        path.write_text("mine")
    return "file or folder", f"{path.relative_to(place)} is a {'folder' if was_file else 'file'}", None


@inputs(2)
@given(st.data())
def test_valid_run_files_are_accepted(evaluated, computed_once, tmp_path, data):
    attempt(functools.partial(case, run=evaluated, context=computed_once, valid=True), data.draw, tmp_path)


@inputs(5)
@given(st.data())
def test_bad_run_files_are_refused_in_one_line(evaluated, computed_once, tmp_path, data):
    attempt(functools.partial(case, run=evaluated, context=computed_once, valid=False), data.draw, tmp_path)

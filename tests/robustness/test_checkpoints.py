"""Checkpoints: of another network, damaged, with foreign files; read to resume, to evaluate, to initialise."""

import functools
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.robustness.inputs import STOP_BEFORE_TRAINING, Case, Draw, attempt, choose, damaged, inputs, value
from tests.robustness.runs import AT, NO_ATTACKS, TINY
from tests.robustness.sandbox import Sandbox

pytestmark = pytest.mark.slow  # a run is trained first

STEPS = ("1", "2")
FOREIGN = ("notes.txt", "99", "²", "1_other", "7_x/3", "3.orbax-checkpoint-tmp-0", "0_train/99", "0_train/²")
FOREIGN += ("0_train/notes", "²_x")


def case(draw: Draw, box: Sandbox, run: Path, valid: bool) -> Case:
    mode = choose(draw, ("eval", "eval", "eval", "train", "init", "init"))
    # A resumed run reads its checkpoints in training, which has at most one short epoch left.
    hooks = () if mode == "train" else STOP_BEFORE_TRAINING
    place = box.cwd / "earlier" if mode == "init" else box.run
    shutil.copytree(run, place)
    argv = [AT, *TINY, NO_ATTACKS, f"--workdir={box.run}"]
    argv += [f"--config.init_from={place}"] if mode == "init" else [f"--mode={mode}"]
    named = [str(place), "The checkpoint of stage"]
    if valid:
        return Case("valid", f"{mode}: {_valid_change(draw, place)}", argv, True, hooks=hooks)
    change = choose(draw, (_file, _meta, _meta, _foreign, _network, _steps))
    kind, description, expected = change(draw, place, argv)
    return Case(kind, f"{mode}: {description}", argv, expected, named, hooks=hooks)


def _valid_change(draw: Draw, place: Path) -> str:
    change = choose(draw, ("as it is", "another file", "no earlier step"))
    if change == "another file":
        (place / "checkpoints" / "notes.txt").write_text("mine")
    elif change == "no earlier step":
        shutil.rmtree(place / "checkpoints" / "0_train" / "1")
    return change


def _file(draw: Draw, place: Path, argv: list[str]) -> tuple[str, str, bool | None]:
    """Damages or deletes a file of one checkpoint, or of both."""
    done = []
    for step in choose(draw, ((choose(draw, STEPS),), STEPS)):
        files = sorted(p for p in (place / "checkpoints" / "0_train" / step).rglob("*") if p.is_file())
        path = choose(draw, files)
        what, content = damaged(draw, path.read_bytes())
        if draw(st.integers(0, 3)):
            path.write_bytes(content)
        else:
            what = "deleted"
            path.unlink()
        done.append(f"{step}: {path.name} {what}")
    return "damaged file", "; ".join(done), None


def _meta(draw: Draw, place: Path, argv: list[str]) -> tuple[str, str, bool | None]:
    """Changes an entry of the metadata of both checkpoints."""
    name, drawn = None, value(draw)
    for step in STEPS:
        path = place / "checkpoints" / "0_train" / step / "meta" / "metadata"
        meta = json.loads(path.read_text())
        name = name or choose(draw, [*meta, "everything"])
        if name == "everything":
            meta = drawn
        elif drawn is None:
            del meta[name]
        else:
            meta[name] = drawn
        path.write_text(json.dumps(meta))
    return "entry of the metadata", f"{name} = {drawn!r}", None


def _foreign(draw: Draw, place: Path, argv: list[str]) -> tuple[str, str, bool | None]:
    """Adds a foreign file or folder."""
    name, folder = choose(draw, FOREIGN), draw(st.booleans())
    path = place / "checkpoints" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if folder:
        path.mkdir()
    else:
        path.write_bytes(b"0123456789")
    return "foreign file", f"{name}, {'a folder' if folder else 'a file'}", None


def _network(draw: Draw, place: Path, argv: list[str]) -> tuple[str, str, bool | None]:
    """Changes the network of the config."""
    (place / "config.json").unlink()
    more = choose(draw, ("width=2", "head.name=lws", "depth=16", "name=resnet18"))
    argv.append(f"--config.model.{more}")
    # Initialisation needs only some arrays of the same names and shapes: the others keep their random values.
    return "another network", more, None if "head" in more or "depth" in more else False


def _steps(draw: Draw, place: Path, argv: list[str]) -> tuple[str, str, bool | None]:
    """Deletes or renames steps or their folder, or puts files in their place."""
    stage = place / "checkpoints" / "0_train"
    what = choose(draw, ("no steps", "renamed", "a file", "no stage", "another stage", "a step is a file"))
    if what == "no steps":
        for step in STEPS:
            shutil.rmtree(stage / step)
    elif what == "renamed":
        (stage / "2").rename(stage / choose(draw, ("3", "-2", "2 ", "02", "9" * 30)))
    elif what == "a file":
        shutil.rmtree(place / "checkpoints")
        (place / "checkpoints").write_text("mine")
    elif what == "no stage":
        shutil.rmtree(stage)
    elif what == "another stage":
        stage.rename(stage.parent / choose(draw, ("1_train", "0_other", "00_train", "x_train")))
    else:
        shutil.rmtree(stage / "2")
        (stage / "2").write_text("mine")
    return f"steps: {what}", what, None


@inputs(3)
@given(st.data())
def test_valid_checkpoints_are_accepted(trained, tmp_path, data):
    attempt(functools.partial(case, run=trained, valid=True), data.draw, tmp_path)


@inputs(12)
@given(st.data())
def test_bad_checkpoints_are_refused_in_one_line(trained, tmp_path, data):
    attempt(functools.partial(case, run=trained, valid=False), data.draw, tmp_path)

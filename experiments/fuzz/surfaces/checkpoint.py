"""Checkpoints: of another network, damaged, with foreign files beside them; read to go on, to evaluate, to begin."""

import contextlib
import json
import shutil
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from experiments.fuzz.box import Box
from experiments.fuzz.cases import Case, no_computation
from experiments.fuzz.draw import damaged, one, value
from experiments.fuzz.surfaces.arguments import ROOT
from lt_adv import evaluation, main

# A run of two epochs of one step, for whatever is read afterwards.
TINY = (
    "--config.data.imbalance=balanced",
    "--config.data.balanced_fraction=0.02",
    "--config.optim.batch_size=16",
    "--config.optim.epochs=2",
    "--config.attack.num_steps=0",
    "--config.checkpoint.every_epochs=1",
    "--config.eval.subset_per_class=1",
    "--config.eval.batch_size=16",
    "--config.cpu_devices=1",
)
NO_ATTACKS = "--config.eval.attacks={}"
AT = f"--config={ROOT}/configs/at.py:dataset=digits"
STEPS = ("1", "2")
FOREIGN = ("notes.txt", "99", "²", "1_other", "7_x/3", "3.orbax-checkpoint-tmp-0", "0_train/99", "0_train/²")
FOREIGN += ("0_train/notes", "²_x")


def train(where: Path, *more: str) -> None:
    """A finished run, with its report."""
    if not where.exists() and main.main(["main", AT, *TINY, *more, f"--workdir={where}"]):
        raise RuntimeError(f"The run in {where} could not be made.")


class Checkpoint:
    def __init__(self, shared: Path) -> None:
        self.run, self.other = shared / "trained", shared / "other"
        train(self.run, NO_ATTACKS)

    def running(self) -> AbstractContextManager[Any]:
        return self._running(self.trains)

    @contextlib.contextmanager
    def _running(self, trains: bool) -> Any:
        """A run that goes on reads its checkpoints in training; then it has nothing to do, or one short epoch."""
        with no_computation() if not trains else mock.patch.object(evaluation, "evaluate", _reached):
            yield

    def case(self, rng: np.random.Generator, box: Box, valid: bool) -> Case:
        mode = one(rng, ("eval", "eval", "eval", "train", "begin", "begin"))
        self.trains = mode == "train"
        place = box.start / "earlier" if mode == "begin" else box.run
        shutil.copytree(self.run, place)
        argv = [AT, *TINY, NO_ATTACKS, f"--workdir={box.run}"]
        argv += [f"--config.init_from={place}"] if mode == "begin" else [f"--mode={mode}"]
        named = [str(place), "The checkpoint of stage"]
        if valid:
            return Case("valid", f"{mode}: {self._whole(rng, place)}", argv, True)
        change = one(rng, (self._file, self._meta, self._meta, self._beside, self._network, self._steps))
        kind, words, expected = change(rng, place, argv)
        return Case(kind, f"{mode}: {words}", argv, expected, named)

    def _whole(self, rng: np.random.Generator, place: Path) -> str:
        change = one(rng, ("as it is", "a file beside", "no earlier step"))
        if change == "a file beside":
            (place / "checkpoints" / "notes.txt").write_text("mine")
        elif change == "no earlier step":
            shutil.rmtree(place / "checkpoints" / "0_train" / "1")
        return change

    def _file(self, rng: np.random.Generator, place: Path, argv: list[str]) -> tuple[str, str, bool | None]:
        """A file of one checkpoint, or of both."""
        done = []
        for step in one(rng, ((one(rng, STEPS),), STEPS)):
            files = sorted(p for p in (place / "checkpoints" / "0_train" / step).rglob("*") if p.is_file())
            path = one(rng, files)
            what, content = damaged(rng, path.read_bytes())
            if rng.integers(4):
                path.write_bytes(content)
            else:
                what = "gone"
                path.unlink()
            done.append(f"{step}: {path.name} {what}")
        return "damaged file", "; ".join(done), None

    def _meta(self, rng: np.random.Generator, place: Path, argv: list[str]) -> tuple[str, str, bool | None]:
        """An entry of what a checkpoint says of itself, in both."""
        name, drawn = None, value(rng)
        for step in STEPS:
            path = place / "checkpoints" / "0_train" / step / "meta" / "metadata"
            meta = json.loads(path.read_text())
            name = name or one(rng, [*meta, "everything"])
            if name == "everything":
                meta = drawn
            elif drawn is None:
                del meta[name]
            else:
                meta[name] = drawn
            path.write_text(json.dumps(meta))
        return "entry of its own", f"{name} = {drawn!r}", None

    def _beside(self, rng: np.random.Generator, place: Path, argv: list[str]) -> tuple[str, str, bool | None]:
        """A file or folder of others."""
        name, folder = one(rng, FOREIGN), bool(rng.integers(2))
        path = place / "checkpoints" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if folder:
            path.mkdir()
        else:
            path.write_bytes(rng.bytes(10))
        return "foreign file", f"{name}, {'a folder' if folder else 'a file'}", None

    def _network(self, rng: np.random.Generator, place: Path, argv: list[str]) -> tuple[str, str, bool | None]:
        """Checkpoints of another network, or a config of one."""
        checkpoints = place / "checkpoints"
        if rng.integers(2):
            shutil.rmtree(checkpoints)
            train(self.other, NO_ATTACKS, "--config.model.width=2")  # as soon as it is needed
            shutil.copytree(self.other / "checkpoints", checkpoints)
            return "another network", "twice as wide", False
        (place / "config.json").unlink()
        more = one(rng, ("--config.model.head.name=lws", "--config.model.depth=16", "--config.model.name=resnet18"))
        argv.append(more)
        # To begin with it is enough that some arrays have the same names and shapes: the others stay as they are.
        return "another network", more, None if "head" in more or "depth" in more else False

    def _steps(self, rng: np.random.Generator, place: Path, argv: list[str]) -> tuple[str, str, bool | None]:
        """Steps or the whole folder that are missing, renamed, files."""
        stage = place / "checkpoints" / "0_train"
        what = one(rng, ("no steps", "renamed", "a file", "no stage", "another stage", "a step is a file"))
        if what == "no steps":
            for step in STEPS:
                shutil.rmtree(stage / step)
        elif what == "renamed":
            (stage / "2").rename(stage / one(rng, ("3", "-2", "2 ", "02", "9" * 30)))
        elif what == "a file":
            shutil.rmtree(place / "checkpoints")
            (place / "checkpoints").write_text("mine")
        elif what == "no stage":
            shutil.rmtree(stage)
        elif what == "another stage":
            stage.rename(stage.parent / one(rng, ("1_train", "0_other", "00_train", "x_train")))
        else:
            shutil.rmtree(stage / "2")
            (stage / "2").write_text("mine")
        return f"steps: {what}", what, None


def _reached(*_: Any, **__: Any) -> None:
    from lt_adv.training import loop

    raise loop.Preempted("evaluation is reached")

"""What else stands in a working directory, read by an evaluation that has nothing to compute: the config, the log of
training, the records, what is known of a baseline; and something else in the place of a file to be written."""

import contextlib
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from experiments.fuzz.box import Box
from experiments.fuzz.cases import Case
from experiments.fuzz.draw import damaged, one, value
from experiments.fuzz.surfaces.checkpoint import AT, TINY, train
from experiments.fuzz.surfaces.npz import Hidden
from lt_adv import evaluation, main
from lt_adv.evaluation import plots
from lt_adv.evaluation.masking import diagnose

ATTACKS = "--config.eval.attacks={'pgd':{'attack':'pgd','eps':0.1,'step_size':0.1,'num_steps':1}}"
WRITTEN = ("report.md", "report.json", "plots", "config.json", "plots/examples.png", "eval", "reports")
JSON_FILES = ("config.json", "metrics.jsonl", "timing.jsonl")


class RunFiles:
    """Examples and the probes of a baseline are computed once, as they depend on nothing here; pictures are drawn, and
    not encoded."""

    def __init__(self, shared: Path) -> None:
        self.run, self._kept = shared / "evaluated", {}
        with self.running():
            train(self.run, ATTACKS)
            main.main(["main", *self._evaluation(self.run), f"--config.eval.baseline={self.run}"])

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        originals = {
            "examples": (evaluation, evaluation.examples),
            "run_diagnostics": (diagnose, diagnose.run_diagnostics),
        }
        with contextlib.ExitStack() as stack:
            for name, (where, original) in originals.items():

                def once(*given: Any, name: str = name, original: Any = original, **options: Any) -> Any:
                    if name not in self._kept:
                        self._kept[name] = original(*given, **options)
                    return self._kept[name]

                stack.enter_context(mock.patch.object(where, name, once))
            stack.enter_context(mock.patch.object(plots, "png", lambda figure: b"a picture"))
            yield

    def _evaluation(self, where: Path) -> list[str]:
        return [AT, *TINY, ATTACKS, "--mode=eval", f"--workdir={where}"]

    def case(self, rng: np.random.Generator, box: Box, valid: bool) -> Case:
        shutil.copytree(self.run, box.run)
        argv = self._evaluation(box.run)
        place, held = box.run, bool(rng.integers(3) == 0)
        if held:
            place = box.start / "earlier"
            shutil.copytree(self.run, place)
            argv.append(f"--config.eval.baseline={place}")
        if valid:
            return Case("valid", self._whole(rng, box.run, held), argv, True)
        change = one(rng, (self._json, self._json, self._entry, self._records, self._records, self._place))
        kind, words, expected = change(rng, place, box)
        return Case(kind, words + ", of the baseline" * held, argv, expected if not held else None, [str(place)])

    def _whole(self, rng: np.random.Generator, place: Path, held: bool) -> str:
        gone = one(rng, (None, "report.md", "plots", "metrics.jsonl", "timing.jsonl"))
        if gone:
            path = place / gone
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return f"without {gone}" + ", held against a baseline" * held

    def _json(self, rng: np.random.Generator, place: Path, box: Box) -> tuple[str, str, bool | None]:
        """The bytes of a file of text."""
        records = sorted(place.glob("eval/*/*/header.json")) + sorted(place.glob("eval/gradient_masking/*.json"))
        path = one(rng, [place / name for name in JSON_FILES] + records)
        what, content = damaged(rng, path.read_bytes())
        path.write_bytes(content)
        return "damaged text", f"{path.relative_to(place)}: {what}", None

    def _entry(self, rng: np.random.Generator, place: Path, box: Box) -> tuple[str, str, bool | None]:
        """JSON with another value somewhere."""
        path = one(rng, [place / name for name in JSON_FILES] + sorted(place.glob("eval/*/*.json")))
        lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        number, drawn = int(rng.integers(len(lines))), value(rng)
        tree = json.loads(lines[number])
        inside, where = tree, []
        while isinstance(inside, (dict, list)) and inside and (not where or rng.integers(3)):
            where.append(one(rng, list(inside)) if isinstance(inside, dict) else int(rng.integers(len(inside))))
            last, inside = inside, inside[where[-1]]
        last[where[-1]] = drawn
        lines[number] = json.dumps(tree)
        path.write_text("\n".join(lines))
        return "another value", f"{path.relative_to(place)}: {where} = {drawn!r}", None

    def _records(self, rng: np.random.Generator, place: Path, box: Box) -> tuple[str, str, bool | None]:
        """Records that are damaged, forged or full of hidden code."""
        path = one(rng, sorted(place.glob("eval/records/*/batch-*.npz")))
        columns: dict[str, Any] = dict(np.load(path))
        name = one(rng, list(columns))
        forged = {
            "bytes": lambda: None,
            "out of range": lambda: columns[name] + one(rng, (10, 10**6, -1, -(10**6))),
            "another shape": lambda: columns[name][:, None],
            "fewer": lambda: columns[name][1:],
            "another type": lambda: columns[name].astype(one(rng, ("f8", "U3", "?", "M8[s]", "c16", "u8", "S1"))),
            "not finite": lambda: np.full(columns[name].shape, np.nan),
            "hidden code": lambda: np.array([Hidden(box.code())] * len(columns[name]), object),
            "a column more": lambda: columns[name],
        }
        what = one(rng, list(forged))
        if what == "bytes":
            what, content = damaged(rng, path.read_bytes())
            path.write_bytes(content)
        else:
            columns["attack/other" if what == "a column more" else name] = forged[what]()
            buffer = io.BytesIO()
            np.savez(buffer, **columns)
            path.write_bytes(buffer.getvalue())
        return "records", f"{name}: {what}", None

    def _place(self, rng: np.random.Generator, place: Path, box: Box) -> tuple[str, str, bool | None]:
        """A folder where a file is to be written, or a file where a folder."""
        path = place / one(rng, WRITTEN)
        was_file = path.is_file()
        shutil.rmtree(path, ignore_errors=True)
        path.unlink(missing_ok=True)
        if was_file:
            (path / "mine").mkdir(parents=True)
        else:
            path.write_text("mine")
        return "in the place of", f"{path.relative_to(place)} is a {'folder' if was_file else 'file'}", None

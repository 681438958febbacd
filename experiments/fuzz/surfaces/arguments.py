"""The command line: typing errors, flags of others, names of working directories, config files that are none."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

from experiments.fuzz.box import Box
from experiments.fuzz.cases import Case, no_computation
from experiments.fuzz.draw import NAMES, damaged, one, value

ROOT = Path(__file__).parents[3]
CONFIGS = sorted(p.stem for p in (ROOT / "configs").glob("*.py") if p.stem not in ("__init__", "common"))
FROM_A_RUN = ("finetune_resampling", "finetune_reweighting", "lws", "posthoc")  # they need a baseline
FRESH = [name for name in CONFIGS if name not in FROM_A_RUN]
OVERRIDES = (
    ("--config.seed=7",),
    ("--config.optim.epochs=40", "--config.optim.learning_rate=0.05"),
    ("--config.attack.eps", "0.05"),
    ("-config.optim.nesterov",),
    ("--noconfig.optim.nesterov",),
    ("--config.eval.only=('pgd20',)",),
    ("--config.data.imbalance=step",),
)
WORKDIRS = ("run", "./run", "run/", "a b", "ä", "a=b,c", "run\n", "[/b]", "[red]", "deep/er", "%s", "-run", "~run")
BAD_WORKDIRS = ("", "x" * 300, "a\0b", "nowhere://x", "http://x", "gs://x/y", "file:///nowhere", "://", "run\udcff")
FLAGS = ("--", "-", "---", "--config", "--workdir", "--mode", "--config.", "--config=", "--config.seed", "--noconfig")
FLAGS += ("--=x", "--flagfile=given", "--undefok=x", "--helpfull", "--help=1", "-x", "@file", "--nomode", "--v=1")
FLAGS += ("--config.optim.epochs.x=1", "--mode=", "--mode=trian", "--mode=Train", "--config:x=1", "--logtostderr")
FLAGS += ("--config.seed==3", "--config.seed=")
TYPED = ("", "x", "=", ":", ".", "-", ",", "\0", "\n", "ü", "'", "{", " ")


class Arguments:
    def __init__(self, shared: Path) -> None:
        del shared

    def running(self) -> AbstractContextManager[Any]:
        return no_computation()

    def case(self, rng: np.random.Generator, box: Box, valid: bool) -> Case:
        (box.start / "configs").symlink_to(ROOT / "configs")
        name = one(rng, FRESH)
        workdir = one(rng, WORKDIRS)
        argv = [f"--config=configs/{name}.py:dataset=digits", *one(rng, OVERRIDES), f"--workdir={box.run}/{workdir}"]
        if valid:
            argv = [str(part) for part in rng.permutation(np.array(argv, object))] if len(argv) == 3 else argv
            return Case("valid", " ".join(argv), argv, True)
        kinds = (self._typing, self._stray, self._workdir, self._argument, self._file, self._twice)
        return one(rng, kinds)(rng, box, argv)

    def _typing(self, rng: np.random.Generator, box: Box, argv: list[str]) -> Case:
        """A few characters of one argument changed; not of the working directory, which may be anywhere then."""
        which = int(rng.integers(len(argv) - 1))
        text = argv[which]
        for _ in range(int(rng.integers(1, 4))):
            at = int(rng.integers(len(text) + 1))
            text = text[:at] + one(rng, TYPED) + text[at + int(rng.integers(2)) :]
        argv[which] = text
        return Case("typing error", " ".join(argv), argv, None)

    def _stray(self, rng: np.random.Generator, box: Box, argv: list[str]) -> Case:
        content = damaged(rng, "\n".join(argv[:-1]).encode())[1]
        (box.start / "given").write_bytes(content)
        argv.insert(int(rng.integers(len(argv) + 1)), one(rng, FLAGS + NAMES))
        return Case("stray argument", " ".join(argv), argv, None)

    def _workdir(self, rng: np.random.Generator, box: Box, argv: list[str]) -> Case:
        where = one(rng, BAD_WORKDIRS)
        argv[-1] = f"--workdir={where if '://' in where or not where else box.run / where}"
        return Case("working directory", " ".join(argv), argv, False)

    def _argument(self, rng: np.random.Generator, box: Box, argv: list[str]) -> Case:
        """After the colon."""
        key = one(rng, ("dataset", "epochs", "variant", "baseline", "adjustment", "x", ""))
        given = str(value(rng, depth=2))
        argv[0] = f"--config=configs/{one(rng, CONFIGS)}.py:dataset=digits,{key}={given}"
        return Case("argument of a config", " ".join(argv), argv, None)

    def _file(self, rng: np.random.Generator, box: Box, argv: list[str]) -> Case:
        """A config file that is damaged, no text, no Python, or no file."""
        kind, content = damaged(rng, (ROOT / "configs" / "at.py").read_bytes())
        path = box.given / one(rng, ("mine.py", "mine", "a b.py", "ä.py"))
        if one(rng, (True, True, False)):
            path.write_bytes(content)
        argv[0] = f"--config={one(rng, (path, box.given))}:dataset=digits"
        return Case("config file", f"{kind}: {' '.join(argv)}", argv, None)

    def _twice(self, rng: np.random.Generator, box: Box, argv: list[str]) -> Case:
        """Arguments said twice, left out or in another order."""
        *others, workdir = argv
        chosen = [others[int(i)] for i in rng.integers(len(others), size=int(rng.integers(len(others) + 2)))]
        return Case("left out or said twice", " ".join(chosen), [*chosen, workdir], None)

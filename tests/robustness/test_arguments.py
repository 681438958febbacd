"""The command line: typing errors, unknown flags, names of working directories, files that are not a config."""

import functools

from hypothesis import given
from hypothesis import strategies as st

from tests.robustness.inputs import NAMES, ROOT, SCALARS, Case, Draw, attempt, below, damaged, inputs, one
from tests.robustness.sandbox import Sandbox

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


def case(draw: Draw, box: Sandbox, valid: bool) -> Case:
    (box.start / "configs").symlink_to(ROOT / "configs")
    name = one(draw, FRESH)
    workdir = one(draw, WORKDIRS)
    argv = [f"--config=configs/{name}.py:dataset=digits", *one(draw, OVERRIDES), f"--workdir={box.run}/{workdir}"]
    if valid:
        argv = draw(st.permutations(argv)) if len(argv) == 3 else argv
        return Case("valid", " ".join(argv), argv, True)
    kinds = (_typing, _stray, _workdir, _argument, _file, _twice)
    return one(draw, kinds)(draw, box, argv)


def _typing(draw: Draw, box: Sandbox, argv: list[str]) -> Case:
    """A few characters of one argument changed; not of the working directory, which could then be anywhere."""
    which = below(draw, len(argv) - 1)
    text = argv[which]
    for _ in range(draw(st.integers(1, 3))):
        at = below(draw, len(text) + 1)
        text = text[:at] + one(draw, TYPED) + text[at + below(draw, 2) :]
    argv[which] = text
    return Case("typing error", " ".join(argv), argv, None)


def _stray(draw: Draw, box: Sandbox, argv: list[str]) -> Case:
    content = damaged(draw, "\n".join(argv[:-1]).encode())[1]
    (box.start / "given").write_bytes(content)
    argv.insert(below(draw, len(argv) + 1), one(draw, FLAGS + NAMES))
    return Case("stray argument", " ".join(argv), argv, None)


def _workdir(draw: Draw, box: Sandbox, argv: list[str]) -> Case:
    where = one(draw, BAD_WORKDIRS)
    argv[-1] = f"--workdir={where if '://' in where or not where else box.run / where}"
    return Case("working directory", " ".join(argv), argv, False)


def _argument(draw: Draw, box: Sandbox, argv: list[str]) -> Case:
    """After the colon."""
    key = one(draw, ("dataset", "epochs", "variant", "baseline", "adjustment", "x", ""))
    given = str(draw(SCALARS))
    argv[0] = f"--config=configs/{one(draw, CONFIGS)}.py:dataset=digits,{key}={given}"
    return Case("argument of a config", " ".join(argv), argv, None)


def _file(draw: Draw, box: Sandbox, argv: list[str]) -> Case:
    """A config file that is damaged, not text, not Python, or missing."""
    kind, content = damaged(draw, (ROOT / "configs" / "at.py").read_bytes())
    path = box.given / one(draw, ("mine.py", "mine", "a b.py", "ä.py"))
    if one(draw, (True, True, False)):
        path.write_bytes(content)
    argv[0] = f"--config={one(draw, (path, box.given))}:dataset=digits"
    return Case("config file", f"{kind}: {' '.join(argv)}", argv, None)


def _twice(draw: Draw, box: Sandbox, argv: list[str]) -> Case:
    """Arguments that are repeated, left out or in another order."""
    *others, workdir = argv
    chosen = draw(st.lists(st.sampled_from(others), max_size=len(others) + 1))
    return Case("left out or repeated", " ".join(chosen), [*chosen, workdir], None)


@inputs(4)
@given(st.data())
def test_valid_command_lines_are_accepted(tmp_path, data):
    attempt(functools.partial(case, valid=True), data.draw, tmp_path)


@inputs(20)
@given(st.data())
def test_bad_command_lines_are_refused_in_one_line(tmp_path, data):
    attempt(functools.partial(case, valid=False), data.draw, tmp_path)

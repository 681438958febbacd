"""The command line: typing errors, unknown flags, names of working directories, files that are not a config."""

import functools

from hypothesis import given
from hypothesis import strategies as st

from tests.robustness.inputs import NAMES, ROOT, SCALARS, Case, Draw, attempt, below, choose, damaged, inputs
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
FLAGS += ("--=x", "--flagfile=flags", "--undefok=x", "--helpfull", "--help=1", "-x", "@file", "--nomode", "--v=1")
FLAGS += ("--config.optim.epochs.x=1", "--mode=", "--mode=trian", "--mode=Train", "--config:x=1", "--logtostderr")
FLAGS += ("--config.seed==3", "--config.seed=")
TYPED = ("", "x", "=", ":", ".", "-", ",", "\0", "\n", "ü", "'", "{", " ")


def case(draw: Draw, box: Sandbox, valid: bool) -> Case:
    (box.cwd / "configs").symlink_to(ROOT / "configs")
    name = choose(draw, FRESH)
    workdir = choose(draw, WORKDIRS)
    argv = [f"--config=configs/{name}.py:dataset=digits", *choose(draw, OVERRIDES), f"--workdir={box.run}/{workdir}"]
    if valid:
        argv = draw(st.permutations(argv)) if len(argv) == 3 else argv
        return Case("valid", " ".join(argv), argv, True)
    kinds = (_typing, _stray, _workdir, _argument, _file, _twice)
    return choose(draw, kinds)(draw, box, argv)


def _typing(draw: Draw, box: Sandbox, argv: list[str]) -> Case:
    """Changes a few characters of an argument, except the working directory, which must stay in the sandbox."""
    which = below(draw, len(argv) - 1)
    text = argv[which]
    for _ in range(draw(st.integers(1, 3))):
        at = below(draw, len(text) + 1)
        text = text[:at] + choose(draw, TYPED) + text[at + below(draw, 2) :]
    argv[which] = text
    return Case("typing error", " ".join(argv), argv, None)


def _stray(draw: Draw, box: Sandbox, argv: list[str]) -> Case:
    content = damaged(draw, "\n".join(argv[:-1]).encode())[1]
    (box.cwd / "flags").write_bytes(content)
    argv.insert(below(draw, len(argv) + 1), choose(draw, FLAGS + NAMES))
    return Case("stray argument", " ".join(argv), argv, None)


def _workdir(draw: Draw, box: Sandbox, argv: list[str]) -> Case:
    where = choose(draw, BAD_WORKDIRS)
    argv[-1] = f"--workdir={where if '://' in where or not where else box.run / where}"
    return Case("working directory", " ".join(argv), argv, False)


def _argument(draw: Draw, box: Sandbox, argv: list[str]) -> Case:
    """Changes the arguments after the colon."""
    key = choose(draw, ("dataset", "epochs", "variant", "baseline", "adjustment", "x", ""))
    text = str(draw(SCALARS))
    argv[0] = f"--config=configs/{choose(draw, CONFIGS)}.py:dataset=digits,{key}={text}"
    return Case("argument of a config", " ".join(argv), argv, None)


def _file(draw: Draw, box: Sandbox, argv: list[str]) -> Case:
    """Names a config file that is damaged, not text, not Python, or missing."""
    kind, content = damaged(draw, (ROOT / "configs" / "at.py").read_bytes())
    path = box.input / choose(draw, ("mine.py", "mine", "a b.py", "ä.py"))
    if choose(draw, (True, True, False)):
        path.write_bytes(content)
    argv[0] = f"--config={choose(draw, (path, box.input))}:dataset=digits"
    return Case("config file", f"{kind}: {' '.join(argv)}", argv, None)


def _twice(draw: Draw, box: Sandbox, argv: list[str]) -> Case:
    """Repeats, omits or reorders arguments."""
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

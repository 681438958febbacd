"""Bad input by the thousand, a few of each kind here; and what is wrong is noticed where it is planted."""

import functools
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from experiments import tables as readme
from experiments.benchmark import record
from experiments.fuzz import __main__ as door
from experiments.fuzz import cases, draw, surfaces
from experiments.fuzz.box import Box
from experiments.fuzz.cases import ACCEPTED, ELSE, REFUSED, Case, examine, tally
from experiments.fuzz.tables import SURFACES
from lt_adv.cli import run as runs
from lt_adv.cli import schema
from lt_adv.data import archives, cache
from tests.experiments import NO_TORCH

INPUTS = {"checkpoint": 4, "run_files": 2, "archive": 6}  # of the others so many as are quick
CHEAP = 12


@pytest.fixture(scope="module", autouse=True)
def alone(tmp_path_factory):
    """One device, and a temporary folder that is not that of everybody."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs.sharding, "make_mesh", lambda: Mesh(np.array(jax.devices()[:1]), ("data",)))
        patch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("temporary")))
        yield


@pytest.fixture(scope="module")
def surface(tmp_path_factory):
    """`surface(name)`: made once, for some begin with a trained run."""

    @functools.cache
    def make(name):
        if name == "weights":
            pytest.importorskip("torch", reason=NO_TORCH)
        return surfaces.make(name, tmp_path_factory.mktemp(name))

    return make


@pytest.mark.parametrize("name", SURFACES)
def test_nothing_but_accepted_and_refused(surface, tmp_path, name):
    tried = [examine(surface(name), 1, number, tmp_path) for number in range(INPUTS.get(name, CHEAP))]
    made = tally(tried)
    assert made["causes"] == [] and made["valid_accepted"] == made["valid"] >= len(tried) / 5
    assert made["accepted"] + made["refused"] == made["tried"] == len(tried)
    assert not list(tmp_path.iterdir())


class Given:
    """A surface of one input."""

    def __init__(self, case):
        self.given = case

    def case(self, rng, box, valid):
        return self.given(box) if callable(self.given) else self.given

    def running(self):
        return cases.no_computation()


DIGITS = f"--config={Path(__file__).parents[2]}/configs/at.py:dataset=digits"


def tried(tmp_path, expected, *given, named=()):
    return examine(
        Given(lambda box: Case("x", "x", [DIGITS, f"--workdir={box.run}", *given], expected, named)), 0, 0, tmp_path
    )


def test_answers(tmp_path):
    assert tried(tmp_path, True).answer == ACCEPTED
    refused = tried(tmp_path, False, "--config.seed=-1", named=["config.seed"])
    assert refused.answer == REFUSED and refused.line.startswith("config.seed must be a whole number")
    assert tried(tmp_path, True, "--config.seed=-1").line.startswith("a valid input is refused: Error: config.seed")
    assert tried(tmp_path, False).line == "a bad input is accepted"
    assert tried(tmp_path, False, "--config.seed=-1", named=["batch"]).line.startswith(
        "the line names nothing of batch"
    )


def crash(*_, **__):
    raise TypeError("a bug")


def elsewhere(config, workdir):
    (Path(workdir).parent / "elsewhere").write_text("x")


def half(config, workdir):
    Path(workdir).mkdir()
    (Path(workdir) / ".report.md.12.tmp").write_text("x")


def code(config, workdir):
    (Path(workdir).parent / "canary").write_text("x")


def outside(config, workdir):
    (Path(workdir).parents[1] / "outside").write_text("x")


def changed(config, workdir):
    (Path(workdir).parent / "given" / "new").write_text("x")


def refused_late(config, workdir):
    Path(workdir).mkdir()
    raise ValueError("too late for that")


def two_lines(config, workdir):
    print("Traceback (most recent call last):", file=sys.stderr)
    raise ValueError("something is wrong")


@pytest.mark.parametrize(
    ("defect", "line"),
    [
        (crash, r"traceback: TypeError: a bug"),
        (elsewhere, "elsewhere was written outside"),
        (half, "run/.report.md.12.tmp is left half written"),
        (code, "the code in the input was run"),
        (outside, "open .*outside beyond the box"),
        (changed, "given/new was changed"),
        (refused_late, "a working directory is left behind"),
        (two_lines, "no single line"),
    ],
)
def test_a_planted_defect_is_noticed(tmp_path, monkeypatch, defect, line):
    monkeypatch.setattr(runs, "train", defect)
    outcome = tried(tmp_path, None)
    assert outcome.answer == ELSE and re.search(line, outcome.line), outcome.line


class _Keeps:
    """A `shutil` that removes nothing: a cache that fails is left half written."""

    disk_usage = staticmethod(shutil.disk_usage)

    def rmtree(self, *_, **__):
        pass


def _unsafe(load, path, **options):
    return load(path, **{**options, "allow_pickle": True})


@pytest.mark.parametrize(
    ("name", "where", "instead"),
    [
        ("config", (schema, "values"), lambda config: None),
        ("archive", (archives, "_safe"), lambda name: name),
        ("archive", (archives, "check"), lambda archive, path: None),
        ("image_folder", (cache, "shutil"), _Keeps()),
        ("npz", (np, "load"), functools.partial(_unsafe, np.load)),
    ],
)
def test_a_check_that_is_gone_is_noticed(surface, tmp_path, monkeypatch, name, where, instead):
    monkeypatch.setattr(*where, instead)
    made = tally([examine(surface(name), 3, number, tmp_path) for number in range(24)])
    assert made["else"] and len(made["causes"]) == made["else"]


def test_damage_is_drawn_of_every_kind_and_repeats():
    rng, content = np.random.default_rng(0), bytes(range(200))
    found = dict(draw.damaged(rng, content) for _ in range(300))
    assert len(found) == 11 and all(made != content for made in found.values()) and found["empty"] == b""
    assert len(found["truncated"]) < 200 and draw.damaged(rng, b"")[1] is not None
    first, again = (draw.value(np.random.default_rng(3)) for _ in range(2))
    assert repr(first) == repr(again)


def test_state_of_a_box(tmp_path):
    box = Box(tmp_path / "box")
    before = box.state()
    assert set(before) == {"given", "data", "start"} and box.wrong(before, refused=True) is None
    half = box.data / "lt_adv_cache" / "a-0123456789abcdef"
    half.mkdir(parents=True)
    (half / "train_image.npy").write_bytes(b"")
    assert "is left half written" in box.wrong(before, refused=False)
    (half / "meta.json").write_text("{}")
    assert box.wrong(before, refused=True) is None


HANGS = """
import json, os, sys, time
name, seed, first, end, folder = sys.argv[1:]
print(json.dumps({"ready": True}), flush=True)
for number in range(int(first), int(end)):
    print(json.dumps({"kind": "k", "words": str(number), "valid": False}), flush=True)
    if number == 1:
        time.sleep(60)
    if number == 3:
        os.kill(os.getpid(), 9)
    outcome = {"kind": "k", "words": str(number), "valid": number == 0, "answer": "accepted", "line": ""}
    print(json.dumps({"outcome": outcome}), flush=True)
"""


def test_an_input_that_hangs_or_kills(tmp_path, monkeypatch):
    """The next begins in a new process."""
    original = subprocess.Popen

    def start(command, **options):
        return original([command[0], "-c", HANGS, *command[3:]], **options)

    monkeypatch.setattr(door.subprocess, "Popen", start)
    found = list(door.outcomes("arguments", 0, 5, 0.5, str(tmp_path)))
    assert [o.words for o in found] == list("01234")
    assert [o.answer for o in found] == [ACCEPTED, ELSE, ACCEPTED, ELSE, ACCEPTED]
    assert found[1].line == "no answer in 0.5 s" and found[3].line == "the process died: SIGKILL"


def test_results_and_table(tmp_path, monkeypatch, capsys):
    def outcomes(surface, seed, inputs, seconds, folder):
        answers = [ACCEPTED, REFUSED, ACCEPTED, ELSE]
        return [cases.Outcome("a", f"{n}", n % 4 == 0, answers[n % 4], f"line {n}") for n in range(inputs)]

    monkeypatch.setattr(door, "outcomes", outcomes)
    monkeypatch.setattr(record, "machine", lambda: {"cpu": "a cpu", "cores": 2})
    assert door.main(["--surface=npz,config", "--inputs=8", f"--out={tmp_path}"]) == 1
    made = json.loads((tmp_path / "fuzz" / "npz.json").read_text())
    assert made["command"] == "python -m experiments.fuzz --surface=npz --inputs=8 --seed=0"
    assert made["machine"] == {"cpu": "a cpu", "cores": 2} and "jax" in made["versions"]
    assert [cause["line"] for cause in made["causes"]] == ["line 3", "line 7"]
    assert made["kinds"]["a"] == {ACCEPTED: 4, REFUSED: 2, ELSE: 2, "for example": "line 1"}
    head, _, config, npz = (
        [cell.strip() for cell in row.strip("|").split("|")] for row in readme.fuzz(tmp_path).splitlines()
    )
    assert config[0] == SURFACES["config"] and npz[0] == SURFACES["npz"]
    assert dict(zip(head[2:], npz[2:], strict=True)) == {
        "Inputs": "8",
        "Valid": "2",
        "Of these accepted": "2",
        "Damaged and yet of use": "2",
        "Refused cleanly": "2",
        "Anything else": "2",
    }
    assert "not measured yet" in readme.fuzz(tmp_path / "nowhere")


@pytest.mark.parametrize("given", ["--surface=npx", "--inputs=0", "--seconds=nan", "--seed=x", "--other"])
def test_arguments_that_cannot_be(given, capsys):
    assert door.main([given]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("Error: ") and printed.count("\n") == 1

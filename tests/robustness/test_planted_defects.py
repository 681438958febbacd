"""The checks of this folder fail if a defect is planted or a check of lt_adv is disabled."""

import functools
import os
import resource
import shutil
import signal
import sys
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lt_adv.cli import schema, train
from lt_adv.data import archives, cache
from tests.robustness import test_archives, test_config_values, test_image_folders, test_npz
from tests.robustness.inputs import DAMAGE, MEMORY, ROOT, VALUES, Case, attempt, damaged, inputs
from tests.robustness.sandbox import Sandbox

DIGITS = f"--config={ROOT}/configs/at.py:dataset=digits"


@pytest.fixture
def answer(tmp_path):
    """Returns `answer(expected, *flags, named=())` -> the line of a refusal, or None; it raises as `attempt` does."""

    def call(expected, *flags, named=()):
        def make(_, box):
            return Case("digits", "digits", [DIGITS, f"--workdir={box.run}", *flags], expected, named)

        return attempt(make, None, tmp_path)

    return call


def test_answers_must_be_as_expected(answer, tmp_path):
    assert answer(True) is None
    line = answer(False, "--config.seed=-1", named=["config.seed"])
    assert line.startswith("config.seed must be a whole number")
    with pytest.raises(AssertionError, match="a valid input is refused: Error: config.seed"):
        answer(True, "--config.seed=-1")
    with pytest.raises(AssertionError, match="a bad input is accepted"):
        answer(False)
    with pytest.raises(AssertionError, match="the line names none of batch"):
        answer(False, "--config.seed=-1", named=["batch"])
    assert not list(tmp_path.iterdir()), "sandboxes are removed"


def crash(*_, **__):
    raise TypeError("a bug")


def exit_at_once(*_, **__):
    sys.exit(3)


def write_elsewhere(config, workdir, hooks):
    (Path(workdir).parent / "elsewhere").write_text("x")


def write_half(config, workdir, hooks):
    Path(workdir).mkdir()
    (Path(workdir) / ".report.md.12.tmp").write_text("x")


def run_hidden_code(config, workdir, hooks):
    (Path(workdir).parent / "canary").write_text("x")


def write_outside(config, workdir, hooks):
    path = ROOT / "outside-of-the-sandbox"
    path.write_text("x")
    path.unlink()


def change_the_input(config, workdir, hooks):
    (Path(workdir).parent / "input" / "new").write_text("x")


def refuse_late(config, workdir, hooks):
    Path(workdir).mkdir()
    raise ValueError("too late for that")


def print_two_lines(config, workdir, hooks):
    print("Traceback (most recent call last):", file=sys.stderr)
    raise ValueError("something is wrong")


def exceed_the_time_limit(config, workdir, hooks):
    os.kill(os.getpid(), signal.SIGALRM)  # as the timer does


@pytest.mark.parametrize(
    ("defect", "message"),
    [
        (crash, r"traceback: TypeError: a bug"),
        (exit_at_once, "SystemExit with 3"),
        (write_elsewhere, "elsewhere was written outside"),
        (write_half, "run/.report.md.12.tmp is left half written"),
        (run_hidden_code, "code of the input was executed"),
        (write_outside, "open .*outside-of-the-sandbox outside of the sandbox"),
        (change_the_input, "input/new was changed"),
        (refuse_late, "a working directory is left behind"),
        (print_two_lines, "no single line"),
        (exceed_the_time_limit, "TimeLimit: no answer in"),
    ],
)
def test_planted_defect_fails(answer, monkeypatch, defect, message):
    monkeypatch.setattr(train, "train", defect)
    with pytest.raises(AssertionError, match=message):
        answer(None)


class ShutilWithoutRmtree:
    """Removes nothing, so that a cache whose write fails is left half written."""

    disk_usage = staticmethod(shutil.disk_usage)

    def rmtree(self, *_, **__):
        pass


def _load_with_pickles(load, path, **options):
    return load(path, **{**options, "allow_pickle": True})


@pytest.mark.parametrize(
    ("case", "where", "instead"),
    [
        (test_config_values.case, (schema, "validate_entries"), lambda config: None),
        (test_archives.case, (archives, "_safe_name"), lambda name: name),
        (test_archives.case, (archives, "check"), lambda archive, path: None),
        (test_image_folders.case, (cache, "shutil"), ShutilWithoutRmtree()),
        (test_npz.case, (np, "load"), functools.partial(_load_with_pickles, np.load)),
    ],
    ids=["schema", "archive members", "archive digest", "cache clean-up", "pickles in .npz"],
)
def test_disabled_check_of_lt_adv_fails(tmp_path, monkeypatch, case, where, instead):
    monkeypatch.setattr(*where, instead)

    @hypothesis.settings(parent=inputs(60), report_multiple_bugs=False, print_blob=False)
    @given(st.data())
    def bad_inputs(data):
        attempt(functools.partial(case, valid=False), data.draw, tmp_path)

    with pytest.raises(AssertionError):
        bad_inputs()


@inputs(200)
@given(st.data())
def test_damage_changes_the_bytes(data):
    content = bytes(range(200))
    kind, changed = damaged(data.draw, content)
    assert kind in DAMAGE and (changed != content or kind in ("bits flipped", "a piece zeroed"))
    assert kind != "truncated" or len(changed) < 200
    assert kind != "empty" or changed == b""
    assert isinstance(damaged(data.draw, b"")[1], bytes)


def test_every_kind_of_damage_is_drawn():
    kinds = set()

    @inputs(200)
    @given(st.data())
    def draws(data):
        kinds.add(damaged(data.draw, b"content")[0])

    draws()
    assert kinds == set(DAMAGE)


def test_inputs_repeat_in_every_run():
    values = []

    @inputs(20)
    @given(st.data())
    def draws(data):
        values.append(repr(data.draw(VALUES)))

    draws()
    first = list(values)
    values.clear()
    draws()
    assert values == first and len(set(first)) > 10


def test_sandbox_reports_a_cache_without_metadata(tmp_path):
    box = Sandbox(tmp_path / "box")
    before = box.state()
    assert set(before) == {"input", "data", "cwd"} and box.problem(before, refused=True) is None
    half = box.data / "lt_adv_cache" / "a-0123456789abcdef"
    half.mkdir(parents=True)
    (half / "train_image.npy").write_bytes(b"")
    assert "is left half written" in box.problem(before, refused=False)
    (half / "meta.json").write_text("{}")
    assert box.problem(before, refused=True) is None


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_memory_and_time_are_limited_only_during_an_input(answer, monkeypatch):
    def read_limits(config, workdir, hooks):
        limits.append((resource.getrlimit(resource.RLIMIT_AS)[0], signal.getitimer(signal.ITIMER_REAL)[0]))

    limits = []
    before = resource.getrlimit(resource.RLIMIT_AS)
    monkeypatch.setattr(train, "train", read_limits)
    assert answer(True) is None
    ((memory, seconds),) = limits
    assert memory > MEMORY and memory != before[0] and seconds > 0
    assert resource.getrlimit(resource.RLIMIT_AS) == before and signal.getitimer(signal.ITIMER_REAL)[0] == 0

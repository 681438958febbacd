"""Any text at all as arguments, any value at all in a config, through `main`: accepted, or one line and exit code 2."""

import io
import re
from contextlib import redirect_stderr, redirect_stdout
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lt_adv import main
from lt_adv.cli import flags, schema
from lt_adv.training import loop
from tests.bad_input.conftest import DIGITS, ROOT

ENTRIES = sorted(schema.flat(flags.load(f"{ROOT}/configs/robal.py:dataset=digits").to_dict()))
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
VALUES = st.recursive(PLAIN, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=5), v, max_size=3))
ARGUMENTS = st.sampled_from(["--config", "--config.seed=3", "--mode=eval", "--noconfig.optim.nesterov", DIGITS])
FILE = """from configs import robal
nan, inf = float("nan"), float("inf")
def get_config(arg=None):
    c = robal.get_config(arg)
    with c.unlocked(), c.ignore_type():
        c.update_from_flattened_dict({%r: %r})
    return c
"""
often = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def answered(tmp_path, monkeypatch):
    """`answered(*arguments)`: the exit code, after what holds for every answer."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")

    def reached(*_):
        raise loop.Preempted("training is reached")

    def call(*given):
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err), mock.patch.object(loop, "train", reached):
            code = main.main(["main", *given, f"--workdir={tmp_path}/run"])
        if code == 0:
            assert not err.getvalue()
        else:
            assert code == 2 and re.fullmatch(r"Error: .+\n", err.getvalue())
        return code

    return call


@often
@given(given_=st.lists(st.text(max_size=12) | st.text(max_size=8).map("--config.{}".format) | ARGUMENTS, max_size=4))
def test_any_arguments(answered, given_):
    if not {"-h", "--help"} & set(given_):
        answered(*given_)


@often
@given(path=st.sampled_from(ENTRIES), value=VALUES)
def test_any_value_on_the_command_line(answered, path, value):
    answered(DIGITS, f"--config.{path}={value}")


@often
@given(path=st.sampled_from(ENTRIES), value=VALUES)
def test_any_value_in_a_config_file(answered, tmp_path, path, value):
    (tmp_path / "mine.py").write_text(FILE % (path, value), "utf-8")
    answered(f"--config={tmp_path}/mine.py:dataset=digits")

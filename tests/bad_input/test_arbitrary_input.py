"""Generated arguments and config values through `main` are accepted, or give one line and exit code 2."""

import io
import re
from contextlib import redirect_stderr, redirect_stdout

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lt_adv import main
from lt_adv.cli import flags, schema
from tests.bad_input.conftest import DIGITS, ROOT

ENTRIES = sorted(schema.flatten(flags.load_config(f"{ROOT}/configs/robal.py:dataset=digits").to_dict()))
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
many_examples = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def check_answer(tmp_path, monkeypatch, no_training):
    """Returns a function of arguments that runs `main` and checks its exit code and error line."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")

    def call(*arguments):
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            code = main.main(["main", *arguments, f"--workdir={tmp_path}/run"], no_training)
        if code == 0:
            assert not err.getvalue()
        else:
            assert code == 2 and re.fullmatch(r"Error: .+\n", err.getvalue())
        return code

    return call


@many_examples
@given(arguments=st.lists(st.text(max_size=12) | st.text(max_size=8).map("--config.{}".format) | ARGUMENTS, max_size=4))
def test_arbitrary_arguments_are_accepted_or_refused_in_one_line(check_answer, arguments):
    if not {"-h", "--help"} & set(arguments):
        check_answer(*arguments)


@many_examples
@given(path=st.sampled_from(ENTRIES), value=VALUES)
def test_arbitrary_values_on_the_command_line_are_accepted_or_refused_in_one_line(check_answer, path, value):
    check_answer(DIGITS, f"--config.{path}={value}")


@many_examples
@given(path=st.sampled_from(ENTRIES), value=VALUES)
def test_arbitrary_values_in_a_config_file_are_accepted_or_refused_in_one_line(check_answer, tmp_path, path, value):
    (tmp_path / "mine.py").write_text(FILE % (path, value), "utf-8")
    check_answer(f"--config={tmp_path}/mine.py:dataset=digits")

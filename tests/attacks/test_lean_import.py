"""`import lt_adv.attacks` brings jax along and none of the project's heavy packages."""

import subprocess
import sys

import pytest

HEAVY = {"flax", "orbax", "tensorflow", "tensorflow_datasets", "sklearn", "ml_collections", "matplotlib"}


def modules_after(statement):
    program = f"import sys; {statement}; print(*sys.modules)"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.parametrize("room", ["attacks", "losses"])
def test_import_is_lean(room):
    loaded = {name.split(".")[0] for name in modules_after(f"import lt_adv.{room}")}
    assert {"jax", "lt_adv"} <= loaded
    assert not loaded & HEAVY


@pytest.mark.parametrize("room", ["attacks", "losses"])
def test_it_loads_nothing_else_of_the_project(room):
    loaded = modules_after(f"import lt_adv.{room}")
    assert all(name.startswith(f"lt_adv.{room}") for name in loaded if name.startswith("lt_adv."))

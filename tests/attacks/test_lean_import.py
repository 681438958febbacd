"""`lt_adv.attacks` and `lt_adv.losses` need jax and numpy only, and nothing else of the project."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_package import BLOCK, outside_of_base_install

ROOT = Path(__file__).parents[2] / "lt_adv"


@pytest.mark.parametrize("package", ["attacks", "losses"])
def test_imports_jax_and_numpy_only(package):
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            allowed = {"jax", "numpy", "lt_adv"} | sys.stdlib_module_names
            assert {name.partition(".")[0] for name in names} <= allowed, path
            assert all(name.startswith(f"lt_adv.{package}") for name in names if name.startswith("lt_adv")), path


@pytest.mark.parametrize("package", ["attacks", "losses"])
def test_import_without_any_other_package(package):
    program = f"{BLOCK}\nimport lt_adv.{package}\nprint(*sys.modules)"
    command = [sys.executable, "-c", program, ",".join(outside_of_base_install())]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert "jax" in loaded
    assert all(name.startswith(f"lt_adv.{package}") for name in loaded if name.startswith("lt_adv."))

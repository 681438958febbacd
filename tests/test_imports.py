"""Layering: each package of lt_adv imports only what `INTERNAL` and `EXTERNAL` allow, checked with `ast`."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = ("lt_adv", "configs", "experiments", "tests")

# Package or module directly in lt_adv -> the others that it may import.
INTERNAL: dict[str, set[str]] = {
    "__init__": set(),
    "runtime": set(),
    "attacks": set(),
    "losses": set(),
    "compilation": set(),
    "models": {"runtime"},
    "data": {"runtime"},
    "methods": {"runtime", "attacks", "losses"},
    "training": {"runtime", "attacks", "models", "data", "methods"},
    "evaluation": {"__init__", "runtime", "attacks", "data"},
    "cli": {"__init__", "runtime", "attacks", "models", "data", "methods", "training", "evaluation", "compilation"},
    "main": {"runtime", "training", "cli"},
}
NUMERIC = {"jax", "numpy", "optax"}
# Package or module directly in lt_adv -> the third-party packages that it may import.
EXTERNAL: dict[str, set[str]] = {
    "__init__": set(),
    "runtime": {"etils", "jax", "numpy"},
    "attacks": NUMERIC | {"matplotlib"},  # for a plot only, see test_lean_import
    "losses": NUMERIC,
    "compilation": NUMERIC,
    "models": NUMERIC | {"flax", "torch"},
    "data": NUMERIC | {"grain", "tensorflow_datasets", "PIL", "sklearn"},
    "methods": NUMERIC | {"flax"},
    "training": NUMERIC | {"absl", "etils", "flax", "ml_collections", "orbax", "rich", "tensorboardX"},
    "evaluation": NUMERIC | {"etils", "matplotlib", "rich"},
    "cli": NUMERIC | {"absl", "etils", "flax", "ml_collections", "safetensors"},
    "main": set(),
}
# Modules that may import less than their package, so that invalid flags are refused before jax is imported.
LIGHT = {
    "lt_adv.cli.entries": {"ml_collections"},
    "lt_adv.cli.flags": {"absl", "etils", "ml_collections"},
    "lt_adv.runtime.atomic_io": {"etils"},
    "lt_adv.runtime.registry": set(),
    "lt_adv.runtime.standard_attacks": set(),
}
FILES = sorted((ROOT / "lt_adv").rglob("*.py"))


def package_of(module: str) -> str:
    """Returns the package of a module: lt_adv.attacks.norms -> attacks; lt_adv itself -> __init__."""
    return (module.split(".") + ["__init__"])[1]


def imported(module: str, is_package: bool, source: str) -> Iterator[tuple[int, str]]:
    """Yields (line, absolute name) of all imports of a module, at any depth; `from a import b` counts as a.b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")[: len(module.split(".")) - node.level + is_package] if node.level else []
            base = ".".join([*parents, *filter(None, [node.module])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("import_module", "__import__"):
                yield node.lineno, str(node.args[0].value)


def target_package(name: str) -> str:
    """Returns the package of an imported lt_adv.* name; __init__ for a name of lt_adv itself (lt_adv.__version__)."""
    package = package_of(name)
    return package if package in INTERNAL or (ROOT / "lt_adv" / package).is_dir() else "__init__"


def violations(module: str, source: str, is_package: bool = False) -> list[str]:
    """Returns one line for each import that the package of the module may not have."""
    package, lines = package_of(module), []
    if package not in INTERNAL:
        return [f"{module}: {package} is not listed in INTERNAL"]
    external = LIGHT.get(module, EXTERNAL[package])
    for line, name in imported(module, is_package, source):
        top = name.split(".")[0]
        if top == "lt_adv":
            target = target_package(name)
            # Every import loads lt_adv/__init__.py, which imports nothing: only names imported from it count.
            if target != package and target not in INTERNAL[package]:
                lines.append(f"{module}:{line}: {package} may not import {name}")
        elif top in PROJECT or (top not in sys.stdlib_module_names and top not in external):
            lines.append(f"{module}:{line}: {package} may not import {top}")
    return lines


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_are_permitted(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    is_package = parts[-1] == "__init__"
    lines = violations(".".join(parts[:-1] if is_package else parts), path.read_text(), is_package)
    assert not lines, "\n".join(lines)


def test_every_package_is_listed():
    packages = {path.relative_to(ROOT / "lt_adv").parts[0].removesuffix(".py") for path in FILES}
    assert packages == set(INTERNAL) == set(EXTERNAL)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("lt_adv.attacks.gradient", "from lt_adv import losses"),  # sideways
        ("lt_adv.attacks.gradient", "import lt_adv.runtime.registry"),  # down, but attacks import no other package
        ("lt_adv.attacks.gradient", "from ..methods import base"),  # up, relative
        ("lt_adv.losses.consistency", "def f():\n    from lt_adv.attacks import pgd"),  # inside a function
        ("lt_adv.losses.consistency", "import flax.linen as nn"),
        ("lt_adv.losses.consistency", "from lt_adv import __version__"),
        ("lt_adv.attacks.norms", "if True:\n    import tensorflow_datasets as tfds"),
        ("lt_adv.models.heads", "from lt_adv.data.longtail import groups"),
        ("lt_adv.models.heads", "import tensorflow_datasets"),
        ("lt_adv.data.cache", "import flax"),
        ("lt_adv.data.sources", "import tensorflow"),
        ("lt_adv.data.sources", "import importlib\nimportlib.import_module('lt_adv.training.loop')"),
        ("lt_adv.methods.robal", "from lt_adv import attacks, models"),
        ("lt_adv.methods.robal", "from lt_adv.training import net"),
        ("lt_adv.evaluation.metrics", "from lt_adv.methods import base"),
        ("lt_adv.evaluation.metrics", "import lt_adv.training.loop"),
        ("lt_adv.training.loop", "from lt_adv import evaluation"),
        ("lt_adv.training.loop", "from lt_adv.cli import experiment"),
        ("lt_adv.cli.train", "from lt_adv import main"),
        ("lt_adv.cli.flags", "import jax"),  # listed in LIGHT
        ("lt_adv.training.loop", "from configs import common"),
        ("lt_adv.runtime.registry", "import numpy"),
        ("lt_adv.helpers.strings", "import os"),
    ],
)
def test_forbidden_imports_are_reported(module, source):
    assert len(violations(module, source)) == 1


def test_permitted_imports_are_not_reported():
    assert not violations("lt_adv.methods.robal", "import os\nfrom lt_adv import attacks, losses\nfrom . import base")
    assert not violations(
        "lt_adv.attacks", "from .norms import get\nimport lt_adv.attacks.initialization", is_package=True
    )
    assert list(imported("lt_adv.a.b", False, "from .. import c")) == [(1, "lt_adv.c")]
    assert list(imported("lt_adv.a", True, "from .b import c")) == [(1, "lt_adv.a.b.c")]


def test_files_have_no_open_notes_and_no_machine_paths():
    unwanted = ["TO" + "DO", "FIX" + "ME", "XX" + "X"]
    unwanted += [f"/{folder}/" for folder in ("root", "home", "work", "tmp", "Users")]
    files = [path for folder in PROJECT for path in (ROOT / folder).rglob("*.py")]
    for pattern in ("*.md", "*.cfg", "*.toml", ".ci/*", "experiments/**/*.md", "experiments/**/*.json"):
        files += ROOT.glob(pattern)
    lines = [
        f"{path.relative_to(ROOT)}:{number}: {word}"
        for path in files
        for number, line in enumerate(path.read_text().splitlines(), 1)
        for word in unwanted
        if word in line
    ]
    assert not lines, "\n".join(lines)

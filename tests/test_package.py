"""The wheel: contents, metadata, and use without the clone, as a base install and with the extra `train`."""

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from importlib.metadata import Distribution, PackageNotFoundError, distribution, packages_distributions
from pathlib import Path

import pytest

from lt_adv.cli import requirements

ROOT = Path(__file__).parents[1]
EXTRAS = {
    "train",
    "cuda12",
    "cuda13",
    "tpu",
    "torch",
    "tfds-tf",
    "tensorboard",
    "gcs",
    "export",
    "docs",
    "test",
    "benchmark",
}
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
# Hides the modules of the comma-separated list in sys.argv[1].
BLOCK = """
import sys
sys.modules.update(dict.fromkeys(sys.argv[1].split(",")))
"""
USE = """
import numpy as np, jax, jax.numpy as jnp
import lt_adv
from lt_adv import attacks, losses
assert lt_adv.__file__.startswith(sys.argv[2]), lt_adv.__file__
w = jnp.eye(4, 3)
x, y = jnp.full((2, 4), 0.5), jnp.array([0, 1])
x_adv = attacks.pgd(jax.random.key(0), lambda x: x @ w, x, y, eps=0.1, step_size=0.05, num_steps=5)
assert np.all(np.abs(x_adv - x) <= 0.1 + 1e-6)
assert np.allclose(x_adv[:, :3], 0.5 + 0.1 * (1 - 2 * np.eye(3)[:2]))  # down in its own logit, up in the others
result = attacks.autoattack(jax.random.key(0), lambda x: x @ w, x, y, eps=0.1, version=("apgd-ce",), resume="journal")
assert result.accuracy["clean"] == 0.5  # the logits of an image are equal: class 0 is predicted
assert losses.balanced_softmax(x @ w, y, class_counts=[5, 3, 1]).shape == (2,)
"""
MAIN = """
import runpy
sys.argv[:2] = []
runpy.run_module("lt_adv.main", run_name="__main__", alter_sys=True)
"""
IMPORT_ALL = """
import importlib, pkgutil
import lt_adv
assert lt_adv.__file__.startswith(sys.argv[2]), lt_adv.__file__
for module in pkgutil.walk_packages(lt_adv.__path__, "lt_adv."):
    importlib.import_module(module.name)
"""


def outside_of_base_install() -> list[str]:
    """Returns the installed modules that `pip install lt_adv` does not bring."""
    base, pending = set(), ["jax", "numpy"]
    while pending:
        name = normal(pending.pop())
        if name in base:
            continue
        try:
            requires = distribution(name).requires or []
        except PackageNotFoundError:  # of another platform
            continue
        base.add(name)
        pending += [re.match(r"[\w.-]+", r)[0] for r in requires if "extra ==" not in r]
    modules = packages_distributions().items()
    blocked = {module for module, owners in modules if not base & {normal(owner) for owner in owners}}
    return sorted(name for name in blocked - {"lt_adv"} - sys.stdlib_module_names if name.isidentifier())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from a copy of the clone, with the setuptools that is installed: nothing is fetched."""
    source, out = tmp_path_factory.mktemp("clone") / "lt_adv", tmp_path_factory.mktemp("wheel")
    unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info", "results", ".*", "build", "dist")
    source.mkdir()
    for name in ("lt_adv", "configs", "experiments", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=unwanted)
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "CITATION.cff"):
        shutil.copy(ROOT / name, source)
    subprocess.run([sys.executable, "-c", BUILD, str(out)], cwd=source, check=True, capture_output=True)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def unpacked(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def metadata(unpacked):
    (info,) = unpacked.glob("*.dist-info")
    return Distribution.at(info)


def run_program(source, unpacked, folder, *args, blocked=("",)):
    environment = {**os.environ, "PYTHONPATH": str(unpacked), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", BLOCK + source, ",".join(blocked), *args]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_wheel_contains_only_lt_adv(unpacked):
    assert {p.name for p in unpacked.iterdir() if not p.name.endswith(".dist-info")} == {"lt_adv"}
    packed = {p.relative_to(unpacked) for p in (unpacked / "lt_adv").rglob("*") if p.is_file()}
    sources = {p.relative_to(ROOT) for p in (ROOT / "lt_adv").rglob("*.py")}
    assert packed == sources | {Path("lt_adv/py.typed")}
    (licence,) = unpacked.glob("*.dist-info/licenses/LICENSE")
    assert "Apache License" in licence.read_text()


def test_base_install_runs_attacks_and_losses(unpacked, tmp_path):
    blocked = outside_of_base_install()
    assert set(requirements.TRAIN_MODULES) <= set(blocked)
    result = run_program(USE, unpacked, tmp_path, str(unpacked), blocked=blocked)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("blocked", [("flax",), ("rich", "optax"), requirements.TRAIN_MODULES])
def test_missing_training_packages_are_named_in_one_line(unpacked, tmp_path, blocked):
    result = run_program(MAIN, unpacked, tmp_path, "main", "--config=robal.py", blocked=blocked)
    assert result.returncode == 2 and not result.stdout
    (line,) = result.stderr.splitlines()
    assert line.startswith('Error: lt_adv.main needs the training packages: pip install "lt_adv[train]"')
    assert all(name in line.partition("Missing: ")[2] for name in blocked)


def test_train_install_imports_every_module_and_runs_main(unpacked, tmp_path):
    result = run_program(IMPORT_ALL, unpacked, tmp_path, str(unpacked))
    assert result.returncode == 0, result.stderr
    result = run_program(MAIN, unpacked, tmp_path, "main")
    assert result.returncode == 2 and result.stderr.startswith("Error: --config is missing"), result.stderr


def test_metadata_of_the_wheel_are_complete(metadata):
    about = metadata.metadata
    assert set(about.get_all("Provides-Extra")) == EXTRAS
    assert about["Requires-Python"] == "<3.14,>=3.11"
    assert "Apache-2.0" in (about["License-Expression"] or about["License"])
    assert about["Description-Content-Type"] == "text/markdown" and about.get_payload().startswith("# lt_adv")
    for extra in (None, "train"):
        assert all(">=" in r for r in requires(metadata, extra)), "a tested range has a lower end"


def test_version_is_the_same_everywhere():
    import lt_adv

    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert setup["metadata"]["version"] == "attr: lt_adv.__version__"
    assert f"version: {lt_adv.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def requires(metadata, extra=None):
    """Returns the requirements of the base install, or those that an extra adds."""
    marker = f'extra == "{extra}"' if extra else ""
    return [r for r in metadata.requires if (marker in r if extra else "extra ==" not in r)]


def packages(requirements):
    return {normal(re.match(r"[\w.-]+", r)[0]) for r in requirements}


def test_requirements_are_the_imported_packages(metadata):
    """No package is missing and none is superfluous; the exceptions have their reason here."""
    not_imported = {
        "importlib-resources": "tensorflow-datasets imports it and does not require it",
        "array-record": "tensorflow-datasets requires it only on Linux",
    }
    assert packages(requires(metadata)) == {"jax", "numpy"}  # see tests/attacks/test_lean_import.py
    assert packages(requires(metadata, "test")) >= {"lt-adv", "pytest"}
    train = packages(requires(metadata, "train"))
    by_module = packages_distributions()
    imported = set()
    for path in (ROOT / "lt_adv").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            imported |= {name.split(".")[0] for name in names}
    third_party = {name for name in imported if name not in sys.stdlib_module_names and name != "lt_adv"}
    for name in third_party - {"jax", "numpy", "tensorboardX", "torch", "safetensors"}:
        assert train & {normal(d) for d in by_module[name]}, f"{name} is imported and not in the extra train"
    used = {normal(d) for name in third_party for d in by_module.get(name, ())}
    assert train - used == set(not_imported)
    assert {normal(d) for name in requirements.TRAIN_MODULES for d in by_module.get(name, ())} & train == train


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()

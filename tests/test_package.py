"""The wheel: lt_adv alone, working without the clone, and asking for what the code imports."""

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from importlib.metadata import Distribution, packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXTRAS = {"test", "cuda13", "cuda12", "tpu", "torch", "tfds-tf", "tensorboard", "export"}
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
USE = """
import sys
import numpy as np, jax, jax.numpy as jnp
import lt_adv
from lt_adv import attacks
assert lt_adv.__file__.startswith(sys.argv[1]), lt_adv.__file__
w = jnp.eye(4, 3)
x, y = jnp.full((2, 4), 0.5), jnp.array([0, 1])
x_adv = attacks.pgd(jax.random.key(0), lambda x: x @ w, x, y, eps=0.1, step_size=0.05, num_steps=5)
assert np.all(np.abs(x_adv - x) <= 0.1 + 1e-6)
assert np.allclose(x_adv[:, :3], 0.5 + 0.1 * (1 - 2 * np.eye(3)[:2]))  # down in its own logit, up in the others
"""


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


def test_the_wheel_holds_lt_adv_alone(unpacked):
    assert {p.name for p in unpacked.iterdir() if not p.name.endswith(".dist-info")} == {"lt_adv"}
    packed = {p.relative_to(unpacked) for p in (unpacked / "lt_adv").rglob("*") if p.is_file()}
    assert packed == {p.relative_to(ROOT) for p in (ROOT / "lt_adv").rglob("*.py")}
    (licence,) = unpacked.glob("*.dist-info/licenses/LICENSE")
    assert "Apache License" in licence.read_text()


def test_attacks_work_from_the_wheel(unpacked, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(unpacked), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", USE, str(unpacked)]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_metadata(metadata):
    about = metadata.metadata
    assert set(about.get_all("Provides-Extra")) == EXTRAS
    assert about["Requires-Python"] == "<3.14,>=3.11"
    assert "Apache-2.0" in (about["License-Expression"] or about["License"])
    assert about["Description-Content-Type"] == "text/markdown" and about.get_payload().startswith("# lt_adv")
    requirements = [r for r in metadata.requires if "extra ==" not in r]
    assert all(">=" in r for r in requirements), "a range that was tested has a lower end"


def test_the_version_is_said_once():
    import lt_adv

    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert setup["metadata"]["version"] == "attr: lt_adv.__version__"
    assert f"version: {lt_adv.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_what_is_imported_is_asked_for(metadata):
    """In both directions; the exceptions stand here with their reason."""
    unimported = {
        "chex": "trip-wires of development",
        "importlib-resources": "tensorflow-datasets imports it without asking for it",
        "array-record": "tensorflow-datasets asks for it on Linux alone",
    }
    asked = {normal(re.match(r"[\w.-]+", r)[0]) for r in metadata.requires if "extra ==" not in r}
    by_module = packages_distributions()
    imported = set()
    for path in (ROOT / "lt_adv").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            imported |= {name.split(".")[0] for name in names}
    outside = {name for name in imported if name not in sys.stdlib_module_names and name != "lt_adv"}
    for name in outside - {"tensorboardX", "torch", "safetensors"}:
        assert asked & {normal(d) for d in by_module[name]}, f"{name} is imported and not in install_requires"
    used = {normal(d) for name in outside for d in by_module.get(name, ())}
    assert asked - used == set(unimported)


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()

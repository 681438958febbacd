"""The page "Adding a method": its files and commands work in a copy of the repository."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "lt_adv" / "methods" / "README.md"
TEXT = PAGE.read_text()


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The repository with the files of the page."""
    folder = tmp_path_factory.mktemp("copy")
    for name in ("lt_adv", "configs", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "golden"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    files = re.findall(r"^`([\w/.]+)`\n\n```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
    assert [Path(name).parts[0] for name, _ in files] == ["lt_adv", "configs", "tests"]
    for name, text in files:
        assert not (folder / name).exists()
        (folder / name).write_text(text)
    return folder


@pytest.mark.slow
def test_every_command_of_the_page_runs(copy):
    (block,) = re.findall(r"^```bash\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
    outputs = []
    for line in block.splitlines():
        command = [sys.executable, *shlex.split(line)[1:]]
        result = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=600)
        assert result.returncode == 0, result.stdout + result.stderr
        outputs.append(result.stdout)
    report = json.loads((copy / "workdirs/hard_classes-dataset=digits-epochs=2/report.json").read_text())
    assert report["header"]["method"] == "hard_classes (gamma 1)" and report["metrics"]["eval/clean/accuracy"] > 0.2
    # The test of the page, and the contract tests: pmap, shard_map, finite, fields, two values of gamma out of range.
    assert re.search(r"^7 passed", outputs[-1], re.MULTILINE), outputs[-1]


def test_links_exist_and_every_function_of_a_method_is_listed():
    links = re.findall(r"\]\(([^)#]+)\)", TEXT)
    assert links and all((PAGE.parent / link).exists() for link in links)
    from lt_adv.methods import base

    public = {name for name, value in vars(base.Method).items() if callable(value) and not name.startswith("_")}
    rows = re.findall(r"^\| (`.*?) \|", TEXT, re.MULTILINE)
    assert public - {"maximize"} == set(re.findall(r"`(\w+)`", "".join(rows)))

"""JAX's settings in a fresh process, the commit and the hash of the code."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lt_adv.runtime import environment

ASK = """
import json, sys
import jax
from lt_adv.runtime import environment
environment.prepare(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None)
jax.jit(lambda x: x + 1)(1.0)
print(json.dumps([jax.device_count(), jax.config.jax_compilation_cache_dir]))
"""


def ask(tmp_path, *arguments, **variables):
    """Returns (number of devices, cache directory) of a process without the XLA and JAX variables of these tests."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("XLA", "JAX"))}
    variables = {**inherited, "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path), **variables}
    command = [sys.executable, "-c", ASK, *map(str, arguments)]
    result = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    assert not result.stderr, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize(
    "batch_size, cores, devices",
    [(64, 1, 1), (64, 2, 2), (64, 3, 2), (64, 8, 4), (128, 8, 8), (30, 8, 1), (48, 4, 3), (7, 8, 1), (4096, 256, 256)],
)
def test_number_of_devices_divides_the_batch_size(batch_size, cores, devices):
    assert environment.devices_for_batch(batch_size, cores) == devices


def test_default_is_one_device_per_core_and_a_compilation_cache(tmp_path):
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    devices, directory = ask(tmp_path, 16 * cores)
    assert devices == cores
    assert Path(directory).parent == tmp_path / "lt_adv"
    assert any(Path(directory).iterdir())


def test_cpu_devices_can_be_set(tmp_path):
    assert ask(tmp_path, 64, 3)[0] == 3


@pytest.mark.parametrize(
    "variables", [{"JAX_NUM_CPU_DEVICES": "5"}, {"XLA_FLAGS": "--xla_force_host_platform_device_count=5"}]
)
def test_environment_variables_take_precedence(tmp_path, variables):
    assert ask(tmp_path, 64, 3, **variables)[0] == 5


def test_cache_directory_can_be_set(tmp_path):
    directory = tmp_path / "cache"
    assert ask(tmp_path, 64, 1, JAX_COMPILATION_CACHE_DIR=str(directory))[1] == str(directory)
    assert not (tmp_path / "lt_adv").exists()


def test_unwritable_cache_directory_is_tolerated(tmp_path):
    """A file stands in place of the directory, so that root cannot write there either."""
    (tmp_path / "lt_adv").write_text("")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("XLA", "JAX"))}
    variables = {**inherited, "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", ASK, "64", "1"], env=variables, capture_output=True, text=True, check=True
    )
    assert json.loads(result.stdout)[0] == 1


def test_initialized_process_keeps_its_devices():
    import jax

    before, directory = jax.device_count(), jax.config.jax_compilation_cache_dir
    try:
        environment.prepare(64, 3)
        assert jax.device_count() == before
    finally:
        jax.config.update("jax_compilation_cache_dir", directory)


def test_import_does_not_load_jax():
    command = "import sys; from lt_adv.runtime import environment; print(environment.cores(), 'jax' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert result.stdout.split() == [str(environment.cores()), "False"]


def test_commit_is_that_of_a_clone_or_of_the_environment_variable(tmp_path, monkeypatch):
    monkeypatch.delenv("LT_ADV_COMMIT", raising=False)
    inside = tmp_path / "copy" / "lt_adv" / "runtime" / "environment.py"
    inside.parent.mkdir(parents=True)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "file").write_text("one")
    subprocess.run([*git, "add", "file"], check=True)
    subprocess.run([*git, "commit", "-qm", "one"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "lt_adv" / "runtime" / "environment.py"))
    assert head.startswith(environment.commit())
    (tmp_path / "file").write_text("two")
    assert environment.commit().endswith("-dirty")
    monkeypatch.setattr(environment, "__file__", str(inside))
    assert environment.commit() is None  # the copy lies in another repository
    monkeypatch.setenv("LT_ADV_COMMIT", "0123456")
    assert environment.commit() == "0123456"
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "lt_adv" / "runtime" / "environment.py"))
    monkeypatch.setenv("PATH", "")
    assert environment.commit() == "0123456"


def test_code_digest_covers_the_package(tmp_path, monkeypatch):
    package = tmp_path / "lt_adv"
    for path in ("main.py", "runtime/environment.py", "attacks/norms.py"):
        (package / path).parent.mkdir(parents=True, exist_ok=True)
        (package / path).write_text("")
    monkeypatch.setattr(environment, "__file__", str(package / "runtime" / "environment.py"))
    digests = [environment.code_digest()]
    for path in ("main.py", "attacks/norms.py"):
        (package / path).write_text("x = 1")
        digests.append(environment.code_digest())
    assert len(set(digests)) == 3

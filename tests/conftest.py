"""Sets eight virtual CPU devices for every test before jax starts, and defines shared fixtures.

The tests spend most of their time compiling, so LLVM's optimisation is off and fusions are compiled by XLA's older
emitters: each halves that time. End-to-end runs (tests/test_end_to_end.py) are processes without these flags.
"""

import atexit
import gc
import os
import shutil
import tempfile
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
QUICK = " ".join((  # also for processes that the tests start
    "--xla_backend_optimization_level=0",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_max_isa=AVX",  # no fused multiply-add, so that bits do not depend on which operations are fused
))  # fmt: skip
FLAGS = f"--xla_force_host_platform_device_count=8 {QUICK}"
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # one for all workers, and for what the tests start
    os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE = tempfile.mkdtemp(prefix="lt_adv-tests-")
    atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["XLA_FLAGS"] = f"{FLAGS} {os.environ.get('XLA_FLAGS', '')}"

import jax
import numpy as np
import pytest

from lt_adv.attacks import _autoattack

MEMORY_MAPS = Path("/proc/self/maps")  # of this process, on Linux
MOST_MEMORY_MAPS = 20_000


@pytest.fixture(scope="module", autouse=True)
def few_memory_maps():
    """Frees compiled programs before the process has 65,530 memory maps, the limit of Linux: XLA crashes there."""
    yield
    if MEMORY_MAPS.exists() and MEMORY_MAPS.read_bytes().count(b"\n") > MOST_MEMORY_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def float64():
    """Double precision; for all tests of a file: `pytestmark = pytest.mark.usefixtures("float64")`."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def short(monkeypatch):
    """AutoAttack with a twentieth of the steps."""
    build_attacks = _autoattack._build_attacks

    def build_short_attacks(*args):
        attacks, notes = build_attacks(*args)
        return {name: attack._replace(num_steps=attack.num_steps // 20) for name, attack in attacks.items()}, notes

    monkeypatch.setattr(_autoattack, "_build_attacks", build_short_attacks)


@pytest.fixture(scope="session")
def golden():
    """`golden("losses_and_heads")`: the arrays of tests/golden/losses_and_heads.npz."""
    folder = os.path.join(os.path.dirname(__file__), "golden")
    return lambda name: np.load(os.path.join(folder, f"{name}.npz"), allow_pickle=False)


@pytest.fixture(scope="session")
def assert_golden():
    """Asserts equality to 1e-9, relative to the largest magnitude of the expected array."""

    def check(actual, expected, tolerance=1e-9):
        actual, expected = np.asarray(actual), np.asarray(expected)
        assert actual.shape == expected.shape, (actual.shape, expected.shape)
        assert actual.dtype == np.float64, f"compared in {actual.dtype}, goldens are float64"
        scale = max(float(np.max(np.abs(expected))), np.finfo(np.float64).tiny)
        error = float(np.max(np.abs(actual - expected))) / scale
        assert error <= tolerance, f"relative error {error:.3e}"

    return check


def pytest_addoption(parser):
    group = parser.getgroup("faults", "fault campaign (tests/robustness/test_faults.py)")
    group.addoption("--faults", type=int, metavar="N", help="inject N faults at each point and write the results")
    group.addoption("--faults-seed", type=int, default=0, metavar="SEED", help="seed of the faults [0]")


def pytest_collection_modifyitems(config, items):
    """Deselects the long comparisons that CI leaves out, unless -m names their marker."""
    if "extended" not in config.option.markexpr:
        extended = {item for item in items if item.get_closest_marker("extended")}
        config.hook.pytest_deselected(items=list(extended))
        items[:] = [item for item in items if item not in extended]


def pytest_terminal_summary(terminalreporter):
    """Prints how long the slow tests and the others took."""
    seconds = {"not slow": 0.0, "slow": 0.0}
    for reports in terminalreporter.stats.values():
        for report in reports:
            if hasattr(report, "duration"):
                seconds["slow" if "slow" in report.keywords else "not slow"] += report.duration
    parts = ", ".join(f"{part} {total:.0f}" for part, total in seconds.items())
    terminalreporter.write_line(f"Seconds of tests, summed over workers: {parts}")

"""Benchmark records become tables of the documentation."""

import json

import pytest

from experiments import tables
from experiments.benchmark import tables as benchmark_tables

STEP = {
    "kind": "step",
    "machine": {"cpu": "Some CPU", "cores": 2},
    "peak": {"device": "cpu", "platform": "cpu", "devices": 1},
    "config": {
        "network": "WRN-16-2",
        "method": "robal",
        "num_steps": 5,
        "dtype": "float32",
        "attack_dtype": "float32",
        "batch_size": 64,
    },
    "summary": {
        "jax": {
            "ms": 812.3,
            "images_per_second": 78.8,
            "share_of_peak": 0.337,
            "memory": 2**30,
            "compile_cold_seconds": 41.26,
            "compile_warm_seconds": 2.5,
        },
        "released": {"ms": 1000.4, "memory": 2**29, "compile_cold_seconds": 0.1, "compile_warm_seconds": None},
        "tuned": {"error": "out of memory"},
    },
    "runs": [{"round": number, "series": "jax"} for number in (0, 0, 1)],
    "ratio": {"released": {"median": 1.2316, "min": 1.2, "max": 1.25}, "tuned": None},
}


def step_rows(folder):
    head, _, *rows = tables.benchmark("step", folder).splitlines()
    return [dict(zip(cells(head), cells(line), strict=True)) for line in rows]


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.fixture
def results(tmp_path):
    (tmp_path / "benchmark").mkdir()
    return tmp_path


def test_step_record_is_a_row(results):
    (results / "benchmark" / "a.json").write_text(json.dumps(STEP))
    gpu = {**STEP, "peak": {"device": "Some GPU", "platform": "gpu", "devices": 2}}
    gpu["config"] = {**STEP["config"], "attack_dtype": "bfloat16"}
    (results / "benchmark" / "b.json").write_text(json.dumps(gpu))
    cpu, gpu = step_rows(results)
    assert cpu["Device"] == "2 cores of Some CPU" and gpu["Device"] == "2 x Some GPU"
    assert cpu["Network"] == "WRN-16-2" and cpu["Method, attack steps"] == "robal, 5" and cpu["Batch"] == "64"
    assert cpu["Precision"] == "float32" and gpu["Precision"] == "float32, attack bfloat16"
    assert cpu["JAX, ms"] == "812" and cpu["PyTorch as released, ms"] == "1,000" and cpu["PyTorch tuned, ms"] == "–"
    assert cpu["Speed-up over released"] == "1.23x (1.20 to 1.25)" and cpu["Speed-up over tuned"] == "–"
    assert cpu["Rounds"] == "2"
    assert cpu["JAX, images/s"] == "78.8" and cpu["Share of peak"] == "34 %"
    assert cpu["Peak memory, GiB"] == "1.00 / 0.50 / –"
    assert cpu["Compile, s"] == "41.3 / 0.10 / –" and cpu["Compile with cache, s"] == "2.50 / – / –"


def test_one_round_has_no_range():
    assert benchmark_tables.times({"median": 1.5, "min": 1.5, "max": 1.5}) == "1.50x"


@pytest.mark.parametrize("kind", benchmark_tables.TABLES)
def test_missing_measurement_names_its_command(kind, results):
    text = tables.benchmark(kind, results)
    assert text.startswith(f"`{kind}`: not measured yet; `python -m experiments.benchmark {kind} --")


def test_every_measurement_has_a_table():
    assert {f"benchmark_{kind}" for kind in benchmark_tables.TABLES} < tables.TABLES.keys()
    assert benchmark_tables.TABLES.keys() == benchmark_tables.COMMANDS.keys()


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "–"), (0.0375, "0.04"), (0.9, "0.90"), (1.237, "1.24"), (12.34, "12.3"), (123.4, "123"), (12345, "12,345")],
)
def test_numbers_have_three_digits(value, shown):
    assert benchmark_tables.number(value) == shown

"""The table of docs/accelerators.md: its programs are valid configs, and its rows are made from compile.json."""

import json
import shlex

import pytest

from experiments import accelerators, tables
from lt_adv.cli import compile_run, flags
from lt_adv.cli.experiment import Experiment
from lt_adv.compilation import topologies
from lt_adv.data.abstract import abstract_dataset


@pytest.mark.parametrize(("name", "number"), [("v5e:16x16", 256), ("v5p:2x2x1", 4), ("h200:8", 8), ("h100", 1)])
def test_number_of_devices(name, number):
    assert accelerators.number_of_devices(name) == number


@pytest.mark.parametrize("name", accelerators.NETWORKS)
def test_networks_are_valid_configs(name):
    network = accelerators.NETWORKS[name]
    config = flags.parse(["main", f"--config={network.config}", *network.overrides]).config
    experiment = Experiment.from_config(config, dataset=abstract_dataset(config.data))
    assert sum(experiment.split.class_counts) >= 256 * min(network.batch_per_device, 32)
    for topology in accelerators.TOPOLOGIES:
        topologies.parse_name(topology)


def test_table(tmp_path):
    assert "not measured yet" in tables.compiled(tmp_path)
    step = {"estimated_ms": 20.0, "images_per_second": 51200.0, "share_of_peak": 0.5}
    step |= {"memory": {"arguments": 2**30, "temporaries": 2**30, "capacity": 2**34}}
    step["collectives"] = {"all-reduce": {"count": 3, "bytes": 2_000_000}, "all-gather": {"count": 1, "bytes": 10**6}}
    report = {"title": "ResNet-18, AT-BSL", "topology": "v5e:2x4", "devices": 8, "batch_size_per_device": 128}
    report |= {
        "versions": {"jax": "0.10.2"},
        "programs": {"train_step": step},
        "seconds_per_epoch": [1.5],
        "hours": 0.25,
    }
    (tmp_path / "compile").mkdir()
    (tmp_path / "compile" / "x.json").write_text(json.dumps(report))
    row = "| ResNet-18, AT-BSL | `v5e:2x4` | 128 | 20 | 6,400 | 50 % | 2.0 of 16 | 4, 3 MB | 1.5 | 0.25 |"
    assert row in tables.compiled(tmp_path).splitlines()


def test_committed_results_are_those_of_the_table():
    for path in accelerators.RESULTS.glob("*.json"):
        report = json.loads(path.read_text())
        command = shlex.split(report["command"])
        assert f"--topology={report['topology']}" in command and report["programs"].keys() == {"train_step"}
        assert compile_run.report_lines(report)


def test_unknown_network_is_refused(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["accelerators", "--networks=resnet"])
    with pytest.raises(SystemExit, match="2"):
        accelerators.main()
    assert "unknown network 'resnet'; there are: resnet18" in capsys.readouterr().err

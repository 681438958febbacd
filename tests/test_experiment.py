"""`Experiment`: what a config determines is computed once, and without data where it needs none."""

import collections

import jax
import pytest
from etils import epath

from configs import at, self_distillation
from lt_adv import data
from lt_adv.cli import schema, train
from lt_adv.cli.experiment import Experiment
from lt_adv.data import longtail
from lt_adv.training import loop, sharding, stage_builder
from lt_adv.training.hooks import Hook


class StopBeforeSteps(Hook):
    def on_stage_start(self, stage, state):
        raise loop.Preempted("the first stage is built")


@pytest.fixture
def calls(monkeypatch):
    """Returns a counter of calls, by the name of the function."""
    counter = collections.Counter()
    for owner, name in (
        (schema, "validate_entries"),
        (schema, "validate"),
        (schema, "validate_for_split"),
        (stage_builder, "create_method"),
        (stage_builder, "create_stages"),
        (stage_builder, "resolve"),
        (data, "load"),
        (data, "long_tailed"),
    ):
        original = getattr(owner, name)

        def counted(*args, _name=name, _original=original, **options):
            counter[_name] += 1
            return _original(*args, **options)

        monkeypatch.setattr(owner, name, counted)
    return counter


def test_a_run_resolves_its_config_once(calls, tmp_path):
    """Two stages, of which one has its own config and its own split."""
    config = self_distillation.get_config("dataset=digits,epochs=1")
    config.cpu_devices = 1
    with pytest.raises(loop.Preempted):
        train.train(config, epath.Path(tmp_path / "run"), [StopBeforeSteps()])
    once = dict.fromkeys(("validate", "create_method", "create_stages", "load"), 1)
    two_stages = dict.fromkeys(("validate_for_split", "resolve"), 2)
    overrides = {"validate_entries": 2}  # those of the teacher's stage are validated too
    assert calls == once | two_stages | overrides | {"long_tailed": 2}


def test_stages_with_the_same_data_share_their_split():
    config = self_distillation.get_config("dataset=digits,epochs=1")
    config.method.balance = 1.0
    experiment = Experiment.from_config(config, mesh=sharding.make_mesh(jax.devices()[:1]))
    teacher, student = experiment.resolved_stages
    assert student.split is experiment.split and teacher.split is not experiment.split
    assert (teacher.name, student.name, student.num_stages) == ("0_teacher", "1_student", 2)
    assert student.config.to_dict() == config.to_dict() and teacher.config.data.to_dict() != config.data.to_dict()


def test_a_config_is_validated_without_data_and_devices(monkeypatch):
    monkeypatch.setattr(data, "load", lambda _: pytest.fail("data are read"))
    monkeypatch.setattr(jax, "devices", lambda: pytest.fail("devices are used"))
    experiment = Experiment.from_config(at.get_config("dataset=cifar10"))
    assert experiment.method.num_steps == 5 and len(experiment.stages) == 1
    with pytest.raises(ValueError, match=r"config\.optim\.epochs must be"):
        config = at.get_config("dataset=cifar10")
        config.optim.epochs = 0
        Experiment.from_config(config)


@pytest.mark.parametrize(("cpu_devices", "size"), [(None, 8), (1, 1), (3, 3), (20, 8)])
def test_mesh_has_the_configured_number_of_cpu_devices(cpu_devices, size):
    config = at.get_config("dataset=digits")
    config.cpu_devices = cpu_devices
    assert Experiment.from_config(config).mesh.size == size


def test_known_values_take_the_place_of_computed_ones():
    config = at.get_config("dataset=digits")
    dataset, mesh = data.load(config.data), sharding.make_mesh(jax.devices()[:2])
    experiment = Experiment.from_config(config, dataset=dataset, mesh=mesh)
    assert experiment.dataset is dataset and experiment.mesh is mesh
    assert experiment.split.class_counts == longtail.long_tailed(dataset, config.data).class_counts

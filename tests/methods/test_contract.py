"""Contract of every method: documented, and each stage gives equal results on one and on eight devices."""

import dataclasses
import inspect

import jax
import numpy as np
import pytest

from configs import common
from lt_adv import methods
from lt_adv.runtime import registry
from tests.training.helpers import assert_same, frozen_teacher, run

pytestmark = pytest.mark.usefixtures("float64")


def invalid_values():
    """(method, hyper-parameter, a value that `base.hyper_parameter` does not allow)."""
    for name in methods.names():
        for field in dataclasses.fields(methods.method_class(name)):
            rule, values = field.metadata, []
            if rule.get("choices"):
                values = ["nonsense"]
            elif rule.get("interval"):
                kind = type(rule["paper"])
                low, high = (float(end) for end in rule["interval"][1:-1].split(","))
                values = [
                    kind(low - 1),
                    *([high + 1] if np.isfinite(high) else []),
                    *([np.nan] if kind is float else []),
                ]
            yield from (pytest.param(name, field.name, v, id=f"{name}-{field.name}-{v}") for v in values)


def stages():
    config = common.get("digits", epochs=200, drop_epochs=(150,), of=200)  # more epochs than any first stage takes
    config.init_from = "a finished run"  # checked only when a run is built
    for name in methods.names():
        for stage in methods.create({"name": name}, num_steps=2).stages(config):
            marks = () if name in ("robal", "reat") else pytest.mark.slow  # one that gathers, one that does not
            yield pytest.param(stage, id=name if stage.name == "train" else f"{name}-{stage.name}", marks=marks)


@pytest.fixture(scope="module", params=stages())
def one_device(request):
    """((method, options) of a stage, its final state and metrics on a single device)."""
    stage = request.param
    with jax.enable_x64(True):
        teacher = frozen_teacher() if stage.teacher else None
        options = {"freeze_batch_stats": stage.freeze_batch_stats, "teacher": teacher}
        return (stage.method, options), run(stage.method, 1, **options)


@pytest.mark.parametrize("parallel", ["pmap", pytest.param("shard_map", marks=pytest.mark.slow)])
def test_eight_devices_equal_one(one_device, parallel):
    (method, options), expected = one_device
    assert_same(run(method, 8, parallel, **options), expected, 1e-9)


def test_loss_and_gradient_are_finite(one_device):
    _, (state, rows) = one_device
    assert all(np.isfinite(row["loss"]) and np.isfinite(row["gradient_norm"]) for row in rows)
    assert all(row["gradient_norm"] > 0 for row in rows) and {"loss", "accuracy", "accuracy_tail"} - set(rows[0]) <= {
        "accuracy_tail"
    }


def test_hyper_parameters_are_fields(one_device):
    (method, _), _ = one_device
    assert dataclasses.is_dataclass(method) and type(method).__doc__ and inspect.getmodule(type(method)).__doc__
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.num_steps = 3
    assert hash(method) == hash(dataclasses.replace(method))
    for fidelity in ("paper", "released_code"):
        dataclasses.replace(method, fidelity=fidelity)
    with pytest.raises(ValueError, match="fidelity"):
        dataclasses.replace(method, fidelity="exact")


@pytest.mark.parametrize(("name", "option", "value"), list(invalid_values()))
def test_values_out_of_range_are_refused(name, option, value):
    with pytest.raises(ValueError, match=rf"config\.method\.{option} .*{value}") as caught:
        methods.create({"name": name, option: value})
    assert "\n" not in str(caught.value)


def test_unknown_names():
    with pytest.raises(ValueError, match="Did you mean 'robal'"):
        methods.create({"name": "robral"})
    with pytest.raises(ValueError, match="Did you mean .margin."):
        methods.create({"name": "robal", "marginn": 1.0})
    assert "base" not in registry.names("lt_adv.methods")

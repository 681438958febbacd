"""Every file of configs/ is plain data, builds for every data set, and has the papers' values."""

import importlib
import inspect
import json
import re
from pathlib import Path

import ml_collections
import pytest

from configs import common
from lt_adv.cli import flags, schema
from lt_adv.cli.experiment import Experiment
from lt_adv.models.classifier import BACKBONES
from lt_adv.training import optimizer, stage_builder

FILES = (Path(__file__).parents[1] / "configs").glob("*.py")
NAMES = sorted(path.stem for path in FILES if path.stem not in ("__init__", "common"))
DATASETS = [*common.DATASETS, "svhn_cropped"]  # svhn_cropped stands for any name of TensorFlow-Datasets
FIELDS = ("Paper", "Command", "Arguments", "Expected")


def module(name):
    return importlib.import_module(f"configs.{name}")


def get(name, **arguments):
    return module(name).get_config(",".join(f"{k}={v}" for k, v in arguments.items()))


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("name", NAMES)
def test_config_is_valid_in_both_fidelities(name, dataset):
    """The config is valid in both fidelities, and its stages have optim.epochs epochs in all."""
    config = get(name, dataset=dataset).lock()
    assert config.data.name == dataset and config.data.imbalance_ratio >= 1
    for fidelity in ("paper", "released_code"):
        config.fidelity = fidelity
        Experiment.from_config(config)
        stages = Experiment.from_config(config).stages  # a teacher has other epochs
        assert sum(stage.epochs for stage in stages if stage.name != "teacher") == config.optim.epochs
        optimizer.schedule(config.optim, 10, config.optim.epochs, fidelity == "released_code")


@pytest.mark.parametrize("name", NAMES)
def test_config_is_plain_data(name):
    """The config survives JSON, with tuples as lists: it has no functions or objects."""
    config = get(name, dataset="cifar10")
    assert isinstance(config, ml_collections.ConfigDict)
    values = config.to_dict()
    assert json.loads(json.dumps(values)) == as_lists(values)
    assert get(name, dataset="cifar10").to_dict() == values, "two calls with the same arguments differ"
    with pytest.raises(AttributeError, match="Did you mean"):
        config.lock().optim.epoch = 3


def as_lists(value):
    if isinstance(value, dict):
        return {k: as_lists(v) for k, v in value.items()}
    return [as_lists(v) for v in value] if isinstance(value, tuple) else value


@pytest.mark.parametrize("name", NAMES)
def test_docstring_has_the_fields(name, monkeypatch):
    doc = inspect.getdoc(module(name))
    fields = re.findall(r"^(\w+) {2,}\S", doc, re.MULTILINE)
    assert [field for field in fields if field in FIELDS] == list(FIELDS)
    command = re.search(r"^Command +python -m lt_adv\.main --config=configs/(\w+)\.py:(\S+)$", doc, re.MULTILINE)
    assert command[1] == name
    module(name).get_config(command[2])
    parse = common.parse
    monkeypatch.setattr(common, "parse", lambda arg, **defaults: accepted.update(defaults) or parse(arg, **defaults))
    accepted: dict = {}
    module(name).get_config("")
    listed = re.search(r"^Arguments (.*?)^Expected", doc, re.MULTILINE | re.DOTALL)[1]
    assert accepted and accepted.keys() <= set(re.findall(r"\w+", listed))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("argument", ["epochs=ten", "cifar10", "no_such_key=1", "variant=Q"])
def test_invalid_arguments_are_named_in_one_line(name, argument):
    with pytest.raises(ValueError) as caught:
        module(name).get_config(argument)
    assert argument.partition("=")[0] in str(caught.value) and "\n" not in str(caught.value)


# Wu et al., CVPR 2021: margin, scale, tau_b, tau_m, gamma, beta; scale and tau_p at inference.
ROBAL = {
    ("cifar10", 50, "N"): (0.1, 10, 1.2, 0, 1 / 32, 6, ("boundary", 10, 0.1)),
    ("cifar10", 50, "R"): (0.1, 10, 1.5, 0.3, 1 / 32, 6, ("none",)),
    ("cifar100", 10, "N"): (0.2, 10, 0, 0, 1 / 32, 3, ("boundary", 10, 1.5)),
    ("cifar100", 10, "R"): (0.3, 10, 0, 0, 1 / 16, 6, ("boundary", 10, 1.7)),
}


@pytest.mark.parametrize("row", ROBAL, ids=lambda row: "-".join(map(str, row)))
def test_robal_has_the_values_of_the_paper(row):
    dataset, ratio, variant = row
    config = get("robal", dataset=dataset, variant=variant)
    method, head = config.method, config.model.head
    values = (method.margin, method.scale, method.tau_b, method.tau_m, head.gamma, method.beta)
    adjustment = config.eval.adjustment
    assert (*values, tuple(adjustment[k] for k in ("name", "scale", "tau_p") if k in adjustment)) == ROBAL[row]
    assert (method.name, head.name, head.scale) == ("robal", "cosine_plus", 1)
    assert (config.data.imbalance, config.data.imbalance_ratio) == ("exponential", ratio)


# The study's other rows are compared with "at" in tests/methods/test_robal_study.py.
@pytest.mark.parametrize("name", ["robal", "at", "trades"])
@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_robals_study_has_the_protocol_of_the_paper(name, dataset):
    config = get(name, dataset=dataset)
    assert (config.model.name, config.model.depth, config.model.width) == ("wide_resnet", 34, 10)
    assert (config.attack.eps, config.attack.step_size, config.attack.num_steps) == (0.031, 0.0078, 5)
    assert Experiment.from_config(config).stages[0].method.start == ("gaussian" if name == "trades" else "uniform")
    assert (config.optim.epochs, config.optim.batch_size, config.optim.weight_decay) == (80, 64, 2e-4)
    assert sgd(config) == (0.1, 0.9, False, (60, 75))
    attacks = config.eval.attacks
    assert all(attacks[a].eps == 0.031 for a in attacks) and attacks.fgsm.start == "zero"
    assert steps(attacks) == {"pgd100": (100, 0.0078)} | dict.fromkeys(("pgd20", "mim20", "cw20", "lsa"), (20, 0.0078))


@pytest.mark.parametrize(
    ("dataset", "model"), [("cifar10", "resnet18"), ("cifar100", "resnet18"), ("tiny_imagenet", "preact_resnet18")]
)
def test_at_bsl_has_the_protocol_of_the_paper(dataset, model):
    config = get("at_bsl", dataset=dataset)
    assert (config.model.name, config.model.head.name, config.eval.adjustment.name) == (model, "linear", "none")
    assert (config.attack.eps, config.attack.step_size, config.attack.num_steps) == (8 / 255, 2 / 255, 10)
    assert Experiment.from_config(config).stages[0].method.start == "gaussian"
    config.attack.start = "zero"  # overrides the method's start
    assert Experiment.from_config(config).stages[0].method.start == "zero"
    assert (config.optim.epochs, config.optim.batch_size, config.optim.weight_decay) == (100, 128, 5e-4)
    assert sgd(config) == (0.1, 0.9, False, (75, 90, 100))
    attacks = config.eval.attacks
    assert all(attacks[a].eps == 8 / 255 for a in attacks) and attacks.fgsm.start == "gaussian"
    assert set(steps(attacks).values()) == {(20, 2 / 255), (100, 2 / 255)}


@pytest.mark.parametrize("augment", ["", "crop_flip", "randaugment", "autoaugment"])
def test_at_bsl_has_the_requested_augmentation(augment):
    images, digits = (get("at_bsl", dataset=dataset, augment=augment).data for dataset in ("cifar10", "digits"))
    assert (images.augment, images.pad) == (augment or "crop_flip", 4)
    assert (digits.augment, digits.pad) == (augment or "none", 1)


def sgd(config):
    o = config.optim
    assert (o.schedule, o.first_epoch, o.drop_factor, o.warmup_epochs) == ("step", 1, 0.1, 0)
    return o.learning_rate, o.momentum, o.nesterov, o.drop_epochs


def steps(attacks):
    return {name: (spec.num_steps, spec.step_size) for name, spec in attacks.items() if "num_steps" in spec}


@pytest.mark.parametrize("name", NAMES)
def test_results_use_the_last_epoch_and_the_complete_test_set(name):
    config = get(name, dataset="cifar10")
    assert config.data.validation_per_class == (100 if name == "cgrm" else 0)  # its weights depend on the split
    assert config.eval.checkpoint == "last"
    assert config.eval.subset_per_class == 0 and not config.eval.only and config.fidelity == "paper"


def test_lt_adv_recipe_has_no_crops_in_short_runs_only():
    augments = {epochs: get("lt_adv", dataset="cifar10", epochs=epochs).data.augment for epochs in (10, 29, 30, 100)}
    assert augments == {10: "flip", 29: "flip", 30: "crop_flip", 100: "crop_flip"}
    assert get("lt_adv", dataset="digits").data.augment == "none"


def rates(config, epochs, fidelity="paper", steps_per_epoch=7):
    """Returns {epoch, from 1: learning rate}; asserts that the rate is constant within an epoch."""
    config.fidelity = fidelity
    (stage,) = Experiment.from_config(config).stages
    schedule = stage_builder.learning_rate(schema.stage_config(config, stage), stage, steps_per_epoch)
    rates = {}
    for epoch in epochs:
        first, last = (float(schedule(step)) for step in ((epoch - 1) * steps_per_epoch, epoch * steps_per_epoch - 1))
        assert first == last
        rates[epoch] = pytest.approx(first, rel=1e-5, abs=0)
    return rates


@pytest.mark.parametrize(("name", "drops"), [("robal", (60, 75, 80)), ("at", (60, 75, 80)), ("at_bsl", (75, 90, 99))])
def test_learning_rates_equal_the_published_schedule(name, drops):
    """Epochs count from 1, so a drop at 60 leaves 59 epochs at the old rate."""
    first, second, last = drops
    config = get(name, dataset="cifar10")
    expected = {1: 0.1, first - 1: 0.1, first: 0.01, second - 1: 0.01, second: 0.001, last: 0.001}
    assert rates(config, expected) == expected


@pytest.mark.parametrize(("epochs", "rate_before"), [(100, 1e-3), (30, 1e-3), (10, 1e-3), (5, 1e-2)])
def test_last_epoch_of_at_bsl_has_the_last_rate(epochs, rate_before):
    """Runs of any length drop the rate before their last epoch, like the authors' scripts with 100 epochs."""
    for dataset in ("cifar10", "cifar100", "tiny_imagenet"):
        config = get("at_bsl", dataset=dataset, epochs=epochs)
        assert config.optim.drop_epochs[-1] == epochs
        expected = {epochs - 1: rate_before, epochs: 1e-4}
        for fidelity in ("paper", "released_code"):
            assert rates(config, expected, fidelity) == expected
    assert get("at_bsl", dataset="digits").optim.drop_epochs == (23, 27, 30)


# Config -> epochs at which the rate drops, counted from its `first_epoch`.
DROPS = {
    **dict.fromkeys(NAMES, (60, 75)),
    **dict.fromkeys(("finetune_resampling", "finetune_reweighting", "lws"), ()),
    "resampling": (15, 20),
    "faal": (2,),
    "at_bsl": (75, 90, 100),
    **dict.fromkeys(("self_distillation", "lt_adv", "taet"), (75, 90)),  # TAET counts from 0, so it never reaches 100
    "cgrm": (100, 105),
}


@pytest.mark.parametrize("name", NAMES)
def test_learning_rate_drops_at_the_published_epochs(name):
    optim = get(name, dataset="cifar10").optim
    assert optim.drop_epochs == DROPS[name] and optim.first_epoch == (0 if name in ("reat", "taet") else 1)
    assert (
        optim.epochs == {2: 2, 15: 25, 60: 80, 75: 100, 100: 110}[DROPS[name][0]] if DROPS[name] else optim.epochs == 1
    )


def test_drops_and_warmup_compound_in_the_released_code():
    """The rate is multiplied again in every epoch: by 0.1 from 60 on, by 0.01 from 75 on."""
    config = get("robal", dataset="cifar10")
    expected = {59: 1e-1, 60: 1e-2, 61: 1e-3, 62: 1e-4, 74: 1e-16, 75: 1e-18, 76: 1e-20, 80: 1e-28}
    assert rates(config, expected, "released_code") == expected
    config.optim.warmup_epochs = 4  # rate of an epoch = that of the one before x (epoch + 1) / 4, before epoch 4
    expected = {1: 0.1 * 2 / 4, 2: 0.1 * 2 / 4 * 3 / 4, 3: 0.3 / 8, 4: 0.3 / 8, 5: 0.3 / 8}
    assert rates(config, expected, "released_code") == expected


@pytest.mark.parametrize("name", NAMES)
def test_drops_compound_in_the_released_code_of_robals_study_only(name):
    not_compounding = {"at_bsl", "reat", "self_distillation", "taet", "mart", "lt_adv", "faal", "cgrm"}
    config = get(name, dataset="cifar10", epochs=8)
    config.optim.drop_epochs = (2,)
    rates = {}
    for config.fidelity in ("paper", "released_code"):
        stage = Experiment.from_config(config).stages[-1]
        schedule = stage_builder.learning_rate(schema.stage_config(config, stage), stage, 1)
        rates[config.fidelity] = float(schedule(stage.epochs - 1))
    assert (rates["released_code"] < 0.5 * rates["paper"]) == (name not in not_compounding)


def test_shorter_runs_drop_at_the_same_fractions():
    assert get("robal", dataset="cifar10", epochs=40).optim.drop_epochs == (30, 38)
    assert get("at_bsl", dataset="cifar10", epochs=20).optim.drop_epochs == (15, 18, 20)


@pytest.mark.parametrize("dataset", DATASETS)
def test_every_dataset_takes_every_network(dataset):
    command = ["main", f"--config=configs/robal.py:dataset={dataset}", "--config.model.depth=16"]
    for name in BACKBONES:
        config = flags.parse([*command, f"--config.model.name={name}", "--config.model.width=2"]).config
        Experiment.from_config(config)
        assert config.model.name == name

"""The base of every config: settings of the data sets and the evaluation protocol, as plain data."""

from ml_collections import ConfigDict

from lt_adv.cli import entries
from lt_adv.runtime.standard_attacks import standard_attacks

# Data set -> title for reports, imbalance ratio and network.
DATASETS = {
    "cifar10": {"title": "CIFAR-10-LT", "ratio": 50.0, "model": {"name": "wide_resnet", "depth": 34, "width": 10}},
    "cifar100": {"title": "CIFAR-100-LT", "ratio": 10.0, "model": {"name": "wide_resnet", "depth": 34, "width": 10}},
    "tiny_imagenet": {"title": "Tiny-ImageNet-LT", "ratio": 10.0, "model": {"name": "preact_resnet18"}},
    "digits": {"title": "Digits-LT", "ratio": 10.0, "model": {"name": "wide_resnet", "depth": 10, "width": 1}},
    "image_folder": {"title": "image folder", "ratio": 50.0, "model": {"name": "resnet18"}},
    "npz": {"title": "npz", "ratio": 50.0, "model": {"name": "resnet18"}},
}


def parse(arg: str | None, **defaults) -> dict:
    """Parses "dataset=cifar100,epochs=10" to a dict with the keys and types of `defaults`; ValueError for others."""
    values = {}
    for part in filter(None, (arg or "").split(",")):
        key, equals, value = (word.strip() for word in part.partition("="))
        if not equals or key not in defaults:
            raise ValueError(f"config argument {part!r}: expected key=value with a key of {', '.join(defaults)}.")
        if key in values:
            raise ValueError(f"config argument {part!r}: {key} is given twice.")
        kind = type(defaults[key])
        try:
            values[key] = kind(value)
        except ValueError:
            raise ValueError(f"config argument {part!r}: {key} must be of type {kind.__name__}.") from None
        if kind is int and values[key] < 1:  # only a default may be 0, which means "as published"
            raise ValueError(f"config argument {part!r}: {key} must be at least 1.")
    return {**defaults, **values}


def scaled(epoch: int, epochs: int, of: int, least: int = 2) -> int:
    """Scales `epoch` of a run of `of` epochs to a run of `epochs`, rounded to the nearest epoch."""
    return max(least, int(epoch * epochs / of + 0.5))


def get(
    dataset: str,
    *,
    epochs: int,
    drop_epochs: tuple[int, ...],
    of: int,
    eps: float = 8 / 255,
    step_size: float = 2 / 255,
) -> ConfigDict:
    """Returns the config of plain adversarial training on a data set.

    Args:
      dataset: a key of DATASETS or any name of TensorFlow-Datasets.
      epochs: of the run.
      drop_epochs: epochs of a run of `of` epochs at which the rate drops; scaled to `epochs`.
      of: epochs of the published run.
      eps: radius of the attacks.
      step_size: of the attacks.
    """
    known = DATASETS.get(dataset, {"title": f"{dataset}-LT", "ratio": 50.0, "model": {"name": "resnet18"}})
    c = entries.default_config()
    c.data.name, c.data.title, c.data.imbalance_ratio = dataset, known["title"], known["ratio"]
    c.model.update(known["model"])
    c.optim.epochs = epochs
    c.optim.drop_epochs = tuple(scaled(drop, epochs, of) for drop in drop_epochs)
    if dataset == "digits":
        eps, step_size = 0.1, 0.025
        c.data.augment = "none"
    if dataset in ("cifar100", "tiny_imagenet"):
        c.robustlt = {"alpha": 0.4, "warmup": 0.6}  # RobustLT's values; the default is its value for CIFAR-10
    if dataset == "cifar100":
        c.dafa.scale = 1.5
    c.attack.eps, c.attack.step_size = eps, step_size
    c.eval.attacks = standard_attacks(eps, step_size)
    return c


def use_digits_settings(c: ConfigDict) -> None:
    """Sets our choices for digits: 8 x 8 pixels and about 500 training images. No paper uses this set."""
    c.optim.batch_size = 64
    c.log.every_steps = 8
    c.checkpoint.every_epochs = 10


def resnet18(dataset: str, epochs: int = 0, *, drop_epochs: tuple[int, ...], of: int, **lengths: float) -> ConfigDict:
    """Returns the config of plain adversarial training of a ResNet-18; `lengths` are `eps` and `step_size` of `get`.

    `epochs` 0 is the published number, `of`, or 30 for digits, whose network is unchanged. For data sets with a
    WideResNet, its depth and width remain in the config for --config.model.name=wide_resnet.
    """
    digits = dataset == "digits"
    c = get(dataset, epochs=epochs or (30 if digits else of), drop_epochs=drop_epochs, of=of, **lengths)
    if digits:
        use_digits_settings(c)
    elif c.model.name == "wide_resnet":
        c.model.name = "resnet18"
    return c


def robal_study(dataset: str, epochs: int = 0, *, drop_epochs: tuple[int, ...] = (60, 75), of: int = 80) -> ConfigDict:
    """Returns the config of plain adversarial training in RoBal's study (Wu et al., CVPR 2021), the base of its rows.

    `epochs` 0 is the published number, `of`, or 30/80 of it for digits.
    """
    digits = dataset == "digits"
    epochs = epochs or (30 * of // 80 if digits else of)
    c = get(dataset, epochs=epochs, drop_epochs=drop_epochs, of=of, eps=0.031, step_size=0.0078)
    c.attack.num_steps = 5
    c.optim.batch_size = 64
    c.optim.weight_decay = 2e-4
    if digits:
        use_digits_settings(c)
    return c


def finetuning(dataset: str, baseline: str, epochs: int = 1) -> ConfigDict:
    """Returns the config of a row of RoBal's study that starts from a finished run, at the initial learning rate.

    `baseline` is the working directory of that run; by default that of configs/at.py with only `dataset` set.
    """
    c = robal_study(dataset, epochs, drop_epochs=())
    c.init_from = baseline or f"workdirs/at-dataset={dataset}"
    return c

"""Classifiers: a backbone and a head, images -> (logits, {"features"})."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import flax.linen as nn
import jax.numpy as jnp

from lt_adv.models import heads, resnet, wide_resnet
from lt_adv.models.layers import Array
from lt_adv.runtime import registry

BACKBONES: Mapping[str, Callable[..., nn.Module]] = {
    "wide_resnet": wide_resnet.WideResNet,
    "resnet18": resnet.ResNet18,
    "preact_resnet18": resnet.PreActResNet18,
}
HEADS: Mapping[str, Callable[..., nn.Module]] = {
    "linear": heads.Linear,
    "linear_no_bias": partial(heads.Linear, use_bias=False),
    "lws": heads.LearnableScale,
    "cosine": heads.Cosine,
    "cosine_plus": partial(heads.Cosine, gamma=1 / 32),
}
# Mean and standard deviation of pixels in [0, 1]. A network of pixels in [0, 255] has the standard deviation 1 / 255.
PIXELS = {"mean": "[0, 1]", "std": "[0.001, 1]"}
PIXELS_HINT = "pixels lie in [0, 1]"
# float64 needs jax.enable_x64; tests compare with reference numbers in it.
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float64": jnp.float64}


class Classifier(nn.Module):
    """Image [batch, height, width, channels] in [0, 1] -> (logits [batch, classes], {"features": [batch, d]}).

    With `train=True` batch norm uses the statistics of the batch and updates the running ones (pass
    `mutable=["batch_stats"]` to get them); by default it uses the running ones. Logits and features are at least
    float32 for every compute dtype. Variables: `params` of `backbone` and `head`, `batch_stats` of `backbone`.

    With `mean` and `std`, one value for each channel or one for all, the backbone takes (x - mean) / std, computed in
    the dtype of x.
    """

    backbone: nn.Module
    head: nn.Module
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __call__(self, x: Array, *, train: bool = False) -> tuple[Array, dict[str, Array]]:
        if x.ndim != 4 or not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(
                f"A classifier takes floating-point images [batch, height, width, channels] in [0, 1], "
                f"not {x.dtype}{list(x.shape)}."
            )
        if self.mean:
            if len(self.mean) not in (1, x.shape[-1]):
                raise ValueError(
                    f"model.mean and model.std have {len(self.mean)} values for images of {x.shape[-1]} channels: give "
                    "one for each channel, or one for all."
                )
            mean, std = (jnp.asarray(values, x.dtype).reshape(1, 1, 1, -1) for values in (self.mean, self.std))
            x = (x - mean) / std
        features = self.backbone(x, train=train)
        return self.head(features), {"features": features}


def create(model_config: registry.Config, num_classes: int, axis_name: str | None = None) -> Classifier:
    """Returns the classifier that a config describes; `classifier.init(key, x)` returns its variables.

    Options of another backbone or head are ignored, so that one config can hold the options of all and only change
    its `name`.

    Args:
      model_config: `name` and options of the backbone; `dtype`, the compute dtype ("float32" or "bfloat16"); `head`, a
        mapping of `name` and options; `mean` and `std`, of a network that normalises its images, or ().
      num_classes: number of logits, at least 2.
      axis_name: device axis over which batch statistics are averaged.

    Raises:
      ValueError: for a name or an option that does not exist, and for a mean and std that cannot normalise.
    """
    options = dict(model_config)
    mean, std = _normalisation(options.pop("mean", ()), options.pop("std", ()))
    head_config = options.pop("head", {"name": "linear"})
    dtype_name = options.pop("dtype", "float32")
    if not isinstance(dtype_name, str) or dtype_name not in DTYPES:
        raise registry.unknown("model dtype", dtype_name, DTYPES)
    if num_classes < 2:
        raise ValueError(f"A classifier needs at least 2 classes, not {num_classes}.")
    dtype = DTYPES[dtype_name]
    backbone = _build("model", BACKBONES, options, dtype=dtype, axis_name=axis_name)
    head = _build("head", HEADS, head_config, dtype=dtype, num_classes=num_classes)
    return Classifier(backbone=backbone, head=head, mean=mean, std=std)


def _normalisation(mean: Sequence[float], std: Sequence[float]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns mean and std; ValueError unless both are empty, or have as many values in the range of PIXELS."""
    for name, values in (("mean", mean), ("std", std)):
        if not isinstance(values, (tuple, list)):
            raise ValueError(f"model.{name} must be a tuple of numbers, not {values!r}.")
        for value in values:
            registry.check_number(f"item of model.{name}", value, PIXELS[name], hint=PIXELS_HINT)
    if len(mean) != len(std):
        raise ValueError(
            f"model.mean has {len(mean)} values and model.std has {len(std)}: give as many of each, or none."
        )
    return tuple(map(float, mean)), tuple(map(float, std))


def _build(
    kind: str, choices: Mapping[str, Callable[..., nn.Module]], config: registry.Config, **fixed: object
) -> nn.Module:
    reserved = {"parent", "name", *fixed}  # fields that flax adds to every module, and those that no config may set
    defaults = {
        choice: {name: p.default for name, p in inspect.signature(module).parameters.items() if name not in reserved}
        for choice, module in choices.items()
    }
    name, options = registry.select_options(kind, config, defaults)
    return choices[name](**options, **fixed)

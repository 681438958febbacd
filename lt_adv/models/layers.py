"""Layers of the backbones: convolution, batch norm, residual blocks, pooling, initialisers."""

from collections.abc import Callable, Iterator
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from lt_adv.models.batch_norm import BatchNorm, conv_then_norm

Array = jax.Array
Initializer = jax.nn.initializers.Initializer

# Normal of variance 2 / (k k out), as in the original WideResNet code and its descendants.
kaiming_normal: Initializer = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
# U(-1/sqrt(fan_in), 1/sqrt(fan_in)), PyTorch's default.
fan_in_uniform: Initializer = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def at_least_float32(dtype: DTypeLike) -> np.dtype:
    """Returns the dtype of parameters, statistics, features and logits: `dtype`, but at least float32."""
    return jnp.promote_types(dtype, jnp.float32)


def conv_and_norm(
    *, dtype: DTypeLike, axis_name: str | None, train: bool, kernel_init: Initializer
) -> tuple[Callable[..., nn.Conv], Callable[..., BatchNorm]]:
    """Returns `conv(features, size, stride, name=)` and `norm(name=)` for one forward pass of one network.

    `axis_name` is the device axis over which batch statistics are averaged; None for separate statistics per device.
    The variance of the running statistics is biased (PyTorch's is unbiased).
    """
    param_dtype = at_least_float32(dtype)

    def conv(features: int, size: int, stride: int = 1, *, name: str) -> nn.Conv:
        # Explicit, because "SAME" pads a strided 3x3 convolution by (0, 1) instead of (1, 1).
        padding = ((size // 2, size // 2),) * 2
        return nn.Conv(
            features, (size, size), strides=stride, padding=padding, use_bias=False,
            dtype=dtype, param_dtype=param_dtype, kernel_init=kernel_init, name=name,
        )  # fmt: skip

    norm = partial(BatchNorm, not train, dtype, param_dtype, axis_name)
    return conv, norm


@jax.custom_jvp
def relu(x: Array) -> Array:
    """max(x, 0). Its derivative is read off the result, so that the gradient does not need `x` in memory."""
    return jnp.maximum(x, 0)


# Not `> 0`, which XLA turns into `x > 0`.
relu.defjvps(lambda tangent, result, x: jax.lax.select(result != 0, tangent, jnp.zeros_like(tangent)))


def residual_plan(widths: tuple[int, ...], blocks: int) -> Iterator[tuple[str, int, int]]:
    """Yields (name, width, stride) of each residual block; every stage but the first halves the image."""
    for stage, width in enumerate(widths, start=1):
        for block in range(blocks):
            yield f"stage{stage}_block{block}", width, 2 if stage > 1 and block == 0 else 1


def global_average_pool(x: Array, dtype: DTypeLike) -> Array:
    """Returns the mean over the image, summed in at least float32: [batch, height, width, d] -> [batch, d]."""
    return jnp.mean(x, axis=(1, 2), dtype=at_least_float32(dtype))


class Block(nn.Module):
    """Residual block of two 3x3 convolutions with batch norm and ReLU after each (He et al. 2015)."""

    width: int
    stride: int
    conv: Callable[..., nn.Conv]
    norm: Callable[..., BatchNorm]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        y = conv_then_norm(self.conv(self.width, 3, self.stride, name="conv1"), self.norm(name="bn1"), x)
        y = conv_then_norm(self.conv(self.width, 3, name="conv2"), self.norm(name="bn2"), relu(y))
        if self.stride != 1 or x.shape[-1] != self.width:
            projection = self.conv(self.width, 1, self.stride, name="shortcut")
            x = conv_then_norm(projection, self.norm(name="shortcut_bn"), x)
        return relu(x + y)


class PreActivationBlock(nn.Module):
    """Residual block with batch norm and ReLU before each convolution (He et al. 2016); also the block of WideResNet.

    A projection shortcut takes the activated input and an identity shortcut the raw one, as in the released code of
    both networks.
    """

    width: int
    stride: int
    conv: Callable[..., nn.Conv]
    norm: Callable[..., BatchNorm]
    dropout: Callable[[], nn.Dropout] = partial(nn.Dropout, 0.0, deterministic=True)

    @nn.compact
    def __call__(self, x: Array) -> Array:
        y = relu(self.norm(name="bn1")(x))
        if self.stride != 1 or x.shape[-1] != self.width:
            x = self.conv(self.width, 1, self.stride, name="shortcut")(y)
        y = conv_then_norm(self.conv(self.width, 3, self.stride, name="conv1"), self.norm(name="bn2"), y)
        y = self.dropout()(relu(y))
        return x + self.conv(self.width, 3, name="conv2")(y)

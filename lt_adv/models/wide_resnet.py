"""WideResNet-d-k (Zagoruyko and Komodakis 2016), the backbone of RoBal and most robustness tables."""

from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from lt_adv.models.layers import (
    Array,
    PreActivationBlock,
    conv_and_norm,
    global_average_pool,
    kaiming_normal,
    relu,
    residual_plan,
)


class WideResNet(nn.Module):
    """Image [batch, height, width, channels] -> features [batch, 64 width].

    Convolutions are initialised from a normal of variance 2 / fan_out, as in RoBal's released code.

    Attributes:
      depth: number of layers, 6 n + 4 for n blocks in each of three stages.
      width: factor of the 16, 32 and 64 channels.
      dropout: rate between the two convolutions of a block; if not 0, training needs `rngs={"dropout": key}`.
      dtype: compute dtype.
      axis_name: device axis over which batch statistics are averaged.
    """

    depth: int = 34
    width: int = 10
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32
    axis_name: str | None = None

    def __post_init__(self) -> None:
        if self.depth < 10 or self.depth % 6 != 4:
            raise ValueError(f"The depth of a WideResNet must be 6 n + 4 (10, 16, 22, 28, 34 ...), not {self.depth}.")
        if self.width < 1:
            raise ValueError(f"The width of a WideResNet must be at least 1, not {self.width}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"The dropout rate must be in [0, 1), not {self.dropout}.")
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        conv, norm = conv_and_norm(dtype=self.dtype, axis_name=self.axis_name, train=train, kernel_init=kaiming_normal)
        x = conv(16, 3, name="conv1")(x)
        widths = (16 * self.width, 32 * self.width, 64 * self.width)
        for name, width, stride in residual_plan(widths, blocks=(self.depth - 4) // 6):
            dropout = partial(nn.Dropout, self.dropout, deterministic=not train)
            x = PreActivationBlock(width, stride, conv, norm, dropout, name=name)(x)
        return global_average_pool(relu(norm(name="bn")(x)), self.dtype)

"""ResNet-18 and PreActResNet-18 with a 3x3 stem for small images, as in AT-BSL and REAT."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from lt_adv.models.batch_norm import conv_then_norm
from lt_adv.models.layers import (
    Array,
    Block,
    PreActivationBlock,
    conv_and_norm,
    fan_in_uniform,
    global_average_pool,
    relu,
    residual_plan,
)

WIDTHS = (64, 128, 256, 512)


class ResNet18(nn.Module):
    """ResNet-18 (He et al. 2015): image [batch, height, width, channels] -> features [batch, 512].

    The stem is one 3x3 convolution of stride 1 without max pooling. Convolutions are initialised from
    U(+-1/sqrt(fan_in)), PyTorch's default, which the released AT-BSL code uses.
    """

    dtype: DTypeLike = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        conv, norm = conv_and_norm(dtype=self.dtype, axis_name=self.axis_name, train=train, kernel_init=fan_in_uniform)
        x = relu(conv_then_norm(conv(WIDTHS[0], 3, name="conv1"), norm(name="bn1"), x))
        for name, width, stride in residual_plan(WIDTHS, blocks=2):
            x = Block(width, stride, conv, norm, name=name)(x)
        return global_average_pool(x, self.dtype)


class PreActResNet18(nn.Module):
    """Pre-activation ResNet-18 (He et al. 2016): image [batch, height, width, channels] -> features [batch, 512].

    Stem and initialisation are those of `ResNet18`; a last batch norm and ReLU precede the pooling.
    """

    dtype: DTypeLike = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        conv, norm = conv_and_norm(dtype=self.dtype, axis_name=self.axis_name, train=train, kernel_init=fan_in_uniform)
        x = conv(WIDTHS[0], 3, name="conv1")(x)
        for name, width, stride in residual_plan(WIDTHS, blocks=2):
            x = PreActivationBlock(width, stride, conv, norm, name=name)(x)
        return global_average_pool(relu(norm(name="bn")(x)), self.dtype)

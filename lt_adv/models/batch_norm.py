"""Batch normalisation with a gradient of its own, and its folding into the convolution before it."""

import functools
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

Residuals = tuple[Array, Array, Array, Array]  # x, scale, mean, 1 / sqrt(var + epsilon)


class BatchNorm(nn.Module):
    """Batch norm of the last axis, with the variables of `flax.linen.BatchNorm`:

        y = scale (x - mean) / sqrt(var + epsilon) + bias.

    In training, mean and (biased) variance are those of the batch over all devices of `axis_name`, and the running
    statistics become  momentum old + (1 - momentum) batch.  They are computed in `param_dtype`.

    Attributes:
      use_running_average: whether to use the running statistics.
      dtype: of the result.
      param_dtype: of parameters and statistics.
      axis_name: device axis over which statistics are averaged; None for separate statistics per device.
      momentum: of the running statistics.
      epsilon: added to the variance.
    """

    use_running_average: bool
    dtype: DTypeLike
    param_dtype: DTypeLike
    axis_name: str | None = None
    momentum: float = 0.9
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (x.shape[-1],)
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, self.param_dtype)
        var = self.variable("batch_stats", "var", jnp.ones, shape, self.param_dtype)
        scale = self.param("scale", nn.initializers.ones, shape, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, shape, self.param_dtype)
        if self.use_running_average:
            factor = scale * lax.rsqrt(var.value + self.epsilon)
            return (x * factor + (bias - factor * mean.value)).astype(self.dtype)
        y, batch_mean, batch_var = normalize_batch(x.astype(self.dtype), scale, bias, self.epsilon, self.axis_name)
        if not self.is_initializing():
            mean.value = self.momentum * mean.value + (1 - self.momentum) * batch_mean
            var.value = self.momentum * var.value + (1 - self.momentum) * batch_var
        return y


def conv_then_norm(conv: nn.Conv, norm: BatchNorm, x: Array) -> Array:
    """Returns norm(conv(x)); with running statistics as one convolution,

        norm(conv(x; W)) = conv(x; s W) + bias - s mean,    s = scale / sqrt(var + epsilon).

    `conv` and `norm` are bound submodules of the module that calls this.
    """
    if not norm.use_running_average or conv.is_initializing():
        return norm(conv(x))
    affine, statistics = norm.variables["params"], norm.variables["batch_stats"]
    s = affine["scale"] * lax.rsqrt(statistics["var"] + norm.epsilon)
    folded = {"kernel": s * conv.variables["params"]["kernel"], "bias": affine["bias"] - s * statistics["mean"]}
    return cast(Array, conv.clone(parent=None, use_bias=True).apply({"params": folded}, x))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def normalize_batch(
    x: Array, scale: Array, bias: Array, epsilon: float, axis_name: str | None
) -> tuple[Array, Array, Array]:
    """Returns (y, mean, variance) of a batch, in the dtypes of `x` and of `scale`. Statistics have no gradient.

    With n elements of a channel over all devices, x^ = (x - mean) / sqrt(var + epsilon) and the gradient g of y,

        dL/dx = scale / sqrt(var + epsilon) (g - sum(g) / n - x^ sum(g x^) / n),

    computed at once, in the dtype of `scale`: JAX would differentiate the mean and the mean of squares one by one, and
    add their gradients in the dtype of x.
    """
    return _forward(x, scale, bias, epsilon, axis_name)[0]


def _forward(
    x: Array, scale: Array, bias: Array, epsilon: float, axis_name: str | None
) -> tuple[tuple[Array, Array, Array], Residuals]:
    wide = x.astype(scale.dtype)
    mean, mean_square = _means((wide, wide * wide), axis_name)
    var = jnp.maximum(mean_square - mean * mean, 0)
    inverse = lax.rsqrt(var + epsilon)
    y = ((wide - mean) * (scale * inverse) + bias).astype(x.dtype)
    return (y, mean, var), (x, scale, mean, inverse)


def _backward(
    epsilon: float, axis_name: str | None, residuals: Residuals, cotangents: tuple[Array, Array, Array]
) -> tuple[Array, Array, Array]:
    del epsilon
    x, scale, mean, inverse = residuals
    g = cotangents[0].astype(scale.dtype)
    centered = x.astype(scale.dtype) - mean
    axes = tuple(range(x.ndim - 1))
    sum_g, sum_gx = jnp.sum(g, axes), jnp.sum(g * centered, axes) * inverse
    n = x.size // x.shape[-1]
    mean_g, mean_gx = _mean_over_devices(jnp.stack((sum_g, sum_gx)) / n, axis_name)
    dx = (scale * inverse) * (g - mean_g - centered * (inverse * mean_gx))
    return dx.astype(x.dtype), sum_gx, sum_g


normalize_batch.defvjp(_forward, _backward)


def _means(arrays: tuple[Array, Array], axis_name: str | None) -> Array:
    """Returns the means of each channel over the batch of all devices, [2, channels], with one exchange."""
    return _mean_over_devices(jnp.stack([jnp.mean(a, axis=tuple(range(a.ndim - 1))) for a in arrays]), axis_name)


def _mean_over_devices(a: Array, axis_name: str | None) -> Array:
    return a if axis_name is None else lax.pmean(a, axis_name)

"""Brings the convolutions of a gradient into the form that XLA executes fast on the platform.

CPU: The gradient of a convolution with respect to its input is a convolution with the mirrored kernel and exchanged
channel axes, which JAX expresses in the dimension numbers. XLA's CPU backend calls its convolution library only for
images NHWC and kernels HWIO. It rewrites other layouts to these, but neither in the body of a loop nor where the
transposition that it has to insert can be folded back into the only convolution that uses it. There it runs naive
loops, about 20 times slower. We therefore transpose explicitly, behind a barrier that prevents folding. The gradient of
a strided convolution has zeros between the pixels of its input, with which XLA computes: where the result has few
channels, we compute all its phases by one convolution without zeros.

TPU: The gradient runs faster if its kernel is mirrored and transposed beforehand, if the channels more than fill the
lanes of a register. With fewer channels XLA puts images into the lanes; it then fuses two consecutive convolutions of
an attack's backward pass and computes the first several times, which a barrier before each convolution prevents.
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.extend import core

from lt_adv.attacks.jaxprs import evaluate, walk

P = ParamSpec("P")
T = TypeVar("T")
# (equation, operands, jaxpr of the equation) -> results
Convolve = Callable[[core.JaxprEqn, Sequence[Any], core.Jaxpr], list[Any]]
TPU_LANES = 128
MAX_CHANNELS_BY_PHASE = 32  # on a CPU `_by_phase` took 0.2 to 0.7 of XLA's time up to 32 channels, 1.3 to 2.1 from 64
_platform: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)


def with_fast_convolutions(gradient: Callable[P, T], *, attack: bool = True) -> Callable[P, T]:
    """Returns `gradient` with fast convolutions on CPU and TPU; see `rewrite_convolutions`.

    Args:
      gradient: the result of jax.grad or jax.value_and_grad.
      attack: whether it is a gradient with respect to images alone.
    """
    if target_platform() == "tpu":
        return rewrite_convolutions(gradient, functools.partial(_on_tpu, attack=attack))
    return rewrite_convolutions(gradient) if target_platform() == "cpu" else gradient


def target_platform() -> str:
    """Returns the platform that programs are traced for, "cpu", "tpu" or "gpu"."""
    return _platform.get() or jax.default_backend()


@contextlib.contextmanager
def tracing_for(platform: str) -> Iterator[None]:
    """Programs that are traced inside are meant for this platform, "cpu", "cuda" or "tpu", which need not be there."""
    token = _platform.set(platform)
    try:
        yield
    finally:
        _platform.reset(token)


def mirrors_kernel_beforehand(kernel: Any) -> bool:
    """Whether a gradient's convolution runs faster on a kernel that is mirrored before the loop."""
    if target_platform() == "tpu":
        few, many = sorted(kernel.shape[-2:])
        return few > TPU_LANES and (few % TPU_LANES or many % TPU_LANES) > 0
    return target_platform() == "cpu"


def _in_standard_layout(equation: core.JaxprEqn, operands: Sequence[Any], jaxpr: core.Jaxpr) -> list[Any]:
    """Evaluates a convolution over images in the layouts NHWC and HWIO."""
    x, kernel = operands
    image, weight, result = equation.params["dimension_numbers"]
    nhwc, hwio = (0, x.ndim - 1, *range(1, x.ndim - 1)), (x.ndim - 1, x.ndim - 2, *range(x.ndim - 2))
    over_images = image[0] == result[0] == 0  # a weight gradient has the batch in the place of channels
    standard = (image, weight, result) == (nhwc, hwio, nhwc)
    if not over_images or standard and not _has_phases(kernel.shape, equation.params):
        return evaluate(equation, operands, jaxpr)
    options = {**equation.params, "dimension_numbers": lax.ConvDimensionNumbers(nhwc, hwio, nhwc)}
    x, kernel = _transpose(x, image, nhwc), _transpose(kernel, weight, hwio)
    convolve = _by_phase if _has_phases(kernel.shape, options) else lax.conv_general_dilated_p.bind
    return [_transpose(convolve(x, kernel, **options), nhwc, result)]


def _has_phases(kernel: tuple[int, ...], params: dict[str, Any]) -> bool:
    """Whether a convolution with a kernel HWIO has a dilated input, as the gradient of a strided one, and few channels.

    If the kernel is smaller than the stride, most phases are zero.
    """
    *side, _, channels = kernel
    ones, dilation = (1,) * len(side), params["lhs_dilation"]
    plain = params["window_strides"] == params["rhs_dilation"] == ones
    plain = plain and params["feature_group_count"] == params["batch_group_count"] == 1
    overlap = all(length >= step for length, step in zip(side, dilation, strict=True))
    return plain and dilation != ones and overlap and channels <= MAX_CHANNELS_BY_PHASE


def _by_phase(x: Array, kernel: Array, **params: Any) -> Array:
    """Evaluates a convolution of an image dilated by s, NHWC and HWIO, without the zeros between its pixels.

    Pixel s a + p of the result, p = 0 .. s - 1, sums the pixels a + o of x times the entries lo - p + s o of
    the kernel, where lo is the padding before the image. The phases p become channels of one convolution over x.
    """
    dilation, padding, axes = params["lhs_dilation"], params["padding"], range(x.ndim - 2)
    side, options = kernel.shape[:-2], {name: params[name] for name in ("precision", "preferred_element_type")}
    numbers, ones = params["dimension_numbers"], (1,) * len(side)
    sizes: list[int] = []  # of the result; the lists have an entry per axis
    counts: list[int] = []  # pixels of each phase
    windows: list[int] = []  # of the new kernel
    new_padding: list[tuple[int, int]] = []
    kernel = jnp.pad(kernel, [(0, 1)] * len(side) + [(0, 0)] * 2)  # the last entry stands for those beyond the kernel
    for axis in axes:
        (low, high), step, length, pixels = padding[axis], dilation[axis], side[axis], x.shape[1 + axis]
        size = (pixels - 1) * step + 1 + low + high - length + 1
        phase_size, first, last = -(-size // step), -(low // step), -((low - length + 1) // step)
        entry = low - np.arange(step) + step * np.arange(first, last + 1)[:, None]  # [offset, phase]
        entry = np.where((entry >= 0) & (entry < length), entry, length)
        kernel = jnp.take(kernel, entry.ravel(), axis=axis)
        sizes, counts, windows = [*sizes, size], [*counts, phase_size], [*windows, last - first + 1]
        new_padding.append((-first, phase_size - 1 + last - (pixels - 1)))
    channels = kernel.shape[-2:]
    kernel = kernel.reshape(*(n for pair in zip(windows, dilation, strict=True) for n in pair), *channels)
    offsets, phases, inputs = [2 * axis for axis in axes], [2 * axis + 1 for axis in axes], 2 * len(side)
    kernel = kernel.transpose(*offsets, inputs, *phases, inputs + 1).reshape(*windows, channels[0], -1)
    result = lax.conv_general_dilated(x, kernel, ones, new_padding, dimension_numbers=numbers, **options)
    result = result.reshape(x.shape[0], *counts, *dilation, channels[1])
    order = [1 + axis + part for axis in axes for part in (0, len(side))]
    result = result.transpose(0, *order, 1 + 2 * len(side))
    result = result.reshape(x.shape[0], *(n * step for n, step in zip(counts, dilation, strict=True)), channels[1])
    return result[(slice(None), *map(slice, sizes))]


def _on_cpu(equation: core.JaxprEqn, operands: Sequence[Any], jaxpr: core.Jaxpr) -> list[Any]:
    """Evaluates a convolution whose windows do not overlap as a product, any other one in the standard layout."""
    x, kernel = operands
    image, weight, result = equation.params["dimension_numbers"]
    patches = _patches(equation.params, x.shape, kernel.shape) if image[0] == result[0] == 0 else None
    if patches is None:
        return _in_standard_layout(equation, operands, jaxpr)
    x, kernel = lax.transpose(x, image), lax.transpose(kernel, weight)  # channels first
    return [lax.transpose(_as_product(x, kernel, *patches, equation.params), np.argsort(result))]


def _patches(
    params: dict[str, Any], image: tuple[int, ...], kernel: tuple[int, ...]
) -> tuple[tuple[int, ...], bool] | None:
    """Returns (side of the patches, whether to patches) of a convolution whose windows do not overlap, or None.

    It embeds patches, as the first layer of a vision transformer does, or is the gradient of such a convolution with
    respect to the image, of which XLA's CPU compiler makes a convolution that is an order of magnitude slower than the
    product of matrices.
    """
    numbers = params["dimension_numbers"]
    spatial = [image[axis] for axis in numbers.lhs_spec[2:]]
    side = tuple(kernel[axis] for axis in numbers.rhs_spec[2:])
    ones = (1,) * len(side)
    plain = params["rhs_dilation"] == ones and params["feature_group_count"] == params["batch_group_count"] == 1
    if not plain or math.prod(side) == 1:
        return None
    strides, dilation, padding = params["window_strides"], params["lhs_dilation"], params["padding"]
    divisible = all(size % length == 0 for size, length in zip(spatial, side, strict=True))
    if strides == side and dilation == ones and divisible and all(pad == (0, 0) for pad in padding):
        return side, True
    full = all(pad == (length - 1, length - 1) for pad, length in zip(padding, side, strict=True))
    return (side, False) if strides == ones and dilation == side and full else None


def _as_product(x: Array, kernel: Array, side: tuple[int, ...], to_patches: bool, params: dict[str, Any]) -> Array:
    """Evaluates a convolution without overlap, channels first, as a product of matrices."""
    spatial, axes = x.shape[2:], range(len(side))
    options = {name: params[name] for name in ("precision", "preferred_element_type")}
    if to_patches:
        counts = [size // length for size, length in zip(spatial, side, strict=True)]
        x = x.reshape(*x.shape[:2], *(n for pair in zip(counts, side, strict=True) for n in pair))
        inner = (1, *(3 + 2 * axis for axis in axes)), (1, *(2 + axis for axis in axes))
        product = lax.dot_general(x, kernel, (inner, ((), ())), **options)
        return jnp.moveaxis(product, -1, 1)
    # An entry of x is multiplied by the reversed kernel.
    product = lax.dot_general(x, lax.rev(kernel, tuple(2 + axis for axis in axes)), (((1,), (1,)), ((), ())), **options)
    order = [0, 1 + len(side)]  # of (batch, *counts, channels, *side): batch, channels, then each count and side
    for axis in axes:
        order += [1 + axis, 2 + len(side) + axis]
    sizes = [count * length for count, length in zip(spatial, side, strict=True)]
    return lax.transpose(product, order).reshape(x.shape[0], kernel.shape[0], *sizes)


def _on_tpu(equation: core.JaxprEqn, operands: Sequence[Any], jaxpr: core.Jaxpr, *, attack: bool) -> list[Any]:
    x, kernel = operands
    if mirrors_kernel_beforehand(kernel):
        return _in_standard_layout(equation, operands, jaxpr)
    return evaluate(equation, [lax.optimization_barrier(x) if attack else x, kernel], jaxpr)


def _transpose(x: Array, old: Sequence[int], new: Sequence[int]) -> Array:
    """Moves axis old[i] of `x` to new[i]."""
    if old == new:
        return x
    source = dict(zip(new, old, strict=True))
    return lax.optimization_barrier(lax.transpose(x, [source[axis] for axis in range(x.ndim)]))


def rewrite_convolutions(gradient: Callable[P, T], convolve: Convolve = _on_cpu) -> Callable[P, T]:
    """Returns `gradient` with every convolution evaluated by `convolve`, by default as is fast on CPU.

    `gradient` is the result of jax.grad or jax.value_and_grad; the returned function cannot be differentiated again.
    It may be traced under jit, vmap, pmap and shard_map. Values change by rounding at most. Convolutions inside a loop
    or a rematerialised part of the network are not rewritten, and neither are weight gradients, which are fast.
    """

    def apply(equation: core.JaxprEqn, operands: Sequence[Any], jaxpr: core.Jaxpr) -> list[Any]:
        is_convolution = equation.primitive.name == "conv_general_dilated"
        return (convolve if is_convolution else evaluate)(equation, operands, jaxpr)

    def rewritten(*args: P.args, **kwargs: P.kwargs) -> T:
        # Inputs are closed over and not passed as arguments, so that each keeps its type, mesh axes included.
        closed, shape = jax.make_jaxpr(lambda: gradient(*args, **kwargs), return_shape=True)()
        return jax.tree.unflatten(jax.tree.structure(shape), walk(closed.jaxpr, closed.consts, [], apply))

    return rewritten

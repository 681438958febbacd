"""Rewrites gradient convolutions into the layout that XLA's CPU backend executes fast.

The gradient of a convolution with respect to its input is a convolution with the mirrored kernel and exchanged channel
axes, which JAX expresses in the dimension numbers. XLA's CPU backend calls its convolution library only for images NHWC
and kernels HWIO. It rewrites other layouts to these, but neither in the body of a loop nor where the transposition that
it has to insert can be folded back into the only convolution that uses it. There it runs naive loops, about 20 times
slower. On CPU we therefore transpose explicitly, behind a barrier that prevents folding. Accelerators do not need this.
"""

from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

import jax
from jax import Array, lax
from jax.extend import core

P = ParamSpec("P")
T = TypeVar("T")
CALLS = ("jit", "pjit", "closed_call")


def with_fast_cpu_convolutions(gradient: Callable[P, T]) -> Callable[P, T]:
    """Returns `rewrite_convolutions(gradient)` on CPU and `gradient` itself elsewhere."""
    return rewrite_convolutions(gradient) if jax.default_backend() == "cpu" else gradient


def rewrite_convolutions(gradient: Callable[P, T]) -> Callable[P, T]:
    """Returns `gradient` with every convolution over images in the layouts NHWC and HWIO.

    `gradient` is the result of jax.grad or jax.value_and_grad; the returned function cannot be differentiated again.
    It may be traced under jit, vmap, pmap and shard_map. Values change by rounding at most. Convolutions inside a loop
    or a rematerialised part of the network are not rewritten, and neither are weight gradients, which are fast.
    """

    def rewritten(*args: P.args, **kwargs: P.kwargs) -> T:
        # Inputs are closed over and not passed as arguments, so that each keeps its type, mesh axes included.
        closed, shape = jax.make_jaxpr(lambda: gradient(*args, **kwargs), return_shape=True)()
        return jax.tree.unflatten(jax.tree.structure(shape), _evaluate(closed.jaxpr, closed.consts, []))

    return rewritten


def _evaluate(jaxpr: core.Jaxpr, consts: Sequence[Array], args: Sequence[Array]) -> list[Array]:
    """Evaluates a jaxpr equation by equation, with convolutions replaced."""
    values: dict[core.Var, Array] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

    def read(atom: core.Var | core.Literal) -> Array:
        return atom.val if isinstance(atom, core.Literal) else values[atom]

    for equation in jaxpr.eqns:
        primitive, options = equation.primitive, equation.params
        operands = [read(atom) for atom in equation.invars]
        if primitive.name in CALLS:
            inner = options["jaxpr"]
            outputs = _evaluate(inner.jaxpr, inner.consts, operands)
        elif primitive.name == "conv_general_dilated":
            outputs = [_convolve(*operands, **options)]
        else:
            outputs = primitive.bind(*operands, **primitive.get_bind_params(options))
            outputs = outputs if primitive.multiple_results else [outputs]
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _convolve(x: Array, kernel: Array, *, dimension_numbers: lax.ConvDimensionNumbers, **options: object) -> Array:
    image, weight, result = dimension_numbers
    space = range(1, x.ndim - 1)
    nhwc, hwio = (0, x.ndim - 1, *space), (x.ndim - 1, x.ndim - 2, *range(x.ndim - 2))
    over_images = image[0] == result[0] == 0  # a weight gradient has the batch in the place of channels
    if not over_images or (image, weight, result) == (nhwc, hwio, nhwc):
        return lax.conv_general_dilated_p.bind(x, kernel, dimension_numbers=dimension_numbers, **options)
    layouts = lax.ConvDimensionNumbers(nhwc, hwio, nhwc)
    x, kernel = _transpose(x, image, nhwc), _transpose(kernel, weight, hwio)
    out = lax.conv_general_dilated_p.bind(x, kernel, dimension_numbers=layouts, **options)
    return _transpose(out, nhwc, result)


def _transpose(x: Array, old: Sequence[int], new: Sequence[int]) -> Array:
    """Moves axis old[i] of `x` to new[i]."""
    if old == new:
        return x
    source = dict(zip(new, old, strict=True))
    return lax.optimization_barrier(lax.transpose(x, [source[axis] for axis in range(x.ndim)]))

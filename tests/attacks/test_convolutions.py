"""Canonical convolutions: the same gradient for networks of every layout, and the layouts that XLA then compiles."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from lt_adv import attacks
from lt_adv.attacks.convolutions import rewrite_convolutions, with_fast_convolutions

RNG = np.random.default_rng(0)
FIRST, SECOND = RNG.normal(size=(3, 3, 2, 6)), RNG.normal(size=(3, 3, 6, 6))  # HWIO
X = RNG.uniform(size=(8, 7, 6, 2))
NHWC, NCHW = ("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW")


def nhwc(x, *, stride=1, **options):
    x = jnp.tanh(lax.conv_general_dilated(x, FIRST.astype(x.dtype), (1, 1), "SAME", dimension_numbers=NHWC))
    kernel = SECOND.astype(x.dtype)
    return lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", dimension_numbers=NHWC, **options)


def nchw(x, *, stride=1):
    x = x.transpose(0, 3, 1, 2)
    for kernel, s in ((FIRST, 1), (SECOND, stride)):
        kernel = kernel.transpose(3, 2, 0, 1).astype(x.dtype)
        x = jnp.tanh(lax.conv_general_dilated(x, kernel, (s, s), "SAME", dimension_numbers=NCHW))
    return x


def one_image(x):
    """As in equinox: a network of one image, channels first, mapped over the batch."""
    return nchw(x[None])[0]


def grouped(x):
    x = lax.conv_general_dilated(x, FIRST, (1, 1), "VALID", dimension_numbers=NHWC)
    return lax.conv_general_dilated(x, SECOND[:, :, :2], (1, 1), "SAME", dimension_numbers=NHWC, feature_group_count=3)


def one_dimension(x):
    return lax.conv_general_dilated(x[:, 0], FIRST[0], (2,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"))


def transposed(x):
    return lax.conv_transpose(x, FIRST, (2, 2), "SAME", dimension_numbers=NHWC)


def jitted(x):
    return jax.jit(jax.checkpoint(nhwc))(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))))


NETWORKS = {
    "nhwc": nhwc,
    "strided": partial(nhwc, stride=2),
    "dilated": partial(nhwc, rhs_dilation=(2, 2)),
    "nchw": nchw,
    "nchw strided": partial(nchw, stride=2),
    "one image": jax.vmap(one_image),
    "grouped": grouped,
    "one dimension": one_dimension,
    "transposed": transposed,
    "jitted": jitted,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_same_gradient(name):
    with jax.enable_x64(True):
        gradient = jax.grad(lambda x: jnp.sum(jnp.sin(NETWORKS[name](x))))
        expected = gradient(X)
        for actual in (with_fast_convolutions(gradient)(X), jax.jit(with_fast_convolutions(gradient))(X)):
            np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-12)


def test_same_value_auxiliary_and_weight_gradient():
    def loss(params, x):
        y = lax.conv_general_dilated(x, params["kernel"], (1, 1), "SAME", dimension_numbers=NHWC)
        return jnp.sum(jnp.tanh(y) ** 2), {"mean": y.mean(), "count": 3, "nothing": None}

    with jax.enable_x64(True):
        f = jax.value_and_grad(loss, has_aux=True)
        actual, expected = with_fast_convolutions(f)({"kernel": FIRST}, X), f({"kernel": FIRST}, X)
        assert jax.tree.structure(actual) == jax.tree.structure(expected)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12), actual, expected)


@pytest.mark.parametrize("check_vma", [True, False])
def test_inside_shard_map(check_vma):
    """The loss closes over a sharded input and replicated weights: each must keep its type."""

    def shard(weight, x):
        def loss(x):
            return jnp.sum(lax.psum(weight, "data") * nhwc(x) ** 2)

        return with_fast_convolutions(jax.grad(loss))(x)

    with jax.enable_x64(True):
        mesh = Mesh(np.array(jax.devices()), ("data",))
        sharded = jax.shard_map(shard, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"), check_vma=check_vma)
        expected = jax.grad(lambda x: jnp.sum(8 * 2.0 * nhwc(x) ** 2))(X)
        np.testing.assert_allclose(jax.jit(sharded)(2.0, X), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["nhwc", "strided", "nchw", "one image"])
def test_every_convolution_of_a_compiled_loop_has_the_fast_layout(name):
    """What XLA makes of it, not what we asked for: a folded transposition would show as another layout."""

    def logits_fn(x):
        y = NETWORKS[name](x.astype(jnp.float32))
        return y.reshape(len(y), -1)[:, :5]

    y, pgd = np.zeros(8, np.int32), partial(attacks.pgd, logits_fn=logits_fn, eps=0.1, step_size=0.02, num_steps=5)
    compiled = jax.jit(lambda key, x, y: pgd(key, x=x, y=y)).lower(jax.random.key(0), X.astype(np.float32), y).compile()
    layouts = re.findall(r"convolution\(.*?dim_labels=([^,\s]+)", compiled.as_text())
    assert len(layouts) == 4 and set(layouts) == {"b01f_01io->b01f"}


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize("layout", [("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NHWC"), ("NHWC", "OHWI", "NCHW")])
def test_convolutions_of_patches_are_products(layout, dtype):
    """Of two layers whose windows do not overlap, with and without a square window."""
    shape = {"N": 2, "H": 12, "W": 8, "C": 3}
    x = jax.random.normal(jax.random.key(0), [shape[letter] for letter in layout[0]], dtype)
    kernel = jax.random.normal(
        jax.random.key(1), [{"H": 4, "W": 2, "I": 3, "O": 5}[letter] for letter in layout[1]], dtype
    )

    def network(x):
        patches = jax.lax.conv_general_dilated(x, kernel, (4, 2), "VALID", dimension_numbers=layout)
        return jnp.sum(jnp.tanh(patches).astype(np.float32) ** 2)

    expected = jax.jit(jax.grad(network))(x)
    rewritten = rewrite_convolutions(jax.grad(network))
    names = {equation.primitive.name for equation in jax.make_jaxpr(rewritten)(x).eqns}
    tolerance = 1e-5 if dtype == np.float32 else 3e-2
    np.testing.assert_allclose(rewritten(x).astype(np.float32), expected.astype(np.float32), atol=tolerance * 10)
    assert "conv_general_dilated" not in names


@pytest.mark.parametrize("layout", [NHWC, NCHW])
@pytest.mark.parametrize(
    ("side", "strides", "padding"),
    [
        ((3, 3), (2, 2), [(1, 1), (1, 1)]),
        ((3, 3), (2, 2), "SAME"),
        ((5, 3), (3, 2), "VALID"),
        ((4, 3), (2, 1), [(0, 3), (2, 0)]),
        ((7, 2), (3, 2), [(3, 3), (1, 2)]),
    ],
)
def test_gradient_of_strides_computes_no_zeros(side, strides, padding, layout):
    """Odd and even sizes, pixels that no window covers, and paddings on one side."""
    rng = np.random.default_rng(1)
    x, kernel = rng.normal(size=(2, 12, 9, 3)), rng.normal(size=(*side, 3, 5))
    if layout == NCHW:
        x, kernel = x.transpose(0, 3, 1, 2), kernel.transpose(3, 2, 0, 1)

    def network(x):
        y = jax.lax.conv_general_dilated(x, kernel.astype(x.dtype), strides, padding, dimension_numbers=layout)
        return jnp.sum(jnp.tanh(y))

    with jax.enable_x64(True):
        rewritten = rewrite_convolutions(jax.grad(network))
        np.testing.assert_allclose(rewritten(x), jax.grad(network)(x), rtol=1e-12, atol=1e-12)
        text = str(jax.make_jaxpr(rewritten)(x))
    assert set(re.findall(r"lhs_dilation=(\(.*?\))", text)) == {"(1, 1)"} and text.count("conv_general_dilated[") == 2


@pytest.mark.parametrize(("strides", "padding"), [((2, 2), "SAME"), ((4, 2), [(1, 1), (0, 0)]), ((3, 2), "VALID")])
def test_other_convolutions_stay(strides, padding):
    x, kernel = jax.random.normal(jax.random.key(0), (2, 12, 9, 3)), jax.random.normal(jax.random.key(1), (4, 2, 3, 5))

    def network(x):
        return jnp.sum(
            jnp.tanh(
                jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))
            )
        )

    rewritten = rewrite_convolutions(jax.grad(network))
    np.testing.assert_allclose(rewritten(x), jax.grad(network)(x), atol=1e-5)
    assert "conv_general_dilated" in str(jax.make_jaxpr(rewritten)(x))

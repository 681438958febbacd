"""Batch norm against flax's, in float64 and over devices; its folding; the derivative of the ReLU."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from lt_adv.models import layers
from lt_adv.models.batch_norm import BatchNorm, conv_then_norm, normalize_batch

MESH = Mesh(np.array(jax.devices()[:4]), ("data",))


def inputs(dtype, batch=8):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(2.0, 3.0, (batch, 4, 5, 3)), dtype)
    weights = jnp.asarray(rng.normal(size=x.shape), dtype)
    variables = {
        "params": {"scale": jnp.asarray([0.5, 1.0, -2.0]), "bias": jnp.asarray([0.1, 0.0, -3.0])},
        "batch_stats": {"mean": jnp.asarray([0.3, 0.0, 1.0]), "var": jnp.asarray([1.0, 2.0, 0.5])},
    }
    return x, weights, jax.tree.map(lambda a: a.astype(jnp.promote_types(dtype, jnp.float32)), variables)


def modules(dtype, train, axis_name=None):
    wide = jnp.promote_types(dtype, jnp.float32)
    ours = BatchNorm(not train, dtype, wide, axis_name)
    flax = nn.BatchNorm(
        not train, momentum=0.9, dtype=dtype, param_dtype=wide, axis_name=axis_name,
        force_float32_reductions=wide == jnp.float32,
    )  # fmt: skip
    return ours, flax


def loss_and_gradient(module, variables, x, weights):
    def loss(params, x):
        y, new = module.apply({**variables, "params": params}, x, mutable=["batch_stats"])
        return jnp.sum(jnp.sin(y.astype(weights.dtype)) * weights), (y, new)

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(variables["params"], x)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("train", [True, False])
def test_equals_flax(train):
    """Output, running statistics and all gradients, to float64 rounding."""
    x, weights, variables = inputs(jnp.float64)
    actual, expected = (loss_and_gradient(m, variables, x, weights) for m in modules(jnp.float64, train))
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-11)
    assert jax.tree.structure(actual) == jax.tree.structure(expected)


def test_variables_are_those_of_flax():
    ours, flax = (jax.eval_shape(m.init, jax.random.key(0), jnp.ones((2, 3))) for m in modules(jnp.float32, True))
    assert ours == flax


def test_in_bfloat16_the_gradient_is_nearer_to_float64_than_that_of_flax():
    x, weights, variables = inputs(jnp.bfloat16, batch=64)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: a.astype(jnp.float64), (x, weights, variables))
        exact = loss_and_gradient(modules(jnp.float64, True)[0], wide[2], *wide[:2])[1][1]
    ours, flax = (loss_and_gradient(m, variables, x, weights)[1][1] for m in modules(jnp.bfloat16, True))
    errors = [np.abs(np.asarray(dx, np.float64) - np.asarray(exact)).mean() for dx in (ours, flax)]
    assert errors[0] <= errors[1]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("parallel", ["pmap", "shard_map"])
def test_statistics_over_devices(parallel):
    """Four devices with a quarter of the batch each: the gradients equal those of one device with all of it."""
    x, weights, variables = inputs(jnp.float64)
    expected = loss_and_gradient(modules(jnp.float64, True)[0], variables, x, weights)
    module = modules(jnp.float64, True, "data")[0]

    def on_device(x, weights):
        varying = jax.lax.pcast(variables, "data", to="varying")
        (_, (y, new)), (params, dx) = loss_and_gradient(module, varying, x, weights)
        return y, dx, jax.lax.psum(params, "data"), jax.lax.pmean(new, "data")

    if parallel == "pmap":
        split = lambda a: a.reshape(4, -1, *a.shape[1:])  # noqa: E731
        y, dx, params, new = jax.pmap(on_device, "data", out_axes=(0, 0, None, None), devices=jax.devices()[:4])(
            split(x), split(weights)
        )
        y, dx = y.reshape(x.shape), dx.reshape(x.shape)
    else:
        specs = (P("data"), P("data"), P(), P())
        y, dx, params, new = jax.jit(jax.shard_map(on_device, mesh=MESH, in_specs=P("data"), out_specs=specs))(
            x, weights
        )
    (_, (expected_y, expected_new)), (expected_params, expected_dx) = expected
    for a, b in zip(
        jax.tree.leaves((y, dx, params, new)),
        jax.tree.leaves((expected_y, expected_dx, expected_params, expected_new)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-11)


def test_the_statistics_have_no_gradient():
    x, _, variables = inputs(jnp.float32)
    scale, bias = variables["params"]["scale"], variables["params"]["bias"]
    gradient = jax.grad(lambda x: jnp.sum(normalize_batch(x, scale, bias, 1e-5, None)[1]))(x)
    assert not gradient.any()


class ConvNorm(nn.Module):
    """A convolution and a batch norm, as one or one after the other."""

    fold: bool

    @nn.compact
    def __call__(self, x):
        conv, norm = layers.conv_and_norm(dtype=x.dtype, axis_name=None, train=False, kernel_init=layers.kaiming_normal)
        conv, norm = conv(5, 3, 2, name="conv"), norm(name="bn")
        return conv_then_norm(conv, norm, x) if self.fold else norm(conv(x))


@pytest.mark.usefixtures("float64")
def test_folding_equals_the_norm_after_the_convolution():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 9, 8, 3)))
    variables = ConvNorm(True).init(jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, ConvNorm(False).init(jax.random.key(0), x))
    keys = iter(jax.random.split(jax.random.key(1), 9))
    variables = jax.tree.map(lambda a: a + jax.random.uniform(next(keys), a.shape), variables)

    def run(fold):
        loss = lambda v, x: jnp.sum(ConvNorm(fold).apply(v, x) ** 2)  # noqa: E731
        return ConvNorm(fold).apply(variables, x), jax.grad(loss, argnums=(0, 1))(variables, x)

    for a, b in zip(jax.tree.leaves(run(True)), jax.tree.leaves(run(False)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12)


def test_relu_has_the_value_and_derivative_of_jax():
    x = jnp.asarray([-jnp.inf, -1.0, -0.0, 0.0, 1e-45, 1.0, jnp.inf])
    np.testing.assert_array_equal(layers.relu(x), jax.nn.relu(x))
    for f in (layers.relu, jax.nn.relu):
        np.testing.assert_array_equal(jax.vmap(jax.grad(f))(x), [0, 0, 0, 0, 1 if f(x)[4] else 0, 1, 1])
    # The residual of the gradient is the result, so that XLA need not keep x.
    _, pullback = jax.vjp(layers.relu, x)
    assert any(np.array_equal(leaf, layers.relu(x)) or leaf.dtype == bool for leaf in jax.tree.leaves(pullback))

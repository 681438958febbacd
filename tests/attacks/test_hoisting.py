"""`hoist`: what it moves out of a loop, that the results stay, and under which transformations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from lt_adv import attacks
from lt_adv.attacks import convolutions
from lt_adv.attacks.hoisting import hoist

RNG = np.random.default_rng(0)
KERNEL, HEAD = RNG.normal(size=(3, 3, 2, 4)).astype(np.float32), RNG.normal(size=(4, 3)).astype(np.float32)
X = RNG.uniform(size=(4, 6, 6, 2)).astype(np.float32)
LAYOUT = ("NHWC", "HWIO", "NHWC")


def network(x, kernel=KERNEL, head=HEAD, dtype=jnp.bfloat16):
    """A network that casts and scales its kernel, jitted inside and with a custom derivative."""
    kernel = (jnp.asarray(kernel) * lax.rsqrt(jnp.arange(1.0, 5.0))).astype(dtype)
    convolve = jax.jit(lambda x: lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=LAYOUT))
    return jnp.mean(jax.nn.relu(convolve(x.astype(dtype))), (1, 2)).astype(x.dtype) @ head


def primitives(function, *args):
    return [equation.primitive.name for equation in jax.make_jaxpr(function)(*args).eqns]


def test_work_on_the_parameters_is_hoisted():
    """The casts, scales and transposed kernels are computed once; nothing but x is cast in the loop."""
    before, after = primitives(network, X), primitives(hoist(network, X), X)
    assert before.count("convert_element_type") > after.count("convert_element_type") and "rsqrt" not in after
    assert after.count("conv_general_dilated") == 1  # inlined from the inner jit


def test_a_broadcast_stays_in_the_loop():
    """It would become an array of the size of the images in memory."""
    scale = jnp.ones(2)
    f = hoist(lambda x: x * jnp.broadcast_to(scale * 2, x.shape), X)
    assert primitives(f, X) == ["broadcast_in_dim", "mul"]


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_a_mirrored_kernel_is_hoisted_where_that_is_fast(platform):
    gradient = jax.grad(lambda x: jnp.sum(network(x) ** 2))
    with convolutions.tracing_for(platform):
        names = primitives(hoist(convolutions.with_fast_convolutions(gradient), X), X)
    assert ("rev" in names) == (platform != "cpu")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_results_and_derivatives_stay(dtype):
    f = lambda x: network(x, dtype=dtype)  # noqa: E731
    for transform in (lambda f: f, jax.jit, lambda f: jax.jit(jax.grad(lambda x: jnp.sum(f(x) ** 2)))):
        np.testing.assert_array_equal(transform(hoist(f, X))(X), transform(f)(X))


def test_a_gradient_flows_to_the_parameters():
    """A training method may differentiate a network of which an attack's loop uses the hoisted form."""

    def loss(kernel, hoisted):
        f = lambda x: network(x, kernel)  # noqa: E731
        return jnp.sum((hoist(f, X) if hoisted else f)(X) ** 2)

    np.testing.assert_array_equal(jax.grad(loss)(KERNEL, True), jax.grad(loss)(KERNEL, False))


def test_several_arguments_and_pytrees():
    keys = jax.random.split(jax.random.key(0), 4)

    def noisy(x, keys):
        noise = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:]))(keys)
        return {"logits": network(x + noise), "constant": jnp.float32(3)}

    for a, b in zip(jax.tree.leaves(hoist(noisy, X, keys)(X, keys)), jax.tree.leaves(noisy(X, keys)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("parallel", ["pmap", "shard_map"])
def test_on_devices(parallel):
    """Keeps the mesh axes over which x and the parameters vary."""

    def on_device(x):
        own = jnp.asarray(KERNEL) * (1 + lax.axis_index("data"))  # differs between devices
        f = lambda x: network(x, own)  # noqa: E731
        step = hoist(jax.grad(lambda x: jnp.sum(f(x) ** 2)), x)
        return lax.fori_loop(0, 3, lambda _, x: x + jnp.sign(step(x)), x), lax.pmean(jnp.sum(f(x)), "data")

    if parallel == "pmap":
        mapped = jax.pmap(on_device, "data", out_axes=(0, None), devices=jax.devices()[:2])
        actual = mapped(X.reshape(2, 2, *X.shape[1:]))
    else:
        mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
        actual = jax.jit(jax.shard_map(on_device, mesh=mesh, in_specs=P("data"), out_specs=(P("data"), P())))(X)
    for device in range(2):
        f = lambda x: network(x, jnp.asarray(KERNEL) * (1 + device))  # noqa: B023, E731
        x = X[2 * device : 2 * device + 2]
        for _ in range(3):
            x = x + jnp.sign(jax.jit(jax.grad(lambda x: jnp.sum(f(x) ** 2)))(x))  # noqa: B023
        np.testing.assert_array_equal(np.asarray(actual[0]).reshape(X.shape)[2 * device : 2 * device + 2], x)


def test_effects_stay_in_the_loop():
    seen = []

    def f(x):
        jax.debug.callback(lambda: seen.append(1))
        return x * 2

    g = hoist(f, X)
    assert not seen
    for _ in range(2):
        g(X)
    jax.effects_barrier()
    assert len(seen) == 2


def test_equations_keep_their_lines_of_source():
    """A profile names the layer, not the transformation."""
    text = jax.jit(hoist(network, X)).lower(X).as_text(debug_info=True)
    assert "test_hoisting.py" in text and "jaxprs.py" not in text.split("convolution")[1][:200]


def test_the_loop_of_pgd_casts_no_kernel():
    """On all platforms: a kernel is cast before the loop, in the training attack as well as in AutoAttack's steps."""
    y = jnp.zeros(4, int)
    attack = lambda x: attacks.pgd(jax.random.key(0), network, x, y, eps=0.1, step_size=0.1, num_steps=5)  # noqa: E731
    jaxpr = jax.make_jaxpr(attack)(X)

    def bodies(jaxpr):
        for equation in jaxpr.eqns:
            for name, value in equation.params.items():
                if hasattr(inner := getattr(value, "jaxpr", value), "eqns"):
                    if equation.primitive.name in ("scan", "while") and name in ("jaxpr", "body_jaxpr"):
                        yield inner
                    yield from bodies(inner)

    (body,) = [b for b in bodies(jaxpr) if any(e.primitive.name == "conv_general_dilated" for e in b.eqns)]
    casts = [
        e for e in body.eqns if e.primitive.name == "convert_element_type" and e.outvars[0].aval.shape == KERNEL.shape
    ]
    assert not casts and any(e.primitive.name == "conv_general_dilated" for e in body.eqns)

"""FLOP counts of small functions, computed by hand, and of networks with known cost."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from experiments.benchmark import flops
from lt_adv import data
from lt_adv.cli import flags
from lt_adv.cli.experiment import Experiment
from lt_adv.training import sharding, stage_builder


def flops_of(function, *shapes):
    return flops.count(jax.make_jaxpr(function)(*(jnp.zeros(shape) for shape in shapes)))


def convolution(x, w, stride=1, groups=1):
    dimensions = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, w, (stride,) * 2, ((1, 1), (1, 1)), dimension_numbers=dimensions, feature_group_count=groups
    )


def test_matrix_products():
    assert flops_of(lambda a, b: a @ b, (3, 5), (5, 7)) == 2 * 3 * 5 * 7
    assert flops_of(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (4, 3, 5), (4, 5, 7)) == 4 * 2 * 3 * 5 * 7
    assert flops_of(lambda a: jnp.tanh(a) + a.sum(), (3, 5)) == 0


@pytest.mark.parametrize("stride", [1, 2])
def test_convolution_and_its_gradients_cost_the_same(stride):
    x, w = (2, 8, 8, 3), (3, 3, 3, 5)
    forward = 2 * 2 * (8 // stride) ** 2 * 5 * 3 * 3 * 3
    assert flops_of(lambda x, w: convolution(x, w, stride), x, w) == forward
    for argument in (0, 1):  # the forward is traced as well
        assert flops_of(jax.grad(lambda x, w: convolution(x, w, stride).sum(), argument), x, w) == 2 * forward
    assert flops_of(jax.grad(lambda x, w: (convolution(x, w, stride) ** 2).sum(), (0, 1)), x, w) == 3 * forward


def test_grouped_convolution():
    assert flops_of(lambda x, w: convolution(x, w, groups=3), (1, 4, 4, 6), (3, 3, 2, 9)) == 2 * 16 * 9 * 9 * 2


def test_loops_and_branches():
    w, product = jnp.eye(6), 2 * 6 * 6 * 6

    def body(_, a):
        return a @ w

    assert flops_of(lambda a: lax.fori_loop(0, 7, body, a), (6, 6)) == 7 * product
    assert flops_of(lambda a: lax.fori_loop(0, 7, body, a, unroll=True), (6, 6)) == 7 * product
    assert flops_of(lambda a: lax.scan(lambda a, _: (a @ w @ w, None), a, length=3)[0], (6, 6)) == 6 * product
    assert flops_of(lambda a: lax.cond(a.sum() > 0, lambda a: a @ w, lambda a: a @ w @ w, a), (6, 6)) == 2 * product
    assert flops_of(lambda a: lax.while_loop(lambda a: a.sum() < 9, lambda a: a + 1, a) @ w, (6, 6)) == product
    with pytest.raises(ValueError, match="How often while"):
        flops_of(lambda a: lax.while_loop(lambda a: a.sum() < 9, lambda a: a @ w, a), (6, 6))


def test_calls_are_counted_and_equal_equations_count_once():
    product = 2 * 6 * 6 * 6

    @jax.custom_vjp
    def squared(a):
        return a @ a

    squared.defvjp(lambda a: (a @ a, a), lambda a, g: (g @ a.T + a.T @ g,))
    assert (
        flops_of(squared, (6, 6)) == product and flops_of(jax.grad(lambda a: squared(a).sum()), (6, 6)) == 3 * product
    )
    assert flops_of(jax.jit(lambda a: jax.checkpoint(lambda a: a @ a)(a)), (6, 6)) == product
    assert flops_of(lambda a: jax.jit(lambda a: a @ a)(a) + a @ a, (6, 6)) == product
    assert flops_of(lambda a, b: a @ b + b @ a, (6, 6), (6, 6)) == 2 * product
    first, second = np.eye(6), np.ones((6, 6))
    assert flops_of(lambda a: a @ first + a @ second, (6, 6)) == 2 * product


@pytest.mark.parametrize("devices", [1, 4])
def test_shard_map_counts_all_devices(devices):
    mesh = sharding.make_mesh(jax.devices()[:devices])
    share = jax.shard_map(lambda a, b: a @ b, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"))
    assert flops_of(share, (8, 5), (5, 7)) == 2 * 8 * 5 * 7


@pytest.fixture(scope="module")
def build():
    rng = np.random.default_rng(0)

    def split(n):
        image = rng.integers(0, 256, (n, 32, 32, 3), np.uint8)
        return data.Split(image, (np.arange(n) % 10).astype(np.int32), np.arange(n))

    images = data.Dataset("random", split(1000), split(10), tuple("abcdefghij"), "digest")

    def build(config, *entries):
        arguments = ["", f"--config=configs/{config}", "--config.optim.batch_size=16", *entries]
        config = flags.parse(arguments).config
        mesh = sharding.make_mesh(jax.devices()[:1])
        return stage_builder.build(Experiment.from_config(config, dataset=images, mesh=mesh).resolved_stages[0], mesh)

    return build


def wide_resnet_multiply_adds(depth, width):
    """Returns the multiply-adds of a WRN on 32 x 32 images, layer by layer."""
    total, inputs, side = 32 * 32 * 9 * 3 * 16, 16, 32
    for stage, channels in enumerate((16 * width, 32 * width, 64 * width)):
        side //= 2 if stage else 1
        for _ in range((depth - 4) // 6):
            total += side**2 * 9 * (inputs * channels + channels**2)
            total += side**2 * inputs * channels * (inputs != channels)
            inputs = channels
    return total + inputs * 10


@pytest.mark.parametrize(("depth", "width"), [(10, 2), (28, 10), (34, 10)])
def test_forward_of_a_wide_resnet(depth, width):
    config = {"name": "wide_resnet", "depth": depth, "width": width}
    assert flops.forward(config, (32, 32, 3), 10) == 2 * wide_resnet_multiply_adds(depth, width)
    assert flops.forward({**config, "dtype": "bfloat16"}, (32, 32, 3), 10) == 2 * wide_resnet_multiply_adds(
        depth, width
    )


# (config, entries, GFLOP of a step per image, equivalent number of forwards). An attack step is a forward and an image
# gradient; the update has two gradients per forward, except that of the image.
STEPS = [
    ("at_bsl.py:dataset=cifar10", [], 25.6, 23),
    ("robal.py:dataset=cifar10", ["--config.model.depth=28"], 168, 16),
    ("robal.py:dataset=cifar10", [], 213, 16),
    ("trades.py:dataset=cifar10", ["--config.model.depth=10"], None, 17),
]


@pytest.mark.slow
@pytest.mark.parametrize(("config", "entries", "expected", "passes"), STEPS)
def test_cost_of_a_step(build, config, entries, expected, passes):
    program = build(config, *entries)
    step = flops.step(program)
    forward = flops.forward(program.config.model, (32, 32, 3), 10)
    assert step / forward == pytest.approx(passes, rel=0.01) and step < passes * forward
    if expected:
        assert step / 1e9 == pytest.approx(expected, rel=0.01)


SMALL = ["--config.model.depth=10", "--config.model.width=1"]


@pytest.mark.slow
def test_attack_step_is_a_forward_and_a_gradient(build):
    @functools.cache
    def step(number):
        return flops.step(build("robal.py:dataset=cifar10", *SMALL, f"--config.attack.num_steps={number}"))

    forward = 2 * wide_resnet_multiply_adds(10, 1)
    assert step(1) - step(0) == 2 * forward and step(3) - step(0) == 3 * 2 * forward
    for name in ("fgsm", "fgsm_rs", "n_fgsm"):  # one step, whatever config.attack.num_steps is
        config = ("robal.py:dataset=cifar10", *SMALL, f"--config.attack.name={name}")
        assert flops.step(build(*config)) == step(1), name


def test_repeated_forwards_of_the_released_code_count_once(build):
    released = build("robal.py:dataset=cifar10", *SMALL, "--config.fidelity=released_code")
    assert flops.step(released) == flops.step(build("robal.py:dataset=cifar10", *SMALL))

"""`create`: names, dtypes and device axis; modes of a classifier's apply."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from lt_adv.models import create

SMALL = {"name": "wide_resnet", "depth": 10, "width": 1, "head": {"name": "cosine_plus"}}


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).random((16, 8, 8, 3), np.float32)


def random_variables(classifier, x):
    """Random variables of the classifier from numpy, because compiling `init` takes seconds on CPU."""
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        values = rng.normal(0, 0.2, leaf.shape).astype(leaf.dtype)
        return 1 + np.abs(values) if path[-1].key in ("scale", "var") else values

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(classifier.init, jax.random.key(0), x))


def test_only_training_updates_the_statistics(images):
    classifier = create(SMALL, 10)
    variables = random_variables(classifier, images)
    logits, out = jax.jit(classifier.apply)(variables, images)
    assert logits.shape == (16, 10) and out["features"].shape == (16, 64)
    (train_logits, _), updates = jax.jit(
        lambda variables, x: classifier.apply(variables, x, train=True, mutable=["batch_stats"])
    )(variables, images)
    assert np.abs(train_logits - logits).max() > 1e-3
    changed = jax.tree.map(lambda old, new: bool((old != new).all()), variables["batch_stats"], updates["batch_stats"])
    assert all(jax.tree.leaves(changed))


def test_bfloat16_network_has_float32_parameters_and_outputs(images):
    narrow, wide = (create({**SMALL, "dtype": dtype}, 10) for dtype in ("bfloat16", "float32"))
    variables = random_variables(narrow, images)
    mutable = ["batch_stats", "intermediates"]
    (logits, out), updates = jax.jit(
        lambda variables, x: narrow.apply(variables, x, train=True, mutable=mutable, capture_intermediates=True)
    )(variables, images)
    outputs = (variables, logits, out, updates["batch_stats"])
    assert {leaf.dtype for leaf in jax.tree.leaves(outputs)} == {jnp.dtype("float32")}
    inside = updates["intermediates"]["backbone"]["stage2_block0"]
    assert {leaf.dtype for leaf in jax.tree.leaves(inside)} == {jnp.dtype("bfloat16")}
    (exact, _), _ = jax.jit(lambda variables, x: wide.apply(variables, x, train=True, mutable=mutable))(
        variables, images
    )
    distance = np.abs(logits - exact).max() / np.abs(exact).max()
    assert 0 < distance < 0.05, distance


def test_float64_network_is_all_float64():
    with jax.enable_x64(True):
        classifier = create({**SMALL, "dtype": "float64"}, 10)
        shapes = jax.eval_shape(classifier.init_with_output, jax.random.key(0), jnp.ones((2, 8, 8, 3)))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float64")}


@pytest.mark.parametrize("parallel", ["pmap", "shard_map"])
def test_batch_statistics_are_global_over_the_device_axis(images, parallel):
    with jax.enable_x64(True):
        x = jnp.asarray(images, jnp.float64)
        config = {**SMALL, "dtype": "float64"}
        variables = random_variables(create(config, 10), x)

        def forward(classifier):
            def run(variables, x):
                (logits, _), updates = classifier.apply(variables, x, train=True, mutable=["batch_stats"])
                return logits, updates["batch_stats"]

            return run

        expected_logits, expected = jax.jit(forward(create(config, 10)))(variables, x)
        run = forward(create(config, 10, axis_name="data"))
        if parallel == "pmap":
            logits, statistics = jax.pmap(run, axis_name="data", in_axes=(None, 0), out_axes=(0, None))(
                variables, x.reshape(8, 2, 8, 8, 3)
            )
            logits = logits.reshape(16, 10)
        else:
            mesh = Mesh(np.array(jax.devices()), ("data",))
            replicated, split = PartitionSpec(), PartitionSpec("data")
            # check_vma proves that the new statistics are the same on every device
            logits, statistics = jax.jit(
                jax.shard_map(
                    run, mesh=mesh, in_specs=(replicated, split), out_specs=(split, replicated), check_vma=True
                )
            )(variables, x)
        np.testing.assert_allclose(logits, expected_logits, rtol=0, atol=1e-12)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13), statistics, expected)


def test_dropout_is_active_in_training_only(images):
    classifier = create({**SMALL, "dropout": 0.5}, 10)
    variables = random_variables(classifier, images)

    @jax.jit
    def train(seed):
        rngs = {"dropout": jax.random.key(seed)}
        return classifier.apply(variables, images, train=True, mutable=["batch_stats"], rngs=rngs)[0][0]

    assert (train(0) == train(0)).all() and (train(0) != train(1)).any()
    evaluate, no_dropout = jax.jit(classifier.apply), jax.jit(create(SMALL, 10).apply)
    np.testing.assert_array_equal(evaluate(variables, images)[0], no_dropout(variables, images)[0])


def test_options_of_other_backbones_and_heads_are_ignored():
    options = {"depth": 10, "width": 1, "dropout": 0.0, "head": {"name": "linear", "scale": 10.0, "gamma": 0.1}}
    assert create({"name": "resnet18", **options}, 10).head.num_classes == 10
    assert create({"name": "wide_resnet", **options}, 10).backbone.depth == 10
    options["head"]["name"] = "cosine"
    assert create({"name": "wide_resnet", **options}, 10).head.scale == 10.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "wide_resent"}, "Unknown model 'wide_resent'. Did you mean 'wide_resnet'"),
        ({"head": {"name": "cosine_plu"}}, "Unknown head 'cosine_plu'. Did you mean 'cosine_plus'"),
        ({"head": {"name": "cosine", "gama": 0.1}}, "Unknown option of head 'cosine': 'gama'. Did you mean 'gamma'"),
        ({"widht": 2}, "'widht'. Did you mean 'width'"),
        ({"dtype": "float16"}, "Unknown model dtype 'float16'"),
        ({"depth": 20}, "must be 6 n \\+ 4"),
        ({"width": 0}, "at least 1, not 0"),
        ({"dropout": 1.0}, r"dropout rate must be in \[0, 1\), not 1"),
    ],
)
def test_invalid_config_is_refused_in_one_line(change, message):
    with pytest.raises(ValueError, match=message) as error:
        create({**SMALL, **change}, 10)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("x", [np.zeros((1, 8, 8, 3), np.uint8), np.zeros((8, 8, 3), np.float32)])
def test_images_must_be_a_floating_point_batch(x):
    with pytest.raises(ValueError, match="floating-point images"):
        jax.eval_shape(create(SMALL, 10).init, jax.random.key(0), x)


def test_at_least_two_classes():
    with pytest.raises(ValueError, match="at least 2 classes"):
        create(SMALL, 1)


MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)


@pytest.mark.parametrize(("mean", "std"), [(MEAN, STD), ([0.5], [0.25])])
@pytest.mark.parametrize("train", [False, True])
def test_normalised_network_is_the_plain_one_on_normalised_images(images, train, mean, std):
    plain, normalised = create(SMALL, 10), create({**SMALL, "mean": mean, "std": std}, 10)
    variables = random_variables(plain, images)
    assert jax.tree.structure(random_variables(normalised, images)) == jax.tree.structure(variables)

    def forward(model):
        mutable = ["batch_stats"] if train else False
        return jax.jit(lambda x: model.apply(variables, x, train=train, mutable=mutable))

    def check(actual, expected):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6 * np.abs(expected).max())

    jax.tree.map(check, forward(normalised)(images), forward(plain)((images - np.float32(mean)) / np.float32(std)))


def test_network_without_normalisation_is_the_same_program(images):
    variables = random_variables(create(SMALL, 10), images)

    def program(config):
        return str(jax.make_jaxpr(create(config, 10).apply)(variables, images))

    assert program({**SMALL, "mean": (), "std": ()}) == program(SMALL) != program({**SMALL, "mean": MEAN, "std": STD})


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_normalisation_is_computed_in_the_dtype_of_the_images(images, dtype):
    """A network in bfloat16 rounds the normalised image."""
    with jax.enable_x64(dtype == "float64"):
        x = images.astype(jnp.promote_types(dtype, np.float32))
        mean, std = (np.array(values, x.dtype).reshape(1, 1, 1, 3) for values in (MEAN, STD))
        plain = create({**SMALL, "dtype": dtype}, 10)
        normalised = create({**SMALL, "dtype": dtype, "mean": MEAN, "std": STD}, 10)
        variables = random_variables(plain, x)
        logits, _ = jax.jit(normalised.apply)(variables, x)
        expected, _ = jax.jit(lambda variables, x: plain.apply(variables, (x - mean) / std))(variables, x)
    assert logits.dtype == x.dtype
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-14 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("normalisation", "line"),
    [
        ({"mean": MEAN}, "model.mean has 3 values and model.std has 0: give as many of each, or none."),
        ({"mean": MEAN, "std": (0.2,)}, "model.mean has 3 values and model.std has 1: give as many of each, or none."),
        ({"mean": (125.3,), "std": (63.0,)}, "item of model.mean must be a number in [0, 1], not 125.3: pixels lie in"),
        (
            {"mean": (0.5,), "std": (0,)},
            "item of model.std must be a number in [0.001, 1], not 0: pixels lie in [0, 1].",
        ),
        ({"mean": (0.5,), "std": (float("nan"),)}, "item of model.std must be a number in [0.001, 1], not nan"),
        ({"mean": 0.5, "std": 0.5}, "model.mean must be a tuple of numbers, not 0.5."),
        ({"mean": ("0.5",), "std": (0.5,)}, "item of model.mean must be a number in [0, 1], not '0.5'"),
    ],
)
def test_normalisation_that_does_not_fit(normalisation, line):
    with pytest.raises(ValueError) as error:
        create({**SMALL, **normalisation}, 10)
    assert line in str(error.value) and "\n" not in str(error.value)

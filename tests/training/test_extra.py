"""Extra images in each batch of the training step: on the devices or streamed, on one device or eight, resumed."""

import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import at_bsl
from lt_adv import methods
from lt_adv.cli import record_header
from lt_adv.cli.experiment import Experiment
from lt_adv.data import Split, device_dataset
from lt_adv.data.abstract import abstract_extra
from lt_adv.data.device_dataset import ExtraDraws
from lt_adv.data.extra import Extra
from lt_adv.methods import DataInfo
from lt_adv.training import checkpoint_hook, input_pipeline, sharding, stage_builder
from tests.training.helpers import COUNTS, assert_same, make, run, split
from tests.training.test_streamed import assert_same_bits, run_steps

METHOD = methods.create({"name": "at"}, num_steps=1)
PER_EPOCH = len(split()) // 16


def draws(number=9, per_batch=6):
    rng = np.random.default_rng(7)
    image = rng.integers(0, 256, (number, 6, 6, 1), dtype=np.uint8)
    return ExtraDraws(Split(image, np.arange(number, dtype=np.int32) % 4, -1 - np.arange(number)), per_batch)


def test_every_step_gets_the_images_of_its_rows():
    """Of both sets: pixels, labels and original indices, resumed within the second epoch."""
    real, extra, key = split(), draws(), jax.random.key(3)
    info = DataInfo(COUNTS, PER_EPOCH, epochs=3, image_shape=(6, 6, 1), num_features=1)
    mesh = sharding.make_mesh(jax.devices()[:2])
    pipeline = input_pipeline.resident(real, None, key, info, 16, mesh, extra=extra)
    image, label, index = (
        np.concatenate([getattr(part, name) for part in (real, extra.split)]) for name in ("image", "label", "index")
    )
    with pipeline.batches(PER_EPOCH + 1, 2 * PER_EPOCH + 1) as batches:
        for step, batch in enumerate(batches, PER_EPOCH + 1):
            options = {"num_examples": len(real), "batch_size": 16, "extra": extra}
            row = np.asarray(device_dataset.batch_rows(key, step // PER_EPOCH, step % PER_EPOCH, **options))
            columns = {name: np.asarray(batch[name])[step % PER_EPOCH] for name in ("row", "label", "index")}
            np.testing.assert_array_equal(columns["row"], row)
            np.testing.assert_array_equal(columns["label"], label[row])
            np.testing.assert_array_equal(columns["index"], index[row])
            np.testing.assert_array_equal(batch["image"][row], image[row].reshape(16, -1))
            assert (columns["index"] < 0).sum() == 6


def test_the_step_does_not_depend_on_the_sizes_of_the_sets():
    """Its program has the number of images of both in one place, the shape of their array."""
    texts = []
    for number in (13_969, 199_963):
        step, state, pipeline, teacher = make(METHOD, 2, extra=draws(number))
        assert pipeline.example["image"].shape == (len(split()) + number, 36)
        texts.append(str(jax.make_jaxpr(step)(state, pipeline.example, teacher)).replace(str(40 + number), "images"))
    assert texts[0] == texts[1]
    without = make(METHOD, 2)[2].example
    assert {name: a.shape for name, a in without.items() if name != "image"} == {
        name: a.shape for name, a in pipeline.example.items() if name != "image"
    }


@pytest.mark.slow
@pytest.mark.parametrize(("parallel", "devices", "sampler"), [("pmap", 2, "uniform"), ("shard_map", 2, "class_aware")])
def test_streamed_equals_resident_bit_for_bit(parallel, devices, sampler, caplog):
    """Until the second epoch, with a restart within it; compiled once."""
    options = {"extra": draws(), "sampler": sampler}
    total = (PER_EPOCH if sampler == "uniform" else 4 * COUNTS.max() // 16) + 3
    expected = run(METHOD, devices, parallel, steps=total, **options)
    step, state, pipeline, teacher = make(METHOD, devices, parallel, streamed=True, **options)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        state, before = run_steps(step, state, pipeline, teacher, 0, total - 2)
        state, after = run_steps(step, state, pipeline, teacher, total - 2, total)
    if parallel == "shard_map":  # pmap does not log the name of the function
        assert sum("Finished XLA compilation of jit(sharded_step)" in line for line in caplog.messages) == 1
    assert_same_bits((state.replace(key=jax.random.key_data(state.key)), before + after), expected)


def local_batches(mesh, parallel):
    """Returns the streamed columns that this process has in each of four steps, the second epoch's first ones among
    them; for tests/test_distributed.py too."""
    info = DataInfo(COUNTS, PER_EPOCH, epochs=3, image_shape=(6, 6, 1), num_features=1)
    key = jax.random.key(3)
    pipeline = input_pipeline.streamed(split(), None, key, info, 16, mesh, parallel, extra=draws())
    with pipeline.batches(PER_EPOCH - 2, PER_EPOCH + 2) as batches:
        return [
            {
                name: np.concatenate([np.asarray(shard.data).ravel() for shard in column.addressable_shards])
                for name, column in batch.items()
            }
            for batch in batches
        ]


@pytest.mark.slow
def test_number_of_devices_and_their_program_change_nothing(float64):
    one, eight = (run(METHOD, *devices, extra=draws()) for devices in ((1, "shard_map"), (8, "pmap")))
    assert_same(eight, one, 1e-9)


@pytest.fixture
def config(tmp_path):
    """Digits with a file of 20 extra images, all of class 9."""
    image = np.random.RandomState(0).randint(0, 256, (20, 8, 8, 1)).astype(np.uint8)
    np.savez(tmp_path / "extra.npz", image=image, label=np.full(20, 9))
    c = at_bsl.get_config("dataset=digits,epochs=1")
    c.data.data_dir, c.data.extra = str(tmp_path / "data"), str(tmp_path / "extra.npz")
    c.data.extra_fraction = 0.25
    return c


def resolve(config, **options):
    config.data.update(options)
    mesh = sharding.make_mesh(jax.devices()[:1])
    (resolved,) = Experiment.from_config(config, mesh=mesh).resolved_stages
    return resolved


def test_stage_of_a_config(config):
    """Steps per epoch are those without extra images, and so are the class counts, unless the prior is the mixture."""
    real, mixture = resolve(config), resolve(config, extra_prior="mixture")
    plain = resolve(config, extra="", extra_fraction=0.0, extra_prior="real")
    assert real.extra_draws.per_batch == 16 and real.info.steps_per_epoch == plain.info.steps_per_epoch
    np.testing.assert_array_equal(real.info.class_counts, plain.info.class_counts)
    n = np.asarray(plain.split.class_counts)
    np.testing.assert_allclose(mixture.info.class_counts, n + np.eye(10)[9] * n.sum() / 3, rtol=1e-15)
    assert plain.describe_extra() is None and plain.extra_draws is None
    described = record_header.describe_extra(mixture.describe_extra())
    pattern = (
        r"extra\.npz, 20 images, 16 of 64 images of a batch, prior mixture, digest [0-9a-f]{16}, 0 of them test images"
    )
    assert re.fullmatch(pattern, described)


def test_extra_images_are_compared_with_those_of_the_evaluation(config, caplog):
    """Also with images of the validation split that the training set does not use."""
    config.data.update({"validation_per_class": 2, "validation_from": "unused"})
    held_out = Experiment.from_config(config.copy_and_resolve_references()).split
    image = np.concatenate([held_out.test.image[:3], held_out.validation.image[:2], held_out.train.image[:4]])
    np.savez(config.data.extra, image=image, label=np.full(9, 1))
    assert resolve(config).describe_extra()["copies"] == {"validation": 2, "test": 3}
    assert "3 of 9 images are also test images" in caplog.text and "2 of 9 images are also validation" in caplog.text


def test_the_evaluation_has_the_prior_of_the_method(config):
    """Logit adjustment after training subtracts the log prior of the mixture."""
    resolved = resolve(config, extra_prior="mixture")
    resolved.config.eval.adjustment = {"name": "logit_adjustment", "tau": 1.0}
    counts = resolved.info.class_counts
    apply = stage_builder.evaluation_apply(resolved.config, resolved.split, counts)
    variables = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), resolved.variable_shapes)  # logits of zero
    actual = jax.jit(apply)(variables, jnp.ones((1, 8, 8, 1)))[0]
    np.testing.assert_allclose(actual, -np.log(counts / counts.sum()), rtol=1e-6)


def test_both_sets_count_for_the_limit_of_the_device_memory(config):
    resolved = resolve(config)
    size = resolved.split.train.image.nbytes + resolved.extra.split.image.nbytes
    for limit, streamed in ((size, False), (size - 1, True)):
        resolved.config.data.max_device_gib = limit / 2**30
        assert stage_builder._make_step(resolved, sharding.make_mesh(jax.devices()[:1])).streamed == streamed


def test_resuming_with_other_extra_images_is_refused(config):
    stage = resolve(config).describe_extra()
    meta = {"data_digest": "a", "devices": 1, "jax_version": "b", "extra": stage}
    checkpoint_hook.check_same_run(meta, dict(meta), "run")
    for other in (None, {**stage, "digest": "other"}, {**stage, "per_batch": 17}):
        with pytest.raises(ValueError, match=r"run was trained with other extra images, or another use of them"):
            checkpoint_hook.check_same_run(meta, {**meta, "extra": other}, "run")


@pytest.mark.parametrize(
    ("fraction", "message"),
    [(0.001, "0.001 is 0 of the 64 images of a batch"), (0.999, "0.999 is 64 of the 64 images of a batch")],
)
def test_a_batch_needs_images_of_both_sets(config, fraction, message):
    with pytest.raises(ValueError, match=message):
        resolve(config, extra_fraction=fraction)


def test_extra_images_of_a_compiled_run_have_a_shape_only(config):
    extra = abstract_extra(config.data, (8, 8, 1))
    assert isinstance(extra, Extra) and extra.split.image.shape == (20, 8, 8, 1)
    with pytest.raises(FileNotFoundError, match="There is no file or folder nowhere"):
        abstract_extra({"extra": "nowhere"}, (8, 8, 1))
    assert abstract_extra({"extra": ""}, (8, 8, 1)) is None

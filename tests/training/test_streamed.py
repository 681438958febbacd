"""Training on prefetched batches gives the same bits as training on a set that the devices hold."""

import logging

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from configs import robal
from lt_adv import data, methods
from lt_adv.cli.experiment import Experiment
from lt_adv.training import stage_builder
from tests.training.helpers import make, run, split

METHOD = methods.create({"name": "at"}, num_steps=2)
PER_EPOCH = len(split()) // 16


def run_steps(step, state, pipeline, teacher, first, last):
    rows = []
    with pipeline.batches(first, last) as batches:
        for batch in batches:
            with jax.transfer_guard("disallow"):
                state, metrics = step(state, batch, teacher)
            rows.append(jax.device_get(metrics))
    return state, rows


def assert_same_bits(actual, expected):
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), jax.tree_util.keystr(path)


@pytest.mark.slow
@pytest.mark.parametrize(("parallel", "devices"), [("pmap", 2), ("shard_map", 2), ("shard_map", 1)])
def test_streamed_equals_resident_bit_for_bit(parallel, devices, caplog):
    """Until the second epoch, with a restart within it; compiled once."""
    check_equals_resident(parallel, devices, caplog)


@pytest.mark.slow
def test_streamed_class_aware_sampling_equals_resident(caplog):
    check_equals_resident("shard_map", 2, caplog, sampler="class_aware", cycles=True)


def check_equals_resident(parallel, devices, caplog, **options):
    expected = run(METHOD, devices, parallel, steps=PER_EPOCH + 3, **options)
    step, state, pipeline, teacher = make(METHOD, devices, parallel, streamed=True, **options)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        state, before = run_steps(step, state, pipeline, teacher, 0, PER_EPOCH + 1)
        state, after = run_steps(step, state, pipeline, teacher, PER_EPOCH + 1, PER_EPOCH + 3)
    if parallel == "shard_map":  # pmap does not log the name of the function
        assert sum("Finished XLA compilation of jit(sharded_step)" in line for line in caplog.messages) == 1
    assert_same_bits((state.replace(key=jax.random.key_data(state.key)), before + after), expected)


@pytest.mark.parametrize("sampler", ["uniform", "class_aware"])
def test_a_set_larger_than_max_device_gib_is_streamed(sampler):
    """A set that is one byte larger than the limit is streamed, with the sampler of the config."""
    config = robal.get_config("dataset=digits,epochs=1")
    config.data.sampler = sampler
    long_tailed = data.long_tailed(data.load(config.data), config.data)
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    for fits, size in ((True, long_tailed.train.image.nbytes), (False, long_tailed.train.image.nbytes - 1)):
        config.data.max_device_gib = size / 2**30
        pipeline = stage_builder.build(Experiment.from_config(config, mesh=mesh).resolved_stages[0], mesh).pipeline
        assert isinstance(pipeline.example["image"], jax.Array) == fits
        with pipeline.batches(0, 1) as batches:
            label = np.asarray(next(batches)["label"])
        if not fits:
            common = np.mean(label == np.argmax(long_tailed.class_counts))
            assert common < 0.2 if sampler == "class_aware" else common > 0.2

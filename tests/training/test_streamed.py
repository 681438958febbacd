"""A stage whose batches are read ahead of its steps: bit for bit the one whose set lives on the devices."""

import logging

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from configs import robal
from lt_adv import data, methods
from lt_adv.training import stage_builder
from tests.training.helpers import make, run, split

METHOD = methods.create({"name": "at"}, num_steps=2)
PER_EPOCH = len(split()) // 16


def go(step, state, feed, teacher, first, last):
    rows = []
    with feed.batches(first, last) as batches:
        for batch in batches:
            with jax.transfer_guard("disallow"):
                state, metrics = step(state, batch, teacher)
            rows.append(jax.device_get(metrics))
    return state, rows


def assert_same_bits(found, expected):
    for (path, mine), theirs in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        assert np.asarray(mine).tobytes() == np.asarray(theirs).tobytes(), jax.tree_util.keystr(path)


@pytest.mark.parametrize(("parallel", "devices"), [("pmap", 2), ("shard_map", 2), ("shard_map", 1)])
def test_as_from_a_resident_set(parallel, devices, caplog):
    """Into the second epoch, stopped in its middle; compiled once."""
    as_from_a_resident_set(parallel, devices, caplog)


def test_class_aware_draws_as_from_a_resident_set(caplog):
    as_from_a_resident_set("shard_map", 2, caplog, sampler="class_aware", cycles=True)


def as_from_a_resident_set(parallel, devices, caplog, **options):
    expected = run(METHOD, devices, parallel, steps=PER_EPOCH + 3, **options)
    step, state, feed, teacher = make(METHOD, devices, parallel, streamed=True, **options)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        state, before = go(step, state, feed, teacher, 0, PER_EPOCH + 1)
        state, after = go(step, state, feed, teacher, PER_EPOCH + 1, PER_EPOCH + 3)
    if parallel == "shard_map":  # pmap logs no name of ours
        assert sum("Finished XLA compilation of jit(sharded_step)" in line for line in caplog.messages) == 1
    assert_same_bits((state.replace(key=jax.random.key_data(state.key)), before + after), expected)


@pytest.mark.parametrize("sampler", ["uniform", "class_aware"])
def test_a_set_is_streamed_by_its_size(sampler):
    """One byte more than fits, and it is; the draws are those that the config asks for."""
    config = robal.get_config("dataset=digits,epochs=1")
    config.data.sampler = sampler
    cut, mesh = data.long_tailed(data.load(config.data), config.data), Mesh(np.array(jax.devices()[:1]), ("data",))
    for fits, size in ((True, cut.train.image.nbytes), (False, cut.train.image.nbytes - 1)):
        config.data.resident_gib = size / 2**30
        feed = stage_builder.build(0, stage_builder.stages(config)[0], config, data.load(config.data), mesh).feed
        assert isinstance(feed.example["image"], jax.Array) == fits
        with feed.batches(0, 1) as batches:
            label = np.asarray(next(batches)["label"])
        if not fits:
            common = np.mean(label == np.argmax(cut.class_counts))
            assert common < 0.2 if sampler == "class_aware" else common > 0.2

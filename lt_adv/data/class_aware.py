"""Class-aware draws in cycles, as the sampler of Kang et al. (ICLR 2020) in the released code of RoBal's study.

A draw is a function of the key and of its position: nothing is carried from step to step and nothing is sorted, so that
a resumed run repeats it, on any number of devices, at a cost that does not depend on the number of examples.
"""

import jax
import jax.numpy as jnp

ROUNDS = 64  # of the shuffle


def cycled_indices(
    key: jax.Array,
    epoch: jax.Array | int,
    step_in_epoch: jax.Array | int,
    order: jax.Array,
    starts: jax.Array,
    counts: jax.Array,
    *,
    batch_size: int,
) -> jax.Array:
    """Examples of one batch, int32 [batch_size]: slice `step_in_epoch` of the sequence of an epoch.

    The sequence is made of cycles: each draws every class once, in an order of its own. The examples of a class come in
    passes: each draws every example once, in an order of its own. So the counts of two classes in a batch differ by two
    at most, and so do those of two examples of a class over any stretch of the sequence.

    An epoch is max(counts) cycles, and the passes go on from one epoch to the next. The draws after the last full batch
    of an epoch are skipped, as in the released code, which differs from this in the random numbers alone.

    Args:
      key: the same in all steps of a run.
      epoch: from 0.
      step_in_epoch: from 0, less than classes * max(counts) // batch_size.
      order: int32 [examples], as in `device_dataset.class_table`, like the next two.
      starts: int32 [classes].
      counts: int32 [classes], positive.
      batch_size: a Python number.
    """
    position = step_in_epoch * batch_size + jnp.arange(batch_size, dtype=jnp.int32)
    # Each cycle draws each class once, so its number is also how often a class was drawn before.
    cycle = epoch * jnp.max(counts) + position // len(counts)
    of_classes, of_examples = jax.random.bits(key, (2,), jnp.uint32)
    classes = shuffled(position % len(counts), len(counts), hashed(of_classes, cycle))
    size = counts[classes]
    within = shuffled(cycle % size, size, hashed(hashed(of_examples, classes), cycle // size))
    return order[starts[classes] + within].astype(jnp.int32)


def shuffled(index: jax.Array, size: jax.Array | int, seed: jax.Array) -> jax.Array:
    """The entry at `index` of a random permutation of 0 to size - 1, without the other entries.

    A swap-or-not shuffle: each round draws a k, pairs every i with k - i modulo size, and swaps each of these pairs
    with probability 1/2. Any number of rounds gives a permutation; after `ROUNDS` the tests see no trace of an order.

    Args:
      index: integers in [0, size), [n].
      size: positive integers up to 2^31 - 1, [n], or one for all.
      seed: uint32 [n], or one for all: names the permutation.

    Returns:
      int32 [n].

    Reference: Hoang et al., "An enciphering scheme based on a card shuffle", CRYPTO 2012.
    """
    index, size, seed = jnp.broadcast_arrays(*(jnp.asarray(a).astype(jnp.uint32) for a in (index, size, seed)))

    def turn(number: jax.Array, entry: jax.Array) -> jax.Array:
        key = hashed(seed, number)
        partner = (key % size + size - entry) % size
        swaps = hashed(~key, jnp.maximum(entry, partner)) >> jnp.uint32(31)  # both of a pair ask the same
        return jnp.where(swaps == 1, partner, entry)

    return jax.lax.fori_loop(0, ROUNDS, turn, index).astype(jnp.int32)


def hashed(seed: jax.Array, value: jax.Array) -> jax.Array:
    """uint32, a hash of a uint32 and an integer, by the last steps of MurmurHash3."""
    x = seed + jnp.asarray(value).astype(jnp.uint32) * jnp.uint32(0x9E3779B1)
    x = (x ^ (x >> jnp.uint32(16))) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> jnp.uint32(13))) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> jnp.uint32(16))

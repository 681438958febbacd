"""Class-aware sampling in cycles: the sampler of Kang et al. (ICLR 2020) in the released code of RoBal's study.

A draw is a function of the key and of its position. There is no state between steps and no sort: a resumed run repeats
the draws on any number of devices, and the cost does not depend on the number of examples.
"""

import jax
import jax.numpy as jnp

ROUNDS = 64  # of swap-or-not


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
    """Returns the examples of one batch: slice `step_in_epoch` of the sequence of an epoch.

    The sequence consists of cycles; each cycle draws every class once, in a random order. The examples of a class are
    drawn in passes; each pass draws every example once, in a random order. Hence the counts of two classes in a batch
    differ by at most two, and so do those of two examples of a class in any part of the sequence.

    An epoch has max(counts) cycles, and passes continue over the ends of epochs. The draws after the last full batch of
    an epoch are skipped, as in the released code, which only has other random numbers.

    Args:
      key: the same in all steps of a run.
      epoch: from 0.
      step_in_epoch: from 0, less than classes * max(counts) // batch_size.
      order: int32 [examples]; this and the next two are those of `device_dataset.class_table`.
      starts: int32 [classes].
      counts: int32 [classes], positive.
      batch_size: a Python integer.

    Returns:
      int32 [batch_size].
    """
    position = step_in_epoch * batch_size + jnp.arange(batch_size, dtype=jnp.int32)
    # Each cycle draws each class once, so its number is also the number of earlier draws of a class.
    cycle = epoch * jnp.max(counts) + position // len(counts)
    class_seed, example_seed = jax.random.bits(key, (2,), jnp.uint32)
    classes = permutation_entry(position % len(counts), len(counts), hash_uint32(class_seed, cycle))
    size = counts[classes]
    within = permutation_entry(cycle % size, size, hash_uint32(hash_uint32(example_seed, classes), cycle // size))
    return order[starts[classes] + within].astype(jnp.int32)


def permutation_entry(index: jax.Array, size: jax.Array | int, seed: jax.Array) -> jax.Array:
    """Returns entry `index` of a random permutation of 0 to size - 1, without computing the other entries.

    A swap-or-not shuffle: each round draws a k, pairs every i with k - i modulo size, and swaps each of these pairs
    with probability 1/2. Any number of rounds gives a permutation; after `ROUNDS` rounds the tests detect no pattern.

    Args:
      index: integers in [0, size), [n].
      size: positive integers up to 2^31 - 1, [n] or a scalar.
      seed: uint32, [n] or a scalar; selects the permutation.

    Returns:
      int32 [n].

    References:
      Hoang et al., "An enciphering scheme based on a card shuffle", CRYPTO 2012.
    """
    index, size, seed = jnp.broadcast_arrays(*(jnp.asarray(a).astype(jnp.uint32) for a in (index, size, seed)))

    def shuffle_round(number: jax.Array, entry: jax.Array) -> jax.Array:
        key = hash_uint32(seed, number)
        partner = (key % size + size - entry) % size
        swaps = hash_uint32(~key, jnp.maximum(entry, partner)) >> jnp.uint32(31)  # equal for both entries of a pair
        return jnp.where(swaps == 1, partner, entry)

    return jax.lax.fori_loop(0, ROUNDS, shuffle_round, index).astype(jnp.int32)


def hash_uint32(seed: jax.Array, value: jax.Array) -> jax.Array:
    """Returns a uint32 hash of a uint32 and an integer, by the last steps of MurmurHash3."""
    x = seed + jnp.asarray(value).astype(jnp.uint32) * jnp.uint32(0x9E3779B1)
    x = (x ^ (x >> jnp.uint32(16))) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> jnp.uint32(13))) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> jnp.uint32(16))

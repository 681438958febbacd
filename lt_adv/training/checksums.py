"""Checksums of the arrays of a checkpoint, and validation of its metadata. Orbax does not notice a flipped bit."""

import functools
import hashlib
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from lt_adv.runtime import distributed
from lt_adv.runtime.distributed import PyTree

# Entry of a checkpoint's metadata -> its type.
METADATA_TYPES: dict[str, Any] = {
    "step": int,
    "total_steps": int,
    "stage": str,
    "stages": int,
    "class_counts": list,
    "seconds": (int, float),
}


def _words(a: jax.Array) -> jax.Array:
    """Returns the bits of `a` as a flat uint32 array."""
    if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
        a = jax.random.key_data(a)
    a = a.reshape(-1)
    if a.dtype == bool:
        a = a.astype(jnp.uint8)
    width = a.dtype.itemsize
    unsigned = jax.lax.bitcast_convert_type(a, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[width])
    return unsigned.astype(jnp.uint32).reshape(-1)


def _checksums(tree: PyTree) -> PyTree:
    meshes = {a.sharding.mesh for a in jax.tree.leaves(tree) if isinstance(getattr(a, "sharding", None), NamedSharding)}
    return _compiled_checksums(meshes.pop() if len(meshes) == 1 else None)(tree)


@functools.lru_cache(maxsize=8)
def _compiled_checksums(mesh: Mesh | None) -> PyTree:
    """Returns the compiled checksum function. On a mesh the result is replicated, since every process reads it."""
    return jax.jit(_all_checksums, out_shardings=mesh and distributed.replicated(mesh))


def _all_checksums(tree: PyTree) -> PyTree:
    def checksum(a: jax.Array) -> jax.Array:
        words = _words(a)
        position = jax.lax.iota(jnp.uint32, words.size)
        # Odd multipliers are units modulo 2**32: one changed word always changes the sum. Two sums make 64 bits.
        odd = (2 * position + 1) * jnp.uint32(0x9E3779B1)
        return jnp.stack([jnp.sum(words * odd), jnp.sum((words ^ (words >> 15)) * (odd * odd))])

    return jax.tree.map(checksum, tree)


def digest(tree: PyTree) -> dict[str, str]:
    """Returns {path of an array: 16 hexadecimal digits}, computed on the devices that hold the arrays."""
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(_checksums(tree)))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): "".join(f"{int(w):08x}" for w in a)
        for path, a in leaves
    }


def with_digests(state: PyTree, meta: dict[str, Any]) -> dict[str, Any]:
    """Returns `meta` with an entry "digest": the digests of the arrays of `state` and of `meta`."""
    return {**meta, "digest": {**digest(state), "meta": _metadata_digest(meta)}}


def _metadata_digest(meta: dict[str, Any]) -> str:
    content = {name: value for name, value in meta.items() if name != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def mismatches(tree: PyTree, meta: dict[str, Any]) -> list[str]:
    """Returns the paths of arrays whose digest differs from the stored one, and "meta" if the metadata differ."""
    stored, actual = meta["digest"], digest(tree)
    if "meta" in stored:  # older checkpoints have none
        actual["meta"] = _metadata_digest(meta)
    return [name for name, value in actual.items() if stored.get(name) != value]


def validate_metadata(meta: Any) -> dict[str, Any]:
    """Returns the metadata of a checkpoint; raises ValueError if an entry has the wrong type or is missing."""
    if not isinstance(meta, dict):
        raise ValueError(f"its metadata are not a dict but {meta!r:.50}")
    for name, kind in {"digest": dict, **METADATA_TYPES}.items():
        if name in meta and (not isinstance(meta[name], kind) or isinstance(meta[name], bool)):
            raise ValueError(f"its {name} is {meta[name]!r:.50}")
    if not math.isfinite(meta.get("seconds", 0.0)):
        raise ValueError(f"its seconds are {meta['seconds']}")
    return meta

"""What a checkpoint says of itself, and how its bits are known again: orbax restores a flipped byte silently."""

import functools
import hashlib
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from lt_adv.runtime import distributed

# What a run says in each of its checkpoints, and is read by others.
ENTRIES: dict[str, Any] = {"step": int, "total_steps": int, "stage": str, "stages": int, "class_counts": list}
ENTRIES["seconds"] = (int, float)


def _words(a: jax.Array) -> jax.Array:
    """The bits of `a` as uint32, flat."""
    if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
        a = jax.random.key_data(a)
    a = a.reshape(-1)
    if a.dtype == bool:
        a = a.astype(jnp.uint8)
    width = a.dtype.itemsize
    unsigned = jax.lax.bitcast_convert_type(a, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[width])
    return unsigned.astype(jnp.uint32).reshape(-1)


def _checksums(tree: Any) -> Any:
    meshes = {a.sharding.mesh for a in jax.tree.leaves(tree) if isinstance(getattr(a, "sharding", None), NamedSharding)}
    return _compiled_checksums(meshes.pop() if len(meshes) == 1 else None)(tree)


@functools.lru_cache(maxsize=8)
def _compiled_checksums(mesh: Mesh | None) -> Any:
    """On a mesh every device gets the result: of several processes each has to read it."""
    return jax.jit(_all_checksums, out_shardings=mesh and distributed.replicated(mesh))


def _all_checksums(tree: Any) -> Any:
    def checksum(a):
        words = _words(a)
        position = jax.lax.iota(jnp.uint32, words.size)
        # Odd multipliers are units modulo 2**32, so no single changed word can cancel; two of them make 64 bits.
        odd = (2 * position + 1) * jnp.uint32(0x9E3779B1)
        return jnp.stack([jnp.sum(words * odd), jnp.sum((words ^ (words >> 15)) * (odd * odd))])

    return jax.tree.map(checksum, tree)


def digest(tree: Any) -> dict[str, str]:
    """Path of each array -> 16 hexadecimal digits over its bits. Computed where the arrays are, shards and all."""
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(_checksums(tree)))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): "".join(f"{int(w):08x}" for w in a)
        for path, a in leaves
    }


def sealed(state: Any, meta: dict[str, Any]) -> dict[str, Any]:
    """`meta` with the digests of the arrays and its own."""
    return {**meta, "digest": {**digest(state), "meta": _seal(meta)}}


def _seal(meta: dict[str, Any]) -> str:
    no_attack = {name: value for name, value in meta.items() if name != "digest"}
    return hashlib.sha256(json.dumps(no_attack, sort_keys=True).encode()).hexdigest()[:16]


def differing(tree: Any, meta: dict[str, Any]) -> list[str]:
    """The arrays of `tree` whose digest is not the stored one, and "meta" if that is damaged."""
    stored, found = meta["digest"], digest(tree)
    if "meta" in stored:  # older checkpoints have none
        found["meta"] = _seal(meta)
    return [name for name, value in found.items() if stored.get(name) != value]


def known(meta: Any) -> dict[str, Any]:
    """What a checkpoint says of itself; ValueError where that is not what a run would say: it has no digest."""
    if not isinstance(meta, dict):
        raise ValueError(f"what it says of itself is {meta!r:.50}")
    for name, kind in {"digest": dict, **ENTRIES}.items():
        if name in meta and (not isinstance(meta[name], kind) or isinstance(meta[name], bool)):
            raise ValueError(f"its {name} is {meta[name]!r:.50}")
    if not math.isfinite(meta.get("seconds", 0.0)):
        raise ValueError(f"its seconds are {meta['seconds']}")
    return meta

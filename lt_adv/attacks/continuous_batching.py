"""Runs an attack over many images on a batch of slots: where an image is done, the next one takes its place.

Every image is attacked by itself, so which images share a batch changes nothing but the time. A slot is free as soon as
its image is broken or out of steps; compute thus falls with the images that are left, in one compiled program of one
shape, spread over all devices.
"""

import functools
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lt_adv.attacks import inputs
from lt_adv.attacks._base import Iterated, logits_of, where_rows
from lt_adv.attacks.initialization import IMPL

CHUNK = {1: range(8, 26), 0: range(40, 91)}  # steps between two looks at the slots, with gradients and without
TURN = 500  # steps after which an image within a round makes room for another one


class Network(NamedTuple):
    """A network on a mesh, as a function of its arrays, so that they are arguments of the compiled programs."""

    call: Any  # a pytree: (x [slots, ...], keys [slots]) -> logits
    mesh: Mesh
    slots: int
    programs: "Programs"

    def put(self, rows: Any) -> Any:
        """Arrays of one row per slot, sharded over the devices."""
        return jax.device_put(rows, NamedSharding(self.mesh, PartitionSpec("slots")))


class Done(NamedTuple):
    """What became of some images under one attack."""

    rows: np.ndarray  # int64 [k]
    broken: np.ndarray  # bool [k]
    x_adv: np.ndarray  # [broken ones, ...]
    steps: np.ndarray  # int64 [k], taken for each


def network(logits_fn: Callable[..., Array], image: np.ndarray, slots: int, random: bool, devices: Any) -> Network:
    """`logits_fn` for batches of at least `slots` images like `image`, on all `devices`.

    A `jax.tree_util.Partial` keeps its arrays as arguments; its programs are cached by the function, for the last few
    functions, and used again for other arrays of the same shapes. Of any other function the arrays it closes over are
    made arguments, and its programs are freed with the result.
    """
    mesh = Mesh(np.asarray(devices if devices is not None else jax.local_devices()), ("slots",))
    slots = -(-slots // mesh.size) * mesh.size
    if isinstance(logits_fn, jax.tree_util.Partial):
        call, cached = logits_fn, programs(mesh, logits_fn.func)
    else:
        x = jax.ShapeDtypeStruct((slots, *image.shape), image.dtype)
        keys = (jax.eval_shape(lambda: jax.random.split(jax.random.key(0, impl=IMPL), slots)),) if random else ()
        call, cached = jax.tree_util.Partial(*inputs.trace(logits_fn, x, *keys)), compile_for(mesh)
    call = call if random else jax.tree_util.Partial(_without_keys, call)
    return Network(jax.device_put(call, NamedSharding(mesh, PartitionSpec())), mesh, slots, cached)


def _without_keys(call: Callable[[Array], Array], x: Array, _: Array) -> Array:
    return call(x)


class Programs(NamedTuple):
    """What runs on a mesh; each compiled once for an attack, a network's shapes and a number of slots."""

    fill: Callable[..., Any]  # (attack, keys, x, y, target, eps, round) -> state
    refill: Callable[..., Any]  # (attack, where, state, back, kept, keys, ...) -> state
    advance: Callable[..., Any]  # (attack, steps, network, state) -> state, broken, steps taken
    logits: Callable[..., Array]  # (network, x, keys)


@functools.lru_cache(maxsize=8)
def programs(mesh: Mesh, function: Callable[..., Any]) -> Programs:
    """The programs of a mesh for networks that are this function of their arrays.

    Those of other functions do not share them: so they are freed once eight other functions have been attacked.
    """
    del function
    return compile_for(mesh)


def compile_for(mesh: Mesh) -> Programs:
    """The programs of a mesh. Results are sharded as the rows are put: in another way they would be compiled again."""
    over_slots = NamedSharding(mesh, PartitionSpec("slots"))

    def fill(attack: Iterated, *new: Array) -> Any:
        return attack.begin(*new)

    def refill(attack: Iterated, where: Array, state: Any, back: Array, kept: dict[str, Array], *new: Array) -> Any:
        begun = attack.begin(*new)
        return where_rows(where, where_rows(back, begun._replace(**kept), begun), state)

    def advance(attack: Iterated, steps: int, call: Any, state: Any) -> Any:
        state = jax.lax.fori_loop(0, steps, lambda _, state: attack.step(call, state), state)
        return state, state.broken, state.steps_taken

    def logits(call: Any, x: Array, keys: Array) -> Array:
        return logits_of(call, x, keys)

    return Programs(
        jax.jit(fill, static_argnums=0, out_shardings=over_slots),
        jax.jit(refill, static_argnums=0, donate_argnums=2, out_shardings=over_slots),
        jax.jit(advance, static_argnums=(0, 1), donate_argnums=3, out_shardings=over_slots),
        jax.jit(logits, out_shardings=over_slots),
    )


@jax.jit
def example_keys(keys: Array, *numbers: Array) -> Array:
    """fold_in(key, n) of each key, for one number after the other, each a scalar or one per key."""
    for number in numbers:
        keys = jax.vmap(jax.random.fold_in)(keys, jnp.broadcast_to(number, keys.shape))
    return keys


def logits(network: Network, x: np.ndarray, keys: Array) -> np.ndarray:
    """Logits of all images, batch by batch, [n, classes]."""
    found, program = [], network.programs.logits
    for start in range(0, len(x), network.slots):
        rows = np.minimum(np.arange(start, start + network.slots), len(x) - 1)
        found.append(np.asarray(program(network.call, *network.put((x[rows], keys[rows])))))
    return np.concatenate(found)[: len(x)]


def dependence(network: Network, x: np.ndarray, keys: Array, logits: np.ndarray, images: int = 3) -> float:
    """How much an image's logits depend on the rest of its batch: the largest change, in shares of the largest logit.

    Some images are judged in a batch of nothing but themselves, by the program that gave `logits`, those of all images
    in batches of different ones.
    """
    largest = 0.0
    for i in np.unique(np.linspace(0, len(x) - 1, images).astype(int)):
        rows = np.full(network.slots, i)
        alone = np.asarray(network.programs.logits(network.call, *network.put((x[rows], keys[rows]))))
        if np.isfinite(logits[i]).all():
            change = np.abs(alone - logits[i]).max() / max(np.abs(logits[i]).max(), np.finfo(np.float32).tiny)
            largest = max(largest, float(np.nan_to_num(change, nan=np.inf)))
    return largest


def run(
    attack: Iterated,
    network: Network,
    rows: np.ndarray,
    *,
    keys: Array,
    x: np.ndarray,
    y: np.ndarray,
    eps: np.ndarray,
    targets: np.ndarray,
) -> Iterator[Done]:
    """Attacks the images `rows` of x, round by round until broken, and yields them as they get done.

    keys, x, y, eps and targets hold one row per image; targets[:, r] is that of round r. The order in which images are
    done depends on the slots; what becomes of each does not. An image keeps its slot until it is done, so that little
    is lost where a run stops; once as few wait as there are slots, they take turns, lest the last ones run on alone.
    """
    size, total, program = network.slots, attack.num_steps, network.programs
    steps = min(CHUNK[min(attack.gradients, 1)], key=lambda steps: (-total % steps, steps)) if total else 0
    waiting, row, seated, fresh = deque(rows.tolist()), np.full(size, -1), np.zeros(size, int), np.ones(size, bool)
    turn, spent, state = np.zeros(len(x), np.int32), np.zeros(len(x), np.int64), None
    kept: dict[int, dict[str, np.ndarray]] = {}  # of the images that left within a round
    while True:
        for slot in np.flatnonzero(row < 0)[: len(waiting)]:
            row[slot], seated[slot], fresh[slot] = waiting.popleft(), 0, True
        busy = row >= 0
        if not busy.any():
            return
        if fresh.any():
            at = np.where(busy, row, row[busy][0])  # an idle slot repeats an image, and nobody looks
            target = targets[at, np.minimum(turn[at], targets.shape[1] - 1)]
            new: tuple = (example_keys(keys[at], turn[at].astype(np.uint32)), x[at], y[at], target, eps[at], turn[at])
            if state is None:
                state = program.fill(attack, *network.put(new))
            else:
                back = fresh & busy & np.isin(row, list(kept))
                fields = _rows({name: getattr(state, name) for name in attack.carries}, back, row, kept)
                where, back, fields, *new = network.put((fresh, back, fields, *new))
                state = program.refill(attack, where, state, back, fields, *new)
            fresh = np.zeros(size, bool)
        state, *facts = program.advance(attack, steps, network.call, state)
        broken, taken = jax.device_get(facts)
        seated += steps
        # Of a random network a point that was wrong once may be right in the next draw: the search goes on.
        ended = busy & (broken & (not attack.random) | (taken >= total))
        spent[row[ended]] += np.minimum(taken, total)[ended]
        done = ended & (broken | (turn[row] + 1 >= attack.rounds))
        again = ended & ~done
        turn[row[again]] += 1
        if 0 < len(waiting) <= size:
            leaving = busy & ~ended & (seated >= TURN) & bool(attack.carries)
            if leaving.any():
                fields = jax.device_get({name: getattr(state, name) for name in attack.carries})
                kept |= {row[slot]: {name: fields[name][slot] for name in fields} for slot in np.flatnonzero(leaving)}
            waiting.extend(row[again | leaving].tolist())
            row[again | leaving] = -1
        fresh |= again & (row >= 0)
        if done.any():
            hit = done & broken
            points = np.asarray(state.x_adv)[hit] if hit.any() else x[:0]
            yield Done(row[done], broken[done], points, spent[row[done]])
            row[done] = -1


def _rows(
    like: dict[str, Array], back: np.ndarray, row: np.ndarray, kept: dict[int, dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """What images come back with, in the rows of their slots; taken out of `kept`."""
    fields = {name: np.zeros(value.shape, value.dtype) for name, value in like.items()}
    for slot in np.flatnonzero(back):
        for name, value in kept.pop(row[slot]).items():
            fields[name][slot] = value
    return fields

"""Continuous batching: attacks many images in a fixed number of slots and refills the slots of finished images.

Every image is attacked independently, so the assignment of images to slots changes the run time and not the result. A
slot becomes free when its image is broken or has taken all steps. The cost therefore falls with the number of remaining
images, in one compiled program of one shape that runs on all devices.
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

from lt_adv.attacks import checks
from lt_adv.attacks._base import Iterated, logits_of, where_rows
from lt_adv.attacks.initialization import IMPL

CHUNK = {1: range(8, 26), 0: range(40, 91)}  # steps between two refills, with gradients and without
MAX_STEPS_IN_SLOT = 500  # steps after which an image is paused within a round if others wait


class Network(NamedTuple):
    """A network on a mesh. Its arrays are arguments of the compiled programs."""

    call: Any  # a pytree: (x [slots, ...], keys [slots]) -> logits
    mesh: Mesh
    slots: int
    programs: "Programs"

    def put(self, rows: Any) -> Any:
        """Shards arrays with one row per slot over the devices."""
        return jax.device_put(rows, NamedSharding(self.mesh, PartitionSpec("slots")))


class Done(NamedTuple):
    """Finished images of one attack."""

    rows: np.ndarray  # int64 [k]
    broken: np.ndarray  # bool [k]
    x_adv: np.ndarray  # [number of broken images, ...]
    steps: np.ndarray  # int64 [k], steps taken for each image


def network(logits_fn: Callable[..., Array], image: np.ndarray, slots: int, random: bool, devices: Any) -> Network:
    """Prepares `logits_fn` for batches of at least `slots` images shaped like `image`, on all `devices`.

    The arrays of a `jax.tree_util.Partial` become arguments of the compiled programs. These are cached by the function,
    for the last few functions, and reused for other arrays of the same shapes. For any other function, the arrays that
    it closes over become arguments, and its programs are freed with the result.
    """
    mesh = Mesh(np.asarray(devices if devices is not None else jax.local_devices()), ("slots",))
    slots = -(-slots // mesh.size) * mesh.size
    if isinstance(logits_fn, jax.tree_util.Partial):
        call, cached = logits_fn, programs(mesh, logits_fn.func)
    else:
        x = jax.ShapeDtypeStruct((slots, *image.shape), image.dtype)
        keys = (jax.eval_shape(lambda: jax.random.split(jax.random.key(0, impl=IMPL), slots)),) if random else ()
        call, cached = jax.tree_util.Partial(*checks.trace(logits_fn, x, *keys)), compile_for(mesh)
    call = call if random else jax.tree_util.Partial(_without_keys, call)
    return Network(jax.device_put(call, NamedSharding(mesh, PartitionSpec())), mesh, slots, cached)


def _without_keys(call: Callable[[Array], Array], x: Array, _: Array) -> Array:
    return call(x)


class Programs(NamedTuple):
    """Jitted functions on a mesh, compiled once per attack, shapes of the network and number of slots."""

    fill: Callable[..., Any]  # (attack, keys, x, y, target, eps, round) -> state
    refill: Callable[..., Any]  # (attack, replaced, state, resumed, fields, keys, ...) -> state
    advance: Callable[..., Any]  # (attack, steps, network, state) -> state, broken, steps taken
    logits: Callable[..., Array]  # (network, x, keys)


@functools.lru_cache(maxsize=8)
def programs(mesh: Mesh, function: Callable[..., Any]) -> Programs:
    """Returns the programs of a mesh for networks that are this function of their arrays.

    Functions do not share programs, so that those of a function are freed once eight other functions were attacked.
    """
    del function
    return compile_for(mesh)


def compile_for(mesh: Mesh) -> Programs:
    """Returns the programs of a mesh. Results are sharded like the inputs; otherwise they would be compiled again."""
    over_slots = NamedSharding(mesh, PartitionSpec("slots"))

    def fill(attack: Iterated, *new: Array) -> Any:
        return attack.begin(*new)

    def refill(
        attack: Iterated, replaced: Array, state: Any, resumed: Array, fields: dict[str, Array], *new: Array
    ) -> Any:
        begun = attack.begin(*new)
        return where_rows(replaced, where_rows(resumed, begun._replace(**fields), begun), state)

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
def fold_in_numbers(keys: Array, *numbers: Array) -> Array:
    """Folds numbers, each a scalar or one per key, into each key, one after the other."""
    for number in numbers:
        keys = jax.vmap(jax.random.fold_in)(keys, jnp.broadcast_to(number, keys.shape))
    return keys


def logits(network: Network, x: np.ndarray, keys: Array) -> np.ndarray:
    """Computes the logits of all images batch by batch, [n, classes]."""
    batches, program = [], network.programs.logits
    for start in range(0, len(x), network.slots):
        rows = np.minimum(np.arange(start, start + network.slots), len(x) - 1)
        batches.append(np.asarray(program(network.call, *network.put((x[rows], keys[rows])))))
    return np.concatenate(batches)[: len(x)]


def dependence(network: Network, x: np.ndarray, keys: Array, logits: np.ndarray, images: int = 3) -> float:
    """Returns how much the logits of an image depend on its batch: the largest change, relative to the largest logit.

    A few images are evaluated in a batch that repeats one image, by the same program that computed `logits` in batches
    of different images.
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
    """Attacks the images `rows` of x, round by round until they are broken, and yields them as they finish.

    `keys`, `x`, `y`, `eps` and `targets` have one row per image; targets[:, r] are the targets of round r. The order in
    which images finish depends on the slots; their results do not. An image keeps its slot until it is finished, so
    that an interruption loses little. Once no more images wait than there are slots, images are paused and resumed in
    turn, because otherwise the last ones would run alone.
    """
    size, total, program = network.slots, attack.num_steps, network.programs
    steps = min(CHUNK[min(attack.gradients, 1)], key=lambda steps: (-total % steps, steps)) if total else 0
    waiting, row = deque(rows.tolist()), np.full(size, -1)
    steps_in_slot, is_new = np.zeros(size, int), np.ones(size, bool)
    round_index, steps_taken, state = np.zeros(len(x), np.int32), np.zeros(len(x), np.int64), None
    paused: dict[int, dict[str, np.ndarray]] = {}  # the carried fields of images that were paused within a round
    while True:
        for slot in np.flatnonzero(row < 0)[: len(waiting)]:
            row[slot], steps_in_slot[slot], is_new[slot] = waiting.popleft(), 0, True
        busy = row >= 0
        if not busy.any():
            return
        if is_new.any():
            at = np.where(busy, row, row[busy][0])  # an idle slot repeats an image; its result is ignored
            rounds = round_index[at]
            target = targets[at, np.minimum(rounds, targets.shape[1] - 1)]
            new: tuple = (fold_in_numbers(keys[at], rounds.astype(np.uint32)), x[at], y[at], target, eps[at], rounds)
            if state is None:
                state = program.fill(attack, *network.put(new))
            else:
                resumed = is_new & busy & np.isin(row, list(paused))
                fields = _paused_fields({name: getattr(state, name) for name in attack.carries}, resumed, row, paused)
                replaced, resumed, fields, *new = network.put((is_new, resumed, fields, *new))
                state = program.refill(attack, replaced, state, resumed, fields, *new)
            is_new = np.zeros(size, bool)
        state, *progress = program.advance(attack, steps, network.call, state)
        broken, taken = jax.device_get(progress)
        steps_in_slot += steps
        # A point that a randomised network classifies wrongly may be right in the next draw: the search continues.
        ended = busy & (broken & (not attack.random) | (taken >= total))
        steps_taken[row[ended]] += np.minimum(taken, total)[ended]
        done = ended & (broken | (round_index[row] + 1 >= attack.rounds))
        next_round = ended & ~done
        round_index[row[next_round]] += 1
        if 0 < len(waiting) <= size:
            leaving = busy & ~ended & (steps_in_slot >= MAX_STEPS_IN_SLOT) & bool(attack.carries)
            if leaving.any():
                fields = jax.device_get({name: getattr(state, name) for name in attack.carries})
                paused |= {row[slot]: {name: fields[name][slot] for name in fields} for slot in np.flatnonzero(leaving)}
            waiting.extend(row[next_round | leaving].tolist())
            row[next_round | leaving] = -1
        is_new |= next_round & (row >= 0)
        if done.any():
            newly_broken = done & broken
            points = np.asarray(state.x_adv)[newly_broken] if newly_broken.any() else x[:0]
            yield Done(row[done], broken[done], points, steps_taken[row[done]])
            row[done] = -1


def _paused_fields(
    current: dict[str, Array], resumed: np.ndarray, row: np.ndarray, paused: dict[int, dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Returns the fields of resumed images in the rows of their slots, and removes them from `paused`."""
    fields = {name: np.zeros(value.shape, value.dtype) for name, value in current.items()}
    for slot in np.flatnonzero(resumed):
        for name, value in paused.pop(row[slot]).items():
            fields[name][slot] = value
    return fields

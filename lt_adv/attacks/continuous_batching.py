"""Continuous batching: attacks many images in a fixed number of slots and refills the slots of finished images.

Every image is attacked independently, so the assignment of images to slots changes the run time and not the result. A
slot becomes free when its image is broken or has taken all steps. The cost therefore falls with the number of remaining
images, in one compiled program of one shape that runs on all devices.
"""

import functools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lt_adv.attacks import _expectation, tracing
from lt_adv.attacks._base import IterativeAttack, State, where_rows
from lt_adv.attacks.hoisting import hoist
from lt_adv.attacks.initialization import IMPL, fold_in
from lt_adv.attacks.signatures import KeyedLogitsFn, LogitsFn, PyTree

CHUNK = {1: range(8, 26), 0: range(40, 91)}  # steps between two refills, with gradients and without
fold_in_numbers = jax.jit(fold_in)
IDLE = -1  # in place of an image, for a slot without one
MAX_STEPS_IN_SLOT = 500  # steps after which an image is paused within a round if others wait


class Network(NamedTuple):
    """A network on a mesh. Its arrays are arguments of the compiled programs."""

    call: KeyedLogitsFn  # a `jax.tree_util.Partial`: (x [slots, ...], keys [slots]) -> logits
    num_samples: int | None  # draws of a randomised network
    mesh: Mesh
    slots: int
    programs: "Programs"

    def put(self, rows: PyTree) -> PyTree:
        """Shards arrays with one row per slot over the devices."""
        return jax.device_put(rows, NamedSharding(self.mesh, PartitionSpec("slots")))


class Done(NamedTuple):
    """Finished images of one attack."""

    rows: np.ndarray  # int64 [k]
    broken: np.ndarray  # bool [k]
    x_adv: np.ndarray  # [number of broken images, ...]
    steps: np.ndarray  # int64 [k], steps taken for each image


def network(
    logits_fn: LogitsFn | KeyedLogitsFn,
    image: np.ndarray,
    slots: int,
    num_samples: int | None,
    devices: Sequence[jax.Device] | None,
) -> Network:
    """Prepares `logits_fn` for batches of at least `slots` images shaped like `image`.

    The arrays of a `jax.tree_util.Partial` become arguments of the compiled programs. These are cached by the function,
    for the last few functions, and reused for other arrays of the same shapes. For any other function, the arrays that
    it closes over become arguments, and its programs are freed with the result.

    Args:
      logits_fn: the network; it takes (x, keys) if `num_samples` is given.
      image: an example, [...].
      slots: images per batch, rounded up to a multiple of the number of devices, and to two images on each of several.
      num_samples: draws of a randomised network, or None.
      devices: None for all devices of this process.
    """
    mesh = Mesh(np.asarray(devices if devices is not None else jax.local_devices()), ("slots",))
    if mesh.size > 1:  # two images on each device, or `batch_dependence` would see no dependence on the batch
        slots = max(-(-slots // mesh.size), 2) * mesh.size
    if isinstance(logits_fn, jax.tree_util.Partial):
        call, cached = logits_fn, programs(mesh, logits_fn.func)
    else:
        per_device = slots // mesh.size
        x = jax.ShapeDtypeStruct((per_device, *image.shape), image.dtype)
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0, impl=IMPL), per_device))
        arguments = (x,) if num_samples is None else (x, keys)
        call, cached = jax.tree_util.Partial(*tracing.trace(logits_fn, *arguments)), compile_for(mesh)
    call = jax.tree_util.Partial(_without_keys, call) if num_samples is None else call
    return Network(jax.device_put(call, NamedSharding(mesh, PartitionSpec())), num_samples, mesh, slots, cached)


def _without_keys(call: Callable[[Array], Array], x: Array, _: Array) -> Array:
    return call(x)


class Programs(NamedTuple):
    """Jitted functions on a mesh, compiled once per attack, shapes of the network and number of slots."""

    fill: Callable[..., State]  # (attack, keys, x, y, target, eps, round) -> state
    refill: Callable[..., State]  # (attack, replaced, state, resumed, fields, keys, ...) -> state
    advance: Callable[..., tuple[State, Array, Array]]  # (attack, steps, network, state) -> state, broken, steps taken
    scores: Callable[[int | None, KeyedLogitsFn, Array, Array], Array]  # (num_samples, network, x, keys) -> scores


@functools.lru_cache(maxsize=8)
def programs(mesh: Mesh, function: Callable[..., Array]) -> Programs:
    """Returns the programs of a mesh for networks that are this function of their arrays.

    Functions do not share programs, so that those of a function are freed once eight other functions were attacked.
    """
    del function
    return compile_for(mesh)


def compile_for(mesh: Mesh) -> Programs:
    """Returns the programs of a mesh. Results are sharded like the inputs; otherwise they would be compiled again."""
    over_slots = NamedSharding(mesh, PartitionSpec("slots"))

    def fill(attack: IterativeAttack, *new: Array) -> State:
        return attack.init(*new)

    def refill(
        attack: IterativeAttack, replaced: Array, state: State, resumed: Array, fields: dict[str, Array], *new: Array
    ) -> State:
        initial = attack.init(*new)
        return where_rows(replaced, where_rows(resumed, initial._replace(**fields), initial), state)

    def on_each_device(function: Callable[..., PyTree], call: KeyedLogitsFn, *rows: PyTree) -> PyTree:
        """Calls function(network, *rows) with the slots of each device.

        XLA's partitioner would exchange logits between devices, though no slot needs those of another.
        """
        specs = (PartitionSpec(), *[PartitionSpec("slots")] * len(rows))
        # A network that was traced before does not say over which mesh axes its values vary.
        mapped = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=PartitionSpec("slots"), check_vma=False)
        return mapped(call, *rows)

    def advance(attack: IterativeAttack, steps: int, call: KeyedLogitsFn, state: State) -> tuple[State, Array, Array]:
        def on_device(call: KeyedLogitsFn, state: State) -> tuple[State, Array, Array]:
            logits_fn = hoist(call, state.x_adv, state.key)
            state = jax.lax.fori_loop(0, steps, lambda _, state: attack.step(logits_fn, state), state)
            return state, state.broken, state.steps_taken

        return on_each_device(on_device, call, state)

    def scores(num_samples: int | None, call: KeyedLogitsFn, x: Array, keys: Array) -> Array:
        def on_device(call: KeyedLogitsFn, x: Array, keys: Array) -> Array:
            return _expectation.scores(call, num_samples, x, keys)

        return on_each_device(on_device, call, x, keys)

    return Programs(
        jax.jit(fill, static_argnums=0, out_shardings=over_slots),
        jax.jit(refill, static_argnums=0, donate_argnums=2, out_shardings=over_slots),
        jax.jit(advance, static_argnums=(0, 1), donate_argnums=3, out_shardings=over_slots),
        jax.jit(scores, static_argnums=0, out_shardings=over_slots),
    )


def steps_per_call(attack: IterativeAttack) -> int:
    """Returns the steps between two refills, of which few are left over in the last call of a round."""
    total = attack.num_steps
    return min(CHUNK[min(attack.gradients, 1)], key=lambda steps: (-total % steps, steps)) if total else 0


def abstract_advance(
    attack: IterativeAttack, logits_fn: LogitsFn, x: jax.ShapeDtypeStruct, mesh: Mesh
) -> tuple[Callable[..., PyTree], tuple[Any, ...]]:
    """Returns the program that takes steps of an attack, and its arguments as shapes with shardings.

    Args:
      attack: of a network that is not randomised.
      logits_fn: a `jax.tree_util.Partial` whose arrays are shapes.
      x: shape of the images in all slots.
      mesh: axis "slots"; its devices need not exist.
    """

    def over(tree: PyTree, *axes: str) -> PyTree:
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree)

    slots = x.shape[0]
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0, impl=IMPL), slots))
    label, eps = jax.ShapeDtypeStruct((slots,), np.int32), jax.ShapeDtypeStruct((slots,), x.dtype)
    state = jax.eval_shape(attack.init, keys, x, label, label, eps, label)
    call = over(jax.tree_util.Partial(_without_keys, logits_fn))
    return compile_for(mesh).advance, (attack, steps_per_call(attack), call, over(state, "slots"))


def scores(network: Network, x: np.ndarray, keys: Array) -> np.ndarray:
    """Computes the logits of all images batch by batch, [n, classes]; mean probabilities of a randomised network."""
    batches, program = [], functools.partial(network.programs.scores, network.num_samples)
    for start in range(0, len(x), network.slots):
        rows = np.minimum(np.arange(start, start + network.slots), len(x) - 1)
        batches.append(np.asarray(program(network.call, *network.put((x[rows], keys[rows])))))
    return np.concatenate(batches)[: len(x)]


def batch_dependence(network: Network, x: np.ndarray, keys: Array, logits: np.ndarray, images: int = 3) -> float:
    """Returns how much the logits of an image depend on its batch: the largest change, relative to the largest logit.

    A few images are evaluated in a batch that repeats one image, by the same program that computed `logits` in batches
    of different images.
    """
    largest = 0.0
    for i in np.unique(np.linspace(0, len(x) - 1, images).astype(int)):
        rows = np.full(network.slots, i)
        alone = np.asarray(
            network.programs.scores(network.num_samples, network.call, *network.put((x[rows], keys[rows])))
        )
        if np.isfinite(logits[i]).all():
            change = np.abs(alone - logits[i]).max() / max(np.abs(logits[i]).max(), np.finfo(np.float32).tiny)
            largest = max(largest, float(np.nan_to_num(change, nan=np.inf)))
    return largest


def run(
    attack: IterativeAttack,
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
    slots, total, compiled = network.slots, attack.num_steps, network.programs
    steps = steps_per_call(attack)
    waiting, image = deque(rows.tolist()), np.full(slots, IDLE)  # the image in each slot
    steps_in_slot, is_new = np.zeros(slots, int), np.ones(slots, bool)
    round_index, steps_taken = np.zeros(len(x), np.int32), np.zeros(len(x), np.int64)
    state: State | None = None
    paused: dict[int, dict[str, np.ndarray]] = {}  # image -> saved fields, if it was paused within a round
    while True:
        for slot in np.flatnonzero(image == IDLE)[: len(waiting)]:
            image[slot], steps_in_slot[slot], is_new[slot] = waiting.popleft(), 0, True
        busy = image != IDLE
        if not busy.any():
            return
        if is_new.any():
            filled = np.where(busy, image, image[busy][0])  # an idle slot repeats an image; its result is ignored
            rounds = round_index[filled]
            target = targets[filled, np.minimum(rounds, targets.shape[1] - 1)]
            round_keys = fold_in_numbers(keys[filled], rounds.astype(np.uint32))
            new: tuple = (round_keys, x[filled], y[filled], target, eps[filled], rounds)
            if state is None:
                state = compiled.fill(attack, *network.put(new))
            else:
                resumed = is_new & busy & np.isin(image, list(paused))
                current = {name: getattr(state, name) for name in attack.saved_fields}
                fields = _paused_fields(current, resumed, image, paused)
                replaced, resumed, fields, *new = network.put((is_new, resumed, fields, *new))
                state = compiled.refill(attack, replaced, state, resumed, fields, *new)
            is_new = np.zeros(slots, bool)
        state, *progress = compiled.advance(attack, steps, network.call, state)
        broken, taken = jax.device_get(progress)
        steps_in_slot += steps
        # A point that a randomised network classifies wrongly may be right in the next draw: the search continues.
        round_done = busy & (broken & (not attack.random) | (taken >= total))
        steps_taken[image[round_done]] += np.minimum(taken, total)[round_done]
        finished = round_done & (broken | (round_index[image] + 1 >= attack.num_rounds))
        next_round = round_done & ~finished
        round_index[image[next_round]] += 1
        if 0 < len(waiting) <= slots:
            to_pause = busy & ~round_done & (steps_in_slot >= MAX_STEPS_IN_SLOT) & bool(attack.saved_fields)
            if to_pause.any():
                fields = jax.device_get({name: getattr(state, name) for name in attack.saved_fields})
                for slot in np.flatnonzero(to_pause):
                    paused[image[slot]] = {name: fields[name][slot] for name in fields}
            waiting.extend(image[next_round | to_pause].tolist())
            image[next_round | to_pause] = IDLE
        is_new |= next_round & (image != IDLE)
        if finished.any():
            newly_broken = finished & broken
            points = np.asarray(state.x_adv)[newly_broken] if newly_broken.any() else x[:0]
            yield Done(image[finished], broken[finished], points, steps_taken[image[finished]])
            image[finished] = IDLE


def _paused_fields(
    current: dict[str, Array], resumed: np.ndarray, image: np.ndarray, paused: dict[int, dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Returns the fields of resumed images in the rows of their slots, and removes them from `paused`."""
    fields = {name: np.zeros(value.shape, value.dtype) for name, value in current.items()}
    for slot in np.flatnonzero(resumed):
        for name, value in paused.pop(image[slot]).items():
            fields[name][slot] = value
    return fields

"""The fused training step: uint8 gather, augmentation, attack, loss, gradient and update in one donated program."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh

from lt_adv.attacks.cpu_convolutions import with_fast_cpu_convolutions
from lt_adv.data import augment
from lt_adv.methods import Batch, DataInfo, Method, TrainProgress
from lt_adv.runtime import registry
from lt_adv.training import sharding
from lt_adv.training.net import AXIS, Net
from lt_adv.training.train_state import TrainState, average_weight


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """What the step needs beside the method: all static."""

    batch_size: int
    eps: float
    step_size: float
    augment: str = "crop_flip"
    pad: int = 4
    streamed: bool = False  # the step is given batches, not the set to draw them from
    log_every: int = 50
    average: Mapping[str, Any] | None = None
    groups: Mapping[str, np.ndarray] | None = None  # "head" / "body" / "tail" -> class ids, for the metrics
    freeze_batch_stats: bool = False

    def __post_init__(self):
        if self.augment not in augment.AUGMENTS:
            raise registry.unknown("config.data.augment", self.augment, augment.AUGMENTS)


def ends_window(step: int, steps_per_epoch: int, log_every: int) -> bool:
    """Whether a log step follows step number `step` (from 0): every `log_every` steps of an epoch and at its end."""
    done = step % steps_per_epoch + 1
    return done % log_every == 0 or done == steps_per_epoch


def _own(data, step, options: StepOptions, info: DataInfo):
    """This device's part of the batch, {"image", "label", "index"}, and the positions of it in the whole batch."""
    share = options.batch_size // lax.axis_size(AXIS)
    position = lax.axis_index(AXIS) * share + jnp.arange(share)
    if not options.streamed:
        number = step % info.steps_per_epoch % len(data["row"])
        own = {name: data[name][number][position] for name in ("row", "label", "index")}
        data = {**own, "image": data["image"][own["row"]]}
    return {**data, "image": data["image"].reshape(-1, *info.image_shape)}, position


def make_train_step(
    method: Method,
    apply: Callable[..., Any],
    tx: optax.GradientTransformation,
    rate: optax.Schedule,
    info: DataInfo,
    options: StepOptions,
    mesh: Mesh,
    parallel: str = "pmap",
    attack_apply: Callable[..., Any] | None = None,
    sharded: Collection[str] = (),
) -> tuple[Callable[[TrainState, Any, Any], tuple[TrainState, Any]], Callable[[TrainState, Any, Any], Any]]:
    """(`step(state, data, teacher) -> (state, metrics)`, `init_window(state, data, teacher)`), the first compiled once
    and its state donated; the second gives the `window` of a state that has taken no step.

    `data` is what the stage's `feed` gives, `teacher` the frozen variables of another network or {}. `metrics` are the
    means over the current window (see `ends_window`), on the device: fetch them at log steps only. `attack_apply`, if
    given, is the same network in another dtype, which `method.perturb` sees instead. `sharded`: `sharding.shardings`.

    Everything random is a function of (key, step, position in the whole batch): neither the number of devices nor a
    restart changes it. (Dropout, where a network has it, is drawn by device.) Per-replica code over the axis "data":
    the gradient of each device's loss is averaged, which is exact for plain means, and for other losses if they gather
    first (`net.gather`).
    """
    if options.batch_size % mesh.size:
        raise ValueError(
            f"config.optim.batch_size = {options.batch_size} is not a multiple of the {mesh.size} devices."
        )
    membership = _membership(options.groups, info.num_classes)

    def replica(state: TrainState, data, teacher, *, attack=True):
        progress = TrainProgress(
            step=state.step,
            epoch=state.step // info.steps_per_epoch,
            steps_per_epoch=info.steps_per_epoch,
            epochs=info.epochs,
        )
        own, position = _own(data, state.step, options, info)
        step_key = jax.random.fold_in(jax.random.fold_in(state.key, 1), state.step)
        streams = [jax.random.fold_in(step_key, n) for n in range(3)]
        augment_keys, attack_keys, loss_keys = (jax.vmap(jax.random.fold_in, (None, 0))(s, position) for s in streams)

        image = augment.augment(options.augment, augment_keys, own["image"], pad=options.pad)
        image = image.astype(float) / 255
        label = own["label"]
        full = jnp.ones_like(image[:, 0, 0, 0])
        batch = Batch(image, label, own["index"], eps=options.eps * full, step_size=options.step_size * full)

        # Varying parameters keep each device's gradient its own until the one pmean below (shard_map would sum them).
        params = lax.pcast(state.params, AXIS, to="varying")

        def network(p, apply=apply):
            return Net(
                apply,
                p,
                state.batch_stats,
                info,
                key=jax.random.fold_in(jax.random.fold_in(step_key, 3), lax.axis_index(AXIS)),
                teacher=teacher,
                freeze_batch_stats=options.freeze_batch_stats,
            )

        x_adv = batch.image
        if attack:
            x_adv = method.perturb(
                attack_keys, network(params, attack_apply or apply), batch, state.method_state, progress
            )

        def objective(p):
            net = network(p)
            value, (method_state, metrics) = method.loss(
                loss_keys, net, batch, lax.stop_gradient(x_adv), state.method_state, progress
            )
            return value, (method_state, metrics, net.batch_stats)

        value_and_gradient = with_fast_cpu_convolutions(jax.value_and_grad(objective, has_aux=True))
        (value, (method_state, metrics, batch_stats)), gradient = value_and_gradient(params)
        gradient = lax.pmean(gradient, AXIS)
        ends_epoch = (state.step + 1) % info.steps_per_epoch == 0
        method_state = jax.tree.map(
            lambda new, old: jnp.where(ends_epoch, new, old), method.epoch_end(method_state, progress), method_state
        )

        sums = _sums({"loss": value, **metrics}, label, membership)
        norm = optax.tree.norm(gradient)
        one = jnp.ones_like(norm)
        sums["gradient_norm"] = (norm, one)
        sums["learning_rate"] = (rate(state.step) * one, one)
        starts_window = (state.step % info.steps_per_epoch) % options.log_every == 0
        window = sums
        if state.window:
            window = jax.tree.map(lambda old, new: jnp.where(starts_window, 0, old) + new, state.window, sums)
        found = (gradient, batch_stats, jax.tree.map(_same_everywhere, method_state), window)
        return found, {name: jnp.where(weight > 0, total / weight, jnp.nan) for name, (total, weight) in window.items()}

    def finish(state: TrainState, found) -> TrainState:
        gradient, batch_stats, method_state, window = found
        updates, opt_state = tx.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        average = {}
        if state.average:
            w = average_weight(options.average, state.step, info.steps_per_epoch)
            new = {"params": params, "batch_stats": batch_stats}
            average = jax.tree.map(lambda a, p: a + w * (p - a), state.average, new)
        return TrainState(
            step=state.step + 1,
            params=params,
            batch_stats=batch_stats,
            opt_state=opt_state,
            average=average,
            method_state=method_state,
            window=window,
            key=state.key,
        )

    def init_window(state: TrainState, data, teacher):
        """Empty sums of every metric: the state must have its final structure before the first call."""
        short = functools.partial(replica, attack=False)
        whole = sharding.parallelise(short, finish, mesh, parallel, sharded, options.streamed)
        shapes = jax.eval_shape(whole, state, data, teacher)
        return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes[0].window)

    return sharding.parallelise(replica, finish, mesh, parallel, sharded, options.streamed), init_window


def _membership(groups: Mapping[str, np.ndarray] | None, num_classes: int) -> dict[str, np.ndarray]:
    """Group name -> 0/1 per class."""
    return {name: np.isin(np.arange(num_classes), ids).astype(np.float32) for name, ids in (groups or {}).items()}


def _sums(metrics: Mapping[str, Any], label: jax.Array, membership: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Metric -> (sum, weight) over all devices; a per-example metric is also summed within each group of classes."""
    sums = {}
    for name, value in lax.stop_gradient(dict(metrics)).items():
        if value.ndim == 0:  # the mean over devices, of weight one
            share = 1 / lax.axis_size(AXIS)
            sums[name] = (value * share, jnp.full_like(value, share))
            continue
        sums[name] = (jnp.sum(value), jnp.sum(jnp.ones_like(value)))
        for group, member in membership.items():
            inside = jnp.asarray(member, value.dtype)[label]
            sums[f"{name}_{group}"] = (jnp.sum(value * inside), jnp.sum(inside))
    flat, unflatten = ravel_pytree(sums)
    return unflatten(lax.psum(flat, AXIS))  # one all-reduce for all


def _same_everywhere(a: jax.Array) -> jax.Array:
    """`a`, equal on all devices after a gather or a mean, in a form whose equality shard_map's type check sees."""
    return lax.pmax(a, AXIS)

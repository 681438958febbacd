"""The training step: gather, augmentation, attack, loss, gradient and update in one compiled program."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh

from lt_adv.attacks.convolutions import with_fast_convolutions
from lt_adv.data import augment
from lt_adv.methods import Batch, DataInfo, LossOutput, Method, TrainProgress
from lt_adv.runtime import registry
from lt_adv.runtime.distributed import PyTree
from lt_adv.training import metrics, sharding
from lt_adv.training.net import AXIS, Net
from lt_adv.training.train_state import TrainState, average_weight


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """Static options of the step other than the method."""

    batch_size: int  # over all devices
    eps: float
    step_size: float
    augment: str = "crop_flip"
    pad: int = 4
    streamed: bool = False  # the step's `data` is the batch itself, not the training set to gather it from
    log_every: int = 50
    average: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"name": "none"})
    groups: Mapping[str, np.ndarray] | None = None  # "head" / "body" / "tail" -> class ids, for the metrics
    freeze_batch_stats: bool = False

    def __post_init__(self) -> None:
        if self.augment not in augment.AUGMENTS:
            raise registry.unknown("config.data.augment", self.augment, augment.AUGMENTS)


class StepKeys(NamedTuple):
    """The random keys of one step: functions of (state key, step, position in the batch)."""

    augment: jax.Array  # one per example [b]
    attack: jax.Array  # one per example [b]
    loss: jax.Array  # one per example [b]
    dropout: jax.Array  # one per device


class StepOutput(NamedTuple):
    """The result of `per_device_step`, equal on all devices: all that the update needs."""

    grads: PyTree
    batch_stats: PyTree
    method_state: PyTree
    metric_sums: dict[str, Any]


def is_log_step(step: int, steps_per_epoch: int, log_every: int) -> bool:
    """Whether metrics are logged after step `step` (from 0): every `log_every` steps of an epoch and at its end."""
    steps_done = step % steps_per_epoch + 1
    return steps_done % log_every == 0 or steps_done == steps_per_epoch


def sample_local_batch(state: TrainState, data: PyTree, info: DataInfo, options: StepOptions) -> tuple[Batch, StepKeys]:
    """Returns this device's share of the batch, augmented, and the keys of the step."""
    size = options.batch_size // lax.axis_size(AXIS)
    position = lax.axis_index(AXIS) * size + jnp.arange(size)  # in the batch over all devices
    if not options.streamed:
        row_of_table = state.step % info.steps_per_epoch % len(data["row"])
        columns = {name: data[name][row_of_table][position] for name in ("row", "label", "index")}
        data = {**columns, "image": data["image"][columns["row"]]}

    step_key = jax.random.fold_in(jax.random.fold_in(state.key, 1), state.step)
    streams = [jax.random.fold_in(step_key, n) for n in range(3)]
    augment_keys, attack_keys, loss_keys = (jax.vmap(jax.random.fold_in, (None, 0))(key, position) for key in streams)
    keys = StepKeys(
        augment=augment_keys,
        attack=attack_keys,
        loss=loss_keys,
        dropout=jax.random.fold_in(jax.random.fold_in(step_key, 3), lax.axis_index(AXIS)),
    )

    image = data["image"].reshape(-1, *info.image_shape)
    image = augment.augment(options.augment, keys.augment, image, pad=options.pad)
    image = image.astype(float) / 255
    ones = jnp.ones_like(image[:, 0, 0, 0])
    batch = Batch(image, data["label"], data["index"], eps=options.eps * ones, step_size=options.step_size * ones)
    return batch, keys


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
) -> tuple[
    Callable[[TrainState, PyTree, PyTree], tuple[TrainState, dict[str, jax.Array]]],
    Callable[[TrainState, PyTree, PyTree], PyTree],
]:
    """Returns (`step(state, data, teacher) -> (state, metrics)`, `init_metric_sums(state, data, teacher)`).

    The step is compiled once and its state donated. `init_metric_sums` gives the `metric_sums` of a state that has
    taken no step.

    `metrics` are averages over the steps since the last log step (see `is_log_step`), on the device: fetch them at log
    steps only. Everything random is a function of (key, step, position in the batch): neither the number of devices nor
    a restart changes it. (Dropout, where a network has it, is drawn per device.) The gradient of each device's loss is
    averaged, which is exact for plain means, and for other losses if they gather first (`Net.gather`).

    Args:
        method: what is trained; see `lt_adv.methods`.
        apply: `apply(variables, x, train=...)` of the network.
        tx: the optimizer.
        rate: its learning rate, for the metrics.
        info: static facts of the training set.
        options: static options of the step.
        mesh: all devices.
        parallel: "pmap" or "shard_map".
        attack_apply: the same network in another dtype, for `method.perturb`; `apply` by default.
        sharded: fields of the state that are sharded over the devices; see `sharding.shardings`.

    The step's `data` come from an `InputPipeline`; `teacher` is the frozen variables of another network, or {}.

    Raises:
        ValueError: for a batch size that is not a multiple of the number of devices, or an unknown `parallel`.
    """
    if options.batch_size % mesh.size:
        raise ValueError(
            f"config.optim.batch_size = {options.batch_size} is not a multiple of the {mesh.size} devices: change it."
        )
    membership = metrics.group_membership(options.groups, info.num_classes)

    def per_device_step(state: TrainState, data: PyTree, teacher: PyTree, *, attack: bool = True) -> StepOutput:
        """One step of  min_theta E loss(theta; x_adv),  x_adv = perturb(theta; x)."""
        progress = TrainProgress.at(state.step, info)
        batch, keys = sample_local_batch(state, data, info, options)
        network = functools.partial(
            Net,
            batch_stats=state.batch_stats,
            info=info,
            key=keys.dropout,
            teacher=teacher,
            freeze_batch_stats=options.freeze_batch_stats,
        )
        # Varying parameters have a gradient per device until the one pmean below: shard_map would sum the others.
        params = lax.pcast(state.params, AXIS, to="varying")

        x_adv = batch.image
        if attack:
            net = network(attack_apply or apply, params)
            x_adv = method.perturb(keys.attack, net, batch, state.method_state, progress)

        def loss_fn(params: PyTree) -> tuple[jax.Array, tuple[LossOutput, PyTree]]:
            net = network(apply, params)
            out = method.loss(keys.loss, net, batch, lax.stop_gradient(x_adv), state.method_state, progress)
            return out.loss, (out, net.batch_stats)

        value_and_grad = with_fast_convolutions(jax.value_and_grad(loss_fn, has_aux=True), attack=False)
        (loss, (out, batch_stats)), grads = value_and_grad(params)
        grads = lax.pmean(grads, AXIS)

        accuracy = metrics.is_correct(out.logits, batch.label)
        step_metrics = {"loss": loss, "accuracy": accuracy, **out.metrics}
        sums = metrics.sum_over_devices(step_metrics, batch.label, membership)
        norm = optax.tree.norm(grads)
        one = jnp.ones_like(norm)
        sums |= {"gradient_norm": (norm, one), "learning_rate": (rate(state.step) * one, one)}
        method_state = state.method_state if out.method_state is None else out.method_state
        first_of_window = state.step % info.steps_per_epoch % options.log_every == 0
        return StepOutput(
            grads,
            batch_stats,
            _replicated(end_epoch(method_state, progress)),
            metrics.accumulate(state.metric_sums, sums, restart=first_of_window),
        )

    def end_epoch(method_state: PyTree, progress: TrainProgress) -> PyTree:
        """Returns `method_state`, or in the last step of an epoch what `method.epoch_end` makes of it."""
        is_last_step = (progress.step + 1) % info.steps_per_epoch == 0
        at_end = method.epoch_end(method_state, progress)
        return jax.tree.map(lambda new, old: jnp.where(is_last_step, new, old), at_end, method_state)

    def apply_gradients(state: TrainState, output: StepOutput) -> tuple[TrainState, dict[str, jax.Array]]:
        """Returns the state after the step, and the metrics."""
        updates, opt_state = tx.update(output.grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        average = state.average
        if options.average["name"] in ("ema", "swa"):
            w = average_weight(options.average, state.step, info.steps_per_epoch)
            latest = {"params": params, "batch_stats": output.batch_stats}
            average = jax.tree.map(lambda a, p: a + w * (p - a), state.average, latest)
        state = TrainState(
            step=state.step + 1,
            params=params,
            batch_stats=output.batch_stats,
            opt_state=opt_state,
            average=average,
            method_state=output.method_state,
            metric_sums=output.metric_sums,
            key=state.key,
        )
        return state, metrics.averages(output.metric_sums)

    def init_metric_sums(state: TrainState, data: PyTree, teacher: PyTree) -> PyTree:
        """Returns zeros for every metric: the state must have its final structure before the first step."""
        without_attack = functools.partial(per_device_step, attack=False)  # only shapes are needed
        step = sharding.parallelize(without_attack, apply_gradients, mesh, parallel, sharded, options.streamed)
        shapes, _ = jax.eval_shape(step, state, data, teacher)
        return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes.metric_sums)

    step = sharding.parallelize(per_device_step, apply_gradients, mesh, parallel, sharded, options.streamed)
    return step, init_metric_sums


def _replicated(tree: PyTree) -> PyTree:
    """`tree`, equal on all devices after a gather or a mean, in a form whose equality shard_map's type check sees."""
    return jax.tree.map(lambda a: lax.pmax(a, AXIS), tree)

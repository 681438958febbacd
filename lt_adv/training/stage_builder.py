"""Builds a training stage from its config: network, input, optimizer, compiled step, initial state."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from etils import epath
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from lt_adv import data, methods, models
from lt_adv.data import device_dataset, longtail
from lt_adv.data.device_dataset import ExtraDraws
from lt_adv.data.extra import Extra, mixed_counts
from lt_adv.methods import DataInfo, Method, Stage, addons
from lt_adv.models import posthoc
from lt_adv.runtime import distributed
from lt_adv.runtime.distributed import PyTree
from lt_adv.training import checkpoint, input_pipeline, optimizer, sharding, train_state, train_step
from lt_adv.training.epoch_update import EpochUpdate, Validation, needs_validation
from lt_adv.training.input_pipeline import InputPipeline
from lt_adv.training.net import AXIS
from lt_adv.training.train_state import TrainState


@dataclasses.dataclass(frozen=True)
class ResolvedStage:
    """A stage of a run with all that its config and its data determine. Nothing is compiled."""

    number: int
    num_stages: int
    stage: Stage
    config: ConfigDict  # with the overrides of the stage
    split: data.LongTailed
    info: DataInfo
    variable_shapes: dict[str, Any]
    extra: Extra | None = None

    @property
    def extra_draws(self) -> ExtraDraws | None:
        return ExtraDraws(self.extra.split, extra_per_batch(self.config)) if self.extra else None

    def describe_extra(self) -> dict[str, Any] | None:
        """Returns the entry of a checkpoint that identifies the extra images and their use, or None."""
        if not self.extra:
            return None
        return {
            "file": epath.Path(self.config.data.extra).name,
            "digest": self.extra.digest,
            "images": len(self.extra.split),
            "per_batch": extra_per_batch(self.config),
            "batch_size": self.config.optim.batch_size,
            "prior": self.config.data.extra_prior,
            "class_counts": self.info.class_counts.tolist(),  # that the method uses
            "copies": dict(self.extra.copies),
        }

    @property
    def name(self) -> str:
        return f"{self.number}_{self.stage.name}"

    @property
    def num_steps(self) -> int:
        return self.info.epochs * self.info.steps_per_epoch


@dataclasses.dataclass(frozen=True)
class StageProgram:
    """Everything needed to run one stage."""

    resolved: ResolvedStage
    apply: Callable[[PyTree, jax.Array], jax.Array]  # (variables, x) -> logits, adjusted as in the evaluation
    step: Callable[..., Any]  # (state, data, teacher) -> (state, metrics), compiled
    pipeline: InputPipeline  # the `data` of the steps
    teacher: PyTree
    first_state: Callable[[], TrainState]
    end_epoch: Callable[[TrainState, int], TrainState]  # after the last step of an epoch, counted from 1
    mesh: Mesh  # all devices; the state is on `sharding.state_mesh` of it

    @property
    def name(self) -> str:
        return self.resolved.name

    @property
    def config(self) -> ConfigDict:
        return self.resolved.config

    @property
    def split(self) -> data.LongTailed:
        return self.resolved.split

    @property
    def info(self) -> DataInfo:
        return self.resolved.info


def create_method(config: ConfigDict) -> Method:
    """Returns the configured method without add-ons, with a value for every option."""
    fields = {name: name for name in ("num_steps", "start", "noise", "relative_step_size")} | {"name": "attack"}
    inner = {fields[name]: value for name, value in config.attack.items() if name in fields and value is not None}
    return methods.create(config.method.to_dict(), fidelity=config.fidelity, **inner)


def create_stages(method: Method, config: ConfigDict) -> tuple[Stage, ...]:
    """Returns the stages of a method, inside the configured add-ons."""
    return addons.wrap(method, config.addons, config).stages(config)


def steps_per_epoch(config: ConfigDict, split: data.LongTailed, devices: int) -> int:
    """Returns the number of full batches per epoch.

    With class-aware sampling an epoch is as long as if every class had as many images as the largest one. Extra images
    do not change it.

    Raises:
        ValueError: the batch is larger than an epoch, or not a multiple of the number of devices.
    """
    size, drawn = config.optim.batch_size, len(split.train)
    if config.data.sampler == "class_aware":
        drawn = len(split.class_counts) * max(split.class_counts)
    if size > drawn:
        raise ValueError(f"config.optim.batch_size = {size} is more than the {drawn} training images: make it smaller.")
    if size % devices:
        raise ValueError(f"config.optim.batch_size = {size} is not a multiple of the {devices} devices: change it.")
    return drawn // size


def extra_per_batch(config: ConfigDict) -> int:
    """Returns the number of images of a batch that are drawn from `config.data.extra`.

    Raises:
        ValueError: it is 0, or all.
    """
    size, fraction = config.optim.batch_size, config.data.extra_fraction
    number = round(fraction * size)
    if not 0 < number < size:
        raise ValueError(
            f"config.data.extra_fraction = {fraction} is {number} of the {size} images of a batch "
            "(config.optim.batch_size), which must have extra and other images: change one of them."
        )
    return number


def variable_shapes(config: ConfigDict, split: data.LongTailed) -> tuple[dict[str, Any], int]:
    """Returns (shapes of the variables, number of features) of the configured network, without computing it."""
    model = models.create(config.model, len(split.class_counts))
    image = jax.ShapeDtypeStruct((1, *split.train.image.shape[1:]), jnp.result_type(float))
    (_, out), variables = jax.eval_shape(model.init_with_output, jax.random.key(0), image)
    return flax.core.unfreeze(variables), out["features"].shape[-1]


def learning_rate(config: ConfigDict, stage: Stage, steps_per_epoch: int) -> optax.Schedule:
    """Returns the schedule of a stage, from the config of that stage.

    Drops compound where the method follows a released code in which they do; see `optimizer.schedule`.
    """
    compounding = stage.method.compounding_schedule and stage.method.fidelity == "released_code"
    return optimizer.schedule(config.optim, steps_per_epoch, stage.epochs, compounding)


def resolve(
    number: int,
    num_stages: int,
    stage: Stage,
    config: ConfigDict,
    split: data.LongTailed,
    num_devices: int,
    extra: Extra | None = None,
) -> ResolvedStage:
    """Returns stage `number` of `num_stages`, with its config, its split and extra images."""
    shapes, num_features = variable_shapes(config, split)
    counts = np.asarray(split.class_counts)
    if extra:
        per_batch = extra_per_batch(config)
        if config.data.extra_prior == "mixture":
            counts = mixed_counts(counts, extra, per_batch, config.optim.batch_size)
    info = DataInfo(
        class_counts=counts,
        steps_per_epoch=steps_per_epoch(config, split, num_devices),
        epochs=stage.epochs,
        image_shape=tuple(split.train.image.shape[1:]),
        num_features=num_features,
    )
    return ResolvedStage(number, num_stages, stage, config, split, info, shapes, extra)


class _Step(NamedTuple):
    """The training step of a stage, and what its first state is made of."""

    step: Callable[..., Any]
    init_metric_sums: Callable[..., PyTree]
    init_variables: Callable[[], PyTree]  # a fresh initialization
    create_state: Callable[[PyTree], TrainState]  # from variables, without metric sums
    key: jax.Array
    streamed: bool
    extra: ExtraDraws | None


def _make_step(resolved: ResolvedStage, mesh: Mesh) -> _Step:
    stage, config, split, info = resolved.stage, resolved.config, resolved.split, resolved.info
    model = models.create(config.model, info.num_classes, axis_name=AXIS)
    attacked = model
    if config.attack.dtype:
        attacked = models.create({**config.model, "dtype": config.attack.dtype}, info.num_classes, axis_name=AXIS)
    rate = learning_rate(config, stage, info.steps_per_epoch)
    extra = resolved.extra_draws
    num_bytes = sum(part.image.nbytes for part in device_dataset.with_extra(split.train, extra))
    tx = optimizer.create(config.optim, rate, resolved.variable_shapes["params"], stage.freeze)
    options = train_step.StepOptions(
        batch_size=config.optim.batch_size,
        eps=config.attack.eps,
        step_size=config.attack.step_size,
        augment=config.data.augment,
        pad=config.data.pad,
        log_every=config.log.every_steps,
        average=config.average.to_dict(),
        groups=longtail.groups(split.class_counts),
        streamed=num_bytes > config.data.max_device_gib * 2**30,
        freeze_batch_stats=stage.freeze_batch_stats,
    )
    step, init_metric_sums = train_step.make_train_step(
        stage.method, model.apply, tx, rate, info, options, mesh, config.parallel, attacked.apply, config.sharded
    )
    key = jax.random.fold_in(jax.random.key(config.seed, impl="threefry2x32"), resolved.number)
    image = jnp.zeros((1, *info.image_shape), float)

    def init_variables() -> PyTree:
        variables = flax.core.unfreeze(jax.jit(lambda: model.init(jax.random.fold_in(key, 2), image, train=False))())
        return {**variables, "params": stage.method.init_params(variables["params"], info)}

    def create_state(variables: PyTree) -> TrainState:
        return train_state.create(key, variables, tx, stage.method.init_state(info), average=config.average.name)

    return _Step(step, init_metric_sums, init_variables, create_state, key, options.streamed, extra)


def build(resolved: ResolvedStage, mesh: Mesh, previous: Mapping[str, Any] | None = None) -> StageProgram:
    """Returns the program of a stage; `previous` are the final variables of the stage before it."""
    stage, config, split, info = resolved.stage, resolved.config, resolved.split, resolved.info
    made = _make_step(resolved, mesh)
    state_mesh = sharding.state_mesh(mesh, config.parallel)
    teacher = sharding.replicate(previous, state_mesh) if stage.teacher == "previous" else {}
    class_aware = config.data.sampler == "class_aware"
    classes = device_dataset.class_table(split.train.label, info.num_classes) if class_aware else None
    cycles = config.fidelity == "released_code"
    arguments = split.train, classes, made.key, info, config.optim.batch_size
    if made.streamed:
        pipeline = input_pipeline.streamed(*arguments, mesh, config.parallel, cycles, made.extra)
    else:
        pipeline = input_pipeline.resident(*arguments, state_mesh, cycles, made.extra)

    def first_state() -> TrainState:
        start = made.init_variables()
        if stage.init != "fresh":
            source = checkpoint.read_variables(stage.init)[0] if stage.init != "previous" else previous or {}
            start = merge(start, {name: source[name] for name in start if name in source}, stage.init)
        state = sharding.replicate(made.create_state(start), state_mesh)
        sums = made.init_metric_sums(state, pipeline.example, teacher)
        state = sharding.replicate(state.replace(metric_sums=sums), state_mesh)
        return sharding.shard_state(state, state_mesh, config.sharded)

    return StageProgram(
        resolved=resolved,
        apply=evaluation_apply(config, split, info.class_counts),
        step=made.step,
        pipeline=pipeline,
        teacher=teacher,
        first_state=first_state,
        end_epoch=_epoch_update(resolved, made.key, mesh),
        mesh=mesh,
    )


def _epoch_update(resolved: ResolvedStage, key: jax.Array, mesh: Mesh) -> EpochUpdate:
    config, split, method = resolved.config, resolved.split, resolved.stage.method
    validate = None
    if needs_validation(method, config.average):
        if split.validation is None:
            raise ValueError("The split has no validation images: set config.data.validation_per_class above 0.")
        model = models.create({**config.model, "dtype": config.eval.dtype}, resolved.info.num_classes)
        validate = Validation(
            functools.partial(model.apply, train=False),
            split.validation,
            resolved.info.num_classes,
            attack={"eps": config.attack.eps, "step_size": config.attack.step_size, "num_steps": 20},
            key=jax.random.fold_in(key, 4),  # 3 draws extra images, see `device_dataset.extra_indices`
            mesh=mesh,
            batch_size=config.eval.batch_size,
        )
    average = config.average.to_dict()
    return EpochUpdate(method, resolved.info, average, validate, mesh, config.parallel, config.sharded)


def abstract_step(resolved: ResolvedStage, mesh: Mesh) -> tuple[Callable[..., Any], tuple[PyTree, PyTree, PyTree]]:
    """Returns the training step of a stage, and its arguments as shapes with shardings: for `step.lower(*arguments)`.

    No array is made, and the devices of the mesh need not exist (`lt_adv.compilation`).
    """
    config = resolved.config
    made = _make_step(resolved, mesh)
    state_mesh = sharding.state_mesh(mesh, config.parallel)
    replicated = distributed.replicated(state_mesh)
    teacher = resolved.variable_shapes if resolved.stage.teacher == "previous" else {}
    batch_size = config.optim.batch_size
    if made.streamed:
        data = input_pipeline.streamed_example(resolved.split.train, batch_size, mesh, config.parallel)
    else:
        data = with_sharding(input_pipeline.resident_example(resolved.split.train, batch_size, made.extra), replicated)
    state = jax.eval_shape(lambda: made.create_state(made.init_variables()))
    state = state.replace(metric_sums=made.init_metric_sums(state, data, teacher))
    shardings = sharding.shardings(state, state_mesh, config.sharded)
    state = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, shardings)
    return made.step, (state, data, with_sharding(teacher, replicated))


def with_sharding(tree: PyTree, array_sharding: NamedSharding) -> PyTree:
    """Returns the shapes of a tree, all with one sharding."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=array_sharding), tree)


def evaluation_apply(
    config: ConfigDict, split: data.LongTailed, class_counts: Sequence[float] | np.ndarray | None = None
) -> Callable[[PyTree, jax.Array], jax.Array]:
    """Returns (variables, x) -> logits of the evaluation: in `config.eval.dtype`, with the post-hoc adjustment.

    `class_counts` are those that the training used: those of the split, unless `config.data.extra_prior` is "mixture".
    """
    model = models.create({**config.model, "dtype": config.eval.dtype}, len(split.class_names))
    counts = split.class_counts if class_counts is None else class_counts
    return posthoc.adjusted_logits_fn(model, config.eval.adjustment, counts)


def check_mergeable(new: Mapping[str, Any], old: Mapping[str, Any], origin: str) -> None:
    """Raises ValueError if an array has another shape in `old` than in `new`, or if no name is in both."""
    for name in sorted(new.keys() & old.keys()):
        if new[name].shape != old[name].shape:
            raise ValueError(
                f"{origin}: {name} has shape {old[name].shape} there, {new[name].shape} in config.model: "
                "name a run of the same network."
            )
    if not new.keys() & old.keys():
        raise ValueError(f"{origin}: none of its arrays has a name of the network in config.model: name another run.")


def merge(fresh: PyTree, source: PyTree, origin: str) -> PyTree:
    """Returns `fresh`, with the arrays of `source` wherever both have one of the same name.

    Logs a warning with the names that only one of them has.

    Raises:
        ValueError: as `check_mergeable`.
    """
    new, old = (flax.traverse_util.flatten_dict(tree, sep="/") for tree in (fresh, source))
    check_mergeable(new, old, origin)
    for kind, names in (("new", new.keys() - old.keys()), ("unused", old.keys() - new.keys())):
        if names:
            logging.warning("%s: %s: %s", origin, kind, ", ".join(sorted(names)))
    return flax.traverse_util.unflatten_dict({k: jnp.asarray(old.get(k, v), v.dtype) for k, v in new.items()}, sep="/")

"""Builds a training stage from its config: network, input, optimizer, compiled step, initial state."""

import collections
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from absl import logging
from jax.sharding import Mesh

from lt_adv import data, methods, models
from lt_adv.data import device_dataset, longtail
from lt_adv.methods import DataInfo, Method, Stage, addons
from lt_adv.models import posthoc, torch_import, weight_files
from lt_adv.training import checkpoint, input_pipeline, optimizer, sharding, train_state, train_step
from lt_adv.training.input_pipeline import Feed
from lt_adv.training.net import AXIS
from lt_adv.training.train_state import TrainState


@dataclasses.dataclass(frozen=True)
class StageProgram:
    """Everything needed to run one stage."""

    name: str
    config: ml_collections.ConfigDict
    data: data.LongTailed
    info: DataInfo
    apply: Callable[[Any, jax.Array], jax.Array]  # (variables, x) -> logits, adjusted as in the evaluation
    step: Callable[..., Any]  # (state, data, teacher) -> (state, metrics), compiled
    feed: Feed  # the `data` of the steps
    teacher: Any
    first_state: Callable[[], TrainState]
    mesh: Mesh  # all devices; the state is on `sharding.state_mesh` of it

    @property
    def num_steps(self) -> int:
        return self.info.epochs * self.info.steps_per_epoch


def method(config: ml_collections.ConfigDict) -> Method:
    """Returns the configured method without add-ons, with a value for every option."""
    inner = {name: config.attack[name] for name in ("num_steps", "start") if config.attack.get(name) is not None}
    return methods.create(config.method.to_dict(), fidelity=config.fidelity, **inner)


def stages(config: ml_collections.ConfigDict) -> tuple[Stage, ...]:
    """Returns the stages of the configured method, inside the configured add-ons."""
    return addons.wrap(method(config), config.addons, config).stages(config)


def steps_per_epoch(config: ml_collections.ConfigDict, split: data.LongTailed, devices: int) -> int:
    """Returns the number of full batches per epoch.

    With class-aware sampling an epoch is as long as if every class had as many images as the largest one.

    Raises:
        ValueError: the batch is larger than an epoch, or not a multiple of the number of devices.
    """
    size, drawn = config.optim.batch_size, len(split.train)
    if config.data.sampler == "class_aware":
        drawn = len(split.class_counts) * max(split.class_counts)
    if size > drawn:
        raise ValueError(f"config.optim.batch_size = {size} is more than the {drawn} training images: make it smaller.")
    if size % devices:
        raise ValueError(f"config.optim.batch_size = {size} is not a multiple of the {devices} devices.")
    return drawn // size


def configured(config: ml_collections.ConfigDict, stage: Stage) -> ml_collections.ConfigDict:
    """Returns a copy of the config with the overrides of one stage."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.update_from_flattened_dict(dict(stage.overrides))
    return config


def shapes(config: ml_collections.ConfigDict, split: data.LongTailed) -> tuple[dict[str, Any], int]:
    """Returns (shapes of the variables, number of features) of the configured network, without computing it."""
    model = models.create(config.model, len(split.class_counts))
    image = jax.ShapeDtypeStruct((1, *split.train.image.shape[1:]), jnp.result_type(float))
    (_, out), variables = jax.eval_shape(model.init_with_output, jax.random.key(0), image)
    return flax.core.unfreeze(variables), out["features"].shape[-1]


def learning_rate(config: ml_collections.ConfigDict, stage: Stage, steps_per_epoch: int) -> optax.Schedule:
    """Returns the schedule of a stage, from the config of that stage.

    Drops compound where the method follows a released code in which they do; see `optimizer.schedule`.
    """
    compounding = stage.method.compounding_schedule and stage.method.fidelity == "released_code"
    return optimizer.schedule(config.optim, steps_per_epoch, stage.epochs, compounding)


def build(
    number: int,
    stage: Stage,
    config: ml_collections.ConfigDict,
    dataset: data.Dataset,
    mesh: Mesh,
    previous: Mapping[str, Any] | None = None,
) -> StageProgram:
    """Returns stage `number` of a run; `previous` are the final variables of the stage before it."""
    config = configured(config, stage)
    split = data.long_tailed(dataset, config.data)
    counts = np.asarray(split.class_counts)
    variables, num_features = shapes(config, split)
    info = DataInfo(
        class_counts=counts,
        steps_per_epoch=steps_per_epoch(config, split, mesh.size),
        epochs=stage.epochs,
        image_shape=tuple(split.train.image.shape[1:]),
        num_features=num_features,
    )
    model = models.create(config.model, info.num_classes, axis_name=AXIS)
    rate = learning_rate(config, stage, info.steps_per_epoch)
    key = jax.random.fold_in(jax.random.key(config.seed, impl="threefry2x32"), number)
    image = jnp.zeros((1, *info.image_shape), float)
    tx = optimizer.create(config.optim, rate, variables["params"], stage.freeze)
    options = train_step.StepOptions(
        batch_size=config.optim.batch_size,
        eps=config.attack.eps,
        step_size=config.attack.step_size,
        augment=config.data.augment,
        pad=config.data.pad,
        log_every=config.log.every_steps,
        average=config.average.to_dict(),
        groups=longtail.groups(counts),
        streamed=split.train.image.nbytes > config.data.max_device_gib * 2**30,
        freeze_batch_stats=stage.freeze_batch_stats,
    )
    attacked = model
    if config.attack.dtype:
        attacked = models.create({**config.model, "dtype": config.attack.dtype}, info.num_classes, axis_name=AXIS)
    step, init_metric_sums = train_step.make_train_step(
        stage.method, model.apply, tx, rate, info, options, mesh, config.parallel, attacked.apply, config.sharded
    )
    state_mesh = sharding.state_mesh(mesh, config.parallel)
    teacher = sharding.replicate(previous, state_mesh) if stage.teacher == "previous" else {}
    classes = (
        device_dataset.class_table(split.train.label, len(counts)) if config.data.sampler == "class_aware" else None
    )
    cycles = config.fidelity == "released_code"
    if options.streamed:
        feed = input_pipeline.streamed(
            split.train, classes, key, info, options.batch_size, mesh, config.parallel, cycles
        )
    else:
        feed = input_pipeline.resident(split.train, classes, key, info, options.batch_size, state_mesh, cycles)

    def first_state() -> TrainState:
        start = flax.core.unfreeze(jax.jit(lambda: model.init(jax.random.fold_in(key, 2), image, train=False))())
        start["params"] = stage.method.init_params(start["params"], info)
        if stage.init != "fresh":
            source = previous if stage.init == "previous" else checkpoint.read_variables(stage.init)[0]
            start = merge(start, {name: source[name] for name in start if name in source}, stage.init)
        state = train_state.create(
            key, start, tx, stage.method.init_state(info), averaged=options.average["name"] != "none"
        )
        state = sharding.replicate(state, state_mesh)
        state = sharding.replicate(
            state.replace(metric_sums=init_metric_sums(state, feed.example, teacher)), state_mesh
        )
        return sharding.shard_state(state, state_mesh, config.sharded)

    return StageProgram(
        name=f"{number}_{stage.name}",
        config=config,
        data=split,
        info=info,
        apply=evaluated(config, split),
        step=step,
        feed=feed,
        teacher=teacher,
        first_state=first_state,
        mesh=mesh,
    )


def evaluated(config: ml_collections.ConfigDict, split: data.LongTailed) -> Callable[[Any, jax.Array], jax.Array]:
    """Returns (variables, x) -> logits as evaluated: in `config.eval.dtype`, with the post-hoc adjustment."""
    model = models.create({**config.model, "dtype": config.eval.dtype}, len(split.class_names))
    return posthoc.adjusted_logits_fn(model, config.eval.adjustment, split.class_counts)


def external_variables(
    config: ml_collections.ConfigDict, split: data.LongTailed
) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns (variables, description) of the weight file in `config.init_from`.

    The description has the file and its SHA-256, and the tensors of the file that the network does not use.

    Raises:
        ValueError: the weights are those of another network.
    """
    model = models.create(config.model, len(split.class_names))
    variables, unused = torch_import.variables(config.init_from, model, split.train.image.shape[1:])
    counted = "; ".join(f"{number}: {reason}" for reason, number in collections.Counter(unused.values()).items())
    return variables, {
        "method": "not known",
        "weights": f"{config.init_from}, SHA-256 {weight_files.sha256(config.init_from)}",
        "unused_tensors": counted or "none",
    }


def mergeable(new: Mapping[str, Any], old: Mapping[str, Any], origin: str) -> None:
    """Raises ValueError if an array has another shape in `old` than in `new`, or if no name is in both."""
    for name in sorted(new.keys() & old.keys()):
        if new[name].shape != old[name].shape:
            raise ValueError(
                f"{origin}: {name} has shape {old[name].shape} there, {new[name].shape} here: is it the same network?"
            )
    if not new.keys() & old.keys():
        raise ValueError(f"{origin}: none of its arrays has a name of this network.")


def merge(fresh: Any, source: Any, origin: str) -> Any:
    """Returns `fresh`, with the arrays of `source` wherever both have one of the same name.

    Logs a warning with the names that only one of them has.

    Raises:
        ValueError: as `mergeable`.
    """
    new, old = (flax.traverse_util.flatten_dict(tree, sep="/") for tree in (fresh, source))
    mergeable(new, old, origin)
    for kind, names in (("new", new.keys() - old.keys()), ("unused", old.keys() - new.keys())):
        if names:
            logging.warning("%s: %s: %s", origin, kind, ", ".join(sorted(names)))
    return flax.traverse_util.unflatten_dict({k: jnp.asarray(old.get(k, v), v.dtype) for k, v in new.items()}, sep="/")

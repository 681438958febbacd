"""A stage made ready to run: network, data on the devices, optimiser, compiled step, first state."""

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
    """What one stage needs; `step(state, data, teacher) -> (state, metrics)` is its one compiled program."""

    name: str
    config: ml_collections.ConfigDict
    data: data.LongTailed
    info: DataInfo
    apply: Callable[[Any, jax.Array], jax.Array]  # (variables, x) -> logits as they are evaluated
    step: Callable[..., Any]
    feed: Feed  # of the step's `data`
    teacher: Any
    first_state: Callable[[], TrainState]
    mesh: Mesh  # all devices; the state lives on `sharding.home` of it

    @property
    def num_steps(self) -> int:
        return self.info.epochs * self.info.steps_per_epoch


def method(config: ml_collections.ConfigDict) -> Method:
    """The configured method, with a value for every option and inside no add-on."""
    inner = {name: config.attack[name] for name in ("num_steps", "start") if config.attack.get(name) is not None}
    return methods.create(config.method.to_dict(), fidelity=config.fidelity, **inner)


def stages(config: ml_collections.ConfigDict) -> tuple[Stage, ...]:
    """The stages of the configured method, inside the configured add-ons."""
    return addons.wrap(method(config), config.addons, config).stages(config)


def steps_per_epoch(config: ml_collections.ConfigDict, split: data.LongTailed, devices: int) -> int:
    """Whole batches in an epoch; one of class-aware draws is as long as if all classes were as large as the largest.

    ValueError for a batch that is larger than that, or cannot be shared among the devices.
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
    """A copy of the config as it holds in one stage."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.update_from_flattened_dict(dict(stage.overrides))
    return config


def shapes(config: ml_collections.ConfigDict, split: data.LongTailed) -> tuple[dict[str, Any], int]:
    """(variables, width of the features) of the configured network, as shapes: nothing is computed."""
    model = models.create(config.model, len(split.class_counts))
    image = jax.ShapeDtypeStruct((1, *split.train.image.shape[1:]), jnp.result_type(float))
    (_, out), variables = jax.eval_shape(model.init_with_output, jax.random.key(0), image)
    return flax.core.unfreeze(variables), out["features"].shape[-1]


def learning_rate(config: ml_collections.ConfigDict, stage: Stage, steps_per_epoch: int) -> optax.Schedule:
    """Of a stage, whose own config this is: compounding where the stage's method follows a released code that does."""
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
    """Stage `number` of a run; `previous` are the variables that the stage before ended with."""
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
        streamed=split.train.image.nbytes > config.data.resident_gib * 2**30,
        freeze_batch_stats=stage.freeze_batch_stats,
    )
    attacked = model
    if config.attack.dtype:
        attacked = models.create({**config.model, "dtype": config.attack.dtype}, info.num_classes, axis_name=AXIS)
    step, init_metric_sums = train_step.make_train_step(
        stage.method, model.apply, tx, rate, info, options, mesh, config.parallel, attacked.apply, config.sharded
    )
    home = sharding.state_mesh(mesh, config.parallel)
    teacher = sharding.replicate(previous, home) if stage.teacher == "previous" else {}
    classes = (
        device_dataset.class_table(split.train.label, len(counts)) if config.data.sampler == "class_aware" else None
    )
    cycles = config.fidelity == "released_code"
    if options.streamed:
        feed = input_pipeline.streamed(
            split.train, classes, key, info, options.batch_size, mesh, config.parallel, cycles
        )
    else:
        feed = input_pipeline.resident(split.train, classes, key, info, options.batch_size, home, cycles)

    def first_state() -> TrainState:
        start = flax.core.unfreeze(jax.jit(lambda: model.init(jax.random.fold_in(key, 2), image, train=False))())
        start["params"] = stage.method.init_params(start["params"], info)
        if stage.init != "fresh":
            source = previous if stage.init == "previous" else checkpoint.read_variables(stage.init)[0]
            start = merge(start, {name: source[name] for name in start if name in source}, stage.init)
        state = train_state.create(
            key, start, tx, stage.method.init_state(info), averaged=options.average["name"] != "none"
        )
        state = sharding.replicate(state, home)
        state = sharding.replicate(state.replace(metric_sums=init_metric_sums(state, feed.example, teacher)), home)
        return sharding.shard_state(state, home, config.sharded)

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
    """(variables, x) -> logits of the configured network as it is evaluated: in its dtype, adjusted after training."""
    model = models.create({**config.model, "dtype": config.eval.dtype}, len(split.class_names))
    return posthoc.adjusted(model, config.eval.adjustment, split.class_counts)


def imported(config: ml_collections.ConfigDict, split: data.LongTailed) -> tuple[dict[str, Any], dict[str, str]]:
    """(variables, what is known of them) of the file of weights in `config.init_from`; ValueError for another network.

    Known are the file and its digest, and the tensors in it that the network has no use for.
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
    """ValueError if a name is in both with different shapes, or in neither."""
    for name in sorted(new.keys() & old.keys()):
        if new[name].shape != old[name].shape:
            raise ValueError(
                f"{origin}: {name} has shape {old[name].shape} there, {new[name].shape} here: is it the same network?"
            )
    if not new.keys() & old.keys():
        raise ValueError(f"{origin}: none of its arrays has a name of this network.")


def merge(fresh: Any, source: Any, origin: str) -> Any:
    """`fresh` with every array that `source` has under the same name; what was new or unused is said, once each.

    ValueError if a name is in both with different shapes, or in neither.
    """
    new, old = (flax.traverse_util.flatten_dict(tree, sep="/") for tree in (fresh, source))
    mergeable(new, old, origin)
    for what, names in (("new", new.keys() - old.keys()), ("unused", old.keys() - new.keys())):
        if names:
            logging.warning("%s: %s: %s", origin, what, ", ".join(sorted(names)))
    return flax.traverse_util.unflatten_dict({k: jnp.asarray(old.get(k, v), v.dtype) for k, v in new.items()}, sep="/")

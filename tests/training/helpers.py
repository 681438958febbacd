"""A network small enough for float64 on eight virtual devices, and training steps of it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lt_adv.data import Split, device_dataset
from lt_adv.methods import DataInfo
from lt_adv.training import input_pipeline, optimizer, sharding, train_state
from lt_adv.training.net import AXIS
from lt_adv.training.train_step import StepOptions, make_train_step

OPTIM = {
    "learning_rate": 0.05,
    "momentum": 0.9,
    "nesterov": False,
    "weight_decay": 1e-3,
    "schedule": "constant",
    "warmup_epochs": 0,
}
COUNTS = np.array([20, 12, 6, 2])  # only two images of the rarest class: most shards of a batch have none


class Small(nn.Module):
    """A tiny network with convolution, batch norm, mean pooling and a cosine classifier."""

    num_classes: int = 4
    axis_name: str | None = AXIS

    @nn.compact
    def __call__(self, x, train):
        h = nn.Conv(6, (3, 3), use_bias=False, padding=((1, 1), (1, 1)), dtype=x.dtype, param_dtype=x.dtype)(x)
        h = nn.BatchNorm(use_running_average=not train, momentum=0.9, axis_name=self.axis_name, dtype=x.dtype)(h)
        features = nn.tanh(h).mean((1, 2))
        w = self.param("kernel", nn.initializers.normal(0.5), (6, self.num_classes), x.dtype)
        logits = 4 * (features @ w) / (1e-2 + jnp.linalg.norm(features, axis=-1, keepdims=True))
        return logits, {"features": features}


def frozen_teacher():
    """Returns variables of a `Small` network that differ from those of `make`."""
    variables = Small().init(jax.random.key(11), jnp.zeros((1, 6, 6, 1), float), train=False)
    return jax.tree.map(lambda a: a.astype(float), variables)


def split(seed: int = 0) -> Split:
    rng = np.random.default_rng(seed)
    label = np.repeat(np.arange(4), COUNTS).astype(np.int32)
    image = rng.integers(0, 256, (len(label), 6, 6, 1), dtype=np.uint8)
    return Split(image, label, np.arange(len(label), dtype=np.int64))


def make(
    method,
    devices,
    parallel="pmap",
    *,
    teacher=None,
    freeze=None,
    optim_options=None,
    attack_apply=None,
    sharded=(),
    seed=3,
    sampler="uniform",
    cycles=False,
    extra=None,
    **options,
):
    """Returns (step, initial state, input, teacher); `seed` changes the random draws, not the initial parameters."""
    mesh = sharding.make_mesh(jax.devices()[:devices])
    batch_size = 16
    classes = device_dataset.class_table(split().label, 4) if sampler == "class_aware" else None
    per_epoch = (len(split()) if classes is None else 4 * COUNTS.max()) // batch_size
    info = DataInfo(class_counts=COUNTS, steps_per_epoch=per_epoch, epochs=3, image_shape=(6, 6, 1), num_features=6)
    model = Small()
    variables = model.init(jax.random.key(3), jnp.zeros((1, 6, 6, 1), float), train=False)
    variables = jax.tree.map(lambda a: a.astype(float), variables)  # linen creates running statistics in float32
    config = {**OPTIM, **(optim_options or {})}
    rate = optimizer.schedule(config, info.steps_per_epoch, info.epochs)
    tx = optimizer.create(config, rate, variables["params"], freeze)
    options = StepOptions(batch_size=batch_size, eps=0.1, step_size=0.05, pad=1, log_every=2, **options)
    step, init_metric_sums = make_train_step(
        method, model.apply, tx, rate, info, options, mesh, parallel, attack_apply=attack_apply, sharded=sharded
    )
    teacher = sharding.replicate(teacher or {}, mesh)
    key = jax.random.key(seed)
    if options.streamed:
        pipeline = input_pipeline.streamed(split(), classes, key, info, batch_size, mesh, parallel, cycles, extra)
    else:
        pipeline = input_pipeline.resident(split(), classes, key, info, batch_size, mesh, cycles, extra)
    state = sharding.replicate(
        train_state.create(key, variables, tx, method.init_state(info), average=options.average["name"]), mesh
    )
    state = sharding.replicate(state.replace(metric_sums=init_metric_sums(state, pipeline.example, teacher)), mesh)
    return step, sharding.shard_state(state, mesh, sharded), pipeline, teacher


def run(method, devices, parallel="pmap", steps=4, **options):
    """Returns the final state and the metrics of every step, as numpy."""
    step, state, pipeline, teacher = make(method, devices, parallel, **options)
    rows = []
    with pipeline.batches(0, steps) as batches:
        for data in batches:
            state, metrics = step(state, data, teacher)
            rows.append(jax.device_get(metrics))
    return jax.device_get(state.replace(key=jax.random.key_data(state.key))), rows


def assert_same(a, b, tolerance):
    """Asserts that the trees are equal, relative to the largest magnitude of each array."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        both = np.isnan(x) & np.isnan(y) if np.issubdtype(x.dtype, np.floating) else np.zeros(x.shape, bool)
        scale = max(np.max(np.abs(y), initial=0, where=~both), 1e-12)
        error = np.max(np.abs(x.astype(float) - y.astype(float)), initial=0, where=~both) / scale
        assert error <= tolerance, f"{jax.tree_util.keystr(path)}: {error:.2e}"

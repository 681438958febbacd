"""Runs one measuring task in its own process and prints its result as one line of JSON.

    python -m experiments.benchmark.worker <task> <options as JSON> --config=... [--config.x.y=z ...]

Seconds are wall time, memory is in bytes. A failure prints one line on stderr and exits with code 1.
"""

import dataclasses
import functools
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments.benchmark.autoattack import jax_autoattack, torch_autoattack
from experiments.benchmark.libraries import library_attack, logits_difference
from experiments.benchmark.timing import measure, peak_memory, timed, torch_device
from lt_adv.cli import flags

MAX_OPERATIONS = 20  # in the result of a profile


def build(config: Any, devices: int | None = None, images: int | None = None) -> Any:
    """Returns the training program of the config's first stage, by default on the devices of `lt_adv.main`.

    With `images`, the training set is repeated or cut to this number.
    """
    import jax
    import numpy as np

    from lt_adv import data
    from lt_adv.cli.experiment import Experiment
    from lt_adv.runtime import environment
    from lt_adv.training import sharding, stage_builder

    environment.prepare(config.optim.batch_size, devices or config.cpu_devices)
    if devices and devices > jax.device_count():
        raise ValueError(f"{devices} devices requested, {jax.device_count()} available.")
    mesh = sharding.make_mesh(jax.devices()[:devices])
    changed: dict[str, Any] = {}
    if images:
        config.data.imbalance = "none"
        dataset = data.load(config.data)
        train = dataset.train.take(np.arange(images) * len(dataset.train) // images)
        changed["dataset"] = dataclasses.replace(dataset, train=train)
    experiment = Experiment.from_config(config, mesh=mesh, **changed)
    return stage_builder.build(experiment.resolved_stages[0], mesh)


def training_step(program: Any) -> Callable[[], Any]:
    """Returns the training step as the training loop runs it: state donated, two steps in flight, no metric fetched."""
    import jax

    state = program.first_state()
    metrics: Any = None
    previous: Any = None

    def step() -> Any:
        nonlocal state, metrics, previous
        jax.block_until_ready(previous)
        previous = metrics
        with jax.transfer_guard("disallow"):
            state, metrics = program.step(state, program.pipeline.example, program.teacher)
        return metrics

    return step


def jax_step(config: Any, *, seconds: float, devices: int | None = None, images: int | None = None) -> dict[str, Any]:
    """Times the training step; `devices` and `images` as of `build`."""
    import jax

    program = build(config, devices, images)
    times, metrics = measure(training_step(program), jax.block_until_ready, seconds)
    loss = require_finite(float(metrics["loss"]))
    return times | {"loss": loss, "images": config.optim.batch_size, "devices": program.mesh.size}


def jax_profile(config: Any) -> dict[str, Any]:
    """Profiles a training step.

    Returns:
        {"operations": the longest kinds of operations, "seconds": time of all operations, summed over threads,
        "devices"}
    """
    from experiments.benchmark import profiling

    program = build(config)
    operations = profiling.operations(training_step(program))
    seconds = sum(entry["ms"] for entry in operations) / 1e3
    return {"operations": operations[:MAX_OPERATIONS], "seconds": seconds, "devices": program.mesh.size}


def torch_step(config: Any, *, setting: str, seconds: float) -> dict[str, Any]:
    """Times the same step of the PyTorch baseline, `setting` "released" or "tuned"."""
    _, device, wait = torch_device()
    from experiments.pytorch_baseline.step import Trainer
    from lt_adv import data

    trainer = Trainer(config, data.long_tailed(data.load(config.data), config.data), setting=setting, device=device)
    times, loss = measure(trainer.step, wait, seconds)
    return times | {"loss": require_finite(float(loss)), "images": config.optim.batch_size}


def peak(config: Any, *, seconds: float) -> dict[str, Any]:
    """Returns the devices and the best FLOP/s of a product of two square matrices, summed over the devices.

    Measured in bfloat16 and float32 at JAX's default precision (TF32 on recent NVIDIA GPUs), on CPU only in float32
    with all cores. With several accelerators, one is measured and multiplied by their number.
    """
    import jax
    import jax.numpy as jnp

    del config
    device = jax.devices()[0]
    size = 2048 if device.platform == "cpu" else 8192
    rates = {}
    for dtype in ("float32",) if device.platform == "cpu" else ("bfloat16", "float32"):
        a, b = (jax.random.normal(jax.random.key(i), (size, size), jnp.dtype(dtype)) for i in range(2))
        times, _ = measure(functools.partial(jax.jit(jnp.matmul), a, b), jax.block_until_ready, seconds)
        rates[dtype] = jax.device_count() * 2 * size**3 / (min(times["ms"]) / 1e3)
    names = {"device": device.device_kind, "platform": device.platform, "devices": jax.device_count()}
    return {**names, "matmul_size": size, "matmul_flops_per_second": rates}


def flops(config: Any) -> dict[str, Any]:
    """Returns model FLOPs per image of an evaluation-mode forward and of a training step."""
    from experiments.benchmark import flops as flop_counter

    program = build(config)
    forward = flop_counter.forward(program.config.model, program.info.image_shape, program.info.num_classes)
    return {"forward": forward, "step": flop_counter.step(program)}


def pipeline(config: Any, *, seconds: float) -> dict[str, Any]:
    """Times gathering, augmenting and converting a batch (always from a uniform draw), compiled as one program."""
    import jax
    import jax.numpy as jnp

    from lt_adv import data
    from lt_adv.data import augment, device_dataset
    from lt_adv.training import sharding

    split = data.long_tailed(data.load(config.data), config.data)
    on_device = device_dataset.put(split.train, sharding.make_mesh(jax.devices()[:1]))
    size = config.optim.batch_size
    per_epoch = device_dataset.steps_per_epoch(len(split.train), size)
    options = {"steps_per_epoch": per_epoch, "num_examples": len(split.train), "batch_size": size}
    key = jax.random.key(config.seed)
    on_device["rows"] = device_dataset.epoch_indices(key, 0, **options)

    @jax.jit
    def batch(number: jax.Array, on_device: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        rows = on_device["rows"][number % per_epoch]
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, number), jnp.arange(size))
        image = on_device["image"][rows].reshape(size, *split.train.image.shape[1:])
        image = augment.augment(config.data.augment, keys, image, pad=config.data.pad)
        return number + 1, (image.astype(float) / 255, on_device["label"][rows])

    number = jnp.zeros((), jnp.int32)

    def step() -> Any:
        nonlocal number
        number, result = batch(number, on_device)
        return result

    return measure(step, jax.block_until_ready, seconds)[0] | {"images": size}


def load(config: Any, *, folder: str) -> dict[str, Any]:
    """Returns the seconds to load the images with `folder` as data_dir; from an empty folder they are decoded first.

    The page cache of the system is not cleared.
    """
    from lt_adv import data

    default = Path(config.data.data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    downloads = Path(folder) / "downloads"
    if (default / "downloads").is_dir() and not downloads.exists():
        downloads.parent.mkdir(parents=True)
        downloads.symlink_to((default / "downloads").absolute())
    config.data.data_dir = folder
    seconds, dataset = timed(lambda: data.load(config.data))
    return {"seconds": seconds, "images": len(dataset.train) + len(dataset.test)}


def pgd_options(config: Any, num_steps: int) -> dict[str, Any]:
    """Returns the options of PGD with `num_steps` steps at the radius and step size of the evaluation's PGD-20."""
    spec = config.eval.attacks.pgd20
    return {"eps": spec.eps, "step_size": spec.step_size, "num_steps": num_steps}


def jax_attack(config: Any, *, num_steps: int, seconds: float) -> dict[str, Any]:
    """Times PGD as the evaluation runs it: `attacks.jit` on a batch of test images, sharded over the devices."""
    import jax
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    from lt_adv import attacks

    program = build(config)
    images = min(config.eval.batch_size, len(program.data.test)) // program.mesh.size * program.mesh.size
    variables, test = program.first_state().variables, program.data.test.take(np.arange(images))
    data_sharding = NamedSharding(program.mesh, PartitionSpec("data"))
    x, y = jax.device_put((test.image.astype(np.float32) / 255, test.label), data_sharding)
    pgd = attacks.jit(attacks.pgd, program.apply, **pgd_options(config, num_steps))
    key = jax.random.key(config.eval.seed)
    times, _ = measure(lambda: pgd(key, variables, x, y), jax.block_until_ready, seconds)
    return times | {"images": images, "devices": program.mesh.size}


def torch_attack(config: Any, *, num_steps: int, seconds: float) -> dict[str, Any]:
    """Times PGD of the PyTorch baseline, a loop of eager float32 steps, at the same batch size through the same network
    with other random weights."""
    torch, device, wait = torch_device()
    import numpy as np

    from experiments.pytorch_baseline import attack, models
    from lt_adv import data

    torch.manual_seed(config.eval.seed)
    split = data.long_tailed(data.load(config.data), config.data)
    test = split.test.take(np.arange(min(config.eval.batch_size, len(split.test))))
    x = torch.tensor(test.image, device=device).permute(0, 3, 1, 2) / 255
    y = torch.tensor(test.label, dtype=torch.int64, device=device)
    net = models.create(config.model, len(split.class_counts), x.shape[1]).to(device).eval()
    options = pgd_options(config, num_steps)

    def objective(x_adv: Any) -> Any:
        return torch.nn.functional.cross_entropy(net(x_adv), y, reduction="sum")

    def pgd() -> Any:
        noise = torch.empty_like(x).uniform_(-options["eps"], options["eps"])
        return attack.pgd(objective, x, noise, **options)

    return measure(pgd, wait, seconds)[0] | {"images": len(y)}


def require_finite(loss: float) -> float:
    if not math.isfinite(loss):
        raise ValueError(f"The loss is {loss}: training diverged, so its time means nothing.")
    return loss


TASKS = {
    task.__name__: task
    for task in (
        *(jax_step, jax_profile, torch_step, peak, flops, pipeline, load),
        *(jax_attack, torch_attack, jax_autoattack, torch_autoattack, library_attack, logits_difference),
    )
}


def run(task: str, config_arguments: Sequence[str], **options: Any) -> dict[str, Any]:
    """Returns the result of a task, with the peak memory of this process if the task times steps."""
    result = TASKS[task](flags.parse(["worker", *config_arguments]).config, **options)
    return result | ({"memory": peak_memory()} if "ms" in result else {})


def main(argv: Sequence[str]) -> int:
    task, options, *config_arguments = argv[1:]
    try:
        print(json.dumps(run(task, config_arguments, **json.loads(options))))
    except Exception as error:
        text = " ".join(str(error).split()) or repr(error)
        kind = "Error" if isinstance(error, (ValueError, ImportError, OSError)) else type(error).__name__
        print(f"{kind}: {text}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))

"""A process that measures one thing once and prints it as one line of JSON.

    python -m experiments.benchmark.worker <work> <options as JSON> --config=... [--config.x.y=z ...]

Seconds are wall time, memory is in bytes. A failure is one line on stderr and exit code 1.
"""

import functools
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.benchmark.autoattack import jax_autoattack, torch_autoattack
from experiments.benchmark.devices import memory, process_memory, torch_device
from experiments.benchmark.timing import measure
from lt_adv.cli import flags

KINDS = 20  # of operations that a profile keeps


def build(config: Any, devices: int | None = None) -> Any:
    """The training program of the config's first stage, on as many devices as `lt_adv.main` takes, or on `devices`."""
    import jax

    from lt_adv import data
    from lt_adv.runtime import environment
    from lt_adv.training import sharding, stage_builder

    environment.prepare(config.optim.batch_size, devices or config.cpu_devices)
    if devices and devices > jax.device_count():
        raise ValueError(f"{devices} devices are asked for, there is {jax.device_count()}.")
    mesh = sharding.make_mesh(jax.devices()[:devices])
    return stage_builder.build(0, stage_builder.stages(config)[0], config, data.load(config.data), mesh)


def jax_step(config: Any, *, seconds: float, devices: int | None = None) -> dict[str, Any]:
    """The fused training step as the training loop runs it: state donated, two steps in flight, no metric fetched."""
    import jax

    built = build(config, devices)
    state = built.first_state()
    metrics: Any = None
    behind: Any = None

    def step() -> Any:
        nonlocal state, metrics, behind
        jax.block_until_ready(behind)
        behind = metrics
        with jax.transfer_guard("disallow"):
            state, metrics = built.step(state, built.feed.example, built.teacher)
        return metrics

    found = measure(step, jax.block_until_ready, seconds)
    loss = finite(float(metrics["loss"]))
    return found | {"loss": loss, "devices": built.mesh.size, "memory": memory(), "xla": xla_costs()}


def jax_profile(config: Any) -> dict[str, Any]:
    """{"operations": the KINDS longest kinds of a training step, "seconds" of all, summed over threads, "devices"}."""
    from experiments.benchmark import profiling

    built = build(config)
    state = built.first_state()

    def step() -> Any:
        nonlocal state
        state, metrics = built.step(state, built.feed.example, built.teacher)
        return metrics

    found = profiling.operations(step)
    seconds = sum(entry["ms"] for entry in found) / 1e3
    return {"operations": found[:KINDS], "seconds": seconds, "devices": built.mesh.size}


def torch_step(config: Any, *, setting: str, seconds: float) -> dict[str, Any]:
    """The same step of the PyTorch twin, `setting` "released" or "tuned"."""
    torch, device, wait = torch_device()
    from experiments.pytorch_baseline.step import Trainer
    from lt_adv import data

    trainer = Trainer(config, data.long_tailed(data.load(config.data), config.data), setting=setting, device=device)
    last: Any = None

    def step() -> Any:
        nonlocal last
        last = trainer.step()
        return last

    found = measure(step, wait, seconds)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else process_memory()
    return found | {"loss": finite(float(last)), "memory": peak}


def peak(config: Any, *, seconds: float) -> dict[str, Any]:
    """What the devices are, and the FLOP/s of a product of two square matrices on all of them, at best.

    bfloat16 and float32, at the precision that JAX takes by default (on recent NVIDIA GPUs TF32); on CPU float32 alone,
    with all cores. Of several accelerators one is measured.
    """
    import jax
    import jax.numpy as jnp

    del config
    device = jax.devices()[0]
    size = 2048 if device.platform == "cpu" else 8192
    rates = {}
    for dtype in ("float32",) if device.platform == "cpu" else ("bfloat16", "float32"):
        a, b = (jax.random.normal(jax.random.key(i), (size, size), jnp.dtype(dtype)) for i in range(2))
        product = jax.jit(jnp.matmul)
        found = measure(functools.partial(product, a, b), jax.block_until_ready, seconds)
        rates[dtype] = jax.device_count() * 2 * size**3 / (min(found["ms"]) / 1e3)
    names = {"device": device.device_kind, "platform": device.platform, "devices": jax.device_count()}
    return {**names, "matmul_size": size, "matmul_flops_per_second": rates}


def flops(config: Any) -> dict[str, Any]:
    """Model FLOPs per image of one evaluation-mode forward and of one whole training step."""
    from experiments.benchmark import flops as counted

    built = build(config)
    forward = counted.forward(built.config.model, built.info.image_shape, built.info.num_classes)
    step = counted.step(built)
    return {"forward": forward, "step": step, "passes": step / forward}


def pipeline(config: Any, *, seconds: float) -> dict[str, Any]:
    """Gather of a batch (always of a uniform draw), augmentation and conversion, alone in one program."""
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
        number, made = batch(number, on_device)
        return made

    return measure(step, jax.block_until_ready, seconds) | {"memory": memory()}


def load(config: Any, *, folder: str) -> dict[str, Any]:
    """Seconds that the images take with `folder` as data_dir: empty, they are decoded from their files or archives.

    What the system has read from disk before it may still have in memory.
    """
    from lt_adv import data

    usual = Path(config.data.data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    downloads = Path(folder) / "downloads"
    if (usual / "downloads").is_dir() and not downloads.exists():
        downloads.parent.mkdir(parents=True)
        downloads.symlink_to((usual / "downloads").absolute())
    config.data.data_dir = folder
    start = time.perf_counter()
    dataset = data.load(config.data)
    return {"seconds": time.perf_counter() - start, "images": len(dataset.train) + len(dataset.test)}


def attack_setting(config: Any, num_steps: int) -> dict[str, Any]:
    """PGD at the radius of the evaluation's PGD-20."""
    spec = config.eval.attacks.pgd20
    return {"eps": spec.eps, "step_size": spec.step_size, "num_steps": num_steps}


def jax_attack(config: Any, *, num_steps: int, seconds: float) -> dict[str, Any]:
    """PGD as the evaluation runs it: `attacks.jit` on a batch of test images, shared among the devices."""
    import jax
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    from lt_adv import attacks

    built = build(config)
    images = min(config.eval.batch_size, len(built.data.test)) // built.mesh.size * built.mesh.size
    variables, test = built.first_state().variables, built.data.test.take(np.arange(images))
    shared = NamedSharding(built.mesh, PartitionSpec("data"))
    x, y = jax.device_put((test.image.astype(np.float32) / 255, test.label), shared)
    pgd = attacks.jit(attacks.pgd, built.apply, **attack_setting(config, num_steps))
    key = jax.random.key(config.eval.seed)
    found = measure(lambda: pgd(key, variables, x, y), jax.block_until_ready, seconds)
    return found | {"images": images, "devices": built.mesh.size, "memory": memory()}


def torch_attack(config: Any, *, num_steps: int, seconds: float) -> dict[str, Any]:
    """The twin's PGD, a loop of eager steps in float32, on a batch of the same size through the same network, which has
    weights of its own."""
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

    def objective(x_adv: Any) -> Any:
        return torch.nn.functional.cross_entropy(net(x_adv), y, reduction="sum")

    def pgd() -> Any:
        setting = attack_setting(config, num_steps)
        noise = torch.empty_like(x).uniform_(-setting["eps"], setting["eps"])
        return attack.pgd(objective, x, noise, **setting)

    peak = torch.cuda.max_memory_allocated if device == "cuda" else process_memory
    return measure(pgd, wait, seconds) | {"images": len(y), "memory": peak()}


def xla_costs() -> dict[str, float]:
    """XLA's own count for the largest program: {"flops", "bytes"}, where the backend gives them.

    It sees the compiled program: of a rolled loop one turn, of a library's convolution possibly nothing.
    """
    import jax

    costs = [executable.cost_analysis() for executable in jax.devices()[0].client.live_executables()]
    costs = [cost for cost in costs if cost.get("flops")]
    largest: dict[str, float] = max(costs, key=lambda cost: cost["flops"], default={})
    names = {"flops": "flops", "bytes": "bytes accessed"}
    return {name: largest[entry] for name, entry in names.items() if entry in largest}


def finite(loss: float) -> float:
    if not math.isfinite(loss):
        raise ValueError(f"The loss is {loss}: what was timed is not training.")
    return loss


WORKS = {
    work.__name__: work
    for work in (
        *(jax_step, jax_profile, torch_step, peak, flops, pipeline, load),
        *(jax_attack, torch_attack, jax_autoattack, torch_autoattack),
    )
}


def main(argv: Sequence[str]) -> int:
    name, options, *config = argv[1:]
    try:
        result = WORKS[name](flags.parse(["worker", *config]).config, **json.loads(options))
    except Exception as error:
        text = " ".join(str(error).split()) or repr(error)
        kind = "Error" if isinstance(error, (ValueError, ImportError, OSError)) else type(error).__name__
        print(f"{kind}: {text}", file=sys.stderr)
        return 1
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))

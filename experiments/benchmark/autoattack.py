"""AutoAttack on one network in JAX and in the PyTorch baseline: two tasks of `worker` with the same result."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.benchmark.target import make_target
from experiments.benchmark.timing import compile_spans, timed, torch_device, union_length


def jax_autoattack(config: Any, *, attacks: Sequence[str], queries: int, **options: Any) -> dict[str, Any]:
    """Times `lt_adv.attacks.autoattack` on all devices, called as the evaluation calls it.

    `options` are the keyword arguments of `make_target`.
    """
    import jax

    from lt_adv.attacks import autoattack
    from lt_adv.runtime import environment

    environment.prepare(config.optim.batch_size, config.cpu_devices)
    target = make_target(config, **options)
    logits_fn = jax.tree_util.Partial(target.apply, jax.device_put(target.variables))
    label, size = target.label, config.eval.batch_size
    if label is None:
        batches = np.split(target.image, range(size, len(target.image), size))
        label = np.concatenate([np.asarray(jax.jit(logits_fn)(batch)).argmax(-1) for batch in batches])
    key = jax.random.key(config.eval.seed)
    settings = {"eps": target.eps, "version": tuple(attacks), "batch_size": size, "num_queries": queries}
    with compile_spans() as spans:
        seconds, result = timed(lambda: autoattack(key, logits_fn, target.image, label, **settings))
    compile_seconds = union_length(spans)
    measured = summarise(seconds - compile_seconds, compile_seconds, target.eps, result)
    return measured | {"devices": jax.local_device_count()}


def torch_autoattack(config: Any, *, attacks: Sequence[str], queries: int, **options: Any) -> dict[str, Any]:
    """Times AutoAttack of the PyTorch baseline, eager and in float32, with the default algorithms of cuDNN."""
    torch, device, wait = torch_device()
    from experiments.pytorch_baseline import autoattack as pytorch

    target, size = make_target(config, **options), config.eval.batch_size
    net = target.torch(device)
    x = torch.tensor(target.image, device=device).permute(0, 3, 1, 2).contiguous()
    if target.label is None:
        y = torch.cat([net(batch).argmax(-1) for batch in x.split(size)])
    else:
        y = torch.tensor(target.label, dtype=torch.int64, device=device)

    def gradient() -> None:
        wait(pytorch.CountingNetwork(net).gradient(x[:size], lambda logits: logits.amax(-1)))

    def attack() -> Any:
        result = pytorch.autoattack(net, x, y, **settings)
        wait(result)
        return result

    first, second = (timed(gradient)[0] for _ in range(2))  # the first call initialises libraries
    generator = torch.Generator(device).manual_seed(config.eval.seed)
    settings = {"eps": target.eps, "attacks": attacks, "batch_size": size, "queries": queries, "generator": generator}
    seconds, result = timed(attack)
    return summarise(seconds, max(0.0, first - second), target.eps, result)


def summarise(seconds: float, compile_seconds: float, eps: float, result: Any) -> dict[str, Any]:
    """Returns the result of one AutoAttack run as plain data.

    "ms" is a list of one block, as in `timing.measure`; "robust" is hexadecimal, one bit per image in their order.
    """
    robust = np.asarray(result.robust.cpu() if hasattr(result.robust, "cpu") else result.robust)
    return {
        "ms": [1e3 * seconds],
        "compile_seconds": compile_seconds,
        "images": len(robust),
        "eps": eps,
        "accuracy": result.accuracy,
        "evaluations": result.evaluations,
        "robust": np.packbits(robust).tobytes().hex(),
    }

"""AutoAttack on one network in JAX and in the PyTorch baseline: two tasks of `worker` with the same result."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from experiments.benchmark.devices import jax_memory, torch_device, torch_memory
from experiments.benchmark.target import make_target


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
    settings = {"eps": target.eps, "version": tuple(attacks), "batch_size": size, "num_queries": queries}
    with compile_spans() as spans:
        start = time.perf_counter()
        result = autoattack(jax.random.key(config.eval.seed), logits_fn, target.image, label, **settings)
        seconds = time.perf_counter() - start
    compile_seconds = union_length(spans)
    measured = summarise(seconds - compile_seconds, compile_seconds, target.eps, result)
    return measured | {"devices": jax.local_device_count(), "memory": jax_memory()}


def torch_autoattack(config: Any, *, attacks: Sequence[str], queries: int, **options: Any) -> dict[str, Any]:
    """Times AutoAttack of the PyTorch baseline, eager and in float32, with the default algorithms of cuDNN."""
    torch, device, wait = torch_device()
    from experiments.pytorch_baseline import autoattack as pytorch

    target, size = make_target(config, **options), config.eval.batch_size
    net = target.torch().to(device)
    x = torch.tensor(target.image, device=device).permute(0, 3, 1, 2).contiguous()
    if target.label is None:
        y = torch.cat([net(batch).argmax(-1) for batch in x.split(size)])
    else:
        y = torch.tensor(target.label, dtype=torch.int64, device=device)
    first = []
    for _ in range(2):  # the first call initialises libraries
        start = time.perf_counter()
        wait(pytorch.CountingNetwork(net).gradient(x[:size], lambda logits: logits.amax(-1)))
        first.append(time.perf_counter() - start)
    generator = torch.Generator(device).manual_seed(config.eval.seed)
    settings = {"eps": target.eps, "attacks": attacks, "batch_size": size, "queries": queries, "generator": generator}
    start = time.perf_counter()
    result = pytorch.autoattack(net, x, y, **settings)
    wait(result)
    seconds = time.perf_counter() - start
    measured = summarise(seconds, max(0.0, first[0] - first[1]), target.eps, result)
    return measured | {"memory": torch_memory(device)}


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


@contextlib.contextmanager
def compile_spans() -> Iterator[list[tuple[float, float]]]:
    """Yields a list that fills with (start, end) of everything JAX traces and compiles; spans may be nested."""
    import jax

    spans: list[tuple[float, float]] = []

    def record(event: str, seconds: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            spans.append((time.perf_counter() - seconds, time.perf_counter()))

    jax.monitoring.register_event_duration_secs_listener(record)
    try:
        yield spans
    finally:
        jax.monitoring.unregister_event_duration_listener(record)


def union_length(spans: Sequence[tuple[float, float]]) -> float:
    """Returns the seconds covered by at least one of the spans."""
    total, covered_until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, covered_until))
        covered_until = max(covered_until, end)
    return total

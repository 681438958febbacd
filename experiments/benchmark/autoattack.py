"""AutoAttack on one network, by JAX and by the PyTorch twin: two works of `worker`, in the same words."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from experiments.benchmark import target
from experiments.benchmark.devices import memory, process_memory, torch_device


def jax_autoattack(config: Any, *, attacks: Sequence[str], queries: int, **case: Any) -> dict[str, Any]:
    """`lt_adv.attacks.autoattack` as the evaluation runs it, on all devices; `case` is that of `target.case`."""
    import jax

    from lt_adv.attacks import autoattack
    from lt_adv.runtime import environment

    environment.prepare(config.optim.batch_size, config.cpu_devices)
    found = target.case(config, **case)
    logits_fn = jax.tree_util.Partial(found.apply, jax.device_put(found.variables))
    label, size = found.label, config.eval.batch_size
    if label is None:
        parts = np.split(found.image, range(size, len(found.image), size))
        label = np.concatenate([np.asarray(jax.jit(logits_fn)(part)).argmax(-1) for part in parts])
    key, options = jax.random.key(config.eval.seed), {"eps": found.eps, "version": tuple(attacks), "batch_size": size}
    options["num_queries"] = queries
    with compiling() as spans:
        start = time.perf_counter()
        result = autoattack(key, logits_fn, found.image, label, **options)
        taken = time.perf_counter() - start
    made = report(taken - union(spans), union(spans), found.eps, result)
    return made | {"devices": jax.local_device_count(), "memory": memory()}


def torch_autoattack(config: Any, *, attacks: Sequence[str], queries: int, **case: Any) -> dict[str, Any]:
    """The twin's, eager and in float32, with cuDNN's choices as they come."""
    torch, device, wait = torch_device()
    from experiments.pytorch_baseline import autoattack as twin

    found, size = target.case(config, **case), config.eval.batch_size
    net = found.torch().to(device)
    x = torch.tensor(found.image, device=device).permute(0, 3, 1, 2).contiguous()
    if found.label is None:
        y = torch.cat([net(part).argmax(-1) for part in x.split(size)])
    else:
        y = torch.tensor(found.label, dtype=torch.int64, device=device)
    first = []
    for _ in range(2):  # what is only done once in a process
        start = time.perf_counter()
        wait(twin.Network(net).gradient(x[:size], lambda logits: logits.amax(-1)))
        first.append(time.perf_counter() - start)
    generator = torch.Generator(device).manual_seed(config.eval.seed)
    options = {"eps": found.eps, "attacks": attacks, "batch_size": size, "queries": queries, "generator": generator}
    start = time.perf_counter()
    result = twin.autoattack(net, x, y, **options)
    wait(result)
    taken = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else process_memory()
    return report(taken, max(0.0, first[0] - first[1]), found.eps, result) | {"memory": peak}


def report(taken: float, compiled: float, eps: float, result: Any) -> dict[str, Any]:
    """What both say: seconds as one block of `timing`; "robust" has a bit for each image, from the first one on."""
    robust = np.asarray(result.robust.cpu() if hasattr(result.robust, "cpu") else result.robust)
    return {
        "ms": [1e3 * taken],
        "compile_seconds": compiled,
        "images": len(robust),
        "eps": eps,
        "accuracy": result.accuracy,
        "evaluations": result.evaluations,
        "robust": np.packbits(robust).tobytes().hex(),
    }


@contextlib.contextmanager
def compiling() -> Iterator[list[tuple[float, float]]]:
    """The times, from and to, in which JAX traces and compiles; one may lie within another."""
    import jax

    spans: list[tuple[float, float]] = []

    def note(event: str, seconds: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            spans.append((time.perf_counter() - seconds, time.perf_counter()))

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        yield spans
    finally:
        jax.monitoring.unregister_event_duration_listener(note)


def union(spans: Sequence[tuple[float, float]]) -> float:
    """Seconds that lie in at least one of the spans."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total

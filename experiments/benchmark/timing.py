"""Timing and peak memory, the same for JAX and PyTorch."""

import contextlib
import math
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

WARM_UP_STEPS = 6  # PyTorch compiles in pieces and records its CUDA graph in the fourth step
BLOCK_SECONDS = 0.25  # the clock is read once a block, so that waiting for the device is a small part of the time
MIN_BLOCKS = 3


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Returns (seconds, result) of a call, which has to wait for the device."""
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def measure(step: Callable[[], Any], wait: Callable[[Any], Any], seconds: float) -> tuple[dict[str, Any], Any]:
    """Times a step that may run asynchronously.

    Args:
        step: starts a step and returns a handle.
        wait: blocks until the step of a handle is done.
        seconds: how long to measure after the warm-up, in complete blocks of steps.

    Returns:
        ({"first": seconds of each warm-up step, "steps": steps per block, "ms": milliseconds per step of each block,
        "compile_seconds": time of the first step beyond the median, and that of later warm-up steps that took more than
        twice the median. For steps that last seconds it includes their ordinary variation}, the last handle)
    """

    def block() -> Any:
        for _ in range(steps):
            handle = step()
        wait(handle)
        return handle

    steps = 1
    first = [timed(block)[0] for _ in range(WARM_UP_STEPS)]
    steps = max(1, round(BLOCK_SECONDS / first[-1]))
    ms = []
    for _ in range(max(MIN_BLOCKS, math.ceil(seconds / (steps * first[-1])))):
        duration, handle = timed(block)
        ms.append(1e3 * duration / steps)
    median = statistics.median(ms) / 1e3
    compiling = [first[0] - median] + [duration - median for duration in first[1:] if duration > 2 * median]
    return {"first": first, "steps": steps, "ms": ms, "compile_seconds": max(0.0, sum(compiling))}, handle


def torch_device() -> tuple[Any, str, Callable[[Any], None]]:
    """Returns (torch, device, function that waits for the device).

    Raises:
        ImportError: PyTorch is missing; the message names the extra.
    """
    try:
        import torch
    except ImportError:
        raise ImportError("PyTorch is not installed: pip install -e '.[torch]'.") from None
    on_gpu = torch.cuda.is_available()
    return torch, "cuda" if on_gpu else "cpu", lambda _: torch.cuda.synchronize() if on_gpu else None


def peak_memory() -> int:
    """Returns the peak memory in bytes of PyTorch's GPU, of JAX's first device, or else of the process."""
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    import jax

    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use") or resident


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

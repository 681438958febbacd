"""The timing loop of every benchmark, the same for JAX and PyTorch."""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

WARM_UP_STEPS = 6  # PyTorch compiles in pieces and records its CUDA graph in the fourth step
BLOCK_SECONDS = 0.25  # the clock is read once a block, so that waiting for the device is a small part of the time
MIN_BLOCKS = 3


def measure(step: Callable[[], Any], wait: Callable[[Any], Any], seconds: float) -> dict[str, Any]:
    """Times a step that may run asynchronously.

    Args:
        step: starts a step and returns a handle.
        wait: blocks until the step of a handle is done.
        seconds: how long to measure after the warm-up, in whole blocks of steps.

    Returns:
        {"first": seconds of each warm-up step, "steps": steps per block, "ms": milliseconds per step of each block,
        "compile_seconds": time of the first step beyond the median, and that of later warm-up steps that took more than
        twice the median. For steps that last seconds it includes their ordinary variation}
    """
    first = []
    for _ in range(WARM_UP_STEPS):
        start = time.perf_counter()
        wait(step())
        first.append(time.perf_counter() - start)
    steps = max(1, round(BLOCK_SECONDS / first[-1]))
    blocks = max(MIN_BLOCKS, math.ceil(seconds / (steps * first[-1])))
    ms = []
    for _ in range(blocks):
        start = time.perf_counter()
        for _ in range(steps):
            handle = step()
        wait(handle)
        ms.append(1e3 * (time.perf_counter() - start) / steps)
    median = statistics.median(ms) / 1e3
    compiling = [first[0] - median] + [duration - median for duration in first[1:] if duration > 2 * median]
    return {"first": first, "steps": steps, "ms": ms, "compile_seconds": max(0.0, sum(compiling))}

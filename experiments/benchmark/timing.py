"""How a step is timed: JAX's and PyTorch's in the same way."""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

WARM_UP = 6  # steps: what compiles in pieces, or records a CUDA graph after three steps, has done so by then
BLOCK = 0.25  # seconds of steps between two looks at the clock, so that the wait for a device is a small part
FEWEST = 3  # blocks


def measure(step: Callable[[], Any], wait: Callable[[Any], Any], seconds: float) -> dict[str, Any]:
    """Times `step() -> handle`, which need not be done before `wait(handle)` returns.

    {"first": seconds of each step of the warm-up, "steps": in a block, "ms": per step, of each block}; as many blocks
    as fill `seconds`. {"compile_seconds"}: how much longer than the median the first step took, and those after it that
    took more than twice the median; what a step of seconds varies by is in it.
    """
    first = []
    for _ in range(WARM_UP):
        start = time.perf_counter()
        wait(step())
        first.append(time.perf_counter() - start)
    steps = max(1, round(BLOCK / first[-1]))
    blocks = max(FEWEST, math.ceil(seconds / (steps * first[-1])))
    ms = []
    for _ in range(blocks):
        start = time.perf_counter()
        for _ in range(steps):
            handle = step()
        wait(handle)
        ms.append(1e3 * (time.perf_counter() - start) / steps)
    usual = statistics.median(ms) / 1e3
    compiling = [first[0] - usual] + [taken - usual for taken in first[1:] if taken > 2 * usual]
    return {"first": first, "steps": steps, "ms": ms, "compile_seconds": max(0.0, sum(compiling))}

"""The time of a step by kind of XLA operation, from JAX's profiler."""

import collections
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

STEPS = 3
CONTAINERS = {"while", "call", "conditional"}  # their time is that of the operations inside


def operations(step: Callable[[], Any]) -> list[dict[str, Any]]:
    """Returns [{"name", "ms" per step, summed over threads or streams, "count" per step}], the longest first.

    Names are those of XLA without their numbers ("ynn_fusion.12" and "ynn_fusion.3" are one kind), on a GPU those of
    kernels.
    """
    jax.block_until_ready(step())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(STEPS):
                jax.block_until_ready(step())
        (path,) = Path(folder).rglob("*.xplane.pb")
        planes = list(jax.profiler.ProfileData.from_file(str(path)).planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:") and any(plane.lines)]
    time: collections.Counter[str] = collections.Counter()
    count: collections.Counter[str] = collections.Counter()
    for plane in devices or [plane for plane in planes if plane.name == "/host:CPU"]:
        for line in plane.lines:
            if devices and not line.name.startswith("Stream"):
                continue  # repeats the same time by program or by name scope
            for event in line.events:
                name = re.sub(r"[.\d]+$", "", event.name)
                if devices or re.fullmatch(r"[a-z][\w.-]*", name) and name not in CONTAINERS:
                    time[name] += event.duration_ns / 1e6 / STEPS
                    count[name] += 1
    return [{"name": name[:80], "ms": ms, "count": count[name] / STEPS} for name, ms in time.most_common()]

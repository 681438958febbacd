"""What a measurement says of itself, and the fresh processes it is made in."""

import json
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from lt_adv.runtime import atomic_io
from lt_adv.runtime.environment import commit, cores

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "experiments" / "results" / "benchmark"
PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "nvidia-cudnn-cu13", "flax", "torch", "triton", "numpy")
NETWORKS = {"resnet18": "ResNet-18", "preact_resnet18": "PreActResNet-18"}


def new(kind: str, command: Sequence[str], config: Any) -> dict[str, Any]:
    """The head of a record: what is about to be measured, where, and at which commit."""
    return {
        "kind": kind,
        "command": portable(shlex.join(["python", "-m", "experiments.benchmark", *command])),
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
        "config": describe(config),
        "peak": {},
        "runs": [],
        "summary": {},
        "ratio": {},
    }


def describe(config: Any) -> dict[str, Any]:
    model = config.model
    sized = f"WRN-{model.get('depth')}-{model.get('width')}"
    return {
        "dataset": config.data.title,
        "network": NETWORKS.get(model.name, sized),
        "dtype": model.dtype,
        "attack_dtype": config.attack.dtype or model.dtype,
        "method": config.method.name,
        "fidelity": config.fidelity,
        "batch_size": config.optim.batch_size,
        "eval_batch_size": config.eval.batch_size,
        "num_steps": config.attack.num_steps,
        "parallel": config.parallel,
    }


def machine() -> dict[str, Any]:
    """Processor, the cores that this process may use, the load before anything is measured, the GPU's driver."""
    found = {"cpu": _cpu(), "cores": cores(), "load_average": list(os.getloadavg())}
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True)
    except OSError:  # no such GPU here
        return found
    return found | ({"driver": answer.stdout.split()[0]} if answer.returncode == 0 and answer.stdout.strip() else {})


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)", path.read_text(), re.MULTILINE) if path.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def portable(text: str) -> str:
    """`text` without the folders of this machine: /data/jpeg/train becomes .../train."""
    return re.sub(r"(?<![\w.:/])/(?:[\w.+~-]+/)+", ".../", text)


def write(path: Path, record: Mapping[str, Any]) -> None:
    """As JSON, all or nothing; after each process, so that what was measured outlives a time limit."""
    atomic_io.write_atomically(path, json.dumps(record, indent=1) + "\n")


def launch(
    work: str, config: Sequence[str], environment: Mapping[str, str] | None = None, **options: Any
) -> dict[str, Any]:
    """The result of a work of `worker.py` in a fresh process, or {"error": one line}."""
    command = [sys.executable, "-m", "experiments.benchmark.worker", work, json.dumps(options), *config]
    done = subprocess.run(command, env={**os.environ, **(environment or {})}, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    return {"error": failure(done.returncode, done.stderr)}


def failure(code: int, stderr: str) -> str:
    """One line for a process that failed: the last it said, or the signal that ended it."""
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    lines = stderr.strip().splitlines() or [f"exit code {code}"]
    return portable(lines[-1].removeprefix("Error: "))[:300]


def caches(folder: str | os.PathLike) -> dict[str, str]:
    """The environment in which what is compiled is kept in `folder`: by JAX, by PyTorch's compiler, by Triton."""
    return {
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_COMPILATION_CACHE_DIR": f"{folder}/jax",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
        "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
        "TRITON_CACHE_DIR": f"{folder}/triton",
    }

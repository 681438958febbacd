"""Benchmark records: the description of a measurement, and the processes that it runs in."""

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
PACKAGES += ("foolbox", "torchattacks", "pyautoattack")
NETWORKS = {"resnet18": "ResNet-18", "preact_resnet18": "PreActResNet-18"}


def new(kind: str, command: Sequence[str], config: Any) -> dict[str, Any]:
    """Returns an empty record with its command, commit, machine, versions and config."""
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
    """Returns the entries of a config that its measurements depend on."""
    model = config.model
    wide_resnet = f"WRN-{model.get('depth')}-{model.get('width')}"
    return {
        "dataset": config.data.title,
        "network": NETWORKS.get(model.name, wide_resnet),
        "dtype": model.dtype,
        "attack_dtype": config.attack.dtype or model.dtype,
        "method": config.method.name + ("" if config.attack.name == "pgd" else f", {config.attack.name}"),
        "fidelity": config.fidelity,
        "batch_size": config.optim.batch_size,
        "eval_batch_size": config.eval.batch_size,
        "num_steps": config.attack.num_steps if config.attack.name == "pgd" else 1,
        "parallel": config.parallel,
    }


def machine() -> dict[str, Any]:
    """Returns the processor, the cores that this process may use, the load average, and the driver of an NVIDIA GPU."""
    facts = {"cpu": _cpu(), "cores": cores(), "load_average": list(os.getloadavg())}
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True)
    except OSError:  # no NVIDIA driver
        return facts
    return facts | ({"driver": answer.stdout.split()[0]} if answer.returncode == 0 and answer.stdout.strip() else {})


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)", path.read_text(), re.MULTILINE) if path.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Returns package -> version of Python and the installed PACKAGES."""
    installed = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return installed


def portable(text: str) -> str:
    """Returns `text` without absolute paths: /data/jpeg/train becomes .../train."""
    return re.sub(r"(?<![\w.:/])/(?:[\w.+~-]+/)+", ".../", text)


def write(path: Path, record: Mapping[str, Any]) -> None:
    """Writes a record as JSON, atomically. Called after each process, so that results survive a time limit."""
    atomic_io.write_atomically(path, json.dumps(record, indent=1) + "\n")


def launch(
    task: str, config: Sequence[str], environment: Mapping[str, str] | None = None, **options: Any
) -> dict[str, Any]:
    """Returns the result of a task of `worker.py` in a fresh process, or {"error": one line}."""
    command = [sys.executable, "-m", "experiments.benchmark.worker", task, json.dumps(options), *config]
    done = subprocess.run(command, env={**os.environ, **(environment or {})}, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    return {"error": failure(done.returncode, done.stderr)}


def failure(code: int, stderr: str) -> str:
    """Returns one line for a failed process: the last line of its stderr, or the signal that ended it."""
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    lines = stderr.strip().splitlines() or [f"exit code {code}"]
    return portable(lines[-1].removeprefix("Error: "))[:300]


def caches(folder: str | os.PathLike) -> dict[str, str]:
    """Returns environment variables that put the compile caches of JAX, PyTorch's compiler and Triton into `folder`."""
    return {
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_COMPILATION_CACHE_DIR": f"{folder}/jax",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
        "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
        "TRITON_CACHE_DIR": f"{folder}/triton",
    }

"""The environment of a run: CPU cores, commit of the code, and JAX's settings before the first computation (number of
CPU devices, directory of the compilation cache).

Only `prepare` imports jax. JAX's environment variables (XLA_FLAGS, JAX_NUM_CPU_DEVICES, JAX_COMPILATION_CACHE_DIR,
JAX_ENABLE_COMPILATION_CACHE) take precedence over these settings.
"""

import contextlib
import hashlib
import os
import pathlib
import platform
import subprocess

MIN_IMAGES_PER_DEVICE = 16  # on a CPU; smaller values were not measured


def prepare(batch_size: int, cpu_devices: int | None = None) -> None:
    """Configures JAX and connects to the other processes, if any (`distributed.initialize`).

    Call it before the first computation; later calls leave the devices as they are. XLA's CPU backend runs convolutions
    of up to 64 channels on one thread. One device per core, each with its share of the batch, keeps all cores busy
    (measured in docs/performance.md). On a machine with accelerators this has no effect.

    Args:
      batch_size: images per step over all processes.
      cpu_devices: number of CPU devices (`config.cpu_devices`); None for one per core, or fewer if the batch is
        not divisible by the number of cores.
    """
    import jax

    from lt_adv.runtime import distributed

    distributed.initialize()
    set_by_xla_flags = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if not set_by_xla_flags and "JAX_NUM_CPU_DEVICES" not in os.environ:
        local_batch_size = batch_size // distributed.process_count()
        with contextlib.suppress(RuntimeError):  # the backends are initialized already
            jax.config.update("jax_num_cpu_devices", cpu_devices or devices_for_batch(local_batch_size, cores()))
    if not jax.config.values["jax_compilation_cache_dir"]:
        jax.config.update("jax_compilation_cache_dir", str(cache_directory()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def cores() -> int:
    """Returns the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def commit() -> str | None:
    """Returns the commit of a clone (ab496aa, or ab496aa-dirty with uncommitted changes).

    Outside a clone, returns the environment variable LT_ADV_COMMIT, or None.
    """
    root = pathlib.Path(__file__).parents[2]
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    description = ""
    if (root / ".git").exists():  # otherwise git would describe a repository further up
        with contextlib.suppress(OSError):  # git is not installed
            description = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return description or os.environ.get("LT_ADV_COMMIT") or None


def code_digest() -> str:
    """Returns a hash of the package source; part of every cache key, so that other code never reuses its results."""
    root = pathlib.Path(__file__).parents[1]
    return hashlib.sha256(b"".join(f.read_bytes() for f in sorted(root.rglob("*.py")))).hexdigest()[:16]


def devices_for_batch(batch_size: int, cores: int) -> int:
    """Returns the largest number of devices that divides the batch and gives each `MIN_IMAGES_PER_DEVICE` images."""
    counts = (n for n in range(1, cores + 1) if batch_size % n == 0 and batch_size // n >= MIN_IMAGES_PER_DEVICE)
    return max(counts, default=1)


def cache_directory() -> pathlib.Path:
    """Returns <XDG_CACHE_HOME or ~/.cache>/lt_adv/<hash of the processor>.

    Code compiled for one processor may not run on another.
    """
    root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(root) / "lt_adv" / hashlib.sha256(_processor().encode()).hexdigest()[:12]


def _processor() -> str:
    """Returns a description of the processor and, on Linux, of its instruction set."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    features = sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
    return "\n".join([platform.machine(), platform.processor(), *features])

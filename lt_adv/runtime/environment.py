"""Where a program runs: its cores, the commit of its code, and what jax is told before its first computation (how many
devices a CPU is, and where compiled programs are kept).

Only `prepare` imports jax. Whatever the environment says in jax's own words (XLA_FLAGS, JAX_NUM_CPU_DEVICES,
JAX_COMPILATION_CACHE_DIR, JAX_ENABLE_COMPILATION_CACHE) comes first.
"""

import contextlib
import hashlib
import os
import pathlib
import platform
import subprocess

SMALLEST_SHARE = 16  # images of a batch on one CPU device: ours, smaller shares were not measured


def prepare(batch_size: int, cpu_devices: int | None = None) -> None:
    """Call before anything is computed. `cpu_devices`: of `config.cpu_devices`, None for one per core. Joins the other
    processes where the environment names them (`distributed.join`).

    XLA's CPU backend runs convolutions of up to 64 channels on one thread, and much else between them. As many devices
    as cores, each with its share of the batch, keep all cores busy (measured in the README, Speed). On a machine with
    accelerators this changes nothing. In a process that has computed already, the devices stay as they are.
    """
    import jax

    from lt_adv.runtime import distributed

    distributed.join()
    given = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if not given and "JAX_NUM_CPU_DEVICES" not in os.environ:
        with contextlib.suppress(RuntimeError):  # the backends are up
            jax.config.update("jax_num_cpu_devices", cpu_devices or share(batch_size // distributed.count(), cores()))
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(cache_directory()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def commit() -> str | None:
    """ab496aa in a clone, ab496aa-dirty with changes that are not committed; elsewhere what LT_ADV_COMMIT in the
    environment says, or None."""
    root = pathlib.Path(__file__).parents[2]
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    found = ""
    if (root / ".git").exists():  # installed elsewhere, a repository further up would answer
        with contextlib.suppress(OSError):  # no git here
            found = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return found or os.environ.get("LT_ADV_COMMIT") or None


def code_digest() -> str:
    """Hash of the package source, part of every cache key: results of other code are not reused."""
    root = pathlib.Path(__file__).parents[1]
    return hashlib.sha256(b"".join(f.read_bytes() for f in sorted(root.rglob("*.py")))).hexdigest()[:16]


def share(batch_size: int, cores: int) -> int:
    """Devices for a batch: the most that divide it and leave each at least `SMALLEST_SHARE` images."""
    fitting = (n for n in range(1, cores + 1) if batch_size % n == 0 and batch_size // n >= SMALLEST_SHARE)
    return max(fitting, default=1)


def cache_directory() -> pathlib.Path:
    """<XDG_CACHE_HOME or ~/.cache>/lt_adv/<processor>: code compiled for one processor may not run on another."""
    root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(root) / "lt_adv" / hashlib.sha256(_processor().encode()).hexdigest()[:12]


def _processor() -> str:
    """What instructions this machine has, as far as it can be read."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    features = sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
    return "\n".join([platform.machine(), platform.processor(), *features])

"""Accelerators by name, and the devices of a slice that this machine does not have."""

import contextlib
import dataclasses
import importlib.metadata
import os
import re

import jax
from jax.experimental import topologies

GIB = 2**30
GPU_CONFIG = """
gpu_device_info {{ threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
shared_memory_per_core: {shared} threads_per_core_limit: 2048 core_count: {cores} fpus_per_core: {fpus}
block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: {bandwidth}
l2_cache_size: {l2} clock_rate_ghz: {clock} device_memory_size: {memory} shared_memory_per_block_optin: {optin}
cuda_compute_capability {{ major: {major} }} registers_per_core_limit: 65536 registers_per_block_limit: 65536 }}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 28 patch: 1 }} runtime_version {{ major: 13 }}
device_description_str: "{name}"
"""
HOPPER = {"shared": 233472, "cores": 132, "fpus": 128, "l2": 52428800, "clock": 1.98, "optin": 232448, "major": 9}
AMPERE = {"shared": 167936, "cores": 108, "fpus": 64, "l2": 41943040, "clock": 1.41, "optin": 166912, "major": 8}


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """One JAX device of a kind of accelerator.

    Attributes:
      platform: "tpu", "cuda" or "cpu".
      kind: the part of a topology's name before the colon.
      memory: bytes.
      bandwidth: of the memory, bytes a second.
      flops: rate of bfloat16 matrix products, FLOP a second.
      clock: cycles a second of the compiler's cost model (TPU).
      source: of the rates.
    """

    platform: str
    kind: str
    memory: int | None = None
    bandwidth: float | None = None
    flops: float | None = None
    clock: float | None = None
    source: str = ""


# Without them libtpu looks for the metadata of a cloud machine, and for a lock, as if it were to use a TPU.
LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # of this machine; a topology has its own
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
CLOUD = "Google Cloud, TPU versions; the clock is peak / (2 x size of the matrix units)"
ACCELERATORS = (
    Accelerator("tpu", "v4", 32 * GIB, 1.228e12, 275e12, 1.05e9, CLOUD),
    Accelerator("tpu", "v5e", 16 * GIB, 0.819e12, 197e12, 1.5e9, CLOUD),
    Accelerator("tpu", "v5p", 95 * GIB, 2.765e12, 459e12, 1.75e9, CLOUD),
    Accelerator("tpu", "v6e", 32 * GIB, 1.64e12, 918e12, 1.75e9, CLOUD),
    Accelerator("tpu", "tpu7x", 96 * GIB, 3.69e12, 1153.5e12, 2.2e9, f"{CLOUD}; half a chip"),
    Accelerator("cuda", "a100", 80 * 10**9, 2.039e12, 312e12, None, "NVIDIA, data sheet of the A100 80GB SXM"),
    Accelerator("cuda", "h100", 84942979072, 3.352e12, 989e12, None, "NVIDIA, data sheet of the H100 SXM"),
    Accelerator("cuda", "h200", 151397597184, 4.3e12, 790e12, None, "both rates measured on an H200"),
    Accelerator("cpu", "cpu"),
)


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices to compile for, which need not exist."""

    name: str
    accelerator: Accelerator
    devices: tuple[jax.Device, ...]


def parse_name(name: str) -> tuple[Accelerator, str]:
    """Returns the accelerator and the shape of "v5e:16x16", "h200:8", "h100" or "cpu:8".

    Raises:
      ValueError: there is no such accelerator, or the shape does not fit it.
    """
    kind, colon, shape = name.partition(":")
    kinds = {accelerator.kind: accelerator for accelerator in ACCELERATORS}
    if kind not in kinds:
        raise ValueError(f"--topology={name}: unknown accelerator {kind!r}. There are: {', '.join(kinds)}.")
    is_tpu = kinds[kind].platform == "tpu"
    if colon and not shape or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}" if is_tpu else r"([1-9]\d*)?", shape):
        example = f"{kind}:2x2, or {kind}:2x2x2 for v4, v5p and tpu7x" if is_tpu else f"{kind}, or {kind}:8"
        raise ValueError(f"--topology={name}: write {example}.")
    return kinds[kind], shape


def get_topology(name: str) -> Topology:
    """Returns the devices of a topology by name; see `parse_name`. For a CPU, call it before JAX is initialized.

    Raises:
      ValueError: the name is not valid, or the compiler does not know the slice.
      ImportError: the compiler is not installed; the message names the extra.
    """
    accelerator, shape = parse_name(name)
    if accelerator.platform == "cpu":
        number = int(shape or 1)
        devices = jax.devices("cpu")
        if len(devices) < number:
            raise ValueError(f"--topology={name}: this process has {len(devices)} CPU devices.")
        return Topology(name, accelerator, tuple(devices[:number]))
    for variable, value in LIBTPU.items():
        os.environ.setdefault(variable, value)
    try:
        if accelerator.platform == "tpu":
            description = topologies.get_topology_desc(platform="tpu", topology_name=name)
        else:
            description = topologies.get_topology_desc(
                platform="cuda",
                topology_name=accelerator.kind,
                target_config=gpu_target_config(accelerator),
                topology=f"1x1x{shape or 1}",
            )
    except Exception as error:  # of the compiler: RuntimeError, XlaRuntimeError or NotImplementedError
        raise explain(error, name, accelerator.platform) from error
    return Topology(name, accelerator, tuple(description.devices))


def gpu_target_config(accelerator: Accelerator) -> str:
    """Returns the text of XLA's GpuTargetConfigProto."""
    fields = AMPERE if accelerator.kind == "a100" else HOPPER
    bandwidth = 4800000000000 if accelerator.kind == "h200" else int(accelerator.bandwidth or 0)
    return GPU_CONFIG.format(memory=accelerator.memory, bandwidth=bandwidth, name=accelerator.kind.upper(), **fields)


def explain(error: Exception, name: str, platform: str) -> Exception:
    """Returns an error of one line for an error of `get_topology_desc`."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    extra = "tpu" if platform == "tpu" else "cuda13"
    missing = "libtpu" if platform == "tpu" else "the CUDA plugin"
    if re.search(r"not installed|not implemented for|[Uu]nknown backend|libtpu\.so|No module|plugin", text):
        return ImportError(f"--topology={name} needs {missing}: pip install -e '.[{extra}]'. ({text})")
    return ValueError(f"--topology={name}: the compiler does not know this slice ({text}).")


def versions(platform: str) -> dict[str, str]:
    """Returns the versions of the packages that compile for a platform."""
    packages = {"tpu": ("libtpu",), "cuda": ("jax-cuda13-plugin", "jax-cuda12-plugin"), "cpu": ()}[platform]
    installed = {}
    for package in ("jax", "jaxlib", *packages):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[package] = importlib.metadata.version(package)
    return installed

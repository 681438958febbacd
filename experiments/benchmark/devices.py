"""Peak memory of JAX, PyTorch and the process, and the device that PyTorch runs on."""

import resource
import sys
from collections.abc import Callable
from typing import Any


def torch_device() -> tuple[Any, str, Callable[[Any], None]]:
    """Returns (torch, device, function that waits for the device).

    Raises:
        ImportError: PyTorch is missing; the message names the extra.
    """
    try:
        import torch
    except ImportError:
        raise ImportError("PyTorch is not installed: pip install -e '.[torch]'.") from None
    cuda = torch.cuda.is_available()

    def wait(_: Any) -> None:
        if cuda:
            torch.cuda.synchronize()

    return torch, "cuda" if cuda else "cpu", wait


def jax_memory() -> int:
    """Returns the peak memory of the first device in bytes, or that of the process where the backend has no count."""
    import jax

    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use") or process_memory()


def torch_memory(device: str) -> int:
    """Returns the peak memory that PyTorch allocated on the GPU in bytes, or that of the process on CPU."""
    if device == "cpu":
        return process_memory()
    import torch

    return torch.cuda.max_memory_allocated()


def process_memory() -> int:
    """Returns the largest resident set size of the process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

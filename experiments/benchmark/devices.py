"""What a measuring process asks of the device that it runs on."""

import resource
import sys
from collections.abc import Callable
from typing import Any


def torch_device() -> tuple[Any, str, Callable[[Any], None]]:
    """(torch, device, what waits for it); ImportError, naming the extra, without torch."""
    try:
        import torch
    except ImportError:
        raise ImportError("PyTorch is not installed: pip install -e '.[torch]'.") from None
    cuda = torch.cuda.is_available()

    def wait(_: Any) -> None:
        if cuda:
            torch.cuda.synchronize()

    return torch, "cuda" if cuda else "cpu", wait


def memory() -> int:
    """The device's peak where it tells it, else that of this process."""
    import jax

    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use") or process_memory()


def process_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

"""Reads files of weights as {name: array}, without executing code that is in them."""

import hashlib
import json
import math
import pathlib
import pickle
import re
import warnings
from collections.abc import Callable, Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from lt_adv.runtime import atomic_io, registry

StateDict = dict[str, np.ndarray]  # PyTorch's tensor name -> array


def load(path: str | pathlib.Path) -> StateDict:
    """Reads a file of weights and returns {PyTorch's tensor name: array}.

    `.pt`, `.pth`, `.pkl` and `.tar` are files of torch.save with a state_dict, or a dict that contains one; they need
    PyTorch. `.npz` and `.safetensors` do not.

    Raises:
      FileNotFoundError: there is no such file.
      ImportError: the file needs PyTorch, which is not installed.
      ValueError: in one line, for another file format, an empty or damaged file, or entries that are not tensors.
    """
    path = pathlib.Path(path).expanduser()
    if path.suffix not in READERS:
        raise registry.unknown("kind of weights", path.suffix, READERS)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file of weights {path}.")
    if not path.stat().st_size:
        raise ValueError(f"{path} is empty.")
    read, formats = READERS[path.suffix]
    file_format = atomic_io.format_of(path)
    if file_format and file_format not in formats:
        suffixes = [suffix for suffix, (_, accepted) in READERS.items() if file_format in accepted]
        hint = f": rename it to end in {suffixes[0]}" if suffixes else ""
        raise ValueError(f"{path} cannot be imported: it is {file_format}{hint}.")
    try:
        state = read(path)
    except (ImportError, PermissionError):
        raise
    except Exception as error:  # the readers raise many types for a damaged file
        raise ValueError(f"{path} cannot be imported: {atomic_io.reason(path, error, *formats)}") from error
    if not state:
        raise ValueError(f"{path} contains no tensors.")
    return state


def is_file(path: str) -> bool:
    """Whether `path` has the suffix of a file of weights and is not a folder."""
    return pathlib.PurePath(path).suffix in READERS and not pathlib.Path(path).is_dir()


def sha256(path: str | pathlib.Path) -> str:
    """Returns the SHA-256 of a file as 64 hexadecimal digits."""
    with pathlib.Path(path).expanduser().open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def format_names(names: Sequence[str], limit: int = 5) -> str:
    """Returns the names in one line for an error message: "a, b, c, d, e and 3 more"."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _torch(path: pathlib.Path) -> StateDict:
    try:
        import torch
    except ImportError:
        raise ImportError(
            f"{path} needs PyTorch to be read: pip install -e '.[torch]', or save its tensors as .safetensors or .npz."
        ) from None
    try:
        with warnings.catch_warnings(action="ignore"):  # the error below has the same information
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # PyTorch's message recommends an unsafe load
        match = re.search(r"GLOBAL (\S+)", str(error))
        problem = f"it refers to {match[1]}, which is not safe to load" if match else "it is not a file of tensors"
        raise ValueError(f"{problem}. If you trust the file, save only its state_dict and use that.") from error

    def is_network(value: object) -> bool:
        """Whether a value is a state_dict of a network: those of optimisers and schedulers hold no kernels."""
        return isinstance(value, Mapping) and any(getattr(tensor, "ndim", 0) == 4 for tensor in value.values())

    state = content
    if not is_network(content):
        content = content if isinstance(content, Mapping) else {}
        networks = [name for name, value in content.items() if is_network(value)]
        if len(networks) != 1:
            raise ValueError(
                f"it must contain one state_dict with convolution kernels, not {len(networks)} "
                f"({format_names(networks) or 'none'}): save only that state_dict."
            )
        # A tensor next to the state_dict may belong to the network (the mean of the images): it is included.
        tensors = {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}
        state = {**tensors, **content[networks[0]]}
    if names := [str(name) for name, value in state.items() if not isinstance(value, torch.Tensor)]:
        raise ValueError(f"entries that are not tensors: {format_names(names)}.")
    casts = {torch.bfloat16: torch.float32}  # numpy has no bfloat16
    return {str(name): t.detach().to(casts.get(t.dtype, t.dtype)).numpy() for name, t in state.items()}


def _npz(path: pathlib.Path) -> StateDict:
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


DTYPES = {
    **{"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": jnp.bfloat16},
    **{"I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1", "BOOL": "?"},
}


def _safetensors(path: pathlib.Path) -> StateDict:
    """Reads the format of https://huggingface.co/docs/safetensors.

    Eight little-endian bytes hold the length of a JSON header {name: {dtype, shape, data_offsets}}; the row-major data
    follow without gaps.
    """
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    if len(content) < start:
        raise ValueError(f"its header should end at byte {start}, but it has {len(content)} bytes.")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    data, end, state = memoryview(content)[start:], 0, {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape, (begin, stop) = np.dtype(DTYPES[entry["dtype"]]), entry["shape"], entry["data_offsets"]
        if begin != end or stop - begin != math.prod(shape) * dtype.itemsize or min(shape, default=0) < 0:
            raise ValueError(f"{name} of shape {shape} cannot lie at bytes {begin} to {stop} of the data.")
        if stop > len(data):
            raise ValueError(f"{name} should end at byte {stop} of the data, which has {len(data)} bytes.")
        state[name], end = np.frombuffer(data[begin:stop], dtype).reshape(shape), stop
    if end != len(data):
        raise ValueError(f"its tensors end at byte {end} of the data, which has {len(data)} bytes.")
    return state


# Suffix -> (reader, accepted formats of the file).
READERS: Mapping[str, tuple[Callable[[pathlib.Path], StateDict], Sequence[str]]] = {
    **dict.fromkeys((".pt", ".pth", ".pkl", ".tar"), (_torch, (atomic_io.TORCH, atomic_io.PICKLE))),
    ".npz": (_npz, (atomic_io.NPZ,)),
    ".safetensors": (_safetensors, (atomic_io.SAFETENSORS,)),
}

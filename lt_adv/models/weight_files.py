"""Files of weights as {name: array}; nothing that is in a file is ever run."""

import hashlib
import json
import math
import pathlib
import pickle
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from lt_adv.runtime import atomic_io, registry

State = dict[str, np.ndarray]


def load(path: str | pathlib.Path) -> State:
    """{PyTorch's name of a tensor: array} of a file of weights.

    `.pt`, `.pth`, `.pkl` and `.tar`, a state_dict or a dict that holds one as torch.save writes them, need PyTorch;
    `.npz` and `.safetensors` do not. Errors: FileNotFoundError; ImportError without PyTorch; ValueError, of one line,
    for a file of another kind, an empty or damaged one, and for anything but tensors where tensors are expected.
    """
    path = pathlib.Path(path).expanduser()
    if path.suffix not in READERS:
        raise registry.unknown("kind of weights", path.suffix, READERS)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file of weights {path}.")
    if not path.stat().st_size:
        raise ValueError(f"{path} is empty.")
    read, formats = READERS[path.suffix]
    what = atomic_io.format_of(path)
    if what and what not in formats:
        suffixes = [suffix for suffix, (_, others) in READERS.items() if what in others]
        hint = f": a name that ends in {suffixes[0]} would say so" if suffixes else ""
        raise ValueError(f"{path} cannot be imported: it is {what}{hint}.")
    try:
        state = read(path)
    except (ImportError, PermissionError):
        raise
    except Exception as error:  # the readers have no exception in common: a damaged file raises almost anything
        raise ValueError(f"{path} cannot be imported: {atomic_io.reason(path, error, *formats)}") from error
    if not state:
        raise ValueError(f"{path} holds no tensors.")
    return state


def is_file(path: str) -> bool:
    """Whether `path` names a file of weights, by its suffix, and not the working directory of a run."""
    return pathlib.PurePath(path).suffix in READERS and not pathlib.Path(path).is_dir()


def sha256(path: str | pathlib.Path) -> str:
    """Of a file, 64 hexadecimal digits."""
    with pathlib.Path(path).expanduser().open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def listed(names: Sequence[str], most: int = 5) -> str:
    """a, b, c, d, e and 3 more: for an error of one line."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _torch(path: pathlib.Path) -> State:
    try:
        import torch
    except ImportError:
        raise ImportError(
            f"{path} needs PyTorch to be read: pip install -e '.[torch]', or save its tensors as .safetensors or .npz."
        ) from None
    try:
        with warnings.catch_warnings(action="ignore"):  # what it cannot read, it also warns of
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # PyTorch's own words recommend to run what is in the file
        asked = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it asks for {asked[1]}, and to run that is not safe" if asked else "it is no file of tensors"
        raise ValueError(f"{what}. Where you trust it, save its state_dict alone, and name that.") from error

    def is_network(value: Any) -> bool:
        """A state_dict has kernels; the states of optimisers and schedulers beside it have none at this depth."""
        return isinstance(value, Mapping) and any(getattr(tensor, "ndim", 0) == 4 for tensor in value.values())

    state = content
    if not is_network(content):
        content = content if isinstance(content, Mapping) else {}
        networks = [name for name, value in content.items() if is_network(value)]
        if len(networks) != 1:
            raise ValueError(f"it holds {listed(networks) or 'nothing'} with kernels: save one state_dict alone.")
        # A tensor beside the network may belong to it, such as the mean of the images: it is not left out here.
        beside = {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}
        state = {**beside, **content[networks[0]]}
    if other := [str(name) for name, value in state.items() if not isinstance(value, torch.Tensor)]:
        raise ValueError(f"entries that are no tensors: {listed(other)}.")
    wide = {torch.bfloat16: torch.float32}  # numpy has no bfloat16
    return {str(name): t.detach().to(wide.get(t.dtype, t.dtype)).numpy() for name, t in state.items()}


def _npz(path: pathlib.Path) -> State:
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


DTYPES = {
    **{"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": jnp.bfloat16},
    **{"I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1", "BOOL": "?"},
}


def _safetensors(path: pathlib.Path) -> State:
    """Eight bytes of length, little-endian; that many of JSON, {name: {dtype, shape, data_offsets}}; then the data,
    end to end, row-major (https://huggingface.co/docs/safetensors, Format)."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    if len(content) < start:
        raise ValueError(f"its header should end at byte {start}, and it has {len(content)} bytes.")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    data, end, state = memoryview(content)[start:], 0, {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape, (begin, stop) = np.dtype(DTYPES[entry["dtype"]]), entry["shape"], entry["data_offsets"]
        if begin != end or stop - begin != math.prod(shape) * dtype.itemsize or min(shape, default=0) < 0:
            raise ValueError(f"{name} of shape {shape} cannot lie at bytes {begin} to {stop} of the data.")
        if stop > len(data):
            raise ValueError(f"{name} should end at byte {stop} of the data, which has {len(data)}.")
        state[name], end = np.frombuffer(data[begin:stop], dtype).reshape(shape), stop
    if end != len(data):
        raise ValueError(f"its tensors end at byte {end} of the data, which has {len(data)}.")
    return state


# Suffix -> (reader, the formats that such a file may have).
READERS: Mapping[str, tuple[Callable[[pathlib.Path], State], Sequence[str]]] = {
    **dict.fromkeys((".pt", ".pth", ".pkl", ".tar"), (_torch, (atomic_io.TORCH, atomic_io.PICKLE))),
    ".npz": (_npz, (atomic_io.NPZ,)),
    ".safetensors": (_safetensors, (atomic_io.SAFETENSORS,)),
}

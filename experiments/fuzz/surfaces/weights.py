"""Files of others' weights: damaged, of another network, with other tensors, with hidden code."""

import json
import re
import struct
import zipfile
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch

from experiments.fuzz.box import Box
from experiments.fuzz.cases import Case, no_computation
from experiments.fuzz.draw import damaged, one, value
from experiments.fuzz.surfaces.arguments import ROOT
from experiments.fuzz.surfaces.npz import Hidden
from experiments.pytorch_baseline.weights import to_torch
from lt_adv import models

TAGS = {"float32": "F32", "float64": "F64", "float16": "F16", "int64": "I64"}
State = dict[str, np.ndarray]


def state(width: int = 1, classes: int = 10) -> State:
    """A network as the config of this surface has it, under the names of TRADES' release."""
    network = {"name": "wide_resnet", "depth": 10, "width": width, "head": {"name": "linear"}}
    variables = models.create(network, classes).init(jax.random.key(0), np.zeros((1, 8, 8, 1), np.float32))
    renamed = {}
    for name, tensor in to_torch(variables).items():
        name = re.sub(r"backbone\.stage(\d)_block(\d)", r"block\1.layer.\2", name)
        name = name.replace("backbone.bn.", "bn1.").replace("backbone.", "").replace("shortcut", "convShortcut")
        renamed[name.replace("head.", "fc.")] = tensor.numpy()
    return renamed


def safetensors(tensors: Mapping[str, np.ndarray], change: Any = lambda header: header) -> bytes:
    """The format by hand, so that its header can be wrong in any way."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, array in tensors.items():
        content = np.ascontiguousarray(array).tobytes()
        offsets = [len(data), len(data) + len(content)]
        header[name] = {"dtype": TAGS[str(array.dtype)], "shape": list(array.shape), "data_offsets": offsets}
        data += content
    text = json.dumps(change(header)).encode()
    return struct.pack("<Q", len(text)) + text + data


def save(path: Path, tensors: Mapping[str, Any]) -> None:
    if path.suffix == ".safetensors":
        path.write_bytes(safetensors(tensors))
    elif path.suffix == ".npz":
        np.savez(path, **tensors)
    else:
        torch.save({name: torch.from_numpy(np.array(array)) for name, array in tensors.items()}, path)


class Weights:
    def __init__(self, shared: Path) -> None:
        del shared
        self.whole, self.wide, self.fewer = state(), state(width=2), state(classes=9)

    def running(self) -> AbstractContextManager[Any]:
        return no_computation()

    def case(self, rng: np.random.Generator, box: Box, valid: bool) -> Case:
        path = box.given / f"weights{one(rng, ('.pt', '.npz', '.safetensors', '.pth', '.pkl', '.tar'))}"
        argv = [f"--config={ROOT}/configs/at.py:dataset=digits", "--mode=eval", f"--workdir={box.run}"]
        argv += [f"--config.init_from={path}"]
        if valid:
            prefix = one(rng, ("", "module.", "model.module."))
            kind = one(rng, ("float32", "float64", "float16"))
            save(path, {prefix + name: array.astype(kind) for name, array in self.whole.items()})
            return Case("valid", f"{path.suffix}, {kind}, prefix {prefix!r}", argv, True)
        make = one(rng, (self._damaged, self._tensors, self._tensors, self._code, self._header, self._other))
        kind, words, expected = make(rng, path, box)
        return Case(kind, f"{path.suffix}: {words}", argv, expected, [str(path), path.name])

    def _damaged(self, rng: np.random.Generator, path: Path, box: Box) -> tuple[str, str, bool | None]:
        save(path, self.whole)
        kind, content = damaged(rng, path.read_bytes())
        path.write_bytes(content)
        return "damaged file", kind, None

    def _tensors(self, rng: np.random.Generator, path: Path, box: Box) -> tuple[str, str, bool | None]:
        """Another network, or one tensor that is not as it should be."""
        tensors, name = dict(self.whole), one(rng, list(self.whole))
        array = tensors[name]
        changes = {
            "another width": lambda: tensors.update(self.wide),
            "another number of classes": lambda: tensors.update(self.fewer),
            "a missing tensor": lambda: tensors.pop(name),
            "an unknown tensor": lambda: tensors.update({one(rng, ("x", "", "a.b", "[/b].weight", "mean")): array}),
            "a turned tensor": lambda: tensors.update({name: array[None]}),
            "a number that is none": lambda: tensors.update({name: np.full_like(array, one(rng, (np.nan, np.inf)))}),
            "an integer tensor": lambda: tensors.update({name: np.ones(array.shape, np.int64)}),
            "an empty tensor": lambda: tensors.update({name: array[:0]}),
            "no tensors": lambda: tensors.clear(),
            "a tensor twice": lambda: tensors.update({"linear.weight": tensors["fc.weight"]}),
        }
        kind = one(rng, list(changes))
        changes[kind]()
        save(path, tensors)
        return kind, f"{kind}: {name}", False if kind != "an integer tensor" else None

    def _code(self, rng: np.random.Generator, path: Path, box: Box) -> tuple[str, str, bool | None]:
        """What runs where it is unpickled."""
        hidden = Hidden(box.code())
        if path.suffix == ".npz":
            np.savez(path, **{**self.whole, "fc.weight": np.array([hidden], object)})
        elif path.suffix == ".safetensors":
            torch.save({"fc.weight": hidden}, path)
        else:
            tensors = {name: torch.from_numpy(array) for name, array in self.whole.items()}
            wrapped = one(rng, ({**tensors, "x": hidden}, {"state_dict": tensors, "epoch": hidden}, hidden, [hidden]))
            torch.save(wrapped, path, _use_new_zipfile_serialization=bool(rng.integers(2)))
        return "hidden code", "hidden code", False

    def _header(self, rng: np.random.Generator, path: Path, box: Box) -> tuple[str, str, bool | None]:
        """A header of safetensors that lies, under any of the names; of the length, of places, of types."""
        name = one(rng, list(self.whole))
        entry = one(rng, ("dtype", "shape", "data_offsets"))
        drawn = value(rng)

        def change(header: dict[str, Any]) -> Any:
            if kind == "no object":
                return drawn
            if kind == "no entry":
                return {**header, name: drawn}
            header[name][entry] = one(rng, (drawn, [-1, 1], [0, 1 << 62], [1 << 62], "F8", [0.5], ["x"], [[]]))
            return header

        kind = one(rng, ("no object", "no entry", "an entry", "the length"))
        content = safetensors(self.whole, change if kind != "the length" else lambda header: header)
        if kind == "the length":
            length = int(one(rng, (0, 1, 7, len(content), 1 << 40, (1 << 64) - 1)))
            content = struct.pack("<Q", length) + content[8:]
        path.write_bytes(content)
        return f"header: {kind}", f"{kind} {entry} {drawn!r}", False

    def _other(self, rng: np.random.Generator, path: Path, box: Box) -> tuple[str, str, bool | None]:
        """No file of weights at all."""
        kind = one(rng, ("absent", "a link to nothing", "a zip of others", "an endless device", "values", "a dict"))
        if kind == "a link to nothing":
            path.symlink_to("nowhere")
        elif kind == "a zip of others":
            with zipfile.ZipFile(path, "w") as file:
                file.writestr("../evil.npy", b"evil")
        elif kind == "an endless device":
            path.symlink_to("/dev/zero")
        elif kind == "values":
            torch.save(one(rng, (value(rng), [1, 2], {"state_dict": value(rng)}, {1: torch.zeros(1, 1, 1, 1)})), path)
        elif kind == "a dict":
            torch.save({"net": {"w": torch.zeros(1, 1, 3, 3), "x": value(rng)}}, path)
        return kind, kind, False

"""Files of external weights: damaged, of another network, with other tensors, with hidden code."""

import functools
import json
import re
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.pytorch_baseline.weights import to_torch
from lt_adv import models
from tests.experiments import NO_TORCH
from tests.robustness.inputs import ROOT, Case, Draw, attempt, choose, damaged, inputs, value
from tests.robustness.sandbox import Sandbox
from tests.robustness.test_npz import Hidden

torch = pytest.importorskip("torch", reason=NO_TORCH)

TAGS = {"float32": "F32", "float64": "F64", "float16": "F16", "int64": "I64"}
State = dict[str, np.ndarray]


def state(width: int = 1, classes: int = 10) -> State:
    """Weights of a network of the tested config, under the names of TRADES' release."""
    network = {"name": "wide_resnet", "depth": 10, "width": width, "head": {"name": "linear"}}
    model, images = models.create(network, classes), np.zeros((1, 8, 8, 1), np.float32)
    variables = jax.tree.map(
        lambda a: np.zeros(a.shape, a.dtype), jax.eval_shape(model.init, jax.random.key(0), images)
    )
    renamed = {}
    for name, tensor in to_torch(variables).items():
        name = re.sub(r"backbone\.stage(\d)_block(\d)", r"block\1.layer.\2", name)
        name = name.replace("backbone.bn.", "bn1.").replace("backbone.", "").replace("shortcut", "convShortcut")
        renamed[name.replace("head.", "fc.")] = tensor.numpy()
    return renamed


def safetensors(tensors: Mapping[str, np.ndarray], change: Any = lambda header: header) -> bytes:
    """Returns a safetensors file whose header is changed by `change`."""
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


@functools.cache
def states() -> tuple[State, State, State]:
    """Weights that fit the config, of a network twice as wide, and of one with a class less."""
    return state(), state(width=2), state(classes=9)


def case(draw: Draw, box: Sandbox, valid: bool) -> Case:
    path = box.input / f"weights{choose(draw, ('.pt', '.npz', '.safetensors', '.pth', '.pkl', '.tar'))}"
    argv = [f"--config={ROOT}/configs/at.py:dataset=digits", "--mode=eval", f"--workdir={box.run}"]
    argv += [f"--config.init_from={path}"]
    if valid:
        prefix = choose(draw, ("", "module.", "model.module."))
        kind = choose(draw, ("float32", "float64", "float16"))
        save(path, {prefix + name: array.astype(kind) for name, array in states()[0].items()})
        return Case("valid", f"{path.suffix}, {kind}, prefix {prefix!r}", argv, True)
    make = choose(draw, (_damaged, _tensors, _tensors, _code, _header, _other))
    kind, description, expected = make(draw, path, box)
    return Case(kind, f"{path.suffix}: {description}", argv, expected, [str(path), path.name])


def _damaged(draw: Draw, path: Path, box: Sandbox) -> tuple[str, str, bool | None]:
    save(path, states()[0])
    kind, content = damaged(draw, path.read_bytes())
    path.write_bytes(content)
    return "damaged file", kind, None


def _tensors(draw: Draw, path: Path, box: Sandbox) -> tuple[str, str, bool | None]:
    """Saves the weights of another network, or one wrong tensor."""
    tensors, name = dict(states()[0]), choose(draw, list(states()[0]))
    array = tensors[name]
    changes = {
        "another width": lambda: tensors.update(states()[1]),
        "another number of classes": lambda: tensors.update(states()[2]),
        "a missing tensor": lambda: tensors.pop(name),
        "an unknown tensor": lambda: tensors.update({choose(draw, ("x", "", "a.b", "[/b].weight", "mean")): array}),
        "a tensor of another rank": lambda: tensors.update({name: array[None]}),
        "a value that is not finite": lambda: tensors.update(
            {name: np.full_like(array, choose(draw, (np.nan, np.inf)))}
        ),
        "an integer tensor": lambda: tensors.update({name: np.ones(array.shape, np.int64)}),
        "an empty tensor": lambda: tensors.update({name: array[:0]}),
        "no tensors": lambda: tensors.clear(),
        "a tensor twice": lambda: tensors.update({"linear.weight": tensors["fc.weight"]}),
    }
    kind = choose(draw, list(changes))
    changes[kind]()
    save(path, tensors)
    return kind, f"{kind}: {name}", False if kind != "an integer tensor" else None


def _code(draw: Draw, path: Path, box: Sandbox) -> tuple[str, str, bool | None]:
    """Hides code that is executed when the file is unpickled."""
    hidden = Hidden(box.code())
    if path.suffix == ".npz":
        np.savez(path, **{**states()[0], "fc.weight": np.array([hidden], object)})
    elif path.suffix == ".safetensors":
        torch.save({"fc.weight": hidden}, path)
    else:
        tensors = {name: torch.from_numpy(array) for name, array in states()[0].items()}
        wrapped = choose(draw, ({**tensors, "x": hidden}, {"state_dict": tensors, "epoch": hidden}, hidden, [hidden]))
        torch.save(wrapped, path, _use_new_zipfile_serialization=draw(st.booleans()))
    return "hidden code", "hidden code", False


def _header(draw: Draw, path: Path, box: Sandbox) -> tuple[str, str, bool | None]:
    """A wrong header of safetensors, under any file name: its length, offsets, shapes, types."""
    name = choose(draw, list(states()[0]))
    entry = choose(draw, ("dtype", "shape", "data_offsets"))
    drawn = value(draw)

    def change(header: dict[str, Any]) -> Any:
        if kind == "no object":
            return drawn
        if kind == "no entry":
            return {**header, name: drawn}
        header[name][entry] = choose(draw, (drawn, [-1, 1], [0, 1 << 62], [1 << 62], "F8", [0.5], ["x"], [[]]))
        return header

    kind = choose(draw, ("no object", "no entry", "an entry", "the length"))
    content = safetensors(states()[0], change if kind != "the length" else lambda header: header)
    if kind == "the length":
        length = int(choose(draw, (0, 1, 7, len(content), 1 << 40, (1 << 64) - 1)))
        content = struct.pack("<Q", length) + content[8:]
    path.write_bytes(content)
    return f"header: {kind}", f"{kind} {entry} {drawn!r}", False


def _other(draw: Draw, path: Path, box: Sandbox) -> tuple[str, str, bool | None]:
    """Puts something else in the place of the weights."""
    kind = choose(draw, ("absent", "a link to nothing", "a zip of others", "an endless device", "values", "a dict"))
    if kind == "a link to nothing":
        path.symlink_to("nowhere")
    elif kind == "a zip of others":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("../evil.npy", b"evil")
    elif kind == "an endless device":
        path.symlink_to("/dev/zero")
    elif kind == "values":
        torch.save(choose(draw, (value(draw), [1, 2], {"state_dict": value(draw)}, {1: torch.zeros(1, 1, 1, 1)})), path)
    elif kind == "a dict":
        torch.save({"net": {"w": torch.zeros(1, 1, 3, 3), "x": value(draw)}}, path)
    return kind, kind, False


@inputs(3)
@given(st.data())
def test_valid_weights_are_accepted(tmp_path, data):
    attempt(functools.partial(case, valid=True), data.draw, tmp_path)


@inputs(12)
@given(st.data())
def test_bad_weights_are_refused_in_one_line(tmp_path, data):
    attempt(functools.partial(case, valid=False), data.draw, tmp_path)

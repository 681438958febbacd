"""Images and labels in an .npz: damaged, of other types and shapes, with impossible labels, with hidden code."""

import functools
import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tests.robustness.inputs import (
    ROOT,
    Case,
    Draw,
    attempt,
    choose,
    damaged,
    inputs,
)
from tests.robustness.sandbox import Sandbox
from tests.robustness.test_image_folders import ARGUMENTS

TYPES = ("f4", "i4", "u2", "?", "i1", "S3", "c8")
LABELS = ("train_label", "test_label")
NAMES = ("train_image", "train_label", "test_image", "test_label")


class Hidden:
    """An object that executes code when it is unpickled."""

    def __init__(self, code: str) -> None:
        self.code = code

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (self.code,)


def header(shape: str, dtype: str = "'|u1'") -> bytes:
    """Returns an .npy file with this shape in its header and few bytes of content."""
    text = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}}}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + bytes(64)


def case(draw: Draw, box: Sandbox, valid: bool) -> Case:
    path = box.input / "set.npz"
    argv = [f"--config={ROOT}/configs/at.py:dataset=npz", *ARGUMENTS, f"--workdir={box.run}"]
    argv += [f"--config.data.path={path}", f"--config.data.data_dir={box.data}"]
    arrays = _arrays()
    if valid:
        description = _valid_change(draw, arrays)
        choose(draw, (np.savez, np.savez_compressed))(path, **arrays)
        return Case("valid", description, argv, True)
    if draw(st.integers(0, 2)):
        kind, description = _changed(draw, arrays, box)
        with path.open("wb") as file:
            np.savez(file, **arrays)
        return Case(kind, description, argv, False, [str(path), "class"])
    if draw(st.booleans()):
        buffer = io.BytesIO()
        choose(draw, (np.savez, np.savez_compressed))(buffer, **arrays)
        kind, content = damaged(draw, buffer.getvalue())
        path.write_bytes(content)
        return Case("damaged file", kind, argv, None, [str(path)])
    kind, description = _member(draw, arrays, path)
    return Case(kind, description, argv, None if kind == "strange names" else False, [str(path)])


def _arrays() -> dict[str, Any]:
    arrays: dict[str, Any] = {}
    for split, number in (("train", 12), ("test", 6)):
        arrays[f"{split}_image"] = np.random.default_rng(0).integers(0, 256, (number, 8, 8, 3)).astype(np.uint8)
        arrays[f"{split}_label"] = np.arange(number) % 3
    return arrays


def _valid_change(draw: Draw, arrays: dict[str, Any]) -> str:
    change = choose(draw, ("label", "grey", "flat", "names", "order", "other array"))
    if change == "label":
        kind = choose(draw, ("i1", "u1", ">i4", "i8", "u8"))
        arrays |= {name: arrays[name].astype(kind) for name in LABELS}
        return f"labels of type {kind}"
    if change in ("grey", "flat"):
        for name in ("train_image", "test_image"):
            arrays[name] = arrays[name][..., :1] if change == "grey" else arrays[name][..., 0]
    elif change == "names":
        arrays["class_names"] = np.array(["cat", "ä", "[/b]", "never seen in the test"][:3])
    elif change == "order":
        arrays["train_image"] = np.asfortranarray(arrays["train_image"])
    else:
        arrays["other"] = np.zeros(3)
    return f"valid: {change}"


def _changed(draw: Draw, arrays: dict[str, Any], box: Sandbox) -> tuple[str, str]:
    """Changes type, shape or content of an array in `arrays`."""
    name = choose(draw, NAMES)
    label = name if name in LABELS else choose(draw, LABELS)
    image = name if name not in LABELS else "train_image"
    train = "train_label"
    changes = {
        "hidden code": (name, lambda: np.array([Hidden(box.code())] * len(arrays[name]), object)),
        "hidden code in a name": ("class_names", lambda: np.array([Hidden(box.code())] * 3, object)),
        "missing array": (name, None),
        "image of another type": (image, lambda: arrays[image].astype(choose(draw, TYPES))),
        "image of another shape": (image, lambda: arrays[image][..., :2]),
        "image without axes": (image, lambda: np.uint8(3)),
        "too many axes": (image, lambda: arrays[image][None]),
        "images of no size": (image, lambda: arrays[image][:, :0]),
        "no images": (image, lambda: arrays[image][:0]),
        "splits of different sizes": (image, lambda: np.repeat(arrays[image], 2, 1)),
        "fewer images": (image, lambda: arrays[image][1:]),
        "label of another type": (label, lambda: arrays[label].astype(choose(draw, ("f8", "?", "U2", "M8[s]", "c16")))),
        "label of another shape": (label, lambda: arrays[label][:, None]),
        "label below zero": (label, lambda: arrays[label] - 1),
        "label too large": (label, lambda: arrays[label] + choose(draw, (20, 10**4, 2**31, 2**40))),
        "label beyond 64 bits": (label, lambda: arrays[label].astype("u8") + np.uint64(2**63)),
        "class without images": (train, lambda: np.where(arrays[train] == 1, 0, arrays[train])),
        "one class": (train, lambda: np.zeros_like(arrays[train])),
        "too few names": ("class_names", lambda: np.array(["a", "b"])),
        "names in two axes": ("class_names", lambda: np.array([["a", "b", "c"]])),
    }
    kind = choose(draw, list(changes))
    where, make = changes[kind]
    if make is None:
        del arrays[where]
    else:
        arrays[where] = make()
    if kind == "one class":
        arrays["test_label"] = np.zeros_like(arrays["test_label"])
    return kind, f"{kind}: {where}"


def _member(draw: Draw, arrays: dict[str, Any], path: Path) -> tuple[str, str]:
    """Writes a zip whose members are not arrays, or have headers with impossible sizes."""
    name = choose(draw, NAMES)
    kinds = {
        "claims many images": header("(999999999999, 8, 8, 3)"),
        "claims a negative number": header("(-5, 8, 8, 3)"),
        "claims an overflow": header("(4611686018427387904, 8, 8, 3)"),
        "code in the header": header("__import__('os').getcwd()"),
        "deep header": header("(" * 5000),
        "an unknown type": header("(12,)", "[('a', '|O')]"),
        "no array": b"no array",
        "strange names": None,
    }
    kind = choose(draw, list(kinds))
    with zipfile.ZipFile(path, "w") as file:
        for each, array in arrays.items():
            buffer = io.BytesIO()
            np.save(buffer, array)
            content = kinds[kind]
            file.writestr(f"{each}.npy", content if each == name and content else buffer.getvalue())
        if kind == "strange names":
            for strange in ("../evil.npy", "/evil", "..\\evil.npy", "train_image", "\xe4.npy"):
                file.writestr(strange, b"evil")
    return kind, f"{kind}: {name}"


@inputs(4)
@given(st.data())
def test_valid_npz_files_are_accepted(tmp_path, data):
    attempt(functools.partial(case, valid=True), data.draw, tmp_path)


@inputs(20)
@given(st.data())
def test_bad_npz_files_are_refused_in_one_line(tmp_path, data):
    attempt(functools.partial(case, valid=False), data.draw, tmp_path)

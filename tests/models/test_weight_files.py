"""Files of weights: one-line errors for damaged and other files; code in a file is never executed."""

import gzip
import hashlib
import json
import os
import pickle
import struct

import numpy as np
import pytest

from lt_adv.models import weight_files
from tests.experiments import NO_TORCH
from tests.models.torch_files import SAVE, save_header, save_npz, save_safetensors, save_torch

STATE = {"conv1.weight": np.arange(54.0, dtype=np.float32).reshape(2, 3, 3, 3), "n": np.array(7), "e": np.ones((0, 2))}


def refused(path):
    """Returns the one-line error message of a file that cannot be loaded."""
    with pytest.raises(ValueError) as error:
        weight_files.load(path)
    text = str(error.value)
    assert text.startswith(f"{path} ") and "\n" not in text and len(text) < 600, text
    return text


@pytest.mark.parametrize("suffix", SAVE)
def test_save_and_load(tmp_path, suffix):
    path = SAVE[suffix](tmp_path / f"weights{suffix}", STATE)
    loaded = weight_files.load(str(path))
    assert loaded.keys() == STATE.keys()
    for name, array in STATE.items():
        np.testing.assert_array_equal(loaded[name], array, strict=True)
    assert weight_files.sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("suffix", SAVE)
@pytest.mark.parametrize("length", [0, 4, 100, -100, -1])
def test_truncated_file_is_refused(tmp_path, suffix, length):
    path = SAVE[suffix](tmp_path / f"weights{suffix}", STATE)
    path.write_bytes(path.read_bytes()[:length])
    assert ("is empty" if length == 0 else "cannot be imported: ") in refused(path)


@pytest.mark.parametrize("suffix", SAVE)
def test_html_page_is_refused(tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    path.write_text("<html>Quota exceeded, try again tomorrow.</html>")
    pytest.importorskip("torch", reason=NO_TORCH) if suffix == ".pt" else None
    assert "cannot be imported: " in refused(path)


class Marks:
    """An object whose pickle creates a folder when it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("suffix", [".pt", ".pkl", ".npz"])
@pytest.mark.parametrize("place", ["file", "entry"])
def test_code_in_a_file_is_not_executed(tmp_path, suffix, place):
    path, mark = tmp_path / f"weights{suffix}", tmp_path / "mark"
    torch = pytest.importorskip("torch", reason=NO_TORCH) if suffix != ".npz" else None
    if place == "file":
        path.write_bytes(pickle.dumps(Marks(mark), protocol=2))
    elif torch:
        torch.save({"conv1.weight": torch.zeros(2, 3, 3, 3), "best": Marks(mark)}, path)
    else:
        np.savez(path, a=np.array([Marks(mark)], object))
    text = refused(path)
    assert not mark.exists() and "weights_only" not in text and "allow_pickle=True" not in text
    if torch:
        assert "it refers to posix.mkdir, which is not safe to load. If you trust the file, save only its" in text
    pickle.loads(pickle.dumps(Marks(mark)))
    assert mark.exists()  # an unsafe load does create it


@pytest.mark.parametrize(
    ("wrap", "line"),
    [
        (lambda s: {"net": s, "ema": s}, "it must contain one state_dict with convolution kernels, not 2 (net, ema)"),
        (lambda s: {"run": {"net": s}}, "not 0 (none): save only that state_dict."),
        (lambda s: list(s.values()), "not 0 (none): save only that state_dict."),
        (lambda s: {**s, "epoch": 3, "names": ["a"]}, "entries that are not tensors: epoch, names."),
    ],
)
def test_unclear_state_dict_is_refused(tmp_path, wrap, line):
    assert line in refused(save_torch(tmp_path / "weights.pt", STATE, wrap))


def test_tensor_next_to_a_state_dict_is_included(tmp_path):
    path = save_torch(tmp_path / "weights.pt", STATE, lambda s: {"state_dict": s, "mean": s["n"], "epoch": 3})
    assert weight_files.load(path).keys() == {*STATE, "mean"}


def entry(begin, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "line"),
    [
        ({"a": entry(0, 8), "b": entry(8, 16)}, None),
        ({"b": entry(8, 16), "a": entry(0, 8)}, None),
        ({"a": entry(0, 8)}, "its tensors end at byte 8 of the data, which has 16"),
        ({"a": entry(0, 8), "b": entry(4, 12)}, "b of shape [2] cannot lie at bytes 4 to 12"),
        ({"a": entry(0, 4, (1,)), "b": entry(8, 16)}, "b of shape [2] cannot lie at bytes 8 to 16"),
        ({"a": entry(0, 16)}, "a of shape [2] cannot lie at bytes 0 to 16"),
        ({"a": entry(0, 16, (-2, -2))}, "a of shape [-2, -2] cannot lie at bytes 0 to 16"),
        ({"a": entry(-8, 0)}, "a of shape [2] cannot lie at bytes -8 to 0"),
        ({"a": entry(0, 16), "b": entry(16, 24)}, "a of shape [2] cannot lie"),
        ({"a": entry(0, 8), "b": entry(8, 24, (4,))}, "b should end at byte 24 of the data, which has 16"),
        ({"a": entry(0, 16, dtype="F8_E4M3")}, "KeyError: 'F8_E4M3'"),
        ({"a": {"dtype": "F32"}}, "KeyError: 'data_offsets'"),
        ({"a": entry(0, 8.0), "b": entry(8, 16)}, "TypeError: "),
        ({"a": 1}, "TypeError: "),
        ([], "TypeError: "),
    ],
)
def test_offsets_of_safetensors_are_checked(tmp_path, header, line):
    path = save_header(tmp_path / "weights.safetensors", header, np.arange(4, dtype=np.float32).tobytes())
    if line is None:
        loaded = weight_files.load(path)
        assert loaded["a"].tolist() == [0, 1] and loaded["b"].tolist() == [2, 3]
    else:
        assert line in refused(path)


@pytest.mark.parametrize("text", [b"{", b"\xff\xfe", b"[" * 100_000])
def test_header_that_is_not_json(tmp_path, text):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    assert "cannot be imported: " in refused(path)


def test_header_longer_than_the_file(tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(struct.pack("<Q", 2**64 - 1) + json.dumps({}).encode())
    assert "its header should end at byte 18446744073709551623, but it has 10 bytes" in refused(path)


@pytest.mark.parametrize("save", [save_npz, save_safetensors])
def test_file_without_tensors_is_refused(tmp_path, save):
    suffix = {save_npz: ".npz", save_safetensors: ".safetensors"}[save]
    assert "contains no tensors" in refused(save(tmp_path / f"weights{suffix}", {}))


def test_missing_files_and_other_suffixes(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no file of weights .*weights\.npz\."):
        weight_files.load(tmp_path / "weights.npz")
    with pytest.raises(ValueError, match=r"Unknown kind of weights '\.onnx'\. There are: \.npz, \.pkl, \.pt, "):
        weight_files.load(tmp_path / "weights.onnx")
    (tmp_path / "run.pt").mkdir()
    named = {"weights.pt": True, "a/b.safetensors": True, "workdirs/at-dataset=digits": False, "": False}
    assert {path: weight_files.is_file(path) for path in named} == named
    assert not weight_files.is_file(str(tmp_path / "run.pt"))


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".pkl", ".tar", ".npz", ".safetensors"])
@pytest.mark.parametrize(
    ("content", "what"),
    [
        (POINTER, "a Git LFS pointer in place of the file: fetch it with git lfs pull"),
        (b"\n<!DOCTYPE html>\n<html></html>", "an HTML page"),
        (b'{"error": "not found"}', "a JSON file"),
        (b"Access denied\nsorry", "a text file that begins with 'Access denied'"),
        (gzip.compress(b"x", mtime=0), "a gzip archive"),
        (b"\x89HDF\r\n\x1a\n" + bytes(9), "an HDF5 file"),
    ],
)
def test_format_of_other_files_is_named(tmp_path, suffix, content, what):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    assert f"cannot be imported: it is {what}" in refused(path)


@pytest.mark.parametrize(
    ("saved", "named", "line"),
    [
        (".safetensors", ".pth", "it is a safetensors file: rename it to end in .safetensors."),
        (".npz", ".pth", "it is an .npz file of NumPy: rename it to end in .npz."),
        (".npz", ".safetensors", "it is an .npz file of NumPy: rename it to end in .npz."),
        (".pt", ".npz", "it is a PyTorch file (torch.save): rename it to end in .pt."),
        (".pt", ".safetensors", "it is a PyTorch file (torch.save): rename it to end in .pt."),
    ],
)
def test_wrong_suffix_is_refused(tmp_path, saved, named, line):
    path = SAVE[saved](tmp_path / f"weights{saved}", STATE)
    assert line in refused(path.rename(tmp_path / f"weights{named}"))


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".npz"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_archive_is_refused(tmp_path, suffix):
    torch = pytest.importorskip("torch", reason=NO_TORCH)
    path = tmp_path / f"weights{suffix}"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    text = refused(path)
    assert "it is a TorchScript archive (torch.jit.save), which contains a program: save only the module's" in text
    assert "weights_only" not in text


@pytest.mark.parametrize("legacy", [True, False])
def test_module_is_not_unpickled(tmp_path, legacy):
    torch = pytest.importorskip("torch", reason=NO_TORCH)
    path = tmp_path / "weights.pth"
    torch.save(torch.nn.Linear(2, 2), path, _use_new_zipfile_serialization=not legacy)
    text = refused(path)
    assert "it refers to torch.nn.modules.linear.Linear" in text and "weights_only" not in text


def test_legacy_state_dict_of_pytorch_before_1_6(tmp_path):
    torch = pytest.importorskip("torch", reason=NO_TORCH)
    state = {name: torch.from_numpy(np.array(array)) for name, array in STATE.items()}
    torch.save(state, tmp_path / "weights.pth", _use_new_zipfile_serialization=False)
    assert weight_files.load(tmp_path / "weights.pth").keys() == STATE.keys()


def test_object_array_is_not_loaded(tmp_path):
    np.savez(tmp_path / "weights.npz", a=np.array([1, None], object))
    assert "files with pickled objects are not read" in refused(tmp_path / "weights.npz")

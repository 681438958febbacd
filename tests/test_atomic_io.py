"""Atomic writes of files and folders, and detection of file formats."""

import errno
import gzip
import io
import pickle
import struct
import subprocess
import sys
import tarfile
import zipfile

import pytest
from etils import epath

from lt_adv.runtime import atomic_io


def test_text_and_bytes_are_written_in_a_new_folder(tmp_path):
    path = tmp_path / "new" / "file"
    atomic_io.write_atomically(path, "ä\n")
    assert path.read_bytes() == "ä\n".encode()
    atomic_io.write_atomically(str(path), b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert [f.name for f in path.parent.iterdir()] == ["file"]


def test_writing_over_a_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is a folder, but a file must be written there: move the folder"):
        atomic_io.write_atomically(tmp_path, "new")
    assert not list(tmp_path.iterdir()) and not list(tmp_path.parent.glob(".*.tmp"))


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
@pytest.mark.parametrize("at", ["write_bytes", "replace"])
def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch, at, failure):
    def fail(self, *_):
        self.touch()
        raise failure

    path = epath.Path(tmp_path) / "file"
    atomic_io.write_atomically(path, "old")
    monkeypatch.setattr(type(path), at, fail)
    with pytest.raises(type(failure)):
        atomic_io.write_atomically(path, "new")
    assert [f.name for f in tmp_path.iterdir()] == ["file"] and path.read_text() == "old"


def test_a_folder_is_replaced(tmp_path):
    path = tmp_path / "new" / "folder"
    atomic_io.replace_folder(path, {"a": b"1", "b": b"2"})
    atomic_io.replace_folder(str(path), {"a": b"3", "b": b"", "c": b"4"})
    assert {file.name: file.read_bytes() for file in path.iterdir()} == {"a": b"3", "b": b"", "c": b"4"}
    assert [file.name for file in path.parent.iterdir()] == ["folder"]
    with pytest.raises(ValueError, match="folder holds a, which would be lost"):
        atomic_io.replace_folder(path, {"b": b"", "c": b""})


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
@pytest.mark.parametrize(("at", "call"), [("write_bytes", 1), ("write_bytes", 2), ("rename", 1), ("rename", 2)])
def test_failed_replacement_keeps_the_old_folder(tmp_path, monkeypatch, at, call, failure):
    path = epath.Path(tmp_path) / "folder"
    atomic_io.replace_folder(path, {"a": b"1"})
    original, calls = getattr(type(path), at), []

    def fail(self, *args):
        calls.append(self)
        if len(calls) == call:
            raise failure
        return original(self, *args)

    monkeypatch.setattr(type(path), at, fail)
    with pytest.raises(type(failure)):
        atomic_io.replace_folder(path, {"a": b"2", "b": b"3"})
    assert [f.name for f in tmp_path.iterdir()] == ["folder"]
    assert {file.name: file.read_bytes() for file in path.iterdir()} == {"a": b"1"}


@pytest.mark.parametrize(("at", "call"), [("write_bytes", 1), ("write_bytes", 2), ("rename", 1), ("rename", 2)])
def test_a_kill_leaves_the_old_folder_or_none(tmp_path, at, call):
    """The folder never has only some of the new files."""
    code = """
import os, sys
from etils import epath
from lt_adv.runtime import atomic_io
path, at, call = epath.Path(sys.argv[1]) / "folder", sys.argv[2], int(sys.argv[3])
atomic_io.replace_folder(path, {"a": b"1"})
original, calls = getattr(type(path), at), []
def killed(self, *args):
    calls.append(self)
    if len(calls) == call:
        os.kill(os.getpid(), 9)
    return original(self, *args)
setattr(type(path), at, killed)
atomic_io.replace_folder(path, {"a": b"2", "b": b"3"})
"""
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path), at, str(call)]).returncode == -9
    folder = tmp_path / "folder"
    assert not folder.exists() or {file.name: file.read_bytes() for file in folder.iterdir()} == {"a": b"1"}


def zipped(*names):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name in names:
            archive.writestr(name, "x")
    return stream.getvalue()


def tarred():
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a"))
    return stream.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
FORMATS = [
    (b"", "empty"),
    (LFS, atomic_io.LFS),
    (b"version https://hawser.github.com/spec/v1\noid sha256:1\n", atomic_io.LFS),
    (b"/annex/objects/SHA256E-s1--4d7a.npz\n", atomic_io.ANNEX),
    (b"<!doctype HTML><p>", "an HTML page"),
    (b"\xef\xbb\xbf\r\n <html lang='en'>", "an HTML page"),
    (b"<!-- error -->\n<html>", "an HTML page"),
    (b"<?xml version='1.0'?><!DOCTYPE html><html>", "an HTML page"),
    (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "an XML document"),
    (b'{"message": "Not Found"}', atomic_io.JSON),
    (b"404: Not Found", "a text file that begins with '404: Not Found'"),
    ("ünï".encode() * 600, "a text file that begins with 'ünï"),
    (zipped(), atomic_io.NPZ),
    (zipped("a.npy", "b.npy"), atomic_io.NPZ),
    (zipped("a.png"), atomic_io.ZIP),
    (zipped("net/data.pkl", "net/version", "net/data/0"), atomic_io.TORCH),
    (zipped("net/data.pkl", "net/constants.pkl", "net/code/__torch__.py"), "a TorchScript archive"),
    (zipped("models/model.json", "archive_format"), "a program (torch.export.save)"),
    (zipped("a.npy")[:40], atomic_io.DAMAGED_ZIP),
    (b"PK\x03\x04", atomic_io.DAMAGED_ZIP),
    (gzip.compress(b"x"), atomic_io.GZIP),
    (tarred(), "a tar archive"),
    (pickle.dumps({}, protocol=2), atomic_io.PICKLE),
    (pickle.dumps({}, protocol=5), atomic_io.PICKLE),
    (b"\x93NUMPY\x01\x00", "a single array of NumPy"),
    (struct.pack("<Q", 2) + b"{}", atomic_io.SAFETENSORS),
    (struct.pack("<Q", 3) + b"{}", None),
    (b"\x00\x01\x02", None),
]


# Explicit ids: compressed content holds the time, so that workers would collect different test names.
@pytest.mark.parametrize(("content", "what"), FORMATS, ids=[f"{n}-{what}" for n, (_, what) in enumerate(FORMATS)])
def test_the_format_of_a_file_is_detected(tmp_path, content, what):
    (tmp_path / "file").write_bytes(content)
    for file in (content, tmp_path / "file", str(tmp_path / "file")):
        result = atomic_io.format_of(file)
        assert result == what if what is None or result is None else result.startswith(what)


def test_reason_names_the_format_or_the_error(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(LFS)
    assert atomic_io.reason(path, ValueError("Expecting value"), atomic_io.JSON) == f"it is {atomic_io.LFS}"
    path.write_text("{")
    assert atomic_io.reason(path, KeyError("a\nb"), atomic_io.JSON) == "KeyError: 'a\\nb'"
    assert atomic_io.reason(tmp_path / "nowhere", ValueError("two\nlines")) == "two lines"


@pytest.mark.parametrize(
    "advice",
    [
        "This file contains pickled (object) data. If you trust the file you can load it unsafely using the "
        "`allow_pickle=` keyword argument or `pickle.load()`.",
        "Object arrays cannot be loaded when allow_pickle=False",
        "Weights only load failed. Re-running `torch.load` with `weights_only` set to `False` will likely succeed",
    ],
)
def test_advice_to_load_pickles_is_replaced(advice):
    assert atomic_io.message(ValueError(advice)) == (
        "files with pickled objects are not read, because loading them can execute code"
    )


def test_pointer_files_are_detected_in_nested_folders(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "file").write_bytes(b"\x00")
    assert atomic_io.placeholder(tmp_path) is None and atomic_io.placeholder(tmp_path / "nowhere") is None
    (tmp_path / "a" / "b" / "part").write_bytes(LFS)
    assert atomic_io.placeholder(tmp_path) == f"{tmp_path / 'a' / 'b' / 'part'} is {atomic_io.LFS}"

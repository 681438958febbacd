"""A file is there whole or not at all."""

import errno
import subprocess
import sys

import pytest
from etils import epath

from lt_adv import files


def test_text_and_bytes_in_a_new_folder(tmp_path):
    path = tmp_path / "new" / "file"
    files.write_atomically(path, "ä\n")
    assert path.read_bytes() == "ä\n".encode()
    files.write_atomically(str(path), b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert [f.name for f in path.parent.iterdir()] == ["file"]


def test_a_folder_in_the_place_of_a_file(tmp_path):
    with pytest.raises(ValueError, match="is a folder, and a file is to be written there: move it"):
        files.write_atomically(tmp_path, "new")
    assert not list(tmp_path.iterdir()) and not list(tmp_path.parent.glob(".*.tmp"))


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
@pytest.mark.parametrize("at", ["write_bytes", "replace"])
def test_a_failed_write_leaves_the_old_file_alone(tmp_path, monkeypatch, at, failure):
    def fail(self, *_):
        self.touch()
        raise failure

    path = epath.Path(tmp_path) / "file"
    files.write_atomically(path, "old")
    monkeypatch.setattr(type(path), at, fail)
    with pytest.raises(type(failure)):
        files.write_atomically(path, "new")
    assert [f.name for f in tmp_path.iterdir()] == ["file"] and path.read_text() == "old"


def test_a_folder_is_replaced(tmp_path):
    path = tmp_path / "new" / "folder"
    files.replace_folder(path, {"a": b"1", "b": b"2"})
    files.replace_folder(str(path), {"a": b"3", "b": b"", "c": b"4"})
    assert {file.name: file.read_bytes() for file in path.iterdir()} == {"a": b"3", "b": b"", "c": b"4"}
    assert [file.name for file in path.parent.iterdir()] == ["folder"]
    with pytest.raises(ValueError, match="folder holds a, which would be lost"):
        files.replace_folder(path, {"b": b"", "c": b""})


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
@pytest.mark.parametrize(("at", "call"), [("write_bytes", 1), ("write_bytes", 2), ("rename", 1), ("rename", 2)])
def test_a_failed_folder_leaves_the_old_one_alone(tmp_path, monkeypatch, at, call, failure):
    path = epath.Path(tmp_path) / "folder"
    files.replace_folder(path, {"a": b"1"})
    original, calls = getattr(type(path), at), []

    def fail(self, *args):
        calls.append(self)
        if len(calls) == call:
            raise failure
        return original(self, *args)

    monkeypatch.setattr(type(path), at, fail)
    with pytest.raises(type(failure)):
        files.replace_folder(path, {"a": b"2", "b": b"3"})
    assert [f.name for f in tmp_path.iterdir()] == ["folder"]
    assert {file.name: file.read_bytes() for file in path.iterdir()} == {"a": b"1"}


@pytest.mark.parametrize(("at", "call"), [("write_bytes", 1), ("write_bytes", 2), ("rename", 1), ("rename", 2)])
def test_a_kill_leaves_no_folder_that_looks_whole(tmp_path, at, call):
    """The old one, or none: never some of the new files under its name."""
    code = """
import os, sys
from etils import epath
from lt_adv import files
path, at, call = epath.Path(sys.argv[1]) / "folder", sys.argv[2], int(sys.argv[3])
files.replace_folder(path, {"a": b"1"})
original, calls = getattr(type(path), at), []
def killed(self, *args):
    calls.append(self)
    if len(calls) == call:
        os.kill(os.getpid(), 9)
    return original(self, *args)
setattr(type(path), at, killed)
files.replace_folder(path, {"a": b"2", "b": b"3"})
"""
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path), at, str(call)]).returncode == -9
    folder = tmp_path / "folder"
    assert not folder.exists() or {file.name: file.read_bytes() for file in folder.iterdir()} == {"a": b"1"}

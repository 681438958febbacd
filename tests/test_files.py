"""A file is there whole or not at all."""

import errno

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

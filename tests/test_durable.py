"""After a power cut a file is there as it was or as it became: on the disk before it gets its name, and then the name.

The order of the calls is what a program can see to, and what is tested; no machine loses its power here.
"""

import errno
import os
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from etils import epath
from jax.sharding import Mesh

from lt_adv import main
from lt_adv.attacks import journal
from lt_adv.cli import run as runs
from lt_adv.data import cache
from lt_adv.data.dataset import Source, SplitReader
from lt_adv.runtime import atomic_io
from lt_adv.training import sharding, train_state
from lt_adv.training.checkpoint import Checkpoints
from tests.bad_input.test_resume import TINY


class Calls:
    """Of a folder: what was synced and renamed below it, in order, and the files a renamed one held."""

    def __init__(self, root: Path, monkeypatch):
        self.root, self.log = root, []
        fsync, rename, replace = os.fsync, os.rename, os.replace

        def synced(descriptor):
            self.log.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}"))))
            fsync(descriptor)

        def renamed(original):
            def act(old, new, **options):
                old, new = Path(os.fspath(old)).absolute(), Path(os.fspath(new)).absolute()
                self.log.append(("rename", old, new, [old, *old.rglob("*")]))
                original(old, new, **options)

            return act

        monkeypatch.setattr(os, "fsync", synced)
        monkeypatch.setattr(os, "rename", renamed(rename))
        monkeypatch.setattr(os, "replace", renamed(replace))

    def published(self) -> list[str]:
        """What got its name, relative to the folder; AssertionError where it was not synced before, or its folder not
        after it. Names inside a folder that is itself unfinished do not count."""
        found = []
        for place, (kind, *what) in enumerate(self.log):
            if kind != "rename" or any(part.endswith(".old") or "-tmp" in part for part in what[1].parts):
                continue
            old, new, held = what
            if self.root not in new.parents:
                continue
            before = {call[1] for call in self.log[:place] if call[0] == "sync"}
            assert not set(held) - before, f"{new} got its name before {set(held) - before} were on the disk"
            assert ("sync", new.parent) in self.log[place:], f"{new} has its name, which may not be on the disk"
            found.append(str(new.relative_to(self.root)))
        return found


@pytest.fixture
def calls(tmp_path, monkeypatch):
    return Calls(tmp_path, monkeypatch)


def test_a_file_and_the_folders_that_were_missing(calls, tmp_path):
    atomic_io.write_atomically(tmp_path / "a" / "b" / "file", "text")
    assert calls.published() == ["a/b/file"]
    synced = [call[1] for call in calls.log if call[0] == "sync"]
    assert {tmp_path, tmp_path / "a", tmp_path / "a" / "b"} <= set(synced), "each new folder has a name, too"


def test_a_folder(calls, tmp_path):
    for content in (b"1", b"2"):
        atomic_io.replace_folder(tmp_path / "new" / "folder", {"x": content, "y": b""})
    assert calls.published() == ["new/folder"] * 2


def test_a_cache_of_decoded_images(calls, tmp_path):
    image, label = np.zeros((3, 2, 2, 1), np.uint8), np.arange(3, dtype=np.int32)
    decoding = SplitReader(image.shape, label, np.arange(3), lambda: iter([image]))
    cache.load(tmp_path, "set", Source("identity", lambda: (("a", "b", "c"), {"train": decoding, "test": decoding})))
    cache.remembered(tmp_path, "small", 1, lambda: {"a": np.arange(2)})
    folder, small = calls.published()
    assert folder.startswith("lt_adv_cache/set-") and small.startswith("lt_adv_cache/small-")


def test_the_journal_of_an_attack(calls, tmp_path):
    made = journal.open_(tmp_path / "new" / "journal", "digest", np.zeros((2, 3)))
    made.waiting.append(journal.Done(*(np.zeros(2) for _ in journal.FIELDS)))
    made.flush(0)
    assert calls.published() == [f"new/journal/{name}" for name in ("logits.npy", "call.txt", "0-000000.npz")]
    assert ("sync", tmp_path) in calls.log and ("sync", tmp_path / "new") in calls.log


def test_checkpoints(calls, tmp_path):
    """Those before a new one are removed when it is on the disk, not sooner."""
    variables = {"params": {"w": np.arange(4.0)}}
    state = train_state.create(jax.random.key(0), variables, optax.sgd(0.1), {}, averaged=False)
    state = sharding.replicate(state, Mesh(np.array(jax.devices()[:1]), ("data",)))
    stage = tmp_path / "checkpoints" / "0_train"
    checkpoints = Checkpoints(stage, keep=1)
    for step in (1, 2):
        checkpoints.save(step, state, {"step": step})
        checkpoints.wait()
    checkpoints.close()
    assert calls.published() == ["checkpoints/0_train/1", "checkpoints/0_train/2"]
    assert {tmp_path, tmp_path / "checkpoints"} <= {call[1] for call in calls.log if call[0] == "sync"}
    assert [path.name for path in stage.iterdir()] == ["2"]


def test_a_checkpoint_without_its_name_is_none(tmp_path, monkeypatch):
    """Passed over where orbax had renamed it and the disk failed, and cleared away by the next save."""
    state = train_state.create(jax.random.key(0), {"params": {"w": np.arange(4.0)}}, optax.sgd(0.1), {}, averaged=False)
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    state = sharding.replicate(state, mesh)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state, {"step": 1})
    checkpoints.wait()
    original = atomic_io.sync_tree

    def fail(folder):
        if folder.parent == tmp_path:
            raise OSError(errno.EIO, "Input/output error")
        original(folder)

    monkeypatch.setattr(atomic_io, "sync_tree", fail)
    checkpoints.save(2, state, {"step": 2})
    with pytest.raises(OSError, match="A checkpoint cannot be written to .* Input/output error"):
        checkpoints.close()
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2.orbax-checkpoint-tmp-written"}
    again = Checkpoints(tmp_path)
    assert again.steps() == [1] and again.restore_latest(state, mesh)[1]["step"] == 1
    monkeypatch.undo()
    again.save(2, state, {"step": 2})
    again.close()
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2"}


def test_all_that_a_run_leaves_behind(calls, tmp_path, monkeypatch):
    """Trained, evaluated with AutoAttack and exported."""
    monkeypatch.setattr(runs.sharding, "make_mesh", lambda: Mesh(np.array(jax.devices()[:1]), ("data",)))
    workdir = f"--workdir={tmp_path / 'run'}"
    assert main.main(["main", *TINY, workdir]) == 0
    assert main.main(["main", *TINY, workdir, "--mode=export"]) == 0
    found = calls.published()
    assert {"run/config.json", "run/metrics.jsonl", "run/timing.jsonl", "run/export"} <= set(found)
    assert {"run/checkpoints/0_train/1", "run/checkpoints/0_train/2"} <= set(found)
    assert {"run/report.md", "run/report.json"} <= set(found), sorted(found)


@pytest.mark.parametrize("module", [atomic_io.sync, journal._sync])
def test_a_file_system_without_such_a_call_for_folders(module, tmp_path, monkeypatch):
    """It is no reason to stop; that a file did not reach the disk is."""
    (tmp_path / "file").write_text("")

    def fail(number):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "fsync", fail)
    error = errno.EINVAL
    module(tmp_path)
    with pytest.raises(OSError):
        module(tmp_path / "file")
    error = errno.EIO
    with pytest.raises(OSError):
        module(tmp_path)


def test_a_bucket_needs_nothing(monkeypatch):
    monkeypatch.setattr(os, "open", lambda *_: pytest.fail("opened"))
    atomic_io.sync("gs://bucket/file")
    journal._sync(epath.Path("gs://bucket/file"))

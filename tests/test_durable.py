"""Durable writes: content is synced to the disk before it is renamed, and its folder is synced afterwards.

After a power cut a file then has its old or its new content. The tests check the order of the calls.
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
from lt_adv.data import cache
from lt_adv.data.dataset import Source, SplitReader
from lt_adv.runtime import atomic_io
from lt_adv.training import sharding, train_state
from lt_adv.training.checkpoint import Checkpoints
from tests.bad_input.test_resume import TINY


class Calls:
    """Records, in order, the syncs and renames below a folder, and the files in each renamed folder."""

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
        """Returns the rename targets relative to the folder, without those inside temporary folders.

        AssertionError if the content was not synced before the rename, or the parent folder not after it.
        """
        targets = []
        for position, (kind, *arguments) in enumerate(self.log):
            if kind != "rename" or any(part.endswith(".old") or "-tmp" in part for part in arguments[1].parts):
                continue
            _, new, files = arguments
            if self.root not in new.parents:
                continue
            synced = {call[1] for call in self.log[:position] if call[0] == "sync"}
            assert not set(files) - synced, f"{new} was renamed before {set(files) - synced} were synced"
            assert ("sync", new.parent) in self.log[position:], f"the folder of {new} was not synced after the rename"
            targets.append(str(new.relative_to(self.root)))
        return targets


@pytest.fixture
def calls(tmp_path, monkeypatch):
    return Calls(tmp_path, monkeypatch)


def test_a_file_and_its_missing_folders_are_synced(calls, tmp_path):
    atomic_io.write_atomically(tmp_path / "a" / "b" / "file", "text")
    assert calls.published() == ["a/b/file"]
    synced = [call[1] for call in calls.log if call[0] == "sync"]
    assert {tmp_path, tmp_path / "a", tmp_path / "a" / "b"} <= set(synced)


def test_a_replaced_folder_is_synced(calls, tmp_path):
    for content in (b"1", b"2"):
        atomic_io.replace_folder(tmp_path / "new" / "folder", {"x": content, "y": b""})
    assert calls.published() == ["new/folder"] * 2


def test_the_image_cache_is_synced(calls, tmp_path):
    image, label = np.zeros((3, 2, 2, 1), np.uint8), np.arange(3, dtype=np.int32)
    reader = SplitReader(image.shape, label, np.arange(3), lambda: iter([image]))
    cache.load(tmp_path, "set", Source("identity", lambda: (("a", "b", "c"), {"train": reader, "test": reader})))
    cache.cached_arrays(tmp_path, "small", 1, lambda: {"a": np.arange(2)})
    folder, small = calls.published()
    assert folder.startswith("lt_adv_cache/set-") and small.startswith("lt_adv_cache/small-")


def test_the_attack_journal_is_synced(calls, tmp_path):
    attack_journal = journal.open_journal(tmp_path / "new" / "journal", "digest", np.zeros((2, 3)))
    attack_journal.waiting.append(journal.Done(*(np.zeros(2) for _ in journal.FIELDS)))
    attack_journal.flush(0)
    assert calls.published() == [f"new/journal/{name}" for name in ("logits.npy", "call.txt", "0-000000.npz")]
    assert ("sync", tmp_path) in calls.log and ("sync", tmp_path / "new") in calls.log


def test_checkpoints_are_synced_before_old_ones_are_removed(calls, tmp_path):
    """Old checkpoints are removed only after a new one is on the disk."""
    variables = {"params": {"w": np.arange(4.0)}}
    state = train_state.create(jax.random.key(0), variables, optax.sgd(0.1), {})
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


def test_checkpoint_whose_sync_failed_is_ignored(tmp_path, monkeypatch):
    """The next save removes it."""
    state = train_state.create(jax.random.key(0), {"params": {"w": np.arange(4.0)}}, optax.sgd(0.1), {})
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


@pytest.mark.slow
def test_all_files_of_a_run_are_synced(calls, tmp_path):
    """The run trains, evaluates with AutoAttack and exports."""
    workdir = f"--workdir={tmp_path / 'run'}"
    assert main.main(["main", *TINY, workdir]) == 0
    assert main.main(["main", *TINY, workdir, "--mode=export"]) == 0
    published = set(calls.published())
    assert {"run/config.json", "run/metrics.jsonl", "run/timing.jsonl", "run/export"} <= published
    assert {"run/checkpoints/0_train/1", "run/checkpoints/0_train/2"} <= published
    assert {"run/report.md", "run/report.json"} <= published, sorted(published)


@pytest.mark.parametrize("sync", [atomic_io.sync, journal._sync])
def test_only_folders_may_fail_to_sync(sync, tmp_path, monkeypatch):
    """A folder that cannot be synced is tolerated, a file that cannot be synced is an error."""
    (tmp_path / "file").write_text("")

    def fail(number):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "fsync", fail)
    error = errno.EINVAL
    sync(tmp_path)
    with pytest.raises(OSError):
        sync(tmp_path / "file")
    error = errno.EIO
    with pytest.raises(OSError):
        sync(tmp_path)


def test_buckets_are_not_synced(monkeypatch):
    monkeypatch.setattr(os, "open", lambda *_: pytest.fail("opened"))
    atomic_io.sync("gs://bucket/file")
    journal._sync(epath.Path("gs://bucket/file"))

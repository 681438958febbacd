"""Runs that cannot be resumed, or have damaged files, give one line and lose nothing."""

import asyncio
import errno
import gc
import json
import os
import re
import shutil
import sys
import types
from pathlib import Path

import jax
import orbax.checkpoint as ocp
import pytest

from lt_adv import main
from tests.bad_input.conftest import RaiseBeforeTraining

# A run of two epochs with one step each.
TINY = [
    "--config=configs/at.py:dataset=digits,epochs=2",
    "--config.cpu_devices=1",  # compiling for eight takes twice as long
    "--config.data.imbalance=balanced",
    "--config.data.balanced_fraction=0.02",
    "--config.optim.batch_size=16",
    "--config.attack.num_steps=0",
    "--config.checkpoint.every_epochs=1",
    "--config.eval.attacks={}",
    "--config.eval.subset_per_class=1",
    "--config.eval.batch_size=16",
]


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """Returns the working directory of a TINY run, and caches compiled programs for the tests that resume it."""
    folder = tmp_path_factory.mktemp("finished")
    options = {"jax_compilation_cache_dir": str(folder / "programs"), "jax_persistent_cache_min_compile_time_secs": 0.0}
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    assert main.main(["main", *TINY, f"--workdir={folder / 'run'}"]) == 0
    yield folder / "run"
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture
def run(finished_run, tmp_path):
    """Returns a copy of the finished run, in the working directory of `answer`."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


def tree(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def truncate(checkpoint):
    for file in (checkpoint / "state").rglob("*"):
        if file.is_file():
            os.truncate(file, 10)


def test_changed_config_is_refused(answer, run):
    before = tree(run)
    for mode in ("train", "eval"):
        printed = answer(*TINY, "--config.seed=1", "--config.method={'name':'at_bsl'}", f"--mode={mode}")
        assert '(method.name: "at" -> "at_bsl"; seed: 0 -> 1): use another --workdir, or the old values' in printed
    assert tree(run) == before
    for text in ("{", "[]", "null"):
        (run / "config.json").write_text(text)
        assert "config.json is damaged" in answer(*TINY)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_run_with_the_entries_of_an_earlier_version_is_refused(answer, run, mode):
    """In one line, with the new names; the old config would not be accepted any more."""
    config = json.loads((run / "config.json").read_text())
    config["data"]["equalise"] = config["data"].pop("resample_balanced")
    config["fidelity"] = "published"
    (run / "config.json").write_text(json.dumps(config))
    printed = answer(*TINY, f"--mode={mode}")
    assert "config.data.equalise is now config.data.resample_balanced; config.fidelity=published is now" in printed
    assert "run/config.json has old names (" in printed
    assert "fidelity=paper): change them in the file, or use another --workdir." in printed


def test_run_of_a_version_without_an_entry_has_its_default(answer, run, no_training):
    config = json.loads((run / "config.json").read_text())
    del config["model"]["mean"], config["model"]["std"]
    (run / "config.json").write_text(json.dumps(config))
    printed = answer(*TINY, "--config.model.mean=(0.5,)", "--config.model.std=(0.5,)")
    assert "(model.mean: [] -> [0.5]; model.std: [] -> [0.5]): use another --workdir" in printed
    assert main.main(["main", *TINY, f"--workdir={run}"], no_training) == 0
    assert json.loads((run / "config.json").read_text())["model"]["mean"] == []


def test_entries_without_effect_on_the_run_may_change(run, no_training, tmp_path):
    overrides = ["--config.eval.groups=reat", f"--config.data.data_dir={tmp_path}", "--config.data.download=True"]
    assert main.main(["main", *TINY, *overrides, f"--workdir={run}"], no_training) == 0
    assert json.loads((run / "config.json").read_text())["eval"]["groups"] == "reat"


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_run_with_damaged_checkpoints_only_is_refused(answer, run, mode):
    for step in (1, 2):
        truncate(run / "checkpoints" / "0_train" / str(step))
    before = tree(run)
    printed = answer(*TINY, f"--mode={mode}")
    assert re.search(r"checkpoint 2 in \S* cannot be read .*checkpoint 1 in .* cannot be .* another --workdir", printed)
    assert tree(run) == before


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_damaged_newest_checkpoint_gives_one_warning(run, mode, caplog, capsys):
    """Gives one warning; training repeats the lost step with the same numbers."""
    lines = (run / "metrics.jsonl").read_text()
    truncate(run / "checkpoints" / "0_train" / "2")
    assert main.main(["main", *TINY, f"--mode={mode}", f"--workdir={run}"]) == 0
    warnings = [r.getMessage() for r in caplog.records if r.levelname != "INFO" and main.is_shown(r)]
    assert len(warnings) == 1 and re.match(r"checkpoint 2 in \S* cannot be read .* checkpoint 1\.", warnings[0])
    assert not capsys.readouterr().err
    assert (run / "metrics.jsonl").read_text() == lines


def test_checkpoint_of_another_network_is_refused(answer, run):
    (run / "config.json").unlink()  # a changed config would be refused first
    other = [*TINY, "--config.model.head.name=cosine"]
    printed = answer(*other, "--mode=eval")
    assert "run holds another network: params/head/bias is (10,) there, absent in config.model; correct" in printed
    assert "has checkpoints but no config.json" in answer(*other)
    assert not (run / "config.json").exists()
    printed = answer(*TINY, "--config.data.balanced_fraction=0.03", "--mode=eval")
    assert "was trained with class counts 2 2 2 2 2 2 2 2 2 2, this config gives 3 3 3" in printed
    assert "it is at step 2 of 2 of stage 0_train: let it finish, or correct the config" in printed


@pytest.mark.parametrize("text", ['{"stage": "0_tr', "3", "[]", '{"step": 1}', "", None])
def test_damaged_metrics_are_restored_from_the_checkpoint(run, caplog, text):
    path = run / "metrics.jsonl"
    content = path.read_text()
    path.unlink() if text is None else path.write_text(text)
    assert main.main(["main", *TINY, f"--workdir={run}"]) == 0
    assert path.read_text() == content and ("metrics.jsonl is damaged in line 1" in caplog.text) == bool(text)


def test_unawaited_reads_log_nothing(caplog):
    """A damaged checkpoint fails in each array, and asyncio logs a traceback for all but the first."""

    async def fail():
        raise ValueError("DATA_LOSS")

    async def start():
        asyncio.get_running_loop().create_task(fail())
        await asyncio.sleep(0)

    asyncio.run(start())
    gc.collect()
    assert "never retrieved" in caplog.text and not any(map(main.is_shown, caplog.records))


def test_closed_event_loop_prints_nothing(monkeypatch):
    """tensorstore raises this once for every pending array when another one fails."""
    printed = []
    monkeypatch.setattr(sys, "__unraisablehook__", printed.append)
    texts = ("Event loop is closed", "another")
    events = [types.SimpleNamespace(exc_value=RuntimeError(text), object=None) for text in texts]
    for event in events:
        main.print_unraisable(event)
    assert printed == events[1:]


READ = """
async def read(forever):
    try:
        await forever
    except BaseException as error:
        raise Exception("Encountered error while reading") from error
"""


def test_discarded_reads_print_nothing(monkeypatch):
    """Orbax raises an exception that nothing can catch when an unawaited read ends. Exceptions of other coroutines are
    printed."""
    printed = []
    monkeypatch.setattr(sys, "unraisablehook", main.print_unraisable)
    monkeypatch.setattr(sys, "__unraisablehook__", lambda event: printed.append(event.object.cr_code.co_filename))
    for file in (ocp.__file__, "elsewhere.py"):
        space: dict = {}
        exec(compile(READ, file, "exec"), space)
        read = space["read"](asyncio.Future(loop=asyncio.new_event_loop()))
        read.send(None)
        del read
        gc.collect()
    assert printed == ["elsewhere.py"]


def test_single_process_keeps_the_traceback_of_a_runtime_error(tmp_path):
    """Only a run of several processes can lose a peer."""
    error = jax.errors.JaxRuntimeError("UNAVAILABLE: no answer")
    with pytest.raises(jax.errors.JaxRuntimeError, match="no answer"):
        main.main(["main", *TINY, f"--workdir={tmp_path / 'run'}"], [RaiseBeforeTraining(error)])


def test_full_disk_keeps_the_earlier_checkpoint(answer, run, monkeypatch):
    """Raises the error of orbax; the previous checkpoint stays unchanged."""

    def full(*_, **__):
        raise ValueError(
            'RESOURCE_EXHAUSTED: Error writing "params/0" in OCDBT database at local file "x":\n Failed writing: "x/1":'
            " Failed to write 40501 bytes to file 14: No space left on device [os_error_code='28'] [locations='a.cc']"
        )

    shutil.rmtree(run / "checkpoints" / "0_train" / "2")
    before = tree(run / "checkpoints")
    monkeypatch.setattr(ocp.CheckpointManager, "save", full)
    printed = answer(*TINY)
    assert re.search(r"cannot be written to \S*0_train \(No space left on device\)\. .* goes on from the last", printed)
    assert tree(run / "checkpoints") == before


def test_full_disk_is_reported_in_one_line(answer, hooks, tmp_path):
    (tmp_path / "run").mkdir()
    hooks.append(RaiseBeforeTraining(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.jsonl")))
    assert "metrics.jsonl: No space left on device. Nothing is half written" in answer(*TINY)


def test_loss_that_is_not_finite_ends_the_run_with_advice(answer, tmp_path):
    (tmp_path / "run").mkdir()
    printed = answer(*TINY, "--config.optim.epochs=30", "--config.optim.learning_rate=1e10")
    assert re.search(r"train/\w+ is (nan|inf) in the steps before step \d+\. The last good .* is step \d", printed)
    assert "a smaller config.optim.learning_rate" in printed


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_git_lfs_pointer_instead_of_a_checkpoint_is_reported(answer, run, mode):
    """The working directory was cloned without its large files."""
    for path in (run / "checkpoints").rglob("*"):
        if path.is_file() and path.suffix != ".json":
            path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n")
    assert "is a Git LFS pointer in place of the file: fetch it with git lfs pull" in answer(*TINY, f"--mode={mode}")


def test_git_lfs_pointer_instead_of_a_config_is_reported(answer, run):
    (run / "config.json").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n")
    assert "config.json is damaged (it is a Git LFS pointer in place of the file" in answer(*TINY)

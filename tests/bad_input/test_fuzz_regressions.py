"""Inputs found by random search that once gave a traceback, an unclear line, or did not end."""

import json
import os
import re
import subprocess
import sys
import zipfile
from collections import namedtuple

import numpy as np
import pytest
from PIL import Image

from lt_adv import main
from lt_adv.data import cache, load
from lt_adv.evaluation import plots, records
from lt_adv.training.checksums import validate_metadata
from tests.bad_input.conftest import DIGITS, ROOT
from tests.bad_input.test_resume import TINY


@pytest.mark.parametrize("entry", ["config.init_from", "config.eval.baseline", "workdir"])
@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("a\0b", r"'a\\x00b' is not a valid path: it contains a NUL byte"),
        ("a\udcff", r"'a\\udcff' is not a valid path: it is not UTF-8"),
        ("http://x/y", r"'http://x/y' is not a valid path: http:// is not supported; buckets are gs://"),
    ],
)
def test_invalid_path_is_refused(answer, entry, path, line):
    assert re.search(f"{entry} {line}", answer(DIGITS, f"--{entry}={path}"))


def test_rich_markup_in_a_name_is_printed_as_it_is(no_training, tmp_path, capsys):
    assert main.main(["main", DIGITS, f"--workdir={tmp_path}/[/b]"], no_training) == 0
    assert "[/b]" in capsys.readouterr().out


def test_uncreatable_path_leaves_no_folder(answer, tmp_path):
    assert "cannot be written" in answer(DIGITS, f"--workdir={tmp_path}/new/{'x' * 300}")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("entry", ["eval.dtype", "model.dtype", "attack.dtype", "optim.schedule"])
def test_list_instead_of_a_name_is_refused(answer, tmp_path, entry):
    (tmp_path / "mine.py").write_text(
        "from configs import at\ndef get_config(arg=None):\n    c = at.get_config(arg)\n"
        f"    with c.ignore_type():\n        c.update_from_flattened_dict({{{entry!r}: ['float32']}})\n    return c\n"
    )
    line = answer(f"--config={tmp_path}/mine.py:dataset=digits")
    assert re.search(r"Unknown [\w. ]*(dtype|schedule) \['float32'\]\. ", line)


@pytest.mark.parametrize("version", ["'best'", "5"])
def test_autoattack_version_must_be_known(answer, version):
    """The version for randomised networks is not supported."""
    spec = f"{{'a':{{'attack':'autoattack','eps':0.1,'version':{version}}}}}"
    line = answer(DIGITS, f"--config.eval.attacks={spec}")
    assert re.search(rf"Unknown version of autoattack {version}\. .*There are: plus, standard\.", line)


def test_images_larger_than_memory_are_refused(answer, no_training, monkeypatch):
    assert "config.data.image_size must be a whole number in [1, 8192]" in answer(
        DIGITS, "--config.data.image_size=9999"
    )
    monkeypatch.setattr(os, "sysconf", lambda name: 1 << 16)  # page size and number of pages: 4 GiB
    printed = answer(DIGITS, "--config.data.image_size=2000")
    assert "config.data.image_size 2000 needs 4 GiB for the images, but this machine has 4 GiB of memory" in printed


@pytest.fixture
def folder(tmp_path):
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "images" / split / name / "0.png")
    return tmp_path / "images"


def read(folder):
    return load({"name": "image_folder", "path": str(folder), "data_dir": str(folder.parent)})


def test_named_pipe_does_not_block(folder):
    os.mkfifo(folder / "train" / "cat" / "1.png")
    with pytest.raises(ValueError, match=r"cat/1\.png is not a regular file"):
        read(folder)


def test_class_name_must_be_utf8(folder):
    for split in ("train", "test"):
        (folder / split / "cat").rename(os.fsdecode(os.fsencode(folder / split) + b"/\xff"))
    with pytest.raises(ValueError, match=r"class name '\\udcff' is not UTF-8"):
        read(folder)


def test_cache_checks_free_space_before_writing(folder, monkeypatch):
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(free=100))
    with pytest.raises(ValueError, match="Cannot write the cache .*No space left on device"):
        read(folder)
    assert not list((folder.parent / "lt_adv_cache").iterdir())


def test_npz_member_must_be_an_array(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as file:
        for name in ("train_image", "train_label", "test_image", "test_label"):
            file.writestr(f"{name}.npy", b"no array")
    with pytest.raises(ValueError, match=r"a\.npz: train_image is not an array"):
        load({"name": "npz", "path": str(tmp_path / "a.npz"), "data_dir": str(tmp_path)})


def test_unreadable_metric_lines_are_skipped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    unreadable = b'{"step": []}\n{"step": 1, "epoch": "x"}\n{"step": 1, "stage": {}}\n{"step": NaN}\n'
    path.write_bytes(unreadable + b'{"step": 1}\n\xff{"step": 2}\n' + b"[" * 100_000 + b'\n{"step": 3}\n')
    assert [row["step"] for row in plots.read_metrics(path)] == [1, 3]


BAD_PREDICTIONS = [
    (np.array([0, 1, 2]), "classes that do not exist"),
    (np.array([0, -2, 1]), "classes that do not exist"),  # -1: logits that were not finite
    (np.array([[0], [1], [0]]), r"holds int64 \(3, 1\)"),
    (np.array([0.0, 1.0, 1.0]), "holds float64"),
]


@pytest.mark.parametrize(("column", "line"), BAD_PREDICTIONS)
def test_invalid_predictions_are_refused(tmp_path, column, line):
    records.write_header(tmp_path, {"class_names": ["a", "b"], "images": 3})
    columns = {"index": np.arange(3), "label": np.array([0, 1, 1])}
    records.write_batch(tmp_path, 0, {**columns, "clean": np.array([0, 1, 1]), "attack/pgd": column})
    with pytest.raises(ValueError, match=rf"batch-00000\.npz.*{line}"):
        records.read_batch(tmp_path, 0)
    records.write_column(tmp_path, "autoattack", column)
    with pytest.raises(ValueError, match=rf"column-autoattack\.npz.*{line}"):
        records.read_column(tmp_path, "autoattack")


def test_column_with_too_few_predictions_is_refused(tmp_path):
    records.write_header(tmp_path, {"class_names": ["a", "b"], "images": 3})
    records.write_column(tmp_path, "autoattack", np.array([0, 1]))
    with pytest.raises(ValueError, match="where predictions should be"):
        records.read_column(tmp_path, "autoattack")


@pytest.mark.parametrize("content", [b"[" * 100_000, b"\xff", b"{"])
def test_invalid_json_is_refused_as_damaged(answer, tmp_path, content):
    (tmp_path / "run").mkdir()
    for name in ("run/config.json", "header.json"):
        (tmp_path / name).write_bytes(content)
    assert "config.json is damaged" in answer(DIGITS)
    with pytest.raises(ValueError, match=r"header\.json is damaged"):
        records.read_header(tmp_path)


def test_checkpoint_metadata_is_checked():
    meta = {"step": 1, "total_steps": 2, "stage": "0_train", "seconds": 0.5, "class_counts": [1, 2], "digest": {}}
    assert validate_metadata(meta) is meta and validate_metadata({**meta, "stages": 1})
    for other in ([], None, 3):
        with pytest.raises(ValueError, match="its metadata are not a dict"):
            validate_metadata(other)
    changes = {"step": "1", "total_steps": None, "stage": [], "class_counts": 3, "digest": "", "seconds": float("nan")}
    for name, value in {**changes, "stages": "1"}.items():
        with pytest.raises(ValueError, match=name):
            validate_metadata(json.loads(json.dumps({**meta, name: value})))


@pytest.mark.slow
def test_damaged_checkpoint_gives_one_line(tmp_path):
    """Runs a process: pending reads printed tracebacks from threads, which no fixture captures."""
    command = [sys.executable, "-m", "lt_adv.main", *TINY, f"--workdir={tmp_path / 'run'}"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0
    for file in (tmp_path / "run" / "checkpoints" / "0_train" / "2" / "state" / "d").iterdir():
        os.truncate(file, 10)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and re.fullmatch(
        r"WARNING: checkpoint 2 in .* going on from checkpoint 1\.\n", done.stderr
    )

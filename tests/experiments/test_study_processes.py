"""Several processes that run one study in shared folders: locks, kills, and the list of runs."""

import contextlib
import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from experiments.study import jobs, locks
from experiments.study.__main__ import main, parse
from tests.experiments.conftest import ROOT

ROWS = ("at", "robal", "reat")


@pytest.fixture
def start(tmp_path):
    """Returns `start()` -> a process of the study, whose runs are those of fake_main.py."""
    interpreter = tmp_path / "python"
    script = ROOT / "tests" / "experiments" / "fake_main.py"
    interpreter.write_text(f'#!/bin/sh\nexec {sys.executable} {script} {tmp_path} "$@"\n')
    interpreter.chmod(interpreter.stat().st_mode | stat.S_IXUSR)
    os.mkfifo(tmp_path / "events")
    code = "import sys\nfrom experiments.study import __main__ as study\nstudy.draw = lambda *_: None\n"
    code += "sys.executable = sys.argv[1]\nsys.exit(study.main(sys.argv[2:]))"
    processes = []

    def call():
        command = [sys.executable, "-c", code, str(interpreter), *arguments(tmp_path)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        output = (tmp_path / f"output-{len(processes)}").open("w")
        processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output))
        return processes[-1]

    yield call
    for process in processes:
        process.kill()
        process.wait()


def arguments(folder):
    common = ["--dataset=digits", "--scales=none", f"--workdirs={folder}/runs", f"--out={folder}", "--name=s"]
    return [f"--rows={','.join(ROWS)}", *common]


def children(process):
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def started(folder):
    """Waits for the next run that starts; returns its working directory."""
    return (folder / "events").read_text().strip()


@pytest.mark.parametrize("kill_the_run", [True, False], ids=["run_killed", "run_goes_on"])
def test_a_killed_process_is_replaced_and_every_row_trained_once(start, tmp_path, kill_the_run):
    os.mkfifo(tmp_path / "gate-robal-seed0")
    first = start()
    assert started(tmp_path) == "at-seed0" and started(tmp_path) == "robal-seed0"  # which waits at its gate
    second = start()
    assert started(tmp_path) == "reat-seed0", "the row that is neither done nor locked"
    (orphan,) = children(first)
    first.kill()
    first.wait()
    assert locks.holder(tmp_path / "runs", "robal-seed0") is not None, "the run holds the lock"
    if kill_the_run:
        os.kill(orphan, signal.SIGKILL)
        assert started(tmp_path) == "robal-seed0", "taken over"
        (tmp_path / "gate-robal-seed0").write_text("go")
    else:
        (tmp_path / "gate-robal-seed0").write_text("go")
        assert started(tmp_path) == "robal-seed0", "of which only the evaluation is left"
    assert second.wait() == 0, (tmp_path / "output-1").read_text()
    assert sorted((tmp_path / "trained").read_text().split()) == sorted(f"{row}-seed0" for row in ROWS)
    assert {path.name for path in (tmp_path / "s").glob("*.json")} == {
        "table.json", *(f"{row}-seed0-full.json" for row in ROWS)
    }  # fmt: skip


def test_two_processes_divide_the_rows(start, tmp_path):
    (tmp_path / "events").unlink()
    processes = [start(), start()]
    assert [process.wait() for process in processes] == [0, 0]
    assert sorted((tmp_path / "trained").read_text().split()) == sorted(f"{row}-seed0" for row in ROWS)


def test_a_failure_of_another_process_is_not_tried_again(study, monkeypatch, tmp_path):
    """One from before the start is."""
    assert study("--rows=at,robal", fails={"robal": (2, "Error: too many")})[0] == 1
    options = parse(["--rows=at,robal,tuned", *arguments(tmp_path)[1:]])
    tried = []

    def run_job(study, job, descriptor):
        tried.append(job.row)
        jobs.failure_path(study, jobs.Job("tuned", 0, "full")).write_text("another process ran out of memory\n")
        return "too many again"

    monkeypatch.setattr(jobs, "run_job", run_job)
    assert [job.row for job, _ in jobs.run(options)] == tried == ["robal"]


def test_locks_exclude_each_other_and_end(tmp_path):
    with locks.lock(tmp_path, "at-seed0", "at-seed0-full") as first:
        assert first is not None
        with locks.lock(tmp_path, "at-seed0", "at-seed0-full") as second:
            assert second is None
        with locks.lock(tmp_path, "at-seed1", "at-seed1-full") as other:
            assert other is not None
        holder = locks.holder(tmp_path, "at-seed0")
        assert holder["process"] == os.getpid() and holder["job"] == "at-seed0-full"
    assert locks.holder(tmp_path, "at-seed0") is None and locks.holder(tmp_path, "never") is None
    with locks.lock(tmp_path, "at-seed0", "at-seed0-full") as again:
        assert again is not None
    locks.wait_for_any(tmp_path, ["at-seed0"])


def test_waiting_ends_with_the_first_of_several_locks(tmp_path):
    names = ["at-seed0", "robal-seed0", "reat-seed0"]
    ended = threading.Event()

    def wait():
        locks.wait_for_any(tmp_path, names)
        ended.set()

    with contextlib.ExitStack() as first_and_last, locks.lock(tmp_path, names[1], "robal-seed0-full"):
        for name in (names[0], names[2]):
            first_and_last.enter_context(locks.lock(tmp_path, name, f"{name}-full"))
        thread = threading.Thread(target=wait)
        thread.start()
        assert not ended.wait(0.05)
        first_and_last.close()
        thread.join(60)
        assert ended.is_set() and locks.holder(tmp_path, names[1])
    for held in range(3):  # whichever of them is free, also the last
        with contextlib.ExitStack() as others:
            for name in names[:held] + names[held + 1 :]:
                others.enter_context(locks.lock(tmp_path, name, f"{name}-full"))
            locks.wait_for_any(tmp_path, names)


def test_list_of_runs(study, capsys, tmp_path):
    study("--rows=at,robal", fails={"robal": (2, "Error: too many")})
    capsys.readouterr()
    with locks.lock(tmp_path / "runs", "tuned-seed0", "tuned-seed0-full"):
        assert study("--rows=at,robal,tuned,tuned_twice", "--list")[1].commands == []
    *lines, total = capsys.readouterr().out.splitlines()
    assert lines[0] == "done     at-seed0-full"
    assert lines[1] == "failed   robal-seed0-full (too many)"
    assert lines[2].startswith("running  tuned-seed0-full (") and f"process {os.getpid()}" in lines[2]
    assert lines[3] == "to do    tuned_twice-seed0-full"
    assert total == "1 done, 1 running, 1 failed, 1 to do."


def test_list_needs_no_folder(tmp_path, capsys):
    assert main([*arguments(tmp_path / "missing"), "--list"]) == 0
    assert capsys.readouterr().out.endswith("0 done, 0 running, 0 failed, 3 to do.\n")
    assert not (tmp_path / "missing").exists()

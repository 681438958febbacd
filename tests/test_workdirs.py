"""A working directory belongs to one config, and to one process at a time."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from etils import epath

from configs import at
from lt_adv import main
from lt_adv.cli import evaluate, networks, workdirs
from lt_adv.runtime import distributed
from tests.bad_input.conftest import DIGITS, RaiseBeforeTraining

ROOT = Path(__file__).parents[1]
LOCK_WORKDIR = """
import sys, time
from lt_adv.cli import workdirs
with workdirs.locked(sys.argv[1]):
    print(flush=True)
    time.sleep(60)
"""


@pytest.fixture
def locking_process(tmp_path):
    """A process that has locked the working directory `tmp_path / "run"`."""
    (tmp_path / "run").mkdir()
    command = [sys.executable, "-c", LOCK_WORKDIR, str(tmp_path / "run")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"\n"
        yield process
        process.kill()


def test_a_second_process_is_refused_until_the_first_is_killed(locking_process, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    command = ["main", DIGITS, f"--workdir={tmp_path / 'run'}"]
    assert main.main(command) == 2
    printed = capsys.readouterr().err
    assert printed == f"Error: Another process uses {tmp_path / 'run'}: wait until it ends, or use another --workdir.\n"
    assert [path.name for path in (tmp_path / "run").iterdir()] == [workdirs.LOCK]
    locking_process.kill()
    locking_process.wait()
    with pytest.raises(SystemExit, match="trains"):
        main.main(command, [RaiseBeforeTraining(SystemExit("trains"))])


def test_evaluation_of_a_locked_run_is_refused(locking_process, tmp_path, monkeypatch):
    monkeypatch.setattr(networks, "load", lambda *_: None)
    with pytest.raises(ValueError, match="Another process uses"):
        evaluate.evaluate(at.get_config("dataset=digits"), epath.Path(tmp_path / "run"))


def test_partial_writes_of_a_killed_process_are_removed(tmp_path):
    for name in ("eval/.batch.npz.7.tmp", "reports/x/.export.7.tmp/network", "reports/x/.export.7.old/network"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "eval" / "batch.npz").write_text("complete")
    with workdirs.locked(tmp_path):
        files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert files == [workdirs.LOCK, "eval/batch.npz", "reports/x/export/network"]  # the old export is restored
    assert (tmp_path / files[-1]).read_text() == "reports/x/.export.7.old/network"


def test_other_processes_of_a_run_and_buckets_take_no_lock(tmp_path, monkeypatch):
    with workdirs.locked("gs://bucket/run"):
        pass
    monkeypatch.setattr(distributed, "is_primary", lambda: False)
    with workdirs.locked(tmp_path), workdirs.locked(tmp_path):
        assert not list(tmp_path.iterdir())


WAIT_BEFORE_TRAINING = """
import sys, time
from lt_adv import main
from lt_adv.training.hooks import Hook

class Wait(Hook):
    def on_train_start(self, stages):
        print("waiting", flush=True)
        time.sleep(60)

sys.exit(main.main(hooks=[Wait()]))
"""


def test_sigterm_outside_of_training_exits_with_code_0(tmp_path):
    command = [sys.executable, "-c", WAIT_BEFORE_TRAINING, DIGITS, f"--workdir={tmp_path / 'run'}"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert any(line == "waiting\n" for line in process.stdout)
        start = time.monotonic()
        process.send_signal(signal.SIGTERM)
        printed, _ = process.communicate()
    assert process.returncode == 0 and time.monotonic() - start < 30
    assert printed == "SIGTERM: the same command resumes from the last checkpoint or record.\n"

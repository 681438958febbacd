"""Stages through the real loop: a teacher, its student, and a start from another run."""

import dataclasses
import json
import shutil
import sys
import threading
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from configs import at
from lt_adv import data, losses
from lt_adv.cli.experiment import Experiment
from lt_adv.methods import base
from lt_adv.training import checkpoint, loop, sharding, stage_builder
from lt_adv.training.checkpoint import read_variables
from lt_adv.training.hooks import Hook

pytestmark = pytest.mark.slow


@dataclasses.dataclass(frozen=True)
class Distil(base.Method):
    num_steps: int = 0

    def loss(self, key, net, batch, x_adv, method_state, progress):
        logits, _ = net(x_adv, train=True)
        value = jnp.mean(losses.cross_entropy(logits, batch.label))
        metrics = {}
        if net.teacher is not None:
            metrics["divergence"] = losses.kl_divergence(net.teacher(batch.image)[0], logits)
            value += jnp.mean(metrics["divergence"])
        return base.LossOutput(value, logits, metrics)


class RecordPrograms(Hook):
    def __init__(self):
        self.trained = []

    def on_stage_start(self, stage, state):
        self.trained.append(stage)


@pytest.fixture(scope="module")
def config():
    config = at.get_config("dataset=digits,epochs=2")
    config.log.clean_per_class = 2
    config.checkpoint.every_epochs = 1
    return config


@pytest.fixture(scope="module")
def run(config):
    """Returns `start(stages, workdir)`, which trains on one device and returns the programs of the trained stages."""
    common = {"dataset": data.load(config.data), "mesh": sharding.make_mesh(jax.devices()[:1])}

    def start(stages, workdir, hooks=(), **changes):
        experiment, programs = Experiment.from_config(config, stages=stages, **(common | changes)), RecordPrograms()
        loop.train(experiment.resolved_stages, epath.Path(workdir), experiment.mesh, [programs, *hooks])
        return programs.trained

    return start


@pytest.fixture(scope="module")
def teacher_and_student(run, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("stages")
    balanced = {"data.imbalance": "none", "data.class_counts": (24,) * 10}
    stages = (
        base.Stage(method=Distil(), epochs=1, name="teacher", overrides=balanced),
        base.Stage(method=Distil(), epochs=2, name="student", teacher="previous"),
    )
    return workdir, stages, run(stages, workdir)


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_the_frozen_teacher_is_the_last_state_of_the_first_stage(teacher_and_student):
    workdir, _, (teacher, student) = teacher_and_student
    assert teacher.info.class_counts.tolist() == [24] * 10 and student.info.class_counts.tolist()[-1] == 12
    assert sorted(d.name for d in (workdir / "checkpoints").iterdir()) == ["0_teacher", "1_student"]
    saved = workdir / "teacher"  # has only the checkpoints of the teacher
    (saved / "checkpoints").mkdir(parents=True)
    (saved / "checkpoints" / "0_teacher").symlink_to(workdir / "checkpoints" / "0_teacher")
    kernel = read_variables(saved)[0]["params"]["head"]["kernel"]
    np.testing.assert_array_equal(kernel, student.teacher["params"]["head"]["kernel"])
    stages = [row["stage"] for row in rows(workdir)]
    assert stages == ["0_teacher"] * stages.count("0_teacher") + ["1_student"] * stages.count("1_student")
    assert all(("train/divergence" in row) == (row["stage"] == "1_student") for row in rows(workdir))


def test_a_finished_run_is_not_trained_again(run, teacher_and_student):
    workdir, stages, _ = teacher_and_student
    before = (workdir / "metrics.jsonl").read_text()
    assert run(stages, workdir) == [] and (workdir / "metrics.jsonl").read_text() == before


def test_resume_in_the_second_stage_keeps_the_metrics_of_both(run, teacher_and_student, tmp_path, capsys):
    workdir, stages, _ = teacher_and_student
    again = tmp_path / "again"
    shutil.copytree(workdir, again)
    last = max((again / "checkpoints" / "1_student").iterdir(), key=lambda d: int(d.name))
    shutil.rmtree(last)
    run(stages, again)
    assert "Resumed 1_student" in capsys.readouterr().out
    assert (again / "metrics.jsonl").read_text() == (workdir / "metrics.jsonl").read_text()


def test_other_images_are_refused(run, config, teacher_and_student, tmp_path):
    workdir, stages, _ = teacher_and_student
    again = tmp_path / "again"
    shutil.copytree(workdir, again)
    with pytest.raises(ValueError, match="was trained on other images"):
        run(stages, again, dataset=dataclasses.replace(data.load(config.data), digest="other"))


def test_a_frozen_backbone_of_another_run_stays_constant(run, teacher_and_student, tmp_path):
    source, _, _ = teacher_and_student
    frozen = base.Stage(
        method=Distil(), epochs=1, init=str(source), freeze="backbone/", freeze_batch_stats=True, name="tuned"
    )
    run((frozen,), tmp_path)
    before, after = read_variables(source)[0], read_variables(tmp_path)[0]
    for name in ("params", "batch_stats"):
        jax.tree.map(np.testing.assert_array_equal, before[name]["backbone"], after[name]["backbone"])
    assert np.abs(before["params"]["head"]["kernel"] - after["params"]["head"]["kernel"]).max() > 1e-3


def test_results_do_not_depend_on_the_default_prng(run, tmp_path):
    """JAX_DEFAULT_PRNG_IMPL=rbg in the environment: the same run, bit for bit."""
    stage = base.Stage(method=Distil(), epochs=1, init="fresh")
    run((stage,), tmp_path / "threefry")
    with jax.default_prng_impl("rbg"):
        run((stage,), tmp_path / "rbg")
    one, other = (metrics_of(tmp_path / name) for name in ("threefry", "rbg"))
    assert one == other and one[0]["step"] == 7


def metrics_of(workdir):
    """The lines of metrics.jsonl, without times."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if "second" not in k and "time" not in k} for row in rows]


def test_tensorboard_gets_the_logged_metrics(run, config, teacher_and_student, tmp_path, monkeypatch):
    """The writer is tensorboardX's; here it is a list. Without the package: one line that names the extra."""
    scalars, teacher = [], teacher_and_student[1][0]

    class SummaryWriter:
        def __init__(self, folder):
            assert folder == str(tmp_path / "tensorboard")

        def add_scalar(self, *scalar):
            scalars.append(scalar)

        def flush(self):
            pass

    monkeypatch.setitem(sys.modules, "tensorboardX", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    monkeypatch.setitem(config.log, "tensorboard", True)
    run((teacher,), tmp_path)
    row = rows(tmp_path)[-1]
    assert ("0_teacher/train/loss", row["train/loss"], row["step"]) in scalars
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[tensorboard\]'"):
        run((teacher,), tmp_path / "again")


def test_merge_reports_names_and_shapes_that_differ(caplog):
    fresh = {"params": {"a": np.zeros(2, np.float32), "new": np.ones(1, np.float32)}}
    merged = stage_builder.merge(fresh, {"params": {"a": np.full(2, 7.0), "old": np.zeros(3)}}, "elsewhere")
    assert merged["params"]["a"].tolist() == [7, 7] and merged["params"]["new"].tolist() == [1]
    assert "elsewhere: new: params/new" in caplog.text and "elsewhere: unused: params/old" in caplog.text
    with pytest.raises(ValueError, match="params/a has shape"):
        stage_builder.merge(fresh, {"params": {"a": np.zeros(3)}}, "elsewhere")
    with pytest.raises(ValueError, match="none of its arrays"):
        stage_builder.merge(fresh, {"params": {"b": np.zeros(3)}}, "elsewhere")


class RecordCalls(Hook):
    def __init__(self, calls):
        self._calls = calls

    def on_train_start(self, stages):
        self._calls.append(("train", [stage.name for stage in stages]))

    def on_stage_start(self, stage, state):
        self._calls.append(("start", stage.name, int(state.step)))

    def on_step(self, stage, state):
        self._calls.append(("step", stage.name, int(state.step)))

    def on_log(self, event):
        event.metrics["added"] = 1.0  # after LogHook has written metrics.jsonl
        self._calls.append(("log", event.step, event.epoch, event.epoch_ended, event.is_last_step))

    def on_stage_end(self, stage, state):
        self._calls.append(("end", stage.name, int(state.step)))


def test_hooks_are_called_in_order(run, tmp_path):
    """Seven steps an epoch; the metrics are fetched at its end."""
    calls = []
    run((base.Stage(method=Distil(), epochs=1),), tmp_path, [RecordCalls(calls)])
    steps = [("step", "0_train", n) for n in range(7)]
    assert calls[:-2] == [("train", ["0_train"]), ("start", "0_train", 0), *steps]
    assert calls[-2:] == [("log", 7, 1, True, True), ("end", "0_train", 7)]
    (row,) = rows(tmp_path)
    assert row["step"] == 7 and "added" not in row and row["train/clean/accuracy"] >= 0


class FailInSecondEpoch(Hook):
    """Raises while the checkpoint of the first epoch waits for `failed`."""

    def __init__(self, failed):
        self._failed = failed

    def on_step(self, stage, state):
        if int(state.step) == 8:
            self._failed.set()
            raise RuntimeError("of a hook")


def test_an_exception_of_a_hook_ends_the_run_and_loses_nothing(run, tmp_path, monkeypatch):
    """The checkpoint of the first epoch, still being written, is on disk when the run ends; the next one resumes."""
    failed, publish = threading.Event(), checkpoint._publish

    def publish_after_the_failure(written, final):
        assert failed.wait(60)
        time.sleep(0.2)  # a run that does not wait has ended by now
        publish(written, final)

    monkeypatch.setattr(checkpoint, "_publish", publish_after_the_failure)
    stage, calls = base.Stage(method=Distil(), epochs=2), []
    with pytest.raises(RuntimeError, match="of a hook"):
        run((stage,), tmp_path, [FailInSecondEpoch(failed)])
    assert [path.name for path in (tmp_path / "checkpoints" / "0_train").iterdir()] == ["7"]
    run((stage,), tmp_path, [RecordCalls(calls)])
    assert calls[1] == ("start", "0_train", 7) and [row["step"] for row in rows(tmp_path)] == [7, 14]


def test_an_exception_of_a_hook_is_raised_though_the_checkpoint_fails_too(run, tmp_path, monkeypatch):
    failed = threading.Event()

    def full_disk(written, final):
        assert failed.wait(60)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_publish", full_disk)
    with pytest.raises(RuntimeError, match="of a hook"):
        run((base.Stage(method=Distil(), epochs=2),), tmp_path, [FailInSecondEpoch(failed)])

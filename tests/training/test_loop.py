"""Stages through the real loop: a teacher, its student, and a start from another run."""

import dataclasses
import json
import shutil
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from configs import at
from lt_adv import data, losses
from lt_adv.methods import base
from lt_adv.training import loop, sharding, stage_builder
from lt_adv.training.checkpoint import read_variables

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


@pytest.fixture(scope="module")
def config():
    config = at.get_config("dataset=digits,epochs=2")
    config.log.clean_per_class = 2
    config.checkpoint.every_epochs = 1
    return config


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    """start(stages, workdir) -> the programs that were built; one device."""
    patch, dataset = pytest.MonkeyPatch(), data.load(config.data)
    mesh, build = sharding.make_mesh(jax.devices()[:1]), stage_builder.build

    def start(stages, workdir):
        built = []
        patch.setattr(stage_builder, "stages", lambda _: stages)
        patch.setattr(stage_builder, "build", lambda *args: built.append(build(*args)) or built[-1])
        loop.train(config, epath.Path(workdir), dataset, mesh)
        return built

    yield start
    patch.undo()


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


def test_two_stages_and_the_frozen_teacher(teacher_and_student):
    workdir, _, (teacher, student) = teacher_and_student
    assert teacher.info.class_counts.tolist() == [24] * 10 and student.info.class_counts.tolist()[-1] == 12
    assert sorted(d.name for d in (workdir / "checkpoints").iterdir()) == ["0_teacher", "1_student"]
    saved = workdir / "only"  # the teacher's last checkpoint alone
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
    built = run(stages, workdir)
    assert len(built) == 2 and (workdir / "metrics.jsonl").read_text() == before


def test_resume_in_the_second_stage_keeps_the_metrics_of_both(run, teacher_and_student, tmp_path, capsys):
    workdir, stages, _ = teacher_and_student
    again = tmp_path / "again"
    shutil.copytree(workdir, again)
    last = max((again / "checkpoints" / "1_student").iterdir(), key=lambda d: int(d.name))
    shutil.rmtree(last)
    run(stages, again)
    assert "Resumed 1_student" in capsys.readouterr().out
    assert (again / "metrics.jsonl").read_text() == (workdir / "metrics.jsonl").read_text()


def test_other_images_are_refused(run, teacher_and_student, tmp_path, monkeypatch):
    workdir, stages, _ = teacher_and_student
    again = tmp_path / "again"
    shutil.copytree(workdir, again)
    long_tailed = data.long_tailed
    monkeypatch.setattr(data, "long_tailed", lambda *args: dataclasses.replace(long_tailed(*args), digest="other"))
    with pytest.raises(ValueError, match="was trained on other images"):
        run(stages, again)


def test_start_from_another_run_with_a_frozen_backbone(run, teacher_and_student, tmp_path):
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
    monkeypatch.setattr(config.log, "tensorboard", True)
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

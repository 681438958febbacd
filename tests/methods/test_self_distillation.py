"""Self-distillation: the balanced set, the terms of the loss of the student, and resuming its two stages."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from configs import self_distillation
from lt_adv import data
from lt_adv.cli.experiment import Experiment
from lt_adv.methods.at_bsl import ATBSL
from lt_adv.methods.self_distillation import SelfDistillation
from lt_adv.training import loop, sharding
from lt_adv.training.checkpoint import read_variables
from tests.training.helpers import Small, assert_same, frozen_teacher, run


def test_without_the_teacher_it_is_at_bsl(float64):
    expected, _ = run(ATBSL(num_steps=1), 1, steps=3)
    for options, teacher in (({}, None), ({"distillation": 0.0, "matching": 0.0}, frozen_teacher())):
        state, _ = run(SelfDistillation(num_steps=1, start="gaussian", **options), 1, steps=3, teacher=teacher)
        assert_same((state.params, state.batch_stats), (expected.params, expected.batch_stats), 1e-12)


def test_terms_of_the_loss(float64):
    """Each against its equation, on the images of one step; four devices."""

    class Spy(SelfDistillation):
        def init_state(self, info):
            return {"x": jnp.zeros((16, 6, 6, 1), float), "x_adv": jnp.zeros((16, 6, 6, 1), float)}

        def loss(self, key, net, batch, x_adv, method_state, progress):
            out = super().loss(key, net, batch, x_adv, method_state, progress)
            return out._replace(method_state=net.gather({"x": batch.image, "x_adv": x_adv}))

    options = {"distillation": 2.0, "temperature": 3.0, "matching": 0.7}
    rows, images = {}, {}
    for teacher_input in ("adversarial", "clean"):
        method = Spy(num_steps=1, teacher_input=teacher_input, **options)
        state, (rows[teacher_input],) = run(method, 4, steps=1, teacher=frozen_teacher())
        images[teacher_input] = state.method_state
    x, x_adv = images["clean"]["x"], images["clean"]["x_adv"]
    first = jax.device_get(run(method, 1, steps=0, teacher=frozen_teacher())[0])
    model = Small(axis_name=None)

    def student(image):
        variables = {"params": first.params, "batch_stats": first.batch_stats}
        return model.apply(variables, image, train=True, mutable=["batch_stats"])[0][0]

    def teacher(image):
        return model.apply(frozen_teacher(), image, train=False)[0]

    def divergence(p_logits, q_logits):
        p, q = jax.nn.softmax(p_logits), jax.nn.softmax(q_logits)
        return float(jnp.mean(jnp.sum(p * jnp.log(p / q), -1)))

    for teacher_input, image in (("adversarial", x_adv), ("clean", x)):
        row = rows[teacher_input]
        taught = 9 * divergence(teacher(image) / 3, student(x_adv) / 3)
        mirrored = 2 * x - x_adv
        matched = divergence(teacher(x_adv) - teacher(mirrored), student(x_adv) - student(mirrored))
        assert row["loss_distillation"] == pytest.approx(taught, rel=1e-9)
        assert row["loss_matching"] == pytest.approx(matched, rel=1e-9)
        assert row["loss"] == pytest.approx(row["loss_balanced"] + 2 * taught + 0.7 * matched, rel=1e-9)
    assert rows["clean"]["loss_distillation"] != pytest.approx(rows["adversarial"]["loss_distillation"], rel=1e-3)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"teacher_input": "noisy"}, "teacher_input 'noisy'. There are: adversarial, clean."),
        ({"teacher_epochs": 0}, r"teacher_epochs must be a whole number in \[1, inf\), not 0\."),
        ({"teacher_epochs": 1.5}, r"teacher_epochs must be a whole number in \[1, inf\), not 1\.5\."),
        ({"balance": 1.5}, r"balance must be a number in \(0, 1\], not 1\.5\."),
        ({"balance": 0.0}, r"balance must be a number in \(0, 1\], not 0\.0\."),
        ({"temperature": 0.0}, r"temperature must be a number in \(0, inf\), not 0\.0\."),
    ],
)
def test_bad_values_are_one_line(options, line):
    with pytest.raises(ValueError, match=line) as caught:
        SelfDistillation(**options)
    assert "\n" not in str(caught.value)


def test_stages():
    config = self_distillation.get_config("dataset=cifar10")
    config.average.start_epoch = 50
    teacher, student = Experiment.from_config(config).stages
    assert (teacher.epochs, student.epochs, student.teacher, student.init) == (30, 100, "previous", "fresh")
    assert teacher.overrides == {
        "data.resample_balanced": 0.5,
        "optim.drop_epochs": (23, 27),
        "average.start_epoch": 15,
    }
    assert not student.overrides and config.optim.drop_epochs == (75, 90)


@pytest.fixture(scope="module")
def config():
    config = self_distillation.get_config("dataset=digits,epochs=1")
    config.method.update(teacher_epochs=2, matching=0.5)
    config.attack.num_steps = 0
    config.log.clean_per_class = 0
    config.checkpoint.every_epochs = 1
    return config


@pytest.fixture(scope="module")
def train(config):
    experiment = Experiment.from_config(config, mesh=sharding.make_mesh(jax.devices()[:1]))
    return lambda workdir: loop.train(experiment.resolved_stages, epath.Path(workdir), experiment.mesh)


@pytest.fixture(scope="module")
def trained(train, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    train(workdir)
    return workdir


def last(folder):
    return max((d for d in folder.iterdir() if d.name.isdigit()), key=lambda d: int(d.name))


def meta(stage):
    return json.loads((last(stage) / "meta" / "metadata").read_text())


@pytest.mark.slow
def test_the_teacher_has_equal_counts_and_the_student_all_images(trained, config):
    teacher, student = (meta(trained / "checkpoints" / name) for name in ("0_teacher", "1_student"))
    counts = data.long_tailed(data.load(config.data), config.data).class_counts
    assert teacher["class_counts"] == [max(counts) // 2] * 10 and student["class_counts"] == list(counts)
    assert student["seconds"] > teacher["seconds"] > 0, "the seconds of a run are those of all its stages"
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert all(("train/loss_matching" in row) == (row["stage"] == "1_student") for row in rows)


@pytest.mark.slow
def test_resume_in_the_first_stage_equals_the_uninterrupted_run(train, trained, tmp_path, capsys):
    again = tmp_path / "again"
    shutil.copytree(trained, again)
    shutil.rmtree(again / "checkpoints" / "1_student")
    shutil.rmtree(last(again / "checkpoints" / "0_teacher"))
    train(again)
    assert "Resumed 0_teacher" in capsys.readouterr().out
    expected, actual = (read_variables(workdir)[0]["params"] for workdir in (trained, again))
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    assert (again / "metrics.jsonl").read_text() == (trained / "metrics.jsonl").read_text()

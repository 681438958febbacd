"""Networks, weights, attack, batches, settings and training of the PyTorch baseline."""

import json

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.experiments import NO_TORCH

torch = pytest.importorskip("torch", reason=NO_TORCH)

from experiments.pytorch_baseline import attack, data, models, train, weights
from lt_adv import evaluation
from lt_adv.cli import evaluate, flags
from lt_adv.data import Split, load, long_tailed
from lt_adv.models import create
from lt_adv.training import checkpoint, optimizer
from tests.experiments.test_pytorch_baseline import make_config, make_trainer
from tests.models import test_backbones
from tests.models.test_backbones import flax_path, golden_variables

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_torch_thread")]

NETWORKS = ({"name": "wide_resnet", "depth": 16, "width": 2}, {"name": "resnet18"}, {"name": "preact_resnet18"})
HEADS = ("linear", "linear_no_bias", "cosine", "cosine_plus")


@pytest.mark.parametrize("name", test_backbones.NETWORKS)
def test_networks_equal_the_released_ones(name, golden, assert_golden):
    """Compares logits in both modes and running statistics with the authors' networks."""
    config, classes, images, batch, averaged = test_backbones.NETWORKS[name]
    reference, (variables, bias) = golden("models"), golden_variables(name)
    network = models.create(config, classes).double()
    network.load_state_dict(weights.to_torch(variables))
    x = torch.from_numpy(reference[images][:batch]).permute(0, 3, 1, 2)
    with torch.no_grad():
        assert_golden(network.eval()(x).numpy() + bias, reference[f"{name}.eval_logits"])
        assert_golden(network.train()(x).numpy() + bias, reference[f"{name}.train_logits"])
    after = flax.traverse_util.flatten_dict(weights.to_flax(network.state_dict()))
    for module in averaged:
        for leaf in ("running_mean", "running_var"):
            path = flax_path(f"{module}.{leaf}", 1)
            assert_golden(after[path], reference[f"{name}.after_train_forward.{module}.{leaf}"])


@pytest.mark.parametrize("head", HEADS)
def test_heads_equal_those_of_lt_adv(head):
    config = {"name": "wide_resnet", "depth": 10, "width": 1, "dtype": "float64", "head": {"name": head}}
    features = np.random.default_rng(0).normal(size=(5, 64))
    features[2] = 0  # a length of zero
    network = models.create(config, 7, channels=1).double()
    with jax.enable_x64(True):
        variables = {"params": weights.to_flax(network.state_dict())["params"]["head"]}
        expected = create(config, 7).head.apply(variables, jnp.asarray(features))
    np.testing.assert_allclose(network.head(torch.from_numpy(features)).detach(), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("config", NETWORKS, ids=lambda c: c["name"])
def test_weights_survive_a_round_trip(config):
    shapes = jax.eval_shape(create(config, 7).init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda a: rng.normal(size=a.shape).astype(np.float32), flax.core.unfreeze(shapes))
    network = models.create(config, 7)
    network.load_state_dict(weights.to_torch(variables))
    jax.tree.map(np.testing.assert_array_equal, weights.to_flax(network.state_dict()), variables)


def test_normalisation_is_refused():
    with pytest.raises(ValueError, match="The PyTorch baseline takes pixels"):
        models.create({**NETWORKS[1], "mean": (0.5,), "std": (0.5,)}, 7)


def test_initial_weights_have_the_distributions_of_lt_adv():
    torch.manual_seed(0)
    wide, residual = (models.create(config, 10).backbone for config in NETWORKS[:2])
    kernel = wide.stage3_block0.conv1.weight  # normal, variance 2 / fan_out
    assert abs(kernel.std().item() / (2 / (9 * 128)) ** 0.5 - 1) < 0.02 and kernel.abs().max() > 3 * kernel.std()
    kernel, bound = residual.stage2_block0.conv1.weight, (9 * 64) ** -0.5  # U(+-1/sqrt(fan_in))
    assert 0.99 * bound < kernel.abs().max() <= bound and abs(kernel.std().item() / (bound / 3**0.5) - 1) < 0.02
    for head in HEADS:
        layer = models.create({**NETWORKS[1], "head": {"name": head}}, 200).head
        for leaf in layer.parameters():
            assert 0.95 * 512**-0.5 < leaf.abs().max() <= 512**-0.5
        assert (getattr(layer, "bias", None) is not None) == (head == "linear")


def test_starting_noise_has_its_distribution():
    x, generator = torch.zeros(50, 3, 8, 8), torch.Generator().manual_seed(0)
    noise = {
        name: attack.starting_noise(x, name, 0.1, generator) for name in ("uniform", "one_sided", "gaussian", "zero")
    }
    assert noise["uniform"].abs().max() <= 0.1 and abs(noise["uniform"].mean()) < 0.002
    assert noise["one_sided"].min() >= 0 and noise["one_sided"].max() <= 0.1
    assert abs(noise["one_sided"].mean() - 0.05) < 0.002 and abs(noise["gaussian"].std() - 0.001) < 5e-5
    assert not noise["zero"].any()
    with pytest.raises(ValueError, match="Unknown start 'sideways'"):
        attack.starting_noise(x, "sideways", 0.1, generator)


def test_pgd_climbs_to_the_corner_of_ball_and_box():
    x = torch.tensor([[0.5, 0.02, 0.99]])
    climb = torch.tensor([[1.0, -1.0, 1.0]])
    x_adv = attack.pgd(lambda z: (z * climb).sum(), x, 0 * x, eps=0.05, step_size=0.02, num_steps=3)
    torch.testing.assert_close(x_adv, torch.tensor([[0.55, 0.0, 1.0]]))
    start = attack.pgd(lambda z: z.sum(), x, x + 1, eps=0.05, step_size=0.02, num_steps=0)
    torch.testing.assert_close(start, torch.tensor([[0.55, 0.07, 1.0]]))


def split(number: int, side: int) -> Split:
    image = np.random.default_rng(0).integers(1, 256, (number, side, side, 2), dtype=np.uint8)
    return Split(image, np.arange(number, dtype=np.int32), np.arange(number))


def test_an_epoch_has_every_image_once_and_drops_the_rest():
    images = split(10, 4)
    batches = data.Batches(images, 3, pad=0, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    epochs = []
    for _ in range(2):
        drawn = [batches.draw() for _ in range(3)]
        label = torch.cat([label for _, label in drawn]).numpy()
        image = torch.cat([image for image, _ in drawn]).permute(0, 2, 3, 1).numpy()
        assert len(set(label)) == 9
        np.testing.assert_array_equal(image, images.image[label] / 255)
        epochs.append(label)
    assert (epochs[0] != epochs[1]).any()


def test_crops_are_crops_of_the_padded_image_and_half_are_mirrored():
    images, pad, side = split(300, 5), 2, 5
    augmented = data.pad_crop_flip(torch.from_numpy(images.image), pad, torch.Generator().manual_seed(0)).numpy()
    padded = np.pad(images.image, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    places = []
    for before, after in zip(padded, augmented, strict=True):
        crops = {
            (row, column, flip): before[row : row + side, column : column + side][:, :: -1 if flip else 1]
            for row in range(2 * pad + 1)
            for column in range(2 * pad + 1)
            for flip in (False, True)
        }
        (place,) = (place for place, crop in crops.items() if np.array_equal(crop, after))
        places.append(place)
    rows, columns, flips = (set(values) for values in zip(*places, strict=True))
    assert rows == columns == set(range(2 * pad + 1)) and flips == {False, True}
    assert 0.4 < np.mean([flip for *_, flip in places]) < 0.6


def test_bfloat16_stays_in_the_backbone():
    config = make_config("robal_n", **{"model.dtype": "bfloat16"})
    trainer, dtypes = make_trainer(config), {}
    conv, head = trainer.model.backbone.stage2_block0.conv2, trainer.model.head
    conv.register_forward_hook(lambda module, inputs, y: dtypes.update(conv=y.dtype))
    head.register_forward_hook(lambda module, inputs, y: dtypes.update(features=inputs[0].dtype, logits=y.dtype))
    loss = trainer.step().item()
    assert dtypes == {"conv": torch.bfloat16, "features": torch.float32, "logits": torch.float32}
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    exact = make_trainer(make_config("robal_n", **{"model.dtype": "float32"})).step().item()
    assert loss != exact and loss == pytest.approx(exact, rel=0.02)
    released = make_trainer(config, "released").step().item()  # float32 whatever the config says
    assert released == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("name", ["robal_n", "trades"])
def test_compiled_step_equals_the_eager_one(name, monkeypatch):
    """Traces without a graph break and differentiates ahead of time; inductor would take a minute."""
    torch_compile, compiled = torch.compile, []

    def compile_quickly(part, **options):
        assert options["fullgraph"]
        compiled.append(part)
        return torch_compile(part, **options, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", compile_quickly)
    config = make_config(name, **{"attack.num_steps": 1})
    eager, trainer = make_trainer(config), make_trainer(config, compiled=True)
    for _ in range(2):
        assert trainer.step().item() == pytest.approx(eager.step().item(), rel=1e-9)
    assert len(compiled) == 3
    torch._dynamo.reset()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["at_bsl", "robal_n", "trades"])
def test_cuda_graph_takes_the_same_steps(name):
    """Takes three eager steps and three of the graph at another learning rate."""
    config = make_config(name, **{"optim.drop_epochs": (2,), "optim.epochs": 2})
    losses = []
    for compiled in (False, True):
        trainer = make_trainer(config, device="cuda", compiled=compiled)
        losses.append([trainer.step().item() for _ in range(6)])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-6)


def test_learning_rate_follows_the_schedule_of_lt_adv():
    config = make_config(
        "at", **{"optim.drop_epochs": (2,), "optim.epochs": 2, "optim.warmup_epochs": 1, "attack.num_steps": 0}
    )
    trainer = make_trainer(config)
    rate = optimizer.schedule(config.optim, trainer.steps_per_epoch, 2)
    for step_number in range(2 * trainer.steps_per_epoch):
        trainer.step()
        assert trainer._optimiser.param_groups[0]["lr"] == pytest.approx(float(rate(step_number)), rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.sampler": "class_aware"}, "config.data.sampler = 'class_aware'"),
        ({"average.name": "ema"}, "config.average.name = 'ema'"),
        ({"model.depth": 11}, "depth of a WideResNet must be 6 n"),
        ({"model.head.name": "lws"}, "linear and cosine heads, not LearnableScale"),
        ({"data.augment": "randaugment"}, "config.data.augment = 'randaugment'"),
        ({"data.augment": "flip"}, "supports only 'none' or 'crop_flip'"),
        ({"addons": ("awp",)}, r"config.addons = \('awp',\)"),
        ({"method.name": "at_ldam"}, "at_ldam"),
    ],
)
def test_unsupported_config_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(make_config("at", **changes))


def test_unknown_setting_is_refused():
    with pytest.raises(ValueError, match="fast"):
        make_trainer(make_config("at"), "fast")


def test_lt_adv_evaluates_a_network_trained_in_pytorch(tmp_path, capsys):
    options = ["--config=configs/at_bsl.py:dataset=digits,epochs=2", f"--workdir={tmp_path / 'run'}"]
    options += ["--config.attack.num_steps=1", "--config.eval.only=('fgsm',)", "--config.eval.subset_per_class=12"]
    assert train.main([*options, "--setting=released"]) == 0
    printed = capsys.readouterr().out
    assert "epoch 2/2" in printed
    config, workdir, *_ = flags.parse(["main", *options])
    dataset = load(config.data)
    summary, split = evaluate.evaluate(config, workdir), long_tailed(dataset, config.data)
    header = summary["header"]
    assert header["stage"] == f"0_train by PyTorch {torch.__version__}, released, on cpu"
    assert header["training"] == "finished" and header["checkpoint_step"] == 2 * (len(split.train) // 64)

    # PyTorch predicts the same classes with these weights.
    variables, _ = checkpoint.read_variables(workdir)
    test = split.test.take(evaluation.balanced_subset(split.test.label, 12))
    network = models.create(config.model, 10, channels=1).eval()
    network.load_state_dict(weights.to_torch(variables))
    with torch.no_grad():
        prediction = network(torch.from_numpy(test.image).permute(0, 3, 1, 2) / 255).argmax(-1).numpy()
    assert summary["metrics"]["eval/clean/accuracy"] == pytest.approx(np.mean(prediction == test.label))
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2] and rows[1]["train/loss"] < rows[0]["train/loss"]

    assert train.main(options) == 2
    assert "use another --workdir" in capsys.readouterr().err

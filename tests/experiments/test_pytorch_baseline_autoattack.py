"""AutoAttack of the PyTorch baseline takes the path of the released code and leaves the same images robust."""

import numpy as np
import pytest

from tests.experiments import NO_TORCH

torch = pytest.importorskip("torch", reason=NO_TORCH)

from experiments.benchmark import target
from experiments.pytorch_baseline import ATTACKS, autoattack

HEADS = target.HEADS


pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_torch_thread")]


def channels_first(images):
    return torch.from_numpy(np.asarray(images).transpose(0, 3, 1, 2).copy())


def channels_last(images):
    return images.numpy().transpose(0, 2, 3, 1)


@pytest.fixture
def paths(golden):
    """Returns `paths("linear")`: (arrays, eps, network in float64, x, y) of the forty images with golden paths."""

    def load(head):
        arrays, digits = golden(f"attacks_digits_{head}"), target.golden_digits(head, np.float64)
        index = arrays["trajectory.index"]
        x, y = channels_first(digits.image[index]), torch.tensor(digits.label[index]).long()
        return arrays, digits.eps, autoattack.CountingNetwork(digits.torch("cpu")), x, y

    return load


@pytest.mark.parametrize("name", ["apgd_ce", "apgd_dlr", "apgd_t"])
@pytest.mark.parametrize("head", HEADS)
def test_apgd_takes_the_released_path(paths, assert_golden, head, name):
    arrays, eps, net, x, y = paths(head)
    objective = {"apgd_ce": autoattack.cross_entropy, "apgd_dlr": autoattack.dlr, "apgd_t": autoattack.targeted_dlr}[
        name
    ]
    start, target = channels_first(arrays["trajectory.start"]).clamp(0, 1), torch.tensor(arrays["apgd_t.target"]).long()
    result = autoattack.apgd(net, objective, x, y, target, start, eps)
    assert_golden(channels_last(result.best - x), arrays[f"{name}.best"])
    assert_golden(channels_last(result.wrong - x), arrays[f"{name}.adversarial"])
    assert_golden(result.value, arrays[f"{name}.best_loss"])
    np.testing.assert_array_equal(~result.broken, arrays[f"{name}.still_correct"])
    assert net.forwards == net.gradients == 40 * 101


@pytest.mark.parametrize("head", HEADS)
def test_fab_takes_the_released_path(paths, assert_golden, head):
    arrays, _, net, x, y = paths(head)
    nearest, _ = autoattack.fab(net, x, y, torch.tensor(arrays["fab_t.target"]).long())
    right = net.logits(x).argmax(-1) == y
    assert_golden(channels_last(autoattack.where_rows(right, nearest - x, 0 * x)), arrays["fab_t_linf"])


@pytest.mark.parametrize("head", HEADS)
def test_networks_equal_the_golden_ones(head, golden):
    arrays, digits = golden(f"attacks_digits_{head}"), target.golden_digits(head)
    logits = digits.torch("cpu")(channels_first(digits.image))
    np.testing.assert_allclose(logits, arrays["logits"], atol=1e-4)
    np.testing.assert_allclose(digits.apply(digits.variables, digits.image), arrays["logits"], atol=1e-4)


def every_fourth(head):
    """Returns (target, network, x, y) of every fourth image, in float32."""
    digits = target.golden_digits(head)
    return digits, digits.torch("cpu"), channels_first(digits.image[::4]), torch.tensor(digits.label[::4]).long()


def test_square_leaves_as_many_robust_as_the_released_code(golden):
    arrays, (digits, net, x, y) = golden("attacks_digits_linear"), every_fourth("linear")
    queries = np.stack([arrays[f"official.plain.square.queries_seed{seed}"][::4] for seed in range(3)])
    right = net(x).argmax(-1) == y
    left = right.clone()
    for count in (100, 500):
        counted = autoattack.CountingNetwork(net)
        broken = autoattack.square(
            counted, x[right], y[right], digits.eps, count, torch.Generator().manual_seed(0)
        ).broken
        left[right] = ~broken
        assert abs(left.double().mean() - (queries > count).mean()) < 0.04, count
        spent = np.minimum(queries, count + 1)[queries > 0].sum() / 3  # the start is a query, too
        assert counted.gradients == 0 and abs(counted.forwards / spent - 1) < 0.1


def test_each_attack_runs_on_the_images_still_robust(golden, monkeypatch):
    arrays, (digits, net, x, y) = golden("attacks_digits_linear"), every_fourth("linear")
    names = ("apgd-ce", "square")
    options = {"eps": digits.eps, "batch_size": 100, "queries": 30, "generator": torch.Generator().manual_seed(0)}
    result = autoattack.autoattack(net, x, y, attacks=names, **options)
    official = arrays["official.plain.apgd-ce.still_correct"][:, ::4]
    assert abs(result.accuracy["apgd-ce"] - official.mean()) <= 0.02
    assert list(result.accuracy) == ["clean", *names] and result.accuracy["square"] == result.robust.double().mean()
    shares = list(result.accuracy.values())
    assert shares == sorted(shares, reverse=True)
    correct, left = round(shares[0] * len(y)), round(shares[1] * len(y))
    assert result.evaluations["apgd-ce"] == (101 * correct, 101 * correct)
    assert left < result.evaluations["square"][0] <= 31 * left and result.evaluations["square"][1] == 0

    monkeypatch.setattr(autoattack, "NUM_STEPS", 5)
    few = autoattack.autoattack(net, x[:40], y[:40], attacks=("apgd-dlr", "apgd-t", "fab-t"), **options)
    assert few.robust.double().mean() < few.accuracy["clean"]
    forwards, gradients = few.evaluations["fab-t"]
    left = round(few.accuracy["apgd-t"] * 40)
    assert forwards == 2 * gradients and 9 * 5 * few.robust.sum() <= gradients <= 9 * 5 * left
    with pytest.raises(ValueError, match="needs at least four classes, the network has 3"):
        autoattack.autoattack(lambda x: net(x)[:, :3], x, y, attacks=names, **options)


@pytest.mark.parametrize("name", ATTACKS)
def test_points_stay_in_ball_and_box_and_are_misclassified(name, monkeypatch):
    monkeypatch.setattr(autoattack, "NUM_STEPS", 20)
    digits, net, x, y = every_fourth("cosine")
    x, y, ranking = x[:40], net(x[:40]).argmax(-1), net(x[:40]).argsort(descending=True)
    options = {"eps": digits.eps, "queries": 100, "generator": torch.Generator().manual_seed(0)}
    broken, wrong = autoattack.run_attack(name, autoattack.CountingNetwork(net), x, y, ranking, **options)
    assert 5 < broken.sum() < 40
    wrong = wrong[broken]
    assert (net(wrong).argmax(-1) != y[broken]).all() and wrong.min() >= 0 and wrong.max() <= 1
    assert (wrong - x[broken]).abs().max() <= digits.eps + 1e-6

"""One call for any network: the numbers of `evaluate`, images as they are, complete files, and bad input."""

import doctest
import functools
import inspect
import io
import json
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console
from jax.sharding import Mesh

from lt_adv import data
from lt_adv.evaluation import _evaluate, evaluate, evaluate_network, masking, networks, read_records, records
from lt_adv.evaluation.masking import diagnose
from tests.attacks.conftest import load

EPS = 0.05
PGD = {"attack": "pgd", "num_steps": 3, "step_size": 0.02, "start": "uniform"}
QUIET = rich.console.Console(quiet=True)
GOLDEN = load("linear")
X, Y = GOLDEN.x[::20], GOLDEN.y[::20]  # five images of each class
COUNTS = GOLDEN.arrays["class_counts"]


def flat(x):
    return x.reshape(len(x), -1) - 0.5


def apply(variables, x):
    """A linear network, on images that are quantised to 16 values if the variables say so, without a gradient."""
    quantised = jax.lax.stop_gradient(jnp.round(x * 15) / 15)
    return flat(jnp.where(variables["quantised"], quantised, x)) @ variables["kernel"]


KERNEL = 20 * np.linalg.lstsq(flat(GOLDEN.x), np.float32(np.eye(10)[GOLDEN.y]), rcond=0.1)[0]
PLAIN, QUANTISED = (
    jax.tree_util.Partial(apply, {"kernel": KERNEL, "quantised": np.array(quantised)}) for quantised in (False, True)
)


def logits_fn(x):
    return flat(x) @ KERNEL


@pytest.fixture(scope="module")
def run():
    """`run(eps=0.1, ...)` with other arguments, on two devices, without the diagnosis of gradient masking."""

    def call(logits_fn=PLAIN, images=X, labels=Y, **changed):
        options = {"class_counts": COUNTS, "eps": EPS, "attacks": {"pgd": PGD}, "gradient_masking": False}
        options |= {"devices": jax.devices()[:2], "console": QUIET, "batch_size": 20}
        return evaluate_network(logits_fn, images, labels, **(options | changed))

    return call


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory):
    """A working directory in which `logits_fn` was evaluated."""
    folder = tmp_path_factory.mktemp("finished")
    run(logits_fn, workdir=folder)
    return folder


def assert_equal(first, second):
    assert list(first.attacks) == list(second.attacks)
    for name in ("clean", *first.attacks):
        np.testing.assert_array_equal(first.prediction(name), second.prediction(name))


def test_results_are_those_of_evaluate(run):
    result = run(jax.tree_util.Partial(GOLDEN.apply, GOLDEN.weights), eps=0.15, seed=7)
    expected = evaluate(
        jax.random.key(7, impl="threefry2x32"), GOLDEN.apply, GOLDEN.weights, data.Split(X, Y, np.arange(len(X))),
        attacks={"pgd": {**PGD, "eps": 0.15}}, batch_size=50, directory=None, header={},
        mesh=Mesh(np.array(jax.devices()[:1]), ("data",)), class_names=list("0123456789"), console=QUIET,
    )  # fmt: skip
    assert_equal(result.records, expected)
    robust = expected.correct("pgd")
    assert result.summary["metrics"]["eval/pgd/accuracy"] == robust.mean() < expected.correct("clean").mean()
    tail = np.argsort(-COUNTS)[-3:]
    assert result.summary["groups"]["tail"] == [str(c) for c in tail]
    assert result.summary["metrics"]["eval/worst/accuracy_tail"] == robust[np.isin(Y, tail)].mean()


def test_any_function_gives_the_same_results(run):
    """Arrays that a function closes over, in and under jit, are arguments of its programs and identify it."""
    expected = run()
    closure, jitted = run(logits_fn), run(jax.jit(logits_fn))
    for result in (closure, jitted):
        assert_equal(result.records, expected.records)
    digests = [result.records.header["weights_digest"] for result in (closure, jitted)]
    other = KERNEL[::-1]
    assert digests[0] == digests[1] != run(lambda x: flat(x) @ other).records.header["weights_digest"]
    assert not _evaluate._predict_and_measure.cache_info().currsize  # freed after the call


def test_arrays_of_a_function_are_arguments_of_its_programs():
    w, table = jnp.ones((4, 3)), np.ones((4, 3), np.float32)
    functions = (lambda x: x @ w + x @ table, jax.jit(lambda x: x @ w + x @ table))
    for logits_fn in functions:
        network = networks.from_function(logits_fn, jax.ShapeDtypeStruct((2, 4), np.float32))
        assert len(network.variables) == 2 and not network.reusable
        for batch in (2, 5):
            x = jnp.ones((batch, 4))
            assert not jax.make_jaxpr(network.apply)(network.variables, x).consts
            doubled = [2 * array for array in network.variables]
            np.testing.assert_allclose(jax.jit(network.apply)(doubled, x), 2 * logits_fn(x))


def test_a_partial_of_several_arguments(run):
    network = jax.tree_util.Partial(lambda kernel, x, *, scale: scale * flat(x) @ kernel, KERNEL, scale=jnp.ones(()))
    result = run(network)
    assert_equal(result.records, run().records)


def test_a_partial_with_options_is_a_function(run):
    def apply(kernel, x, *, train):
        assert not train
        return flat(x) @ kernel

    result = run(jax.tree_util.Partial(apply, KERNEL, train=False))
    assert_equal(result.records, run().records)


def test_floating_images_are_not_quantised(run):
    """Classes differ by less than the step of uint8 images, which would make them equal."""
    x = np.full((40, 4, 4, 1), 100.2 / 255)
    y = np.arange(40) % 2
    x[y == 1] += 1e-4
    middle = x[:2].mean()

    def logits_fn(x):
        brightness = 1e4 * (x - middle).mean((1, 2, 3))
        return jnp.stack([-brightness, brightness], -1)

    for images in (x, x.astype(np.float32), jnp.float32(x)):
        assert run(logits_fn, images, y, class_counts=[3, 2], eps=1e-6).records.correct("pgd").all()
    quantised = np.round(255 * x).astype(np.uint8)
    assert run(logits_fn, quantised, y, class_counts=[3, 2], eps=1e-6).records.correct("clean").mean() == 0.5


def test_uint8_images_are_divided_by_255(run):
    pixels = np.round(255 * X).astype(np.uint8)
    assert_equal(run(images=pixels).records, run(images=pixels.astype(np.float32) / 255).records)


def test_files_and_printed_table(run, tmp_path, monkeypatch):
    monkeypatch.setattr(diagnose, "QUERIES", 20)
    console = rich.console.Console(file=io.StringIO(), width=200)
    names = [f"digit {c}" for c in range(10)]
    options = {"class_names": names, "model": "a small network", "groups": "robustlt", "gradient_masking": True}
    result = run(logits_fn, workdir=tmp_path / "new" / "run", console=console, **options)
    folder = tmp_path / "new" / "run"
    assert {path.name for path in folder.iterdir()} == {"report.json", "report.md", "plots", "eval"}
    assert {path.name for path in (folder / "plots").iterdir()} == {
        "accuracy_by_class.png", "robust_error.png", "examples.png", "gradient_masking.png",
    }  # fmt: skip
    stored = json.loads((folder / "report.json").read_text())
    assert stored == result.summary == result.to_dict() == json.loads(json.dumps(result.to_dict()))
    assert_equal(read_records(folder / "eval"), result.records)
    text = (folder / "report.md").read_text()
    for part in (
        "- **Model:** a small network", "|  | Accuracy | Balanced | Head | Tail |", "| Worst case |", "| digit 9 |",
        "**No sign of gradient masking (PGD-20 ", "on 50 images with radius 0.05", "natural error", ": robustlt)",
    ):  # fmt: skip
        assert part in text, part
    assert "Baseline" not in text and str(folder / "report.md") in console.file.getvalue()
    printed = str(result)
    for part in ("Head", "Tail", "Worst case", "50 images", "No sign of gradient masking", "Without a baseline"):
        assert part in printed, part
    assert repr(result).startswith("NetworkEvaluation(50 images, accuracy: clean 0.")


def test_gradient_masking_is_reported(run, tmp_path, monkeypatch):
    """A network whose input is quantised, alone and against the same network without that."""
    monkeypatch.setattr(diagnose, "QUERIES", 20)
    alone = run(QUANTISED, gradient_masking=True)
    assert alone.summary["reliability"]["verdict"]["trustworthy"] is False
    assert "Signs of gradient masking: robustness is overestimated" in str(alone)
    assert "The input gradient is exactly zero on 100.0 % of the images: gradient attacks" in str(alone)
    compared = run(QUANTISED, gradient_masking=True, baseline=PLAIN, workdir=tmp_path)
    verdict = compared.summary["reliability"]["verdict"]
    assert verdict["trustworthy"] is False and "(baseline 0.0 %)" in str(compared)
    assert "Baseline: the network that was given as one." in (tmp_path / "report.md").read_text()
    assert len(list((tmp_path / "eval" / "gradient_masking").iterdir())) == 2
    monkeypatch.setattr(diagnose, "run_diagnostics", None)  # stored diagnostics are read
    again = run(QUANTISED, gradient_masking=True, baseline=PLAIN, workdir=tmp_path)
    assert again.summary == compared.summary


def test_without_class_counts_there_are_no_groups(run, tmp_path):
    result = run(class_counts=None, workdir=tmp_path)
    assert result.summary["groups"] == {"definition": None} and list(result.summary["decomposition"]) == ["all"]
    text = (tmp_path / "report.md").read_text()
    assert text.startswith("# Adversarial robustness") and "Training images" not in text and "Groups" not in text
    assert "|  | Accuracy | Balanced |\n" in text and (tmp_path / "plots" / "accuracy_by_class.png").exists()
    assert [row["name"] for row in result.summary["classes"]] == [str(c) for c in range(10)]


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_attacks_by_name_have_the_radius_and_norm(run, norm):
    attacks = run(images=X[:4], labels=Y[:4], attacks=("fgsm", "pgd20"), eps=0.5, norm=norm).records.header["attacks"]
    assert list(attacks) == ["fgsm", "pgd20"] and {spec["norm"] for spec in attacks.values()} == {norm}
    assert attacks["pgd20"]["step_size"] == 0.125 and attacks["pgd20"]["num_steps"] == 20
    assert list(run(images=X[:4], labels=Y[:4], attacks="fgsm").records.attacks) == ["fgsm"]


def test_large_radii_are_checked_relative_to_their_size():
    """The sum of 150,528 float32 pixels, of a length of 60, is rounded by more than 1e-6."""
    check = functools.partial(_evaluate._check_bounds, "pgd", {"norm": "l1", "eps": 60.0}, excesses=np.zeros(1))
    check(np.array([60.0001]))
    with pytest.raises(ValueError, match="is 60.01 away from its clean image, eps is 60.0"):
        check(np.array([60.01]))


@pytest.mark.usefixtures("short")
def test_autoattack_is_one_of_the_attacks(run, tmp_path):
    spec = {"attack": "autoattack", "version": ("square",)}
    options = {"attacks": {"autoattack": spec}, "devices": jax.devices()[:1], "workdir": tmp_path}
    result = run(logits_fn, X[::2], Y[::2], **options)
    correct = result.records.correct("autoattack")
    assert 0 < correct.sum() < result.records.correct("clean").sum() and "AutoAttack" in str(result)
    assert not (tmp_path / "plots" / "examples.png").exists()


def test_images_of_other_channels_have_no_plot(run, tmp_path):
    x = np.repeat(X, 2, axis=-1)
    result = run(lambda x: logits_fn(x[..., :1]), x, workdir=tmp_path)
    np.testing.assert_array_equal(result.records.clean, run().records.clean)
    assert not (tmp_path / "plots" / "examples.png").exists()


def test_an_interrupted_call_continues(run, tmp_path, monkeypatch):
    original, written = records.write_batch, []

    def write_batch(directory, number, columns):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(number)
        original(directory, number, columns)

    monkeypatch.setattr(records, "write_batch", write_batch)
    with pytest.raises(KeyboardInterrupt):
        run(workdir=tmp_path)
    assert written == [0, 1] and not (tmp_path / "report.md").exists()
    written.clear()
    result = run(workdir=tmp_path)
    assert written == [2] and (tmp_path / "report.md").exists()
    assert_equal(result.records, run().records)
    again = run(workdir=tmp_path, class_counts=None)  # only the report is written again
    assert written == [2] and again.summary["groups"] == {"definition": None}


def doubled(x):
    """Other logits with the same arrays and the same predictions."""
    return 2 * (flat(x) @ KERNEL)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"logits_fn": PLAIN}, "other weights"),
        ({"logits_fn": doubled}, r"another network \(other logits\)"),
        ({"eps": 0.1}, "other attacks or radii"),
        ({"seed": 1}, "another seed"),
        ({"images": X[::-1].copy()}, "other images or labels"),
    ],
)
def test_a_workdir_of_another_evaluation_is_kept(run, finished, changed, words):
    before = contents(finished)
    with pytest.raises(ValueError, match=f"holds .*{words}.*: choose another workdir"):
        run(**{"logits_fn": logits_fn, "workdir": finished, **changed})
    assert contents(finished) == before


@pytest.mark.parametrize("name", ["config.json", "report.md", "eval/records/0123456789ab/header.json"])
def test_a_workdir_of_something_else_is_kept(run, tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")
    with pytest.raises(ValueError, match="choose another workdir"):
        run(workdir=tmp_path)
    with pytest.raises(ValueError, match="is a file: choose another workdir"):
        run(workdir=path)
    assert contents(tmp_path) == {name: b"{}"}


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_damaged_logits_are_reported(run, finished, tmp_path):
    copy = shutil.copytree(finished, tmp_path / "copy")
    (copy / "eval" / "clean_logits.npy").write_bytes(b"PK")
    with pytest.raises(ValueError, match="clean_logits.npy is damaged: remove it"):
        run(logits_fn, workdir=copy)


NAN = lambda x: x.mean((1, 2)) @ jnp.full((1, 10), jnp.nan)  # noqa: E731


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"labels": np.where(Y == 9, 10, Y)}, "labels: 5 of 50 labels are not whole numbers from 0 to 9, such as 10"),
        ({"labels": Y - 1}, "labels: 5 of 50 labels are not whole numbers from 0, such as -1"),
        ({"labels": np.eye(10)[Y]}, "convert one-hot labels"),
        ({"labels": Y[:-1]}, "labels must be 50 whole numbers from 0, one for each image"),
        ({"images": 255 * X}, r"Floating images must lie in \[0, 1\], not between 0 and 255: scale them"),
        ({"images": X - 0.1}, "not between -0.1 and 0.9"),
        ({"images": np.where(X == 1, np.nan, X)}, "not between nan and nan"),
        ({"images": np.int64(255 * X)}, "images must be uint8, from 0 to 255, or floating, .* not int64"),
        ({"images": X[..., 0]}, r"of shape \(50, 8, 8\): add the channels with images"),
        ({"images": X[:0], "labels": Y[:0]}, "there are no images"),
        ({"logits_fn": NAN}, "logits_fn: the logits of the first 50 images are not finite"),
        ({"logits_fn": "network"}, "logits_fn must be a function from images to logits, not str"),
        ({"logits_fn": lambda x: (logits_fn(x), x)}, "logits_fn must return one array"),
        ({"logits_fn": lambda x: x.mean((1, 2))}, "logits of 1 class: there is nothing to attack"),
        ({"class_counts": COUNTS[:9]}, r"class_counts must have 10 entries, one for each logit, not shape \(9,\)"),
        ({"class_counts": np.r_[0, COUNTS[1:]]}, "class_counts must be whole numbers from 1"),
        ({"class_counts": COUNTS / 7}, "class_counts must be whole numbers from 1"),
        ({"class_names": ["a", "b"]}, "class_names must have 10 entries, one for each logit, not 2"),
        ({"groups": "third"}, "Unknown group definition 'third'. Did you mean 'thirds'"),
        ({"attacks": ("pgd20", "autoatack")}, "Unknown attack 'autoatack'. Did you mean 'autoattack'"),
        ({"attacks": {"a": {"attack": "pdg"}}}, "Unknown attack 'pdg'. Did you mean 'pgd'"),
        ({"attacks": {"a": {"attack": "pgd", "num_steps": 5}}}, "The attack 'pgd' needs step_size"),
        ({"attacks": {"../a": PGD}}, "The name '../a' of an attack must be of letters"),
        ({"attacks": {"clean": PGD}}, "An attack cannot be called clean"),
        ({"eps": None}, "eps must be a number, got None"),
        ({"eps": -0.1}, "eps must be above 0, in units of the .* not -0.1"),
        ({"eps": 0}, "eps must be above 0"),
        ({"eps": 8}, "is 8.0/255 meant"),
        ({"eps": np.nan}, "eps must be a finite number"),
        ({"norm": "l3"}, "Unknown norm 'l3'"),
        ({"seed": -1}, "seed must be a Python int"),
        ({"batch_size": 0}, "batch_size must be a Python int, 1 or more"),
        ({"baseline": lambda x: logits_fn(x)[:, :9]}, "The baseline has 9 classes, the network 10"),
    ],
)
def test_bad_input_is_refused_in_one_line_and_nothing_is_written(run, tmp_path, changed, message):
    with pytest.raises(ValueError, match=message) as error:
        run(**{"workdir": tmp_path / "new", **changed})
    assert "\n" not in str(error.value)
    assert not (tmp_path / "new").exists()


def test_an_unwritable_workdir_is_refused(run, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot be written"):
        run(workdir=tmp_path / "file" / "run")


def test_logits_that_are_not_finite_on_some_images_count_as_wrong(run):
    with_nan = lambda x: jnp.where(x[:, :1, 0, 0] > 0.4, jnp.nan, logits_fn(x))  # noqa: E731
    result = run(with_nan, np.where(np.arange(50)[:, None, None, None] == 3, 0.5, X))
    assert result.records.clean[3] == -1
    assert "clean: the logits of 1 images are not finite" in str(result)


def test_the_docstring_is_complete_and_its_example_runs():
    names = {"np": np, "jnp": jnp, "evaluate_network": functools.partial(evaluate_network, console=QUIET)}
    (example,) = doctest.DocTestFinder(recurse=False).find(evaluate_network, "evaluate_network", globs=names)
    assert len(example.examples) == 6 and not doctest.DocTestRunner().run(example).failed
    arguments = evaluate_network.__doc__.split("Args:\n")[1].split("Returns:\n")[0]
    assert all(f"      {name}: " in arguments for name in inspect.signature(evaluate_network).parameters)


def test_the_diagnosis_takes_a_class_balanced_sample(run, monkeypatch):
    seen = SimpleNamespace()
    monkeypatch.setattr(masking, "compare_with_baseline", lambda *sides, **options: vars(seen).update(options, s=sides))
    run(gradient_masking=True, norm="l2", eps=1.0)
    network, baseline, sample = seen.s
    assert baseline is None and len(sample) == 50 and network.directory is None
    assert seen.protocol["norm"] == "l2" and seen.protocol["step_size"] == 0.25 and seen.protocol["autoattack"] == ()
    assert set(seen.groups) == {"head", "body", "tail"}


def test_images_too_small_for_square_are_refused_before_the_first_attack(run, tmp_path):
    small = {"images": X[:4, :4, :4], "labels": Y[:4], "eps": 0.5, "norm": "l2", "attacks": ("fgsm",)}
    logits_fn = lambda x: x.reshape(len(x), -1)[:, :10]  # noqa: E731
    with pytest.raises(ValueError, match="Square needs images of at least 5 x 5 pixels for L2.*gradient_masking=False"):
        run(logits_fn, gradient_masking=True, workdir=tmp_path / "run", **small)
    assert not (tmp_path / "run").exists()
    assert len(run(logits_fn, **small).records) == 4

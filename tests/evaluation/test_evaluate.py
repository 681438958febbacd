import importlib
import io
import types
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console

from lt_adv import attacks
from lt_adv.evaluation import balanced_subset, examples, read_records, records

module = importlib.import_module("lt_adv.evaluation._evaluate")  # the package's `evaluate` is the function


def assert_equal(first, second):
    assert list(first.attacks) == list(second.attacks)
    for name in ("index", "label", "clean"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
    for name in first.attacks:
        np.testing.assert_array_equal(first.attacks[name], second.attacks[name])


@pytest.fixture
def written(monkeypatch):
    """Returns a list that collects the numbers of written batches."""
    numbers, original = [], records.write_batch
    monkeypatch.setattr(
        records, "write_batch", lambda where, n, columns: (numbers.append(n), original(where, n, columns))
    )
    return numbers


def test_every_image_is_recorded_with_its_clean_prediction(toy, run, tmp_path):
    result, _ = run()
    np.testing.assert_array_equal(result.index, toy.split.index)
    np.testing.assert_array_equal(result.label, toy.split.label)
    logits = toy.apply(toy.variables, toy.split.image / 255)
    np.testing.assert_array_equal(result.clean, logits.argmax(-1))
    assert result.conditions == ("clean", "fgsm", "pgd", "lsa", "worst")
    assert 0 < result.correct("pgd").sum() < result.correct("clean").sum()
    folder = records.record_directory(tmp_path, result.header)
    assert sorted(path.name for path in folder.iterdir()) == [
        "batch-00000.npz", "batch-00001.npz", "batch-00002.npz", "header.json",
    ]  # fmt: skip
    assert records.read_batch(folder, 2)["index"].shape == (6,)  # 20 = 7 + 7 + 6, padded to 8 for the devices
    assert_equal(read_records(tmp_path), result)


def test_records_depend_on_neither_batch_size_nor_devices(run):
    reference, _ = run(batch_size=7, devices=8, directory=None)
    for batch_size, devices in ((16, 1), (16, 8)):
        assert_equal(run(batch_size=batch_size, devices=devices, directory=None)[0], reference)


def test_each_image_has_its_own_key(toy):
    """The attack on one image alone, with fold_in(fold_in(key, crc32(name)), index), gives the same result."""
    runner = module._Runner(toy.key, toy.apply, toy.variables, toy.mesh(8))
    x, y, index = runner.batch(toy.split, slice(14, 20), 7)
    x_adv = runner.attack("pgd", toy.pgd, x, y, index)
    assert x.shape == (8, 4, 4, 1)
    key = jax.random.fold_in(jax.random.fold_in(toy.key, zlib.crc32(b"pgd")), toy.split.index[16])
    image = jnp.asarray(toy.split.image[16:17], jnp.float32) / 255
    options = {name: value for name, value in toy.pgd.items() if name != "attack"}
    alone = attacks.pgd(key[None], lambda z: toy.apply(toy.variables, z), image, toy.split.label[16:17], **options)
    np.testing.assert_allclose(np.asarray(x_adv)[2], alone[0], atol=1e-6)
    other = runner.attack("another name", toy.pgd, x, y, index)
    assert np.abs(np.asarray(other) - np.asarray(x_adv)).max() > 1e-3


def test_resumes_at_missing_and_damaged_batches(run, written, tmp_path):
    first, text = run()
    assert written == [0, 1, 2] and "warning" not in text
    folder = records.record_directory(tmp_path, first.header)
    written.clear()
    again, _ = run()
    assert written == []
    assert_equal(again, first)

    (folder / "batch-00001.npz").unlink()
    assert_equal(run()[0], first)
    assert written == [1]

    written.clear()
    path = folder / "batch-00002.npz"
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 0xFF  # one flipped byte
    path.write_bytes(content)
    (folder / "batch-00000.npz").write_bytes(b"PK")  # cut off
    result, text = run()
    assert written == [0, 2] and text.count("warning:") == 2
    assert "batch-00000.npz is damaged" in text and "computed again" in text
    assert_equal(result, first)
    assert_equal(read_records(tmp_path), first)


def test_a_batch_of_other_images_or_columns_is_computed_again(run, written, tmp_path):
    first, _ = run()
    folder = records.record_directory(tmp_path, first.header)
    columns = records.read_batch(folder, 0)
    records.write_batch(folder, 0, {**columns, "index": columns["index"] + 1})
    columns = records.read_batch(folder, 2)
    records.write_batch(folder, 2, {**columns, "label": (columns["label"] + 1) % 3})
    columns = records.read_batch(folder, 1)
    del columns["attack/fgsm"]
    records.write_batch(folder, 1, columns)
    written.clear()
    result, text = run()
    assert written == [0, 1, 2]
    assert text.count("holds other images") == 2 and text.count("holds other columns") == 1
    assert_equal(result, first)


def test_an_interrupted_evaluation_resumes(run, written, tmp_path, monkeypatch):
    original = module._Runner.batch

    def interrupted(self, split, rows, size):
        if rows.start >= 7:
            raise KeyboardInterrupt
        return original(self, split, rows, size)

    with monkeypatch.context() as patch:
        patch.setattr(module._Runner, "batch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run()
    assert written == [0]
    with pytest.raises(ValueError, match="2 of 3 batches are missing"):
        read_records(tmp_path)
    result, _ = run()
    assert written == [0, 1, 2]
    assert_equal(result, run(directory=None)[0])


def test_each_header_has_its_own_directory(toy, run, written, tmp_path):
    first, _ = run()
    moved = {"kernel": toy.variables["kernel"] + 1e-6}
    stronger = {**toy.attacks, "pgd": {**toy.pgd, "eps": 8 / 255}}
    for change in (
        {"header": {"seed": 8}},
        {"variables": moved},
        {"attacks": stronger},
        {"key": jax.random.key(8)},
        {"batch_size": 10},
    ):
        written.clear()
        other, _ = run(**change)
        assert len(written) == (2 if "batch_size" in change else 3), change
        assert records.record_directory(tmp_path, other.header) != records.record_directory(tmp_path, first.header)
    with pytest.raises(ValueError, match="several headers"):
        read_records(tmp_path)
    assert_equal(read_records(records.record_directory(tmp_path, first.header)), first)


def test_an_edited_header_is_refused_and_a_damaged_one_rewritten(run, written, tmp_path):
    first, _ = run()
    folder = records.record_directory(tmp_path, first.header)
    records.write_header(folder, {**first.header, "seed": 99})
    with pytest.raises(ValueError, match="another header"):
        run()
    (folder / "header.json").write_text('{"seed": ')
    written.clear()
    result, text = run()
    assert "header.json is damaged" in text and written == []
    assert records.read_header(folder) == result.header


def test_the_header_holds_the_protocol(toy, run):
    header = run(directory=None)[0].header
    assert header["attacks"]["pgd"]["eps"] == 0.031 and header["attacks"]["pgd"]["eps_255"] == 7.905
    assert header["attacks"]["fgsm"]["eps"] == 8 / 255 and header["attacks"]["fgsm"]["eps_255"] == 8.0
    assert header["attacks"]["fgsm"]["start"] == "zero"  # the default
    assert header["attacks"]["lsa"]["logit_scale"] == 10.0
    assert (header["images"], header["images_per_class"], header["seed"]) == (20, [7, 7, 6], 7)
    assert header["jax_version"] == jax.__version__ and header["device"] == "8 x cpu"
    with pytest.raises(ValueError, match="leave them out: device"):
        run(header={"device": "mine"})


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (lambda x: x + 0.032, "away from its clean image, eps is 0.031"),
        (lambda x: x.at[3].add(-0.032), "away from its clean image, eps is 0.031"),
        (lambda x: x + 0.031, r"leaves \[0, 1\]"),
        (lambda x: x - 0.031, r"leaves \[0, 1\]"),
        (lambda x: x * jnp.nan, "away from its clean image"),
    ],
)
def test_an_attack_that_leaves_the_ball_or_the_pixel_range_is_refused(toy, run, monkeypatch, attack, message):
    monkeypatch.setattr(attacks, "jit", lambda *_, **__: lambda key, variables, x, y: attack(x))
    with pytest.raises(ValueError, match=message):
        run(directory=None, attacks={"pgd": toy.pgd}, apply=lambda variables, x: x.reshape(len(x), -1)[:, :3])


def test_the_l2_radius_is_the_norm_of_the_whole_image(toy, run, monkeypatch):
    spec = {**toy.pgd, "norm": "l2", "eps": 1.0}
    network = lambda variables, x: x.reshape(len(x), -1)[:, :3]  # noqa: E731
    for shift, inside in ((0.2499, True), (0.2501, False)):  # sixteen pixels: norm 4 shift
        inwards = lambda key, variables, x, y, shift=shift: jnp.where(x < 0.5, x + shift, x - shift)  # noqa: E731
        monkeypatch.setattr(attacks, "jit", lambda *_, f=inwards, **__: f)
        fresh = types.FunctionType(network.__code__, network.__globals__)  # compiled programs are cached by function
        if inside:
            run(directory=None, attacks={"l2": spec}, apply=fresh)
        else:
            with pytest.raises(ValueError, match="eps is 1.0"):
                run(directory=None, attacks={"l2": spec}, apply=fresh)


def test_non_finite_logits_are_an_error(toy, run):
    broken = {"kernel": toy.variables["kernel"] * np.nan}
    with pytest.raises(ValueError, match="clean: the logits of 7 images are not finite"):
        run(directory=None, variables=broken)


def test_bad_arguments_are_refused(toy, run):
    with pytest.raises(ValueError, match="cannot be called worst"):
        run(attacks={"worst": toy.pgd})
    empty = types.SimpleNamespace(image=toy.split.image[:0], label=toy.split.label[:0], index=toy.split.index[:0])
    with pytest.raises(ValueError, match="Nothing to evaluate"):
        run(split=empty)


def test_nothing_is_compiled_twice(toy, run):
    run(directory=None)
    caches = module._predict_and_measure, module.attack_specs._cached_jit
    before = [cache.cache_info().misses for cache in caches]
    run(directory=None, variables={"kernel": toy.variables["kernel"] * 2})
    assert [cache.cache_info().misses for cache in caches] == before


def test_progress_prints_lines_without_a_terminal(run):
    _, text = run(directory=None)
    assert 1 < len(text.splitlines()) <= 10
    assert "images/s" in text and "evaluating 100 %" in text and "pgd" in text


def test_balanced_subset_is_balanced_fixed_and_nested():
    label = np.random.default_rng(1).permutation(np.repeat(np.arange(4), [9, 5, 7, 30]))
    rows = balanced_subset(label, 5)
    assert np.bincount(label[rows]).tolist() == [5, 5, 5, 5]
    assert np.all(np.diff(rows) > 0)
    np.testing.assert_array_equal(rows, balanced_subset(label, 5))
    assert set(balanced_subset(label, 3)) < set(rows)
    assert set(balanced_subset(label, 5, seed=1)) != set(rows)
    # Must not change: results on another subset are not comparable.
    assert balanced_subset(np.arange(12) % 3, 2).tolist() == [1, 2, 6, 7, 9, 11]
    without_two_classes = np.repeat([0, 2, 3], [3, 4, 2])  # of five classes
    assert np.bincount(without_two_classes[balanced_subset(without_two_classes, 2)], minlength=5).tolist() == [
        2,
        0,
        2,
        2,
        0,
    ]
    for wrong in (0, 6):
        with pytest.raises(ValueError, match="classes have 5 images or more"):
            balanced_subset(label, wrong)


def test_examples_are_the_images_of_the_records(toy, run):
    result, _ = run(directory=None)
    pictures = examples(
        toy.key, toy.apply, toy.variables, toy.split, result,
        attack="pgd", spec=toy.pgd, class_counts=(10, 100, 1), mesh=toy.mesh(8),
    )  # fmt: skip
    assert pictures["label"].tolist() == [1, 0, 2]  # by training count
    delta = np.abs(pictures["adversarial"] - pictures["clean"])
    assert 0.02 < delta.max() <= 0.031 + 1e-6
    logits = toy.apply(toy.variables, pictures["adversarial"])
    np.testing.assert_array_equal(np.argmax(logits, -1), pictures["prediction"])
    for label, before, after in zip(*(pictures[k] for k in ("label", "clean_prediction", "prediction")), strict=True):
        turned = result.correct("clean") & ~result.correct("pgd") & (result.label == label)
        assert (before == label and after != label) == turned.any()


def test_progress_shows_a_bar_on_a_terminal(toy):
    console = rich.console.Console(file=io.StringIO(), width=200, force_terminal=True)
    module.evaluate(
        toy.key, toy.apply, toy.variables, toy.split, attacks=toy.attacks, batch_size=7, directory=None, header={},
        mesh=toy.mesh(8), class_names=toy.names, console=console,
    )  # fmt: skip
    text = console.file.getvalue()
    assert "lsa" in text and "100%" in text and "images/s" in text

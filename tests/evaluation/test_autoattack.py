"""AutoAttack in an evaluation: it runs on all images at once, is stored as one column, and resumes."""

import numpy as np
import pytest

from lt_adv.evaluation import _evaluate, read_records, records
from lt_adv.evaluation.attack_specs import resolve

pytestmark = pytest.mark.usefixtures("short")
SPEC = {"attack": "autoattack", "eps": 0.05, "version": ("apgd-ce", "square")}


@pytest.fixture
def run_both(toy, run):
    return lambda **options: run(attacks={"pgd": toy.pgd, "autoattack": SPEC}, **options)


@pytest.mark.slow
def test_a_stored_column_is_reused_unless_damaged(toy, run_both, tmp_path, monkeypatch):
    first, text = run_both()
    assert first.conditions == ("clean", "pgd", "autoattack", "worst")
    assert "autoattack   apgd-ce: robust" in text
    assert 0 < first.correct("autoattack").sum() < first.correct("clean").sum()
    folder = records.record_directory(tmp_path, first.header)
    assert sorted(p.name for p in folder.iterdir())[-2:] == ["column-autoattack.npz", "header.json"]
    assert first.header["attacks"]["autoattack"]["eps_255"] == 12.75
    np.testing.assert_array_equal(read_records(tmp_path).attacks["autoattack"], first.attacks["autoattack"])

    with monkeypatch.context() as patch:
        patch.setattr(_evaluate, "autoattack", None)  # fails if it is called
        again, _ = run_both()
    np.testing.assert_array_equal(again.attacks["autoattack"], first.attacks["autoattack"])

    path = records.column_path(folder, "autoattack")
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match="column-autoattack.npz is damaged"):
        read_records(tmp_path)
    again, text = run_both()
    assert "column-autoattack.npz is damaged" in text and "computed again" in text
    np.testing.assert_array_equal(again.attacks["autoattack"], first.attacks["autoattack"])
    path.unlink()
    with pytest.raises(ValueError, match="autoattack is missing; run the evaluation again"):
        read_records(tmp_path)


@pytest.mark.slow
def test_predictions_depend_on_neither_batch_size_nor_devices(run_both):
    reference, _ = run_both(batch_size=7, devices=8, directory=None)
    for size, devices in ((20, 1), (3, 2)):
        other, _ = run_both(batch_size=size, devices=devices, directory=None)
        np.testing.assert_array_equal(other.attacks["autoattack"], reference.attacks["autoattack"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "rand"}, "randomised networks"),
        ({"version": "better"}, "Unknown version of autoattack 'better'"),
        ({"version": ("pgd",)}, "Unknown attack 'pgd'"),
        ({"num_steps": 3}, "Unknown option of autoattack 'num_steps'"),
        ({"eps": 8}, "8/255"),
    ],
)
def test_bad_entries_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        resolve(SPEC | change)

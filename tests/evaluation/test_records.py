import dataclasses

import numpy as np
import pytest

from lt_adv.evaluation import records
from lt_adv.evaluation.records import Records


def columns_of(results, rows):
    attacks = {f"attack/{name}": column[rows] for name, column in results.attacks.items()}
    return {"index": results.index[rows], "label": results.label[rows], "clean": results.clean[rows]} | attacks


def store(directory, results):
    where = records.record_directory(directory, results.header)
    records.write_header(where, results.header)
    for number in range(2):
        records.write_batch(where, number, columns_of(results, slice(4 * number, 4 * number + 4)))
    return where


def test_written_records_are_read_back(hand_made, tmp_path):
    where = store(tmp_path, hand_made)
    for directory in (where, tmp_path, str(tmp_path)):
        again = records.read_records(directory)
        assert again.header == hand_made.header
        assert list(again.attacks) == ["fgsm", "pgd20"]
        np.testing.assert_array_equal(again.index, hand_made.index)
        np.testing.assert_array_equal(again.attacks["pgd20"], hand_made.attacks["pgd20"])
        assert again.conditions == ("clean", "fgsm", "pgd20", "worst")
    assert not list(where.glob(".*")), "a temporary file was left behind"


def test_missing_incomplete_and_damaged_records_are_refused(hand_made, tmp_path):
    with pytest.raises(FileNotFoundError, match="No evaluation records"):
        records.read_records(tmp_path)
    where = store(tmp_path, hand_made)
    records.batch_path(where, 1).write_bytes(b"")
    with pytest.raises(ValueError, match=r"batch-00001\.npz is damaged"):
        records.read_records(tmp_path)
    records.batch_path(where, 1).unlink()
    with pytest.raises(ValueError, match="1 of 2 batches are missing; run the evaluation again"):
        records.read_records(tmp_path)


def test_every_flipped_byte_is_detected_or_harmless(hand_made, tmp_path):
    columns = columns_of(hand_made, slice(None))
    records.write_batch(tmp_path, 0, columns)
    path = records.batch_path(tmp_path, 0)
    content = path.read_bytes()
    detected = 0
    for position in range(0, len(content), 7):
        path.write_bytes(content[:position] + bytes([content[position] ^ 0x55]) + content[position + 1 :])
        try:
            again = records.read_batch(tmp_path, 0)
        except ValueError:
            detected += 1
            continue
        for name in set(again) & set(columns):  # no column is read as another
            np.testing.assert_array_equal(again[name], columns[name])
    assert detected > 50


def test_digest_depends_on_every_entry_but_not_on_their_order(hand_made):
    header = dict(hand_made.header)
    assert records.digest(dict(reversed(header.items()))) == records.digest(header)
    digests = {records.digest({**header, name: "changed"}) for name in header}
    assert len(digests | {records.digest(header)}) == len(header) + 1


def test_correctness_and_errors_by_hand(hand_made):
    assert hand_made.images_per_class.tolist() == [3, 2, 1]
    assert hand_made.correct("worst").tolist() == [False, False, False, True, False, False]
    assert hand_made.natural_error.tolist() == [False, False, True, False, False, True]
    assert hand_made.boundary_error.tolist() == [True, True, False, False, True, False]
    assert hand_made.count(hand_made.robust_error).tolist() == [3, 1, 1]
    assert hand_made.take(np.array([5, 0])).index.tolist() == [7, 9]


def test_records_are_frozen_and_of_equal_length(hand_made):
    with pytest.raises(dataclasses.FrozenInstanceError):
        hand_made.clean = hand_made.label
    with pytest.raises(ValueError, match="check pgd20"):
        Records(hand_made.header, hand_made.index, hand_made.label, hand_made.clean, {"pgd20": hand_made.clean[:5]})

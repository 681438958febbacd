"""Faults injected into short runs on digits: each run must end like one without faults, bit for bit.

    pytest -m faults --faults=10 [--faults-seed=0] [-k POINT]

Several faults are injected into a run, one per start, and then it runs to its end. The state before every step must
equal that of a run without faults; at the end, so must all arrays of the last checkpoint, metrics.jsonl, all
predictions, the exported network and the names of all files. The results are written to
experiments/results/faults/campaign.json, from which `python -m experiments.tables` makes the table of the docs.
"""

import dataclasses
import functools
import itertools
import json
import zlib

import numpy as np
import orbax.checkpoint as ocp
import pytest

from experiments import tables
from tests.robustness.faults import campaign, compare, disk, points
from tests.robustness.faults.points import POINTS, Fault
from tests.robustness.faults.run import (
    CONFIG,
    KILLED,
    REFUSED,
    TERMINATED,
    Outcome,
    Pair,
    Run,
    peer_problem,
    refusal_problem,
)

RESULTS = tables.RESULTS / "faults" / "campaign.json"
OUTCOME = Outcome(code=TERMINATED, out="", err="", steps={}, saves=[])


def outcome_of(**fields):
    return dataclasses.replace(OUTCOME, **fields)


@pytest.mark.parametrize(
    ("outcome", "problem"),
    [
        ({"code": 2, "err": "WARNING: of a library\nError: no.\n"}, ""),
        ({"code": 2, "err": "Traceback\nError: no.\n"}, "2 lines on stderr"),
        ({"code": 2, "err": "no.\n"}, "1 lines on stderr"),
        ({"code": 1, "err": "Error: no.\n"}, "exit code 1 instead of 2"),
    ],
)
def test_a_refusal_is_one_line_and_exit_code_2(outcome, problem):
    actual = refusal_problem(outcome_of(**outcome))
    assert actual.startswith(problem) and bool(actual) == bool(problem)
    assert campaign.answer_problems(Fault(REFUSED), outcome_of(**outcome)) == ([actual] if problem else [])


@pytest.mark.parametrize(
    ("outcome", "ok"),
    [
        ({"code": 2, "err": "Error: Another process of this run has ended.\n"}, True),
        ({"code": -6, "err": "F1122 ... another task died; see\n    @ 0x1 (unknown)\n"}, True),
        ({"code": -6, "err": "Segmentation fault\n"}, False),
        ({"code": 2, "err": "Traceback\nError: Another process\n"}, False),
        ({"code": 0, "out": "Report:"}, False),
        ({"code": None}, False),
    ],
)
def test_process_whose_peer_died_ends_with_a_message(outcome, ok):
    assert (peer_problem(outcome_of(**outcome)) == "") == ok


def test_unexpected_exit_codes_and_tracebacks_are_problems():
    assert campaign.answer_problems(Fault(KILLED), outcome_of(code=0)) and campaign.answer_problems(
        Fault(TERMINATED), outcome_of(code=None)
    )
    assert campaign.answer_problems(Fault(TERMINATED, message="saved at"), outcome_of(out="nothing"))
    assert campaign.answer_problems(Fault(TERMINATED), outcome_of(err="Traceback (most recent call last)")) == [
        "a traceback"
    ]
    assert not campaign.answer_problems(Fault(TERMINATED, message="saved at"), outcome_of(out="saved at step 3"))


def test_training_must_resume_from_the_newest_checkpoint_or_report_damage():
    resumed = outcome_of(out="Resumed 0_train at step 7 of 98.", steps={7: "a"})
    with_message = dataclasses.replace(resumed, err="damaged: going on from checkpoint 7.")
    assert not campaign.resumption_problems(Fault(KILLED), resumed, [0, 7])
    assert campaign.resumption_problems(Fault(KILLED), with_message, [7, 14]) == ["resumed from step 7 instead of 14"]
    assert "without a message" in campaign.resumption_problems(Fault(KILLED, may_fall_back=True), resumed, [7, 14])[0]
    assert not campaign.resumption_problems(Fault(KILLED, may_fall_back=True), with_message, [7, 14])
    assert campaign.resumption_problems(Fault(KILLED, may_fall_back=True), with_message, [7, 14, 21])


def test_only_an_unfinished_save_may_be_lost():
    killed = outcome_of(saves=[14, 21], steps={21: "a"})
    assert not campaign.lost_checkpoints(killed, before=[7], after=[7, 14]) and not campaign.lost_checkpoints(
        killed, [7], [14, 21]
    )
    assert campaign.lost_checkpoints(killed, [7], [7]) == [
        "the newest checkpoint is 7, though the save of step 14 had ended"
    ]
    assert campaign.lost_checkpoints(outcome_of(saves=[14]), before=[7], after=[]) != []


def test_a_different_state_is_reported():
    reference = campaign.Reference({}, {1: "a", 2: "b"})
    assert not campaign.state_mismatches(outcome_of(steps={2: "b"}), reference)
    assert "before step 2" in campaign.state_mismatches(outcome_of(steps={1: "a", 2: "c"}), reference)[0]


RECORD = {
    "command": "pytest -m faults --faults=10",
    "commit": "0123456",
    "machine": {"cpu": "Some CPU", "cores": 2},
    "versions": {"jax": "0.10.2"},
    "digest": True,
    "points": {"commit": {"description": "SIGKILL", "faults": 10, "failed": 1, "fell_back": 0, "lost": 7}},
    "runs": [{"end": "the same"}, {"end": "3 results differ"}],
}


def test_table_of_the_campaign_lists_every_point(tmp_path):
    assert "not measured yet; `pytest -m faults --faults=10`" in tables.faults(tmp_path)
    folder = tmp_path / "faults"
    folder.mkdir()
    (folder / "digest-off.json").write_text(json.dumps(RECORD | {"digest": False}))
    (folder / "campaign.json").write_text(json.dumps(RECORD))
    text, _, _, _, row, _, off = tables.faults(tmp_path).splitlines()
    assert "10 faults at 1 point, 1 of them failed; 1 of 2 runs ended like the run without faults" in text
    assert row == "| `commit` | SIGKILL | 10 | 1 |  | 7 |"
    assert off.startswith("With the digest of checkpoints switched off:")


def test_results_of_a_point_replace_only_that_point(tmp_path, monkeypatch):
    """Points of the same code, seed and number of faults stay; others are dropped."""
    path = tmp_path / "faults" / "campaign.json"
    monkeypatch.setattr(campaign.record, "machine", lambda: {"cpu": "a cpu", "cores": 2})

    def write(name, *problems, faults=2, seed=0):
        rows = [{"point": name, "done": "", "problems": list(p), "lost": 3} for p in problems]
        campaign.write_results(path, name, [{"end": "the same", "faults": rows}], faults=faults, seed=seed)
        return json.loads(path.read_text())

    write("commit", [], ["lost"])
    written = write("step_killed", [], [])
    assert list(written["points"]) == ["step_killed", "commit"] and len(written["runs"]) == 2
    assert written["points"]["commit"]["failed"] == 1 and written["points"]["commit"]["lost"] == 3
    written = write("commit", [], [])
    assert written["points"]["commit"]["failed"] == 0 and len(written["runs"]) == 2
    assert written["command"] == "pytest -m faults --faults=2 --faults-seed=0"
    assert "4 faults at 2 points, 0 of them failed; 2 of 2 runs" in tables.faults(tmp_path)
    assert list(write("commit", [], seed=1)["points"]) == ["commit"]


def test_faults_repeat_from_a_seed():
    draws = [POINTS["step_killed"].draw(np.random.default_rng([0, 1]), None) for _ in range(2)]
    assert draws[0] == draws[1] and len(POINTS) >= 27


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Returns `real(points, digest=...)` -> (rows, end) of a short run with these faults.

    `real.reference` is the run without faults.
    """
    folder = tmp_path_factory.mktemp("faults")
    patch = pytest.MonkeyPatch()
    patch.chdir(tables.ROOT)
    patch.setenv("XLA_FLAGS", "")
    patch.setattr("tests.robustness.faults.run.CONFIG", tuple(text.replace("epochs=14", "epochs=5") for text in CONFIG))
    data = folder / "digits.npz"
    campaign.write_digits(data)
    reference = campaign.reference_run(Run(folder / "disk", "reference", data))

    def inject(names, digest=True):
        run = Run(folder / "disk", f"digest-{digest}", data, digest=digest)
        return campaign.inject_faults(run, names, np.random.default_rng(0), reference)

    inject.reference = reference
    yield inject
    patch.undo()


def change_weight(rng, run):
    """Flips a bit of a weight of the newest checkpoint; only the digest can detect it."""
    state = run.newest_checkpoint() / "state"
    tree = ocp.PyTreeCheckpointer().restore(state)
    kernel = np.array(tree["params"]["head"]["kernel"])
    kernel.view(np.uint32)[0, 0] ^= 1 << 22
    tree["params"]["head"]["kernel"] = kernel
    ocp.PyTreeCheckpointer().save(state, tree, force=True)
    return points.damaged_file(rng, lambda *_: "one weight", [])


@pytest.fixture
def weight(monkeypatch):
    monkeypatch.setitem(POINTS, "weight", points.Point("weight", "", change_weight, checkpoints=2))


@pytest.mark.slow
def test_run_ends_like_the_reference_after_three_faults(real, weight):
    rows, end = real(["during_save", "weight", "second_run"])
    assert end == "the same" and [row["problems"] for row in rows] == [[], [], []]
    assert rows[1]["fell_back"]


@pytest.mark.slow
def test_run_diverges_where_digests_are_not_verified(real, weight):
    (row,), end = real(["weight"], digest=False)
    assert "differs from that of the run without faults" in row["problems"][0] and "results differ" in end


@pytest.mark.slow
def test_a_changed_byte_of_the_results_is_reported(real):
    results = real.reference.results
    names = " ".join(results)
    for part in ("array params/", "array opt_state/", "array average/", "array key", "batch-00014 attack/fgsm"):
        assert part in names
    assert {"metrics.jsonl", "export/network.jax", "file report.json", "checkpoint 35"} <= results.keys()
    assert compare.mismatches(results, dict(results)) == []
    assert compare.mismatches(results, results | {"more": ""}) == ["more"]
    array = np.arange(4, dtype=np.float32)
    other = np.frombuffer(bytes([array.tobytes()[0] ^ 1]) + array.tobytes()[1:], np.float32)
    assert compare._array(array) != compare._array(other) and compare._array(array) != compare._array(array[None])


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """Returns `references(kind)` -> (a function that makes a run of this kind, the reference run)."""
    folder = tmp_path_factory.mktemp("campaign")
    data = folder / "digits.npz"
    numbers = itertools.count()

    @functools.cache
    def references(kind):
        def make():
            return kind(folder / "disk", f"run-{next(numbers)}", data)

        run = make()
        reference = campaign.reference_run(run)
        run.remove()
        return make, reference

    with pytest.MonkeyPatch.context() as patch, disk.mounted(folder / "disk") as references.mounted:
        patch.chdir(tables.ROOT)
        patch.setenv("XLA_FLAGS", "")
        campaign.write_digits(data)
        yield references


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize("name", POINTS)
def test_run_with_faults_ends_like_one_without(references, request, name):
    if POINTS[name].mounts and not references.mounted:
        pytest.skip("this process may not mount a file system")
    number, seed = request.config.option.faults, request.config.option.faults_seed
    make, reference = references(Pair if POINTS[name].processes == 2 else Run)
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    runs, left = [], number or 1
    while left > 0:
        run = make()
        rows, end = campaign.inject_faults(run, [name] * min(left, campaign.PER_RUN), rng, reference)
        run.remove()
        runs.append({"end": end, "faults": rows})
        left -= len(rows)
    if number:
        campaign.write_results(RESULTS, name, runs, faults=number, seed=seed)
    failed = [
        f"{row['done']}: {'; '.join(row['problems'])}" for run in runs for row in run["faults"] if row["problems"]
    ]
    assert not failed, "\n".join(failed)

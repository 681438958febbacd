"""The fault campaign: what it draws, what it takes for a failure, and a few real faults."""

import collections
import dataclasses
import json

import numpy as np
import orbax.checkpoint as ocp
import pytest

from experiments import tables
from experiments.faults import __main__ as door
from experiments.faults import campaign, compare, points
from experiments.faults import run as running
from experiments.faults.points import POINTS, Fault
from experiments.faults.run import KILLED, REFUSED, TERMINATED, Outcome, Run, refusal

OUTCOME = Outcome(code=TERMINATED, out="", err="", steps={}, saves=[])


def found(**fields):
    return dataclasses.replace(OUTCOME, **fields)


def test_every_point_is_drawn_equally_often_and_the_same_from_a_seed():
    names = list(POINTS)
    assert len(names) >= 12 and "full_disk" not in points.possible(mounts=False)
    runs = campaign.draw(names, 10 * len(names) + 3, seed=1)
    counts = collections.Counter(name for run in runs for name in run)
    assert set(counts) == set(names) and sorted(counts.values())[-4:] == [10, 11, 11, 11]
    assert (
        runs == campaign.draw(names, 10 * len(names) + 3, seed=1) != campaign.draw(names, 10 * len(names) + 3, seed=2)
    )
    for run in runs:
        assert len(run) <= campaign.PER_RUN and [points.order(name) for name in run] == sorted(map(points.order, run))
        assert len({POINTS[name].processes for name in run}) == 1, "a run is of one process or of two"


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
    assert refusal(found(**outcome)).startswith(problem) and bool(refusal(found(**outcome))) == bool(problem)
    assert campaign.answered(Fault(REFUSED), found(**outcome)) == ([refusal(found(**outcome))] if problem else [])


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
def test_one_that_is_left_alone_ends_by_itself_and_says_why(outcome, ok):
    assert (running.peer_died(found(**outcome)) == "") == ok


def test_another_ending_is_a_failure():
    assert campaign.answered(Fault(KILLED), found(code=0)) and campaign.answered(Fault(TERMINATED), found(code=None))
    assert campaign.answered(Fault(TERMINATED, says="saved at"), found(out="nothing"))
    assert campaign.answered(Fault(TERMINATED), found(err="Traceback (most recent call last)")) == ["a traceback"]
    assert not campaign.answered(Fault(TERMINATED, says="saved at"), found(out="saved at step 3"))


def test_training_must_go_on_from_the_newest_checkpoint_or_say_why_not():
    resumed = found(out="Resumed 0_train at step 7 of 98.", steps={7: "a"})
    told = dataclasses.replace(resumed, err="damaged: going on from checkpoint 7.")
    assert not campaign.went_on(Fault(KILLED), resumed, [0, 7])
    assert campaign.went_on(Fault(KILLED), told, [7, 14]) == ["went on from step 7 instead of 14"]
    assert "without a word" in campaign.went_on(Fault(KILLED, falls_back=True), resumed, [7, 14])[0]
    assert not campaign.went_on(Fault(KILLED, falls_back=True), told, [7, 14])
    assert campaign.went_on(Fault(KILLED, falls_back=True), told, [7, 14, 21])


def test_nothing_may_be_lost_but_the_save_that_was_under_way():
    killed = found(saves=[14, 21], steps={21: "a"})
    assert not campaign.kept(killed, before=[7], after=[7, 14]) and not campaign.kept(killed, [7], [14, 21])
    assert campaign.kept(killed, [7], [7]) == ["the newest checkpoint is 7, though the save of step 14 had ended"]
    assert campaign.kept(found(saves=[14]), before=[7], after=[]) != []


def test_a_state_that_differs_is_noticed():
    reference = campaign.Reference({}, {1: "a", 2: "b"})
    assert not campaign.state_mismatches(found(steps={2: "b"}), reference)
    assert "before step 2" in campaign.state_mismatches(found(steps={1: "a", 2: "c"}), reference)[0]


RECORD = {
    "command": "python -m experiments.faults",
    "commit": "0123456",
    "machine": {"cpu": "Some CPU", "cores": 2},
    "versions": {"jax": "0.10.2"},
    "digest": True,
    "drawn": [["commit"] * 8, ["commit"] * 3],
    "points": {"commit": {"words": "SIGKILL", "faults": 10, "failed": 1, "fell_back": 0, "lost": 7}},
    "runs": [{"end": "the same"}, {"end": "ended otherwise"}],
}


def test_the_table(tmp_path):
    assert "not measured yet; `python -m experiments.faults`" in tables.faults(tmp_path)
    folder = tmp_path / "faults"
    folder.mkdir()
    (folder / "digest-off.json").write_text(json.dumps(RECORD | {"digest": False}))
    (folder / "digest-on.json").write_text(json.dumps(RECORD))
    text, _, _, _, row, _, off = tables.faults(tmp_path).splitlines()
    assert "10 faults of 11 so far at 1 points, 1 of them failed; 1 of 2 runs ended as the unbroken one" in text
    assert row == "| `commit` | SIGKILL | 10 | 1 |  | 7 |"
    assert off.startswith("With the digest of checkpoints switched off")


def test_the_door(tmp_path, monkeypatch, capsys):
    """What was done is kept and not done again; a failure is exit code 1; bad arguments are one line."""
    given = [f"--out={tmp_path}", f"--workdirs={tmp_path}", "--points=commit,step_killed", "--faults=20", "--seed=3"]
    called = []

    def hurt(run, names, rng, reference, tell):
        called.append(names)
        if len(called) == 2:
            raise KeyboardInterrupt
        rows = [{"point": name, "done": "", "problems": ["lost"] if len(called) == 4 else []} for name in names]
        return rows, "the same"

    monkeypatch.setattr(campaign, "unbroken", lambda run: campaign.Reference({}, {}))
    monkeypatch.setattr(campaign, "inject_faults", hurt)
    monkeypatch.setattr(door.disk, "_mount", lambda *_: False)
    assert door.main(given) == 130 and len(json.loads((tmp_path / "digest-on.json").read_text())["runs"]) == 1
    assert door.main(given) == 1
    made = json.loads((tmp_path / "digest-on.json").read_text())
    assert called[1] == called[2] and [len(run["faults"]) for run in made["runs"]] == [8, 8, 4]
    assert [row["faults"] for row in made["points"].values()] == [10, 10]
    assert sum(row["failed"] for row in made["points"].values()) == 4 and door.main(given) == 1 and len(called) == 4
    capsys.readouterr()
    for wrong, text in (("--points=comit", "commit"), ("--digest=no", "off, on"), ("--points=full_disk", "mount")):
        assert door.main([*given[:2], wrong]) == 2
        printed = capsys.readouterr().err
        assert printed.startswith("Error: ") and printed.count("\n") == 1 and text in printed


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """`real(points, digest=...)`: (rows, end) of a run that these faults were done to, and the end of the unbroken one.

    The runs are short.
    """
    folder = tmp_path_factory.mktemp("faults")
    patch = pytest.MonkeyPatch()
    patch.chdir(tables.ROOT)
    patch.setenv("XLA_FLAGS", "")
    patch.setattr(running, "CONFIG", tuple(text.replace("epochs=14", "epochs=5") for text in running.CONFIG))
    data = folder / "digits.npz"
    campaign.write_digits(data)
    reference = campaign.reference_run(Run(folder / "disk", "unbroken", data))

    def hurt(names, digest=True):
        run = Run(folder / "disk", f"digest-{digest}", data, digest=digest)
        return campaign.inject_faults(run, names, np.random.default_rng(0), reference, lambda _: None)

    hurt.reference = reference
    yield hurt
    patch.undo()


def changed(rng, run):
    """One bit of one weight of the newest checkpoint, in files that are whole otherwise: no reader can tell."""
    state = run.newest() / "state"
    tree = ocp.PyTreeCheckpointer().restore(state)
    kernel = np.array(tree["params"]["head"]["kernel"])
    kernel.view(np.uint32)[0, 0] ^= 1 << 22
    tree["params"]["head"]["kernel"] = kernel
    ocp.PyTreeCheckpointer().save(state, tree, force=True)
    return points.damaged(rng, run, lambda *_: "one weight", [])


@pytest.fixture
def weight(monkeypatch):
    monkeypatch.setitem(POINTS, "weight", points.Point("weight", "", changed, checkpoints=2))


def test_faults_that_are_real(real, weight):
    rows, end = real(["during_save", "weight", "second_run"])
    assert end == "the same" and [row["problems"] for row in rows] == [[], [], []]
    assert rows[1]["fell_back"]


def test_without_the_digest_it_fails(real, weight):
    (row,), end = real(["weight"], digest=False)
    assert "is another than that of the unbroken run" in row["problems"][0] and "ended otherwise" in end


def test_a_byte_of_the_end_is_noticed(real):
    end = real.reference.end
    names = " ".join(end)
    for part in ("array params/", "array opt_state/", "array average/", "array key", "batch-00014 attack/fgsm"):
        assert part in names
    assert {"metrics.jsonl", "export/network.jax", "file report.json", "checkpoint 35"} <= end.keys()
    assert compare.differing(end, dict(end)) == [] and compare.differing(end, end | {"more": ""}) == ["more"]
    array = np.arange(4, dtype=np.float32)
    other = np.frombuffer(bytes([array.tobytes()[0] ^ 1]) + array.tobytes()[1:], np.float32)
    assert compare._array(array) != compare._array(other) and compare._array(array) != compare._array(array[None])

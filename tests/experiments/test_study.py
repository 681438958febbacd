"""The study's processes: order, resume, failures, and answers to what cannot be. Nothing is trained here."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.study import jobs
from experiments.study.__main__ import main, parse
from experiments.study.rows import PRESETS, ROWS, Row, with_bases
from lt_adv.cli import flags, schema
from tests.experiments.fake_runs import option

ROOT = Path(__file__).parents[2]


def test_every_config_has_a_row_and_every_row_a_config():
    there = {path.stem for path in (ROOT / "configs").glob("*.py")} - {"__init__", "common"}
    assert {row.config for row in ROWS.values()} == there, "experiments/study/rows.py"


@pytest.mark.parametrize("name", ROWS)
def test_every_row_can_be_run(name, monkeypatch, tmp_path):
    """Its config takes its arguments, epochs and every preset; its base is a row that is trained."""
    monkeypatch.chdir(ROOT)
    row = ROWS[name]
    assert ("{base}" in row.arguments) == (row.base is not None and not row.evaluates)
    if row.base:
        assert not ROWS[row.base].evaluates
    if row.evaluates:  # what the base was trained with must be given again
        assert row.share == ROWS[row.base].share and not ROWS[row.base].overrides
    for given in (["--dataset=digits", "--epochs=3"], *([f"--preset={preset}"] for preset in PRESETS)):
        asked = parse([f"--rows={name}", f"--workdirs={tmp_path}", *given])
        config = flags.parse(jobs.command(asked, jobs.Job(name, 0, asked.part))[1:]).config
        schema.values(config)


def test_titles_are_told_apart():
    assert len({row.title for row in ROWS.values()}) == len(ROWS)


def test_the_cpu_budget_is_one_for_all(monkeypatch):
    monkeypatch.chdir(ROOT)
    asked = parse(["--preset=cpu", "--config.data.path=some/images"])
    assert (asked.name, asked.seeds, asked.epochs, asked.part) == ("cpu", (0, 1), 10, "subset")
    assert asked.rows == tuple(name for name in ROWS if not ROWS[name].varies)
    assert asked.workdirs == Path("workdirs/cpu")
    for name, row in ROWS.items():
        config = flags.parse(jobs.command(asked, jobs.Job(name, 0, asked.part))[1:]).config
        assert (config.data.name, config.data.path, config.data.image_size) == ("image_folder", "some/images", 16)
        assert config.data.imbalance_ratio == 50 and config.data.imbalance == "exponential"
        assert (config.model.name, config.model.depth, config.model.width) == ("wide_resnet", 10, 1)
        assert config.eval.subset_per_class == 100
        assert {config.eval.attacks[name].eps for name in config.eval.only} == {0.031}
        assert config.attack.eps == 0.031
        if row.share == 1:
            assert config.optim.epochs == 10 and config.optim.batch_size == 64


def test_choices_of_ours_never_see_the_test_set(monkeypatch):
    monkeypatch.chdir(ROOT)
    asked = parse(["--preset=ablation", "--config.data.path=some/images"])
    for name in asked.rows:
        config = flags.parse(jobs.command(asked, jobs.Job(name, 0, asked.part))[1:]).config
        assert config.eval.split == "validation" and config.data.validation_per_class == 100
    varied = {ROWS[name].varies for name in asked.rows} - {None}
    assert {"self_distillation", "reat"} <= varied <= set(asked.rows)
    assert all(ROWS[name].config == ROWS[ROWS[name].varies].config for name in asked.rows if ROWS[name].varies)


def test_a_row_comes_after_the_one_that_it_needs(study):
    assert with_bases(["tuned_twice", "robal", "shifted"]) == ("at", "tuned", "tuned_twice", "robal", "shifted")
    code, runs = study("--rows=tuned_twice,shifted,robal", "--seeds=0,1", "--epochs=5", "--scales=1,10")
    assert code == 0
    first = ["at-seed0", "at-seed0/scales", "tuned-seed0", "tuned-seed0/scales", "tuned_twice-seed0"]
    first += ["tuned_twice-seed0/scales", "at-seed0/shifted", "at-seed0/shifted-scales"]
    first += ["robal-seed0", "robal-seed0/scales"]
    second = ["at-seed1", "tuned-seed1", "tuned_twice-seed1", "at-seed1/shifted", "robal-seed1"]
    assert runs.names == first + second


def test_commands(study):
    _, runs = study("--rows=robal,tuned,shifted", "--epochs=5", "--config.attack.num_steps=2", "--scales=0.1,10")
    found = dict(zip(runs.names, runs.given, strict=True))
    base = option(found["at-seed0"], "workdir")
    assert option(found["robal-seed0"], "config") == "configs/robal.py:dataset=digits,variant=N,epochs=2"
    assert option(found["robal-seed0"], "config.attack.num_steps") == "3", "what makes the row, goes before the budget"
    assert option(found["at-seed0"], "config.attack.num_steps") == "2"
    assert option(found["tuned-seed0"], "config") == f"configs/lws.py:dataset=digits,baseline={base}", "its own epochs"
    assert option(found["tuned-seed0"], "workdir") != base
    shifted = found["at-seed0/shifted"]
    assert option(shifted, "mode") == "eval" and option(shifted, "workdir") == base
    swept = found["at-seed0/scales"]
    assert option(swept, "config") == "experiments/study/sweep.py:configs/at.py:dataset=digits,epochs=5"
    # What main would make of it: the same network and training, other attacks.
    config, other = (flags.parse(found[name][1:]).config for name in ("at-seed0", "at-seed0/scales"))
    assert other.eval.only == ("scale_0p1", "scale_10")
    assert other.eval.attacks.scale_0p1.to_dict() == {**config.eval.attacks.pgd20.to_dict(), "logit_scale": 0.1}
    schema.values(other)
    with config.unlocked(), other.unlocked():
        del config.eval, other.eval
    assert config.to_dict() == other.to_dict()


def test_what_is_finished_is_not_run_again(study):
    given = ("--rows=at,shifted", "--epochs=3")
    assert study(*given)[1].names == ["at-seed0", "at-seed0/shifted"]
    assert study(*given)[1].names == []
    _, more = study(*given, "--seeds=0,1")
    assert more.names == ["at-seed1", "at-seed1/shifted"]
    _, other = study("--rows=at", "--epochs=4")
    assert other.names == ["at-seed0"], "another budget is another run"
    table = json.loads((study.folder / "table.json").read_text())
    assert table["rows"]["at"]["seeds"] == [0] and set(table["rows"]) == {"at"}, "budgets do not meet in a table"


def test_a_network_that_is_gone_is_trained_again_where_it_is_needed(study, tmp_path):
    study("--rows=at", "--epochs=3")
    (tmp_path / "runs").rename(tmp_path / "elsewhere")  # as in a fresh clone, which has the results alone
    assert study("--rows=at", "--epochs=3")[1].names == []
    assert study("--rows=at,shifted", "--epochs=3")[1].names == ["at-seed0", "at-seed0/shifted"]


def test_a_failed_row_takes_only_those_along_that_need_it(study, capsys):
    fails = {"tuned": (2, "Error: too many in /data/images/set")}
    code, runs = study("--rows=tuned_twice,robal", fails=fails)
    assert code == 1 and runs.names == ["at-seed0", "tuned-seed0", "robal-seed0"]
    failed = json.loads((study.folder / "table.json").read_text())["failed"]
    assert failed == {
        "tuned-seed0-full": "too many in .../set",
        "tuned_twice-seed0-full": "needs tuned, which failed",
    }
    text = (study.folder / "table.md").read_text()
    assert "| tuned-seed0-full | too many in .../set |" in text and "| RoBal-N |" in text
    assert "tuned-seed0-full: too many" in capsys.readouterr().out
    code, runs = study("--rows=tuned_twice,robal")
    assert code == 0 and runs.names == ["tuned-seed0", "tuned_twice-seed0"]
    assert json.loads((study.folder / "table.json").read_text())["failed"] == {}
    assert "Failed" not in (study.folder / "table.md").read_text()


def test_a_run_that_was_stopped_is_no_result(study):
    code, _ = study("--rows=at")
    path = study.folder / "at-seed0-full.json"
    path.unlink()
    code, _ = study("--rows=at", silent={"at"})
    assert code == 1 and not path.exists(), "the report of another time lies there"
    assert "SIGTERM: saved at step 3" in (study.folder / "failed" / "at-seed0-full.txt").read_text()


def test_a_study_that_is_stopped_shows_what_it_has(study, monkeypatch, capsys):
    study("--rows=at", "--epochs=3")

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "launch", stopped)
    assert study("--rows=at,robal", "--epochs=3")[0] == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert set(json.loads((study.folder / "table.json").read_text())["rows"]) == {"at"}


def test_a_result_says_where_it_is_from(study):
    study("--rows=tuned", "--config.data.path=/data/images/here")
    found = json.loads((study.folder / "tuned-seed0-full.json").read_text())
    config = "configs/lws.py:dataset=digits,baseline=workdirs/s/at-seed0"
    assert found["command"].startswith(f"python -m lt_adv.main --config={config} --workdir=workdirs/s/tuned-seed0 ")
    assert "--config.data.path=.../here" in found["command"]
    assert found["commit"] == "0123456789ab" and found["machine"]["device"] == "1 x cpu"
    assert found["training_seconds"] == 2 * 5.5, "all stages, of the base too"
    assert not re.search(r"[= ']/\w", json.dumps({k: v for k, v in found.items() if k != "report"}))


def test_a_process_and_its_last_word(tmp_path):
    log = tmp_path / "logs" / "a.log"
    good = "import sys; print('one'); print('last'); print('a warning', file=sys.stderr)"
    assert jobs.execute(["-c", good], log) == (0, "last")
    assert log.read_text() == "one\nlast\na warning\n"
    bad = "import sys; print('out'); print('noise', file=sys.stderr); sys.exit('Error: no such row')"
    assert jobs.execute(["-c", bad], log) == (1, "Error: no such row")


def test_a_process_is_told_to_save_when_the_study_is_stopped(tmp_path, monkeypatch):
    waiting = "import signal, sys, time\n"
    waiting += "signal.signal(15, lambda *_: sys.exit(open(sys.argv[1], 'w').write('saved')))\n"
    waiting += "print('ready', flush=True)\ntime.sleep(60)"
    communicate = subprocess.Popen.communicate

    def interrupted(process, *given):
        monkeypatch.setattr(subprocess.Popen, "communicate", communicate)
        while "ready" not in (tmp_path / "log").read_text():
            pass
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess.Popen, "communicate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        jobs.execute(["-c", waiting, str(tmp_path / "said")], tmp_path / "log")
    assert (tmp_path / "said").read_text() == "saved"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--rows=at,robbal"], "Did you mean 'robal'?"),
        (["--rows="], "Unknown row ''"),
        (["--seeds=0,-1"], "--seeds: must be whole numbers"),
        (["--seeds=one"], "--seeds: must be whole numbers"),
        (["--epochs=0"], "--epochs: must be above 0"),
        (["--epochs=ten"], "--epochs: must be a number of type int"),
        (["--preset=gpu"], "Unknown preset 'gpu'"),
        (["--scales=2"], "Unknown scale 2.0"),
        (["--scales=much"], "Unknown scale 'much'"),
        (["--name=.."], "--name: must be of letters"),
        (["--row=at"], "Did you mean '--rows'?"),
        (["stray"], "Unknown option 'stray'"),
        (["--workdir=w"], "Did you mean '--workdirs'?"),
        (["--rows=at", "--config.optim.batch_siz=3"], "row at: Unknown entry"),
        (["--rows=at,robal", "--config.optim.batch_size=0"], "config.optim.batch_size must be a whole number"),
        (["--rows=at", "--dataset=digits,epochs=3"], "--dataset: must be of letters"),
    ],
)
def test_bad_arguments_are_answered_in_one_line(given, expected, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(jobs, "execute", lambda *_: pytest.fail("a process was started"))
    assert main([*given, f"--out={tmp_path}"]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("Error: ") and printed.err.count("\n") == 1 and expected in printed.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["out", "workdirs"])
def test_a_place_that_cannot_be_written(place, study, capsys, tmp_path):
    (tmp_path / "file").write_text("mine")
    code, runs = study("--rows=at", f"--{place}={tmp_path}/file")
    assert (code, runs.given) == (2, []) and capsys.readouterr().err.startswith(f"Error: {tmp_path}/file")


def test_a_row_that_alone_cannot_fails_alone(study, monkeypatch):
    """The others have such an entry."""
    monkeypatch.setitem(ROWS, "odd", Row("Odd", "no_such_config"))
    code, runs = study("--rows=odd,at", fails={"odd": (2, "Error: Unknown config file")})
    assert code == 1 and len(runs.given) == 2 and (study.folder / "at-seed0-full.json").exists()


def test_a_real_run_of_a_row_that_cannot_be(tmp_path, monkeypatch):
    """Not a stand-in: the process answers, and its line is kept."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setitem(ROWS, "odd", Row("Odd", "at", "variant=Q"))
    asked = parse(["--rows=odd", "--dataset=digits", f"--out={tmp_path}", f"--workdirs={tmp_path}/runs"])
    (answer,) = {reason for _, reason in jobs.run(asked)}
    assert "config argument 'variant=Q'" in answer and "\n" not in answer and sys.executable not in answer


def test_help_describes_every_preset(capsys):
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"--preset={name}" in printed for name in PRESETS)

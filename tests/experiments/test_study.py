"""The processes of a study: order, resume, failures, refusal of bad arguments. Nothing is trained."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.study import jobs
from experiments.study.__main__ import main, parse
from experiments.study.rows import PRESETS, ROWS, Row, with_bases
from lt_adv.cli import flags
from lt_adv.cli.experiment import Experiment
from tests.experiments.fake_runs import option

ROOT = Path(__file__).parents[2]


def test_every_config_has_a_row_and_every_row_a_config():
    configs = {path.stem for path in (ROOT / "configs").glob("*.py")} - {"__init__", "common"}
    assert {row.config for row in ROWS.values()} == configs, "experiments/study/rows.py"


@pytest.mark.parametrize("name", ROWS)
def test_every_row_has_a_valid_command(name, monkeypatch, tmp_path):
    """Its config accepts its arguments, epochs and every preset; its base is a row that trains."""
    monkeypatch.chdir(ROOT)
    row = ROWS[name]
    assert ("{base}" in row.arguments) == (row.base is not None and not row.evaluates)
    if row.base:
        assert not ROWS[row.base].evaluates
    if row.evaluates:  # the config must equal that of the base
        assert row.share == ROWS[row.base].share and not ROWS[row.base].overrides
    for arguments in (["--dataset=digits", "--epochs=3"], *([f"--preset={preset}"] for preset in PRESETS)):
        study_options = parse([f"--rows={name}", f"--workdirs={tmp_path}", *arguments])
        config = flags.parse(jobs.command(study_options, jobs.Job(name, 0, study_options.part))[1:]).config
        Experiment.from_config(config)


def test_titles_are_unique():
    assert len({row.title for row in ROWS.values()}) == len(ROWS)


def test_cpu_preset_gives_every_row_the_same_budget(monkeypatch):
    monkeypatch.chdir(ROOT)
    study_options = parse(["--preset=cpu", "--config.data.path=some/images"])
    assert (study_options.name, study_options.seeds, study_options.epochs, study_options.part) == (
        "cpu",
        (0, 1),
        10,
        "subset",
    )
    assert study_options.rows == tuple(name for name in ROWS if not ROWS[name].varies)
    assert study_options.workdirs == Path("workdirs/cpu")
    for name, row in ROWS.items():
        config = flags.parse(jobs.command(study_options, jobs.Job(name, 0, study_options.part))[1:]).config
        assert (config.data.name, config.data.path, config.data.image_size) == ("image_folder", "some/images", 16)
        assert config.data.imbalance_ratio == 50 and config.data.imbalance == "exponential"
        assert (config.model.name, config.model.depth, config.model.width) == ("wide_resnet", 10, 1)
        assert config.eval.subset_per_class == 100
        assert {config.eval.attacks[name].eps for name in config.eval.only} == {0.031}
        assert config.attack.eps == 0.031
        if row.share == 1:
            assert config.optim.epochs == 10 and config.optim.batch_size == 64


def test_ablations_never_use_the_test_set(monkeypatch):
    monkeypatch.chdir(ROOT)
    study_options = parse(["--preset=ablation", "--config.data.path=some/images"])
    for name in study_options.rows:
        config = flags.parse(jobs.command(study_options, jobs.Job(name, 0, study_options.part))[1:]).config
        assert config.eval.split == "validation" and config.data.validation_per_class == 100
    varied = {ROWS[name].varies for name in study_options.rows} - {None}
    assert {"self_distillation", "reat"} <= varied <= set(study_options.rows)
    assert all(ROWS[name].config == ROWS[ROWS[name].varies].config for name in study_options.rows if ROWS[name].varies)


def test_row_runs_after_its_base(study):
    assert with_bases(["tuned_twice", "robal", "shifted"]) == ("at", "tuned", "tuned_twice", "robal", "shifted")
    code, runs = study("--rows=tuned_twice,shifted,robal", "--seeds=0,1", "--epochs=5", "--scales=1,10")
    assert code == 0
    first = ["at-seed0", "at-seed0/scales", "tuned-seed0", "tuned-seed0/scales", "tuned_twice-seed0"]
    first += ["tuned_twice-seed0/scales", "at-seed0/shifted", "at-seed0/shifted-scales"]
    first += ["robal-seed0", "robal-seed0/scales"]
    second = ["at-seed1", "tuned-seed1", "tuned_twice-seed1", "at-seed1/shifted", "robal-seed1"]
    assert runs.names == first + second


def test_commands_of_every_kind_of_row(study):
    _, runs = study("--rows=robal,tuned,shifted", "--epochs=5", "--config.attack.num_steps=2", "--scales=0.1,10")
    commands = dict(zip(runs.names, runs.commands, strict=True))
    base = option(commands["at-seed0"], "workdir")
    assert option(commands["robal-seed0"], "config") == "configs/robal.py:dataset=digits,variant=N,epochs=2"
    assert option(commands["robal-seed0"], "config.attack.num_steps") == "3", "overrides of the row take precedence"
    assert option(commands["at-seed0"], "config.attack.num_steps") == "2"
    assert option(commands["tuned-seed0"], "config") == f"configs/lws.py:dataset=digits,baseline={base}", (
        "the epochs of its config"
    )
    assert option(commands["tuned-seed0"], "workdir") != base
    shifted = commands["at-seed0/shifted"]
    assert option(shifted, "mode") == "eval" and option(shifted, "workdir") == base
    swept = commands["at-seed0/scales"]
    assert option(swept, "config") == "experiments/study/sweep.py:configs/at.py:dataset=digits,epochs=5"
    # The configs differ only in their attacks.
    config, other = (flags.parse(commands[name][1:]).config for name in ("at-seed0", "at-seed0/scales"))
    assert other.eval.only == ("scale_0p1", "scale_10")
    assert other.eval.attacks.scale_0p1.to_dict() == {**config.eval.attacks.pgd20.to_dict(), "logit_scale": 0.1}
    Experiment.from_config(other)
    with config.unlocked(), other.unlocked():
        del config.eval, other.eval
    assert config.to_dict() == other.to_dict()


def test_finished_runs_are_not_repeated(study):
    arguments = ("--rows=at,shifted", "--epochs=3")
    assert study(*arguments)[1].names == ["at-seed0", "at-seed0/shifted"]
    assert study(*arguments)[1].names == []
    _, more = study(*arguments, "--seeds=0,1")
    assert more.names == ["at-seed1", "at-seed1/shifted"]
    _, other = study("--rows=at", "--epochs=4")
    assert other.names == ["at-seed0"], "another budget is another run"
    table = json.loads((study.folder / "table.json").read_text())
    assert table["rows"]["at"]["seeds"] == [0] and set(table["rows"]) == {"at"}, "a table has one budget"


def test_missing_network_is_trained_again_if_required(study, tmp_path):
    study("--rows=at", "--epochs=3")
    (tmp_path / "runs").rename(tmp_path / "elsewhere")  # as in a fresh clone, which has only the results
    assert study("--rows=at", "--epochs=3")[1].names == []
    assert study("--rows=at,shifted", "--epochs=3")[1].names == ["at-seed0", "at-seed0/shifted"]


def test_failed_row_skips_only_rows_that_start_from_it(study, capsys):
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


def test_stopped_run_gives_no_result(study):
    code, _ = study("--rows=at")
    path = study.folder / "at-seed0-full.json"
    path.unlink()
    code, _ = study("--rows=at", silent={"at"})
    assert code == 1 and not path.exists(), "the report is from an earlier run"
    assert "SIGTERM: saved at step 3" in (study.folder / "failed" / "at-seed0-full.txt").read_text()


def test_stopped_study_writes_its_table(study, monkeypatch, capsys):
    study("--rows=at", "--epochs=3")

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "run_job", stopped)
    assert study("--rows=at,robal", "--epochs=3")[0] == 130
    assert "the same command resumes" in capsys.readouterr().err
    assert set(json.loads((study.folder / "table.json").read_text())["rows"]) == {"at"}


def test_result_records_command_commit_and_machine(study):
    study("--rows=tuned", "--config.data.path=/data/images/here")
    result = json.loads((study.folder / "tuned-seed0-full.json").read_text())
    config = "configs/lws.py:dataset=digits,baseline=workdirs/s/at-seed0"
    assert result["command"].startswith(f"python -m lt_adv.main --config={config} --workdir=workdirs/s/tuned-seed0 ")
    assert "--config.data.path=.../here" in result["command"]
    assert result["commit"] == "0123456789ab" and result["machine"]["device"] == "1 x cpu"
    assert result["training_seconds"] == 2 * 5.5, "all stages, of the base too"
    assert not re.search(r"[= ']/\w", json.dumps({k: v for k, v in result.items() if k != "report"}))


def test_execute_returns_the_last_line(tmp_path):
    log = tmp_path / "logs" / "a.log"
    good = "import sys; print('one'); print('last'); print('a warning', file=sys.stderr)"
    assert jobs.execute(["-c", good], log) == (0, "last")
    assert log.read_text() == "one\nlast\na warning\n"
    bad = "import sys; print('out'); print('noise', file=sys.stderr); sys.exit('Error: no such row')"
    assert jobs.execute(["-c", bad], log) == (1, "Error: no such row")


def test_stopped_study_terminates_its_process(tmp_path, monkeypatch):
    waiting = "import signal, sys, time\n"
    waiting += "signal.signal(15, lambda *_: sys.exit(open(sys.argv[1], 'w').write('saved')))\n"
    waiting += "print('ready', flush=True)\ntime.sleep(60)"
    communicate = subprocess.Popen.communicate

    def interrupted(process, *arguments):
        monkeypatch.setattr(subprocess.Popen, "communicate", communicate)
        while "ready" not in (tmp_path / "log").read_text():
            pass
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess.Popen, "communicate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        jobs.execute(["-c", waiting, str(tmp_path / "saved")], tmp_path / "log")
    assert (tmp_path / "saved").read_text() == "saved"


@pytest.mark.parametrize(
    ("arguments", "expected"),
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
def test_bad_arguments_give_one_line(arguments, expected, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(jobs, "execute", lambda *_: pytest.fail("a process was started"))
    assert main([*arguments, f"--out={tmp_path}"]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("Error: ") and printed.err.count("\n") == 1 and expected in printed.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option_name", ["out", "workdirs"])
def test_unwritable_folder_gives_one_line(option_name, study, capsys, tmp_path):
    (tmp_path / "file").write_text("mine")
    code, runs = study("--rows=at", f"--{option_name}={tmp_path}/file")
    assert (code, runs.commands) == (2, []) and capsys.readouterr().err.startswith(f"Error: {tmp_path}/file")


def test_invalid_row_does_not_stop_the_others(study, monkeypatch):
    monkeypatch.setitem(ROWS, "odd", Row("Odd", "no_such_config"))
    code, runs = study("--rows=odd,at", fails={"odd": (2, "Error: Unknown config file")})
    assert code == 1 and len(runs.commands) == 2 and (study.folder / "at-seed0-full.json").exists()


def test_real_process_reports_an_invalid_row(tmp_path, monkeypatch):
    """Starts a real process and reads its error."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setitem(ROWS, "odd", Row("Odd", "at", "variant=Q"))
    study_options = parse(["--rows=odd", "--dataset=digits", f"--out={tmp_path}", f"--workdirs={tmp_path}/runs"])
    (answer,) = {reason for _, reason in jobs.run(study_options)}
    assert "config argument 'variant=Q'" in answer and "\n" not in answer and sys.executable not in answer


def test_help_describes_every_preset(capsys):
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"--preset={name}" in printed for name in PRESETS)

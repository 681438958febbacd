"""A study: its rows and presets, the order of the processes, resume, failures and additional parts; one real study."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.study import jobs, sweep
from experiments.study.__main__ import main, parse
from experiments.study.rows import PRESETS, ROWS, Row, with_bases
from lt_adv.cli import flags
from lt_adv.cli.experiment import Experiment
from tests.conftest import QUICK
from tests.experiments.conftest import ROOT
from tests.experiments.fake_runs import option


def config_of(options, row):
    """Returns the config of a row in the main evaluation."""
    return flags.parse(jobs.command(options, jobs.Job(row, 0, options.part))[1:]).config


def test_every_config_has_a_row_and_every_row_a_config():
    configs = {path.stem for path in (ROOT / "configs").glob("*.py")} - {"__init__", "common"}
    assert {row.config for row in ROWS.values()} == configs, "experiments/study/rows.py"


@pytest.mark.parametrize("name", ROWS)
def test_every_row_has_a_valid_command(name, tmp_path):
    """Its config accepts its arguments, epochs and every preset; its base is a row that trains."""
    row = ROWS[name]
    assert ("{base}" in row.arguments) == (row.base is not None and not row.evaluates)
    if row.base:
        assert not ROWS[row.base].evaluates
    if row.evaluates:  # the config must equal that of the base
        assert row.share == ROWS[row.base].share and not ROWS[row.base].overrides
    for arguments in (["--dataset=digits", "--epochs=3"], *([f"--preset={preset}"] for preset in PRESETS)):
        if name == "cgrm" and arguments[0] in ("--preset=ablation", "--preset=recipe"):
            continue  # its training uses the validation split
        Experiment.from_config(config_of(parse([f"--rows={name}", f"--workdirs={tmp_path}", *arguments]), name))


def test_titles_are_unique():
    assert len({row.title for row in ROWS.values()}) == len(ROWS)


def test_cpu_preset_gives_every_row_the_same_budget():
    options = parse(["--preset=cpu", "--config.data.path=some/images"])
    assert (options.name, options.seeds, options.epochs, options.part) == ("cpu", (0, 1), 10, "subset")
    assert options.rows == tuple(name for name in ROWS if not ROWS[name].varies)
    assert options.workdirs == Path("workdirs/cpu")
    for name, row in ROWS.items():
        config = config_of(options, name)
        assert (config.data.name, config.data.path, config.data.image_size) == ("image_folder", "some/images", 16)
        assert config.data.imbalance_ratio == 50 and config.data.imbalance == "exponential"
        assert (config.model.name, config.model.depth, config.model.width) == ("wide_resnet", 10, 1)
        assert config.eval.subset_per_class == 100
        assert {config.eval.attacks[name].eps for name in config.eval.only} == {config.attack.eps} == {0.031}
        if row.share == 1:
            assert config.optim.epochs == 10 and config.optim.batch_size == 64


def test_candidates_for_our_recipe_never_use_the_test_set():
    options = parse(["--preset=recipe", "--config.data.path=some/images"])
    assert len(options.rows) == 5 and "lt_adv_faal" in options.rows
    for name in options.rows:
        config = config_of(options, name)
        assert (config.eval.split, config.data.validation_from) == ("validation", "unused")
        assert config.data.validation_per_class == 100 and config.model.depth == 16


def test_comparison_is_on_the_whole_test_set():
    options = parse(["--preset=comparison", "--config.data.path=some/images"])
    assert (options.seeds, options.epochs, options.part) == ((0, 1), 30, "full")
    for name in options.rows:
        config = config_of(options, name)
        assert (config.eval.split, config.eval.subset_per_class) == ("test", 0)
        assert config.eval.only == ("pgd20", "cw20", "lsa") and (config.model.depth, config.model.width) == (16, 2)


def test_ablations_never_use_the_test_set():
    options = parse(["--preset=ablation", "--config.data.path=some/images"])
    for name in options.rows:
        config = config_of(options, name)
        assert config.eval.split == "validation" and config.data.validation_per_class == 100
    varied = {ROWS[name].varies for name in options.rows} - {None}
    assert {"self_distillation", "reat"} <= varied <= set(options.rows)
    assert all(ROWS[name].config == ROWS[ROWS[name].varies].config for name in options.rows if ROWS[name].varies)


def test_precisions_differ_in_training_only():
    options = parse(["--preset=precision"])
    assert (options.seeds, options.dataset, options.epochs, options.part) == ((0, 1, 2), "digits", None, "full")
    configs = [config_of(options, name) for name in options.rows]
    assert [(config.model.dtype, config.attack.dtype) for config in configs] == [
        *(("float32", None), ("float32", "bfloat16"), ("bfloat16", None))
    ]
    assert {(config.eval.dtype, config.eval.only) for config in configs} == {("float32", ("pgd20",))}


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
    monkeypatch.setitem(ROWS, "odd", Row("Odd", "at", "variant=Q"))
    options = parse(["--rows=odd", "--dataset=digits", f"--out={tmp_path}", f"--workdirs={tmp_path}/runs"])
    (answer,) = {reason for _, reason in jobs.run(options)}
    assert "config argument 'variant=Q'" in answer and "\n" not in answer and sys.executable not in answer


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_damaged_result_is_made_again(tmp_path, content):
    options = parse(["--rows=at", "--dataset=digits", "--scales=none", f"--out={tmp_path}", "--name=s"])
    (job,) = options.jobs()
    jobs.result_path(options, job).parent.mkdir()
    jobs.result_path(options, job).write_text(content)
    assert jobs.remaining_jobs(options) == [job] and jobs.results(options, options.part) == {}


def test_autoattack_runs_for_all_seeds_on_fewer_images(study):
    arguments = ("--epochs=5", "--scales=none", "--autoattack=3", "--config.eval.attacks.pgd20.eps=0.05")
    arguments += ("--config.eval.only=('pgd20',)", "--config.eval.subset_per_class=9")  # of the main evaluation
    code, runs = study("--rows=at,shifted", "--seeds=0,1", *arguments)
    assert code == 0
    assert runs.names == ["at-seed0", "at-seed0/autoattack", "at-seed0/shifted", "at-seed0/shifted-autoattack"] + [
        "at-seed1", "at-seed1/autoattack", "at-seed1/shifted", "at-seed1/shifted-autoattack",
    ]  # fmt: skip
    commands = dict(zip(runs.names, runs.commands, strict=True))
    config = flags.parse(commands["at-seed0/autoattack"][1:]).config
    assert config.eval.only == ("autoattack",) and config.eval.subset_per_class == 3
    assert config.eval.attacks.autoattack.eps == 0.05, "the radius of pgd20"
    assert option(commands["at-seed0/autoattack"], "mode") == "eval"


def test_every_row_is_compared_with_the_baseline(study):
    arguments = ("--scales=none", "--baseline=at", "--config.eval.only=('fgsm',)")
    code, runs = study("--rows=robal,shifted", "--seeds=0,1", *arguments)
    assert code == 0
    assert runs.names == [
        "at-seed0", "robal-seed0", "robal-seed0/verdict", "at-seed0/shifted", "at-seed0/shifted-verdict",
        "at-seed1", "robal-seed1", "at-seed1/shifted",
    ]  # fmt: skip
    commands = dict(zip(runs.names, runs.commands, strict=True))
    for name in ("robal-seed0/verdict", "at-seed0/shifted-verdict"):
        config = flags.parse(commands[name][1:]).config
        assert config.eval.only == ("pgd20",) and config.eval.baseline.endswith("/at-seed0")
        assert option(commands[name], "mode") == "eval"
    table = json.loads((study.folder / "table.json").read_text())
    assert table["about"]["baseline"] == "AT" and table["rows"]["robal"]["verdict"]["trustworthy"]
    assert table["rows"]["at"]["verdict"] is None
    text = (study.folder / "table.md").read_text()
    assert "| no sign |" in text and "| **robustness overestimated: all, tail** |" in text
    assert "The gain is not real. Of it, nothing is left." in text
    assert "the gain over AT, on 25 images" in text
    results = [path.read_text() for path in study.folder.glob("*-verdict.json")]
    assert len(results) == 2 and not any(str(study.folder.parent) in text for text in results)
    shutil.rmtree(Path(option(commands["at-seed0"], "workdir")) / "checkpoints")
    (study.folder / "robal-seed0-verdict.json").unlink()
    code, runs = study("--rows=robal,shifted", "--seeds=0,1", *arguments)
    assert code == 0 and runs.names == ["at-seed0", "robal-seed0/verdict"], (
        "the verdict requires the network of the baseline"
    )


def test_the_sweep_follows_the_radius():
    arguments = ["main", "--config=experiments/study/sweep.py:configs/at.py", "--config.eval.attacks.pgd20.eps=0.05"]
    attacks = flags.parse(arguments).config.eval.attacks.to_dict()
    assert {attacks[sweep.attack_name(scale)]["eps"] for scale in sweep.SCALES} == {0.05}
    assert attacks["lsa"]["eps"] != 0.05
    with pytest.raises(ValueError, match="config file"):
        flags.parse(["main", "--config=experiments/study/sweep.py"])


@pytest.mark.slow
def test_study_of_a_network_and_its_adjustment(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("XLA_FLAGS", QUICK)
    arguments = ["--dataset=digits", "--epochs=2", "--name=small"]
    arguments += [f"--workdirs={tmp_path}/runs", f"--out={tmp_path}", "--config.eval.only=('pgd20',)"]
    arguments += ["--config.eval.subset_per_class=20", "--config.attack.num_steps=1"]
    arguments += ["--config.eval.attacks.pgd20.num_steps=2", "--config.log.clean_per_class=0"]
    assert main([*arguments, "--rows=tau_norm", "--scales=none"]) == 0, capfd.readouterr()
    assert capfd.readouterr().out.startswith("2 of 2 runs to do.")
    assert main([*arguments, "--rows=at", "--scales=10"]) == 0, capfd.readouterr()
    assert capfd.readouterr().out.startswith("1 of 2 runs to do."), "the network exists, the sweep is new"
    folder = tmp_path / "small"
    table = json.loads((folder / "table.json").read_text())
    assert list(table["rows"]) == ["at", "tau_norm"] and not table["failed"]
    assert table["about"]["images"] == 200 and table["about"]["epochs"] == 2 and table["about"]["eps"] == 0.1
    for name, row in table["rows"].items():
        figures = {k: v["mean"] for k, v in row["figures"].items()}
        assert figures["eval/worst/accuracy"] <= figures["eval/pgd20/accuracy"]
        assert row["training_seconds"]["mean"] > 0
        log = (tmp_path / "runs" / f"{name}-seed0-subset.log").read_text()
        assert "Report:" in log
        result = (folder / f"{name}-seed0-subset.json").read_text()
        assert str(tmp_path) not in result and json.loads(result)["report"]["context"]["training_seconds"] > 0
    assert [scale for scale, _ in table["rows"]["at"]["scales"]] == [10] and not table["rows"]["tau_norm"]["scales"]
    clean, adjusted = (table["rows"][name]["figures"]["eval/clean/accuracy"]["mean"] for name in ("at", "tau_norm"))
    assert clean > 0.2 and adjusted != clean, "two epochs are enough to be above chance"
    text = (folder / "table.md").read_text()
    pictures = re.findall(r"!\[[\w ]+\]\((.*?)\)", text)
    assert sorted(pictures) == [f"plots/{name}.png" for name in ("classes", "errors", "logit_scale", "robustness")]
    assert all((folder / picture).stat().st_size > 10_000 for picture in pictures)

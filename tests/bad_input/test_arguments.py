"""Bad arguments and config entries through `main` give one line on stderr and exit code 2."""

import re
import subprocess
import sys

import jax
import pytest

from lt_adv import main
from tests.bad_input.conftest import DIGITS, ROOT, RaiseBeforeTraining

# (arguments, regular expression of the error line).
COMMAND_LINES = [
    ([], r"--config is missing, for example --config=configs/robal\.py"),
    (["--config="], r"--config is missing"),
    (["--config.seed=1", "--config"], r"Missing value for flag --config"),
    (["--config=configs/robl.py"], r"Unknown config file 'configs/robl\.py'\. Did you mean 'configs/robal\.py'\?"),
    (["--config=configs/common.py"], r"configs/common\.py must have a function get_config that returns a ConfigDict"),
    (["--config=configs/robal.py:variant=X"], r"variant=X: RoBal has the variants N and R\."),
    (["--config=configs/robal.py:datset=digits"], r"'datset=digits': expected key=value with a key of dataset,"),
    (["--config=configs/robal.py:digits"], r"'digits': expected key=value with a key of dataset, variant, epochs"),
    (["--config=configs/robal.py:epochs=0"], r"'epochs=0': epochs must be at least 1"),
    (["--config=configs/robal.py:epochs=ten"], r"'epochs=ten': epochs must be of type int"),
    (["--config=configs/at.py:epochs=1,epochs=2"], r"'epochs=2': epochs is given twice"),
    (["--config=configs/at_bsl.py:augment=crop"], r"Unknown config\.data\.augment 'crop'\."),
    ([DIGITS, "--config.optim.epohcs=3"], r"Unknown entry of config\.optim: 'epohcs'\. Did you mean 'epochs'\?"),
    ([DIGITS, "--config.optm.epochs=3"], r"Unknown entry of config: 'optm'\. Did you mean 'optim'\?"),
    ([DIGITS, "--config.seed.x=3"], r"config\.seed is a value and has no entries"),
    ([DIGITS, "--config.method.marginn=1"], r"Unknown entry of config\.method: 'marginn'\. Did you mean 'margin'\?"),
    ([DIGITS, "--config.optim.epochs=three"], r"--config\.optim\.epochs=three: invalid literal for int"),
    ([DIGITS, "--config.attack.eps=8/255"], r"--config\.attack\.eps=8/255: could not convert string to float"),
    ([DIGITS, "--config.data.download=maybe"], r"--config\.data\.download=maybe.*boolean"),
    ([DIGITS, "--config.optim=3"], r"--config\.optim=3.*not a dict"),
    ([DIGITS, "--config.optim.epochs"], r"Missing value for flag --config\.optim\.epochs"),
    ([DIGITS, "--config.fidelity=released_code", "--config.attack.start=zero"], r"start is 'zero', but .* 'one_sided'"),
    ([DIGITS, "--config.addons=robustlt", "--config.attack.start=zero"], r"start is 'zero', but .* sets 'uniform'"),
    ([DIGITS, "--mode=foo"], r"Unknown --mode 'foo'\. There are: compile, eval, export, train"),
    ([DIGITS, "--mode="], r"Unknown --mode ''\. There are: compile, eval, export, train"),
    ([DIGITS, "--workdir="], r"--workdir is empty: name a folder, or leave it out"),
    (["--config=configs/natural.py:dataset=digits", "--config.addons=robustlt"], r"config\.method has none"),
    (
        ["--config=configs/natural.py:dataset=digits", "--config.addons=dafa"],
        r"'dafa' changes .* config\.method has none",
    ),
    (["--config=configs/faal.py:dataset=digits", "--config.init_from="], r"config\.init_from is missing: method faal"),
    (
        ["--config=configs/cgrm.py:dataset=digits", "--config.eval.split=validation"],
        r"config\.eval\.split is 'validation', but training uses that split",
    ),
    (
        ["--config=configs/cgrm.py:dataset=digits", "--config.data.validation_per_class=0"],
        r"config\.method 'cgrm' adapts to its accuracy on a validation split: set",
    ),
    ([DIGITS, "--workdri=x"], r"Unknown flag '--workdri'\. Did you mean '--workdir'\?"),
    ([DIGITS, "eval"], r"Unexpected argument 'eval'"),
    (["eval", DIGITS], r"Unexpected argument 'eval'"),
    ([DIGITS, "--flagfile=no-such-file"], r"Unable to open flagfile"),
]
VALUES = [
    ("data.imbalance_ratio=0.02", r"config\.data\.imbalance_ratio must be .*\[1, inf\), not 0\.02.*is ratio 50"),
    ("data.imbalance_ratio=inf", r"imbalance_ratio must be a number in \[1, inf\), not inf"),
    ("attack.eps=8", r"config\.attack\.eps must be a number in \(0, 1\], not 8\.0: .*8/255 is 0\.03137"),
    ("attack.eps=0", r"config\.attack\.eps must be .*not 0\.0"),
    ("attack.eps=-0.1", r"config\.attack\.eps must be .*not -0\.1"),
    ("attack.eps=nan", r"config\.attack\.eps must be .*not nan"),
    ("attack.step_size=0", r"config\.attack\.step_size must be .*not 0\.0"),
    ("attack.step_size=-1", r"config\.attack\.step_size must be .*not -1\.0"),
    ("attack.num_steps=-1", r"config\.attack\.num_steps must be a whole number in \[0, 1000000\], not -1"),
    ("attack.num_steps=99999999999", r"config\.attack\.num_steps must be .*not 99999999999"),
    ("attack.start=unifrom", r"Unknown config\.attack\.start 'unifrom'\. Did you mean 'uniform'\?"),
    ("seed=-1", r"config\.seed must be a whole number in \[0, 4294967295\], not -1"),
    ("seed=4294967296", r"config\.seed must be .*not 4294967296"),
    ("data.split_seed=-1", r"config\.data\.split_seed must be"),
    ("eval.seed=99999999999999999999", r"config\.eval\.seed must be"),
    ("cpu_devices=65", r"config\.cpu_devices must be a whole number in \[1, 64\], not 65"),
    ("parallel=pmpa", r"Unknown config\.parallel 'pmpa'\. Did you mean 'pmap'\? There are: pmap, shard_map"),
    ("fidelity=published", r"config\.fidelity=published is now config\.fidelity=paper\."),
    ("sharded=('params','x')", r"Unknown item of config\.sharded 'x'\. There are: average, opt_state, params"),
    ("fidelity=article", r"Unknown config\.fidelity 'article'\. There are: paper, released_code"),
    ("data.name=digitz", r"Unknown data set 'digitz'\. Did you mean 'digits'\?"),
    ("data.name=image_folder", r"image_folder needs --config\.data\.path"),
    ("data.imbalance=exponental", r"Unknown config\.data\.imbalance 'exponental'\. Did you mean 'exponential'\?"),
    ("data.balanced_fraction=0", r"config\.data\.balanced_fraction must be"),
    ("data.class_counts=(5,0)", r"item of config\.data\.class_counts must be a whole number in \[1, 1000000\], not 0"),
    ("data.class_counts=(5,5)", r"class_counts has 2 entries, the data set has 10 classes"),
    ("data.class_counts=many", r"item of config\.data\.class_counts must be a whole number"),
    ("data.validation_per_class=-1", r"config\.data\.validation_per_class must be"),
    ("data.validation_per_class=12", r"validation_per_class 12 leaves no training image of class 9"),
    ("data.resample_balanced=-1", r"config\.data\.resample_balanced must be a number in \[0, 1\], not -1\.0"),
    ("data.resample_balanced=0.001", r"resample_balanced 0\.001 leaves no image of a class: the largest has"),
    ("data.equalise=0.5", r"Error: config\.data\.equalise is now config\.data\.resample_balanced\.$"),
    ("data.resident_gib=0", r"Error: config\.data\.resident_gib is now config\.data\.max_device_gib\.$"),
    ("data.image_size=0", r"config\.data\.image_size must be a whole number in \[1, 8192\], not 0"),
    ("data.sampler=unifrm", r"Unknown config\.data\.sampler 'unifrm'\. Did you mean 'uniform'\?"),
    ("data.augment=crop", r"Unknown config\.data\.augment 'crop'\."),
    ("data.pad=-1", r"config\.data\.pad must be"),
    ("model.name=resnet19", r"Unknown config\.model\.name 'resnet19'\. Did you mean 'resnet18'\?"),
    ("model.depth=11", r"depth of a WideResNet must be 6 n \+ 4"),
    ("model.dtype=float16", r"Unknown config\.model\.dtype 'float16'"),
    ("model.head.name=cosin", r"Unknown config\.model\.head\.name 'cosin'\. Did you mean 'cosine'\?"),
    ("model.head.gamma=nan", r"config\.model\.head\.gamma must be a number in \(-inf, inf\), not nan"),
    ("model.head={'name':'cosine','gama':1}", r"Unknown option of head 'cosine'.* 'gama'\. Did you mean 'gamma'\?"),
    ("model.head={'name':'cosine','scale':'x'}", r"option scale of head 'cosine' must be of type float, not 'x'"),
    ("method.name=robol", r"Unknown method 'robol'\. Did you mean 'robal'\?"),
    ("method.name=trades", r"Unknown option of method trades 'margin'\."),
    ("method={'name':'at','beta':1.0}", r"Unknown option of method at 'beta'\. There are: none"),
    ("method={'name':'trades','num_steps':3}", r"Unknown option of method trades 'num_steps'\. There are: beta"),
    ("method={'name':'trades','beta':'6'}", r"config\.method\.beta must be of type float, not '6'"),
    ("method={'name':'trades','beta':None}", r"config\.method\.beta must be of type float, not None"),
    ("method={}", r"config\.method\.name is missing"),
    ("method={'name':'avmixup','lambda1':1.5}", r"config\.method\.lambda1 must be a number in \[0, 1\], not 1\.5"),
    (
        "addons=awpp",
        r"Unknown item of config\.addons 'awpp'\. Did you mean 'awp'\? There are: awp, cfa, dafa, robustlt",
    ),
    ("addons=('awp','awp')", r"config\.addons names 'awp' twice"),
    ("addons=(1,)", r"Unknown item of config\.addons 1\."),
    ("awp.gamma=-1", r"config\.awp\.gamma must be a number in \[0, inf\), not -1"),
    ("awp.gama=1", r"Unknown entry of config\.awp: 'gama'\. Did you mean 'gamma'\?"),
    ("dafa.epoch=70", r"config\.dafa\.epoch must be a number in \[0, 1\], not 70.*fraction of the epochs"),
    ("cfa.lambda_1=-1", r"config\.cfa\.lambda_1 must be a number in \[0, inf\), not -1"),
    ("robustlt.alpha=nan", r"config\.robustlt\.alpha must be a number in \[0, 1\], not nan"),
    ("robustlt.warmup=80", r"config\.robustlt\.warmup must be a number in \[0, 1\], not 80.*fraction of the epochs"),
    ("optim.epochs=0", r"config\.optim\.epochs must be a whole number in \[1, 1000000\], not 0"),
    ("optim.epochs=-3", r"config\.optim\.epochs must be .*not -3"),
    ("optim.batch_size=0", r"config\.optim\.batch_size must be .*not 0"),
    ("optim.batch_size=512", r"config\.optim\.batch_size = 512 is more than the 503 training images"),
    ("optim.learning_rate=-0.1", r"config\.optim\.learning_rate must be a number in \(0, inf\), not -0\.1"),
    ("optim.momentum=1", r"config\.optim\.momentum must be a number in \[0, 1\), not 1\.0"),
    ("optim.weight_decay=-1", r"config\.optim\.weight_decay must be"),
    ("optim.schedule=steps", r"Unknown config\.optim\.schedule 'steps'\. Did you mean 'step'\?"),
    ("optim.drop_epochs=(1,'x')", r"item of config\.optim\.drop_epochs must be a whole number"),
    ("optim.drop_factor=0", r"config\.optim\.drop_factor must be"),
    ("optim.first_epoch=2", r"config\.optim\.first_epoch must be a whole number in \[0, 1\], not 2"),
    ("optim.warmup_epochs=-1", r"config\.optim\.warmup_epochs must be"),
    ("optim={'learning_rat':1}", r"Unknown entry of config: 'optim\.learning_rat'\. Did you mean 'optim\."),
    ("average.name=emaa", r"Unknown config\.average\.name 'emaa'\. Did you mean 'ema'\?"),
    ("average.decay=1", r"config\.average\.decay must be"),
    (
        "average={'name':'swa','decay':0.9,'start_epoch':999,'min_class_accuracy':0.0}",
        r"start_epoch must be a whole number in .*, not 999",
    ),
    ("log.every_steps=0", r"config\.log\.every_steps must be"),
    ("checkpoint.every_epochs=0", r"config\.checkpoint\.every_epochs must be"),
    ("checkpoint.keep=0", r"config\.checkpoint\.keep must be"),
    ("eval.batch_size=0", r"config\.eval\.batch_size must be"),
    ("eval.subset_per_class=-1", r"config\.eval\.subset_per_class must be"),
    ("eval.subset_per_class=1000", r"No balanced subset of 1000 per class"),
    ("eval.only=pgd21", r"Unknown attack in config\.eval\.only: 'pgd21'\. Did you mean 'pgd20'\?"),
    ("eval.report=../../elsewhere", r"config\.eval\.report must be a name, of letters, digits, '_', '-' and '\.', not"),
    ("eval.groups=third", r"Unknown config\.eval\.groups 'third'\. Did you mean 'thirds'\?"),
    ("eval.checkpoint=first", r"Unknown config\.eval\.checkpoint 'first'\. There are: best, last"),
    ("eval.split=validation", r"config\.eval\.split is 'validation', which needs config\.data\.validation_per_class"),
    ("data.validation_from=rest", r"unused"),
    ("eval.checkpoint=best", r"config\.eval\.checkpoint is 'best', which needs config\.data\.validation_per_class"),
    ("eval.adjustment.name=bondary", r"Unknown config\.eval\.adjustment\.name 'bondary'\. Did you mean 'boundary'\?"),
    ("eval.adjustment={'name':'cdt','tau':None}", r"option tau of adjustment 'cdt' must be of type float, not None"),
    ("eval.attacks={'a/b':{'attack':'fgsm','eps':0.1}}", r"each key of config\.eval\.attacks must be a name, .*'a/b'"),
    ("eval.attacks={'':{'attack':'fgsm','eps':0.1}}", r"each key of config\.eval\.attacks must be a name, .*''"),
    ("eval.attacks.pgd20.eps=8", r"config\.eval\.attacks\.pgd20\.eps must be .*not 8\.0.*8/255"),
    ("eval.attacks.fgsm.eps=0", r"config\.eval\.attacks\.fgsm\.eps must be .*not 0\.0"),
    ("eval.attacks.cw20.step_size=-1", r"config\.eval\.attacks\.cw20\.step_size must be"),
    ("eval.attacks.pgd100.num_steps=-1", r"config\.eval\.attacks\.pgd100\.num_steps must be"),
    ("eval.attacks.pgd20.start=zeros", r"Unknown config\.eval\.attacks\.pgd20\.start 'zeros'\. Did you mean 'zero'\?"),
    ("eval.attacks.pgd20.attack=pdg", r"config\.eval\.attacks\.pgd20: Unknown attack 'pdg'\. Did you mean 'pgd'\?"),
    ("eval.attacks.pgd20={'attack':'pgd','stepsize':1}", r"attacks\.pgd20: Unknown option of pgd 'stepsize'"),
    ("eval.attacks={'clean':{'attack':'fgsm','eps':0.1}}", r"the name 'clean' is reserved for the report"),
    ("eval.attacks={'new':{'attack':'pgd','eps':0.1}}", r"config\.eval\.attacks\.new: .* needs step_size, num_steps"),
    ("eval.attacks={'new':{'attack':'fgsm','eps':0.1,'norm':'l3'}}", r"Unknown config\.eval\.attacks\.new\.norm 'l3'"),
]


@pytest.mark.parametrize(
    ("arguments", "line"), COMMAND_LINES, ids=[" ".join(arguments) for arguments, _ in COMMAND_LINES]
)
def test_bad_command_line_is_refused(answer, arguments, line):
    assert re.search(line, answer(*arguments))


@pytest.mark.parametrize(("override", "line"), VALUES, ids=[override for override, _ in VALUES])
def test_bad_config_value_is_refused(answer, no_training, override, line):
    assert re.search(line, answer(DIGITS, f"--config.{override}"))


# Values at the limits of their ranges.
LIMITS = [
    "data.imbalance_ratio=1",
    "attack.eps=1.0",
    "attack.step_size=1",
    "attack.num_steps=0",
    "seed=4294967295",
    "optim.epochs=1",
    "optim.batch_size=496",
    "optim.learning_rate=1e10",
    "optim.drop_epochs=()",
    "optim.momentum=0",
    "data.class_counts=(8,8,8,8,8,8,8,8,8,8)",
    "data.validation_per_class=11",
    "data.image_size=1",
    "model.dtype=bfloat16",
    "method.beta=0",
    "addons=('robustlt','awp')",
    "average={'name':'swa','decay':0.0,'start_epoch':0,'min_class_accuracy':0.0}",
    "eval.only=pgd20",
    "eval.subset_per_class=52",
    "eval.attacks={}",
    "eval.attacks.pgd20={'attack':'pgd','eps':3.0,'step_size':2.0,'num_steps':1,'norm':'l2'}",
]


@pytest.mark.parametrize("override", LIMITS)
def test_value_at_the_limit_is_accepted(no_training, capsys, tmp_path, monkeypatch, override):
    monkeypatch.chdir(ROOT)
    assert main.main(["main", f"--config.{override}", DIGITS, f"--workdir={tmp_path / 'run'}"], no_training) == 0
    printed = capsys.readouterr()
    assert "training is reached" in printed.out and not printed.err
    assert (tmp_path / "run" / "config.json").exists()


CONFIG_START = (
    "from configs import common\ndef get_config():\n    c = common.get('digits', epochs=1, drop_epochs=(), of=1)\n"
)


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("def get_config(:", r"mine\.py: SyntaxError: invalid syntax"),
        ("import no_such_package", r"mine\.py: ModuleNotFoundError: No module named 'no_such_package'"),
        ("def get_config():\n    return {}['a']", r"mine\.py: KeyError: 'a'"),
        ("def get_config():\n    raise ValueError('two\\nlines')", r"mine\.py: two lines"),
        ("def get_config():\n    pass", r"mine\.py must have a function get_config that returns a ConfigDict"),
        (CONFIG_START + "    c.optim.epohcs = 1\n    return c", r"Unknown entry of config: 'optim\.epohcs'\."),
        (CONFIG_START + "    c.data.equalise = 0.5\n    return c", r"config\.data\.equalise is now config\.data\.res"),
        (CONFIG_START + "    c.fidelity = 'published'\n    return c", r"config\.fidelity=published is now config\."),
        (CONFIG_START + "    del c.optim.epochs\n    return c", r"config\.optim\.epochs is missing"),
        (CONFIG_START + "    c.attack.eps = None\n    return c", r"config\.attack\.eps must be .*not None"),
        (CONFIG_START + "    c.method.f = print\n    return c", r"config\.method\.f must be of type"),
    ],
)
def test_bad_config_file_is_refused(answer, tmp_path, source, line):
    path = tmp_path / "mine.py"
    path.write_text(source + "\n")
    assert re.search(line, answer(f"--config={path}"))


@pytest.mark.parametrize("bug", [TypeError, KeyError, AssertionError, RuntimeError])
def test_bug_keeps_its_traceback(tmp_path, bug):
    with pytest.raises(bug):
        main.main(["main", DIGITS, f"--workdir={tmp_path / 'run'}"], [RaiseBeforeTraining(bug("a bug"))])


MEMORY = r"Out of memory \([^:]*(: Out of memory)?.*\): reduce config\.optim\.batch_size, "
LOST = r"Another process of this run has ended or cannot be reached \(INTERNAL: Gloo .* from the last checkpoint"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (MemoryError("Unable to allocate 59.6 GiB"), MEMORY),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nTrace: ..."), MEMORY),
        (jax.errors.JaxRuntimeError("INTERNAL: Gloo all-reduce failed: Connection closed by peer\nTrace: ..."), LOST),
    ],
)
def test_machine_failure_gives_one_line(answer, hooks, monkeypatch, tmp_path, error, line):
    (tmp_path / "run").mkdir()
    hooks.append(RaiseBeforeTraining(error))
    monkeypatch.setattr("lt_adv.runtime.distributed.is_distributed", lambda: line == LOST)
    monkeypatch.setattr(main, "skip_jax_shutdown_barrier", lambda _: None)
    printed = answer(DIGITS)
    assert re.search(line, printed) and "Trace" not in printed


def test_interrupt_exits_with_130(capsys, tmp_path):
    assert main.main(["main", DIGITS, f"--workdir={tmp_path}"], [RaiseBeforeTraining(KeyboardInterrupt())]) == 130
    assert "The same command resumes" in capsys.readouterr().err


def test_environment_variable_requests_the_traceback(monkeypatch):
    monkeypatch.setenv("LT_ADV_TRACEBACK", "1")
    with pytest.raises(ValueError, match="--config is missing"):
        main.main(["main"])


def test_help_lists_flags_and_entries(capsys):
    assert main.main(["main", "--help"]) == 0
    printed = capsys.readouterr().out
    assert "--config=FILE" in printed and "\noptim.epochs " in printed


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([DIGITS, "--config.optim.epohcs=3"], r"Error: Unknown entry .* Did you mean 'epochs'\?.*\n"),
        ([DIGITS, "--config.attack.eps=8"], r"Error: config\.attack\.eps must be .*8/255 is 0\.03137\.\n"),
    ],
)
def test_process_exits_with_code_2_and_one_line(tmp_path, arguments, line):
    """Checks exit code and stderr of a real process."""
    command = [sys.executable, "-m", "lt_adv.main", *arguments, f"--workdir={tmp_path / 'run'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and not done.stdout and re.fullmatch(line, done.stderr)
    assert not (tmp_path / "run").exists()

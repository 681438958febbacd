"""Fake runs for the tests of the study: reports without training, and processes that write them."""

import json
from pathlib import Path

import numpy as np

from experiments.study import sweep
from lt_adv.evaluation import Records, records, summarise

COUNTS = (50, 30, 20, 10)


def make_records(seed=0, right=0.8, robust=0.4, swept=False, classes=4):
    """Returns records of 25 images per class; `right` and `robust` are the accuracies of the most frequent class."""
    rng = np.random.default_rng(seed)
    label = np.repeat(np.arange(classes, dtype=np.int32), 25)
    wrong = (label + 1) % classes
    class_factor = 1 - 0.5 * label / classes
    draws = rng.random(len(label))
    names = [sweep.attack_name(scale) for scale in sweep.SCALES] if swept else ["fgsm", "pgd20", "cw20", "lsa"]
    spec = {"attack": "pgd", "eps": 0.1, "step_size": 0.025, "num_steps": 20}
    columns = {
        name: np.where(draws < robust * class_factor - 0.01 * i, label, wrong).astype(np.int32)
        for i, name in enumerate(names)
    }
    header = {
        "class_names": [f"class {c}" for c in range(classes)],
        "attacks": {name: dict(spec) for name in names},
        "dataset": "Digits-LT, exponential profile",
        "model": "wide_resnet-10-1, head linear, float32",
        "epochs": 3,
        "images": len(label),
        "batch_size": len(label),
        "subset": "the whole test split",
        "device": "1 x cpu",
        "jax_version": "0.10.2",
    }
    for scale in sweep.SCALES * swept:
        header["attacks"][sweep.attack_name(scale)]["logit_scale"] = scale
    clean = np.where(draws < right * class_factor, label, wrong).astype(np.int32)
    return Records(header, np.arange(len(label)), label, clean, columns)


def report(*arguments, classes=4, **options):
    """Returns the report of `make_records`."""
    made = make_records(*arguments, classes=classes, **options)
    counts = COUNTS if classes == len(COUNTS) else [classes - c for c in range(classes)]
    return {**summarise(made, counts), "context": {"commit": "0123456789ab", "class_counts": list(counts)}}


def reliability(baseline, trustworthy):
    """Returns what `lt_adv.cli.baseline.compare` would return."""
    reasons = [] if trustworthy else ["The gain is not real.", "Of it, nothing is left."]
    gains = [{"group": group, "real": trustworthy or group == "head"} for group in ("", "", "head", "tail")]
    verdict = {"trustworthy": trustworthy, "words": "", "reasons": reasons, "notes": [], "gains": gains}
    return {"verdict": verdict, "protocol": {"images": 25}, "baseline_run": str(baseline)}


def write_records(workdir, made):
    """Writes records as an evaluation in this working directory does."""
    folder = records.record_directory(workdir / "eval", made.header)
    records.write_header(folder, made.header)
    attacks = {f"attack/{name}": column for name, column in made.attacks.items()}
    records.write_batch(folder, 0, {"index": made.index, "label": made.label, "clean": made.clean, **attacks})


def option(command, name):
    """Returns the last value of --name=..., which takes precedence, or None."""
    return ([part.partition("=")[2] for part in command if part.startswith(f"--{name}=")] or [None])[-1]


def report_path(command):
    """Returns the path of the report that this command writes."""
    name = option(command, "config.eval.report")
    return Path(option(command, "workdir")) / (f"reports/{name}" if name else "") / "report.json"


class FakeRuns:
    """Replaces `jobs.execute`: records each command and writes the files of a run.

    `fails` is row -> (exit code, last line); the rows of `silent` end without a report.
    """

    def __init__(self):
        self.commands, self.fails, self.silent = [], {}, set()

    def __call__(self, command, log, *descriptors):
        self.commands.append(command)
        workdir = Path(option(command, "workdir"))
        row = log.name.partition("-seed")[0]
        if row in self.fails:
            return self.fails[row]
        if row in self.silent:
            return 0, "SIGTERM: saved at step 3 of 9. The same command goes on from there."
        if option(command, "mode") != "eval":
            (workdir / "checkpoints").mkdir(parents=True, exist_ok=True)
            lines = [("0_teacher", 1.5), ("1_train", 3.5), ("1_train", 5.5)]
            text = "".join(json.dumps({"stage": stage, "seconds": seconds}) + "\n" for stage, seconds in lines)
            (workdir / "timing.jsonl").write_text(text)
        else:
            assert (workdir / "checkpoints").exists(), "the network is evaluated before it is trained"
        path = report_path(command)
        path.parent.mkdir(parents=True, exist_ok=True)
        options = {"seed": int(option(command, "config.seed")), "swept": "sweep.py" in option(command, "config")}
        write_records(workdir, make_records(**options))
        summary = report(**options)
        if baseline := option(command, "config.eval.baseline"):
            assert (Path(baseline) / "checkpoints").exists(), "the baseline is not trained yet"
            summary["reliability"] = reliability(baseline, trustworthy=row == "robal")
        path.write_text(json.dumps(summary))
        return 0, ""

    @property
    def names(self):
        """The runs in their order: at, at/scales, ..."""
        names = []
        for command in self.commands:
            name = Path(option(command, "workdir")).name
            names.append("/".join(filter(None, (name, option(command, "config.eval.report")))))
        return names

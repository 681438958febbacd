"""What the tests of the study share: a report that nobody had to train for, and a run that writes it."""

import json
from pathlib import Path

import numpy as np

from experiments.study import sweep
from lt_adv.evaluation import Records, summarise

COUNTS = (50, 30, 20, 10)


def report(seed=0, right=0.8, robust=0.4, swept=False, classes=4):
    """A report of 25 images a class, `right` of them right clean and `robust` under attack; rarer classes less so."""
    rng = np.random.default_rng(seed)
    label = np.repeat(np.arange(classes, dtype=np.int32), 25)
    wrong = (label + 1) % classes
    ease = 1 - 0.5 * label / classes
    draws = rng.random(len(label))
    names = [sweep.name(scale) for scale in sweep.SCALES] if swept else ["fgsm", "pgd20", "cw20", "lsa"]
    spec = {"attack": "pgd", "eps": 0.1, "step_size": 0.025, "num_steps": 20}
    columns = {
        name: np.where(draws < robust * ease - 0.01 * i, label, wrong).astype(np.int32) for i, name in enumerate(names)
    }
    header = {
        "class_names": [f"class {c}" for c in range(classes)],
        "attacks": {name: dict(spec) for name in names},
        "dataset": "Digits-LT, exponential profile",
        "model": "wide_resnet-10-1, head linear, float32",
        "epochs": 3,
        "images": len(label),
        "subset": "the whole test split",
        "device": "1 x cpu",
        "jax_version": "0.10.2",
    }
    for scale in sweep.SCALES * swept:
        header["attacks"][sweep.name(scale)]["logit_scale"] = scale
    clean = np.where(draws < right * ease, label, wrong).astype(np.int32)
    records = Records(header, np.arange(len(label)), label, clean, columns)
    counts = COUNTS if classes == len(COUNTS) else [classes - c for c in range(classes)]
    return {**summarise(records, counts), "context": {"commit": "0123456789ab", "class_counts": list(counts)}}


def judged(baseline, trustworthy):
    """What `lt_adv.cli.baseline.compare` would say."""
    reasons = [] if trustworthy else ["The gain is not real.", "Of it, nothing is left."]
    gains = [{"group": group, "real": trustworthy or group == "head"} for group in ("", "", "head", "tail")]
    verdict = {"trustworthy": trustworthy, "words": "", "reasons": reasons, "notes": [], "gains": gains}
    return {"verdict": verdict, "protocol": {"images": 25}, "baseline_run": str(baseline)}


def option(given, name):
    """The last value of --name=..., as that is the one that holds; None without one."""
    return ([part.partition("=")[2] for part in given if part.startswith(f"--{name}=")] or [None])[-1]


def written(given):
    """Where the run of this command writes its report."""
    name = option(given, "config.eval.report")
    return Path(option(given, "workdir")) / (f"reports/{name}" if name else "") / "report.json"


class Runs:
    """Stands for the processes: notes each command and writes what a run would leave.

    `fails` is row -> (exit code, last words); the rows of `silent` end without a report.
    """

    def __init__(self):
        self.given, self.fails, self.silent = [], {}, set()

    def __call__(self, given, log):
        self.given.append(given)
        workdir = Path(option(given, "workdir"))
        row = log.name.partition("-seed")[0]
        if row in self.fails:
            return self.fails[row]
        if row in self.silent:
            return 0, "SIGTERM: saved at step 3 of 9. The same command goes on from there."
        if option(given, "mode") != "eval":
            (workdir / "checkpoints").mkdir(parents=True, exist_ok=True)
            lines = [("0_teacher", 1.5), ("1_train", 3.5), ("1_train", 5.5)]
            text = "".join(json.dumps({"stage": stage, "seconds": seconds}) + "\n" for stage, seconds in lines)
            (workdir / "timing.jsonl").write_text(text)
        else:
            assert (workdir / "checkpoints").exists(), "the network is evaluated before it is trained"
        path = written(given)
        path.parent.mkdir(parents=True, exist_ok=True)
        found = report(int(option(given, "config.seed")), swept="sweep.py" in option(given, "config"))
        if where := option(given, "config.eval.baseline"):
            assert (Path(where) / "checkpoints").exists(), "the baseline is not there yet"
            found["reliability"] = judged(where, trustworthy=row == "robal")
        path.write_text(json.dumps(found))
        return 0, ""

    @property
    def names(self):
        """at, at/scales, ...: what was run, in order."""
        found = []
        for given in self.given:
            name = Path(option(given, "workdir")).name
            found.append("/".join(filter(None, (name, option(given, "config.eval.report")))))
        return found

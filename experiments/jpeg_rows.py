"""RoBal-N, AT-BSL and AT side by side on a JPEG copy of CIFAR-10, small enough for a CPU.

    python -m experiments.jpeg_rows --images=<folder with train/<class>/*.jpg, test/<class>/*.jpg> --seeds=0,1

Every row has the same budget: WRN-10-1, ratio 50, the same epochs, batch, optimiser and training attack (PGD-5, eps
0.031); only method and head differ. Clean and PGD-20 on the whole test set; the other attacks on a fixed class-balanced
subset. Each run is `python -m lt_adv.main`; one that was interrupted goes on. Reports are collected in
experiments/results/jpeg_rows/.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from absl import app, flags

IMAGES = flags.DEFINE_string("images", None, "The image folder.", required=True)
SEEDS = flags.DEFINE_list("seeds", ["0"], "Seeds.")
ROWS = flags.DEFINE_list("rows", ["robal", "at_bsl", "at"], "Configs.")
EPOCHS = flags.DEFINE_integer("epochs", 10, "Epochs of every row.")
WORKDIRS = flags.DEFINE_string("workdirs", "workdirs/jpeg_rows", "Where the runs are.")
RESULTS = Path(__file__).parent / "results" / "jpeg_rows"

BUDGET = [
    "--config.data.name=image_folder",
    "--config.data.title=CIFAR-10-LT (JPEG copy)",
    "--config.model.name=wide_resnet",
    "--config.model.depth=10",
    "--config.model.width=1",
    "--config.optim.batch_size=64",
    "--config.optim.weight_decay=2e-4",
    "--config.attack.num_steps=5",
    "--config.attack.eps=0.031",
    "--config.attack.step_size=0.0078",
    "--config.attack.start=uniform",
    "--config.eval.attacks.fgsm.start=zero",
    "--config.eval.batch_size=500",
]
# (mode, arguments) of the two evaluations: one as training ends, one of more attacks on fewer images.
FULL = "train", ["--config.eval.only=('pgd20',)"]
SUBSET = "eval", ["--config.eval.subset_per_class=100", "--config.eval.report=subset1000"]


def command(row: str, seed: str, mode: str, extra: list[str]) -> list[str]:
    """The very command of one run."""
    config = f"--config=configs/{row}.py:dataset=cifar10,epochs={EPOCHS.value}"
    workdir = f"--workdir={WORKDIRS.value}/{row}-{EPOCHS.value}-seed{seed}"
    attacks = [
        f"--config.eval.attacks.{name}.{k}={v}" for name in ATTACKS for k, v in (("eps", 0.031), ("step_size", 0.0078))
    ]
    attacks = [a for a in attacks if a != "--config.eval.attacks.fgsm.step_size=0.0078"]
    images = [f"--config.data.path={IMAGES.value}", f"--config.seed={seed}"]
    return [sys.executable, "-m", "lt_adv.main", config, workdir, f"--mode={mode}", *BUDGET, *images, *attacks, *extra]


ATTACKS = ("fgsm", "pgd20", "pgd100", "mim20", "cw20", "lsa")


def main(_) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    for seed in SEEDS.value:
        for row in ROWS.value:
            for mode, extra in (FULL, SUBSET):
                subprocess.run(command(row, seed, mode, extra), check=True)
            collect(row, seed)


def collect(row: str, seed: str) -> None:
    """Copy a run's reports, with their commands and the commit; the plots of the first seed alone."""
    run = Path(WORKDIRS.value) / f"{row}-{EPOCHS.value}-seed{seed}"
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    for name, source, mode, extra in (("full", run, *FULL), ("subset1000", run / "reports" / "subset1000", *SUBSET)):
        report = json.loads((source / "report.json").read_text())
        shown = " ".join(["python", *command(row, seed, mode, extra)[1:]])
        record = {
            "command": shown.replace(IMAGES.value, "<images>").replace(WORKDIRS.value, "workdirs/jpeg_rows"),
            "machine": {"device": report["header"]["device"], "cores": os.cpu_count()},
            "commit": report["context"].get("commit", commit),
            "report": report,
        }
        (RESULTS / f"{row}-seed{seed}-{name}.json").write_text(json.dumps(record, indent=1) + "\n")
        if seed == "0":
            unshown = shutil.ignore_patterns("examples.png")  # the pictures themselves are not ours to publish
            shutil.copytree(source / "plots", RESULTS / f"plots-{row}-{name}", ignore=unshown, dirs_exist_ok=True)


if __name__ == "__main__":
    app.run(main)

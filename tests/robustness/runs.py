"""A run of two epochs of one step each, for tests that read a working directory."""

from pathlib import Path

from lt_adv import main
from tests.robustness.inputs import ROOT

AT = f"--config={ROOT}/configs/at.py:dataset=digits"
NO_ATTACKS = "--config.eval.attacks={}"
TINY = (
    "--config.data.imbalance=balanced",
    "--config.data.balanced_fraction=0.02",
    "--config.optim.batch_size=16",
    "--config.optim.epochs=2",
    "--config.attack.num_steps=0",
    "--config.checkpoint.every_epochs=1",
    "--config.eval.subset_per_class=1",
    "--config.eval.batch_size=16",
    "--config.cpu_devices=1",
)


def train(workdir: Path, *flags: str) -> Path:
    """Trains and evaluates; returns the working directory."""
    if main.main(["main", AT, *TINY, *flags, f"--workdir={workdir}"]):
        raise RuntimeError(f"The run in {workdir} failed.")
    return workdir

"""Trains a config in PyTorch on the same images; lt_adv evaluates the result.

    python -m experiments.pytorch_baseline.train --config=configs/robal.py:dataset=digits --workdir=workdirs/robal-torch
    python -m lt_adv.main --config=configs/robal.py:dataset=digits --workdir=workdirs/robal-torch --mode=eval

--config, --config.x.y=z    as of lt_adv.main
--workdir=PATH              a new folder; the stage in its report names PyTorch and the setting
--setting=released|tuned    see experiments/pytorch_baseline/step.py [tuned]

Trains on the GPU where there is one. An interrupted run cannot be resumed: start again in another working directory.
Checkpoints hold PyTorch's running variances, which are unbiased, as the network was trained with them.
"""

import math
import os
import sys
from collections.abc import Sequence
from typing import Any

from experiments.benchmark.timing import timed, torch_device
from experiments.options import Parser, one_of, run_command
from experiments.pytorch_baseline import SETTINGS
from lt_adv.cli import flags


def parse(argv: Sequence[str]) -> tuple[flags.Arguments, str]:
    """Returns (arguments as of lt_adv.main, setting)."""
    parser = Parser()
    parser.add_argument("--setting", type=one_of("setting", SETTINGS), default="tuned")
    options, rest = parser.parse_known_args(argv)
    arguments = flags.parse(["train", *rest])
    if not any(arg.lstrip("-").startswith("workdir") for arg in rest):
        raise ValueError("--workdir is missing: the default one is that of lt_adv.main.")
    if arguments.mode != "train":
        raise ValueError("The PyTorch baseline only trains; python -m lt_adv.main --mode=eval evaluates.")
    return arguments, options.setting


def train(argv: Sequence[str]) -> int:
    """Trains all epochs and writes checkpoints and metrics; returns the exit code.

    Raises:
        FloatingPointError: the loss is not finite.
        ValueError: the command line, the config or the working directory cannot be used.
    """
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # JAX only writes checkpoints; the GPU is for PyTorch
    (config, workdir, *_), setting = parse(argv)
    torch, device, _ = torch_device()
    from experiments.pytorch_baseline.step import Trainer
    from lt_adv.cli import schema, workdirs
    from lt_adv.cli.experiment import Experiment
    from lt_adv.training import metric_logging
    from lt_adv.training.checkpoint import Checkpoints

    experiment = Experiment.from_config(config)
    if (workdir / "checkpoints").exists():
        raise ValueError(f"{workdir} has checkpoints, which the PyTorch baseline cannot resume: use another --workdir.")
    workdirs.require_same_config(config, workdir, training=True)
    split = experiment.split
    schema.validate_for_split(config, split, 1)
    trainer = Trainer(config, split, setting=setting, device=device, seed=config.seed)
    epochs, per_epoch = config.optim.epochs, trainer.steps_per_epoch
    meta: dict[str, Any] = {
        "stage": f"0_train by PyTorch {torch.__version__}, {setting}, on {device}",
        "stages": 1,
        "total_steps": epochs * per_epoch,
        "class_counts": list(split.class_counts),
        "data_digest": split.digest,
        "seconds": 0.0,
    }

    def train_epoch() -> float:
        return float(torch.stack([trainer.step() for _ in range(per_epoch)]).mean())

    with workdirs.claim(config, workdir):
        lines = metric_logging.JsonLines(workdir / "metrics.jsonl")
        metric_logging.console.print(
            f"{meta['stage']}  method {config.method.name}  model {config.model.name}  workdir {workdir}"
        )
        checkpoints = Checkpoints(workdir / "checkpoints" / "0_train", keep=config.checkpoint.keep)
        for epoch in range(1, epochs + 1):
            seconds, loss = timed(train_epoch)
            meta["seconds"] += seconds
            if not math.isfinite(loss):
                raise FloatingPointError(f"The loss is {loss} in epoch {epoch}.")
            lines.add({"stage": meta["stage"], "step": trainer.steps, "epoch": epoch, "train/loss": loss})
            rate = per_epoch * config.optim.batch_size / seconds
            metric_logging.console.print(f"epoch {epoch}/{epochs}  {rate:,.0f} img/s  loss {loss:.3f}")
            if epoch == epochs or epoch % config.checkpoint.every_epochs == 0:
                checkpoints.save(trainer.steps, trainer.variables(), {"step": trainer.steps, **meta})
        checkpoints.close()
    return 0


def main(argv: Sequence[str]) -> int:
    return run_command(train, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

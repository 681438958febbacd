"""Trains a config in PyTorch on the same images; lt_adv evaluates the result.

    python -m experiments.pytorch_baseline.train --config=configs/robal.py:dataset=digits --workdir=workdirs/robal-torch
    python -m lt_adv.main --config=configs/robal.py:dataset=digits --workdir=workdirs/robal-torch --mode=eval

--config, --config.x.y=z    as of lt_adv.main
--workdir=PATH              a new folder; the stage in its report names PyTorch and the setting
--setting=released|tuned    see experiments/pytorch_baseline/step.py [tuned]
--device=cpu|cuda           [cuda where available]

An interrupted run cannot be resumed: start again in another working directory. Checkpoints hold PyTorch's running
variances, which are unbiased, as the network was trained with them.
"""

import argparse
import math
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from lt_adv.cli import flags
from lt_adv.main import one_line
from lt_adv.runtime import registry

DEVICES = ("cpu", "cuda")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after one line that begins with "Error:"."""
    argv = list(sys.argv if argv is None else argv)
    if {"-h", "--help"} & set(argv[1:]):
        print(__doc__)
        return 0
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # JAX only writes checkpoints; the GPU is for PyTorch
    try:
        train(*parse(argv))
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        print("Error:", one_line(error), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    return 0


def parse(argv: Sequence[str]) -> tuple[flags.Arguments, str, str]:
    """Returns (arguments as of lt_adv.main, setting, device)."""
    try:
        import torch
    except ImportError:
        raise ImportError("The PyTorch baseline needs PyTorch: pip install '.[torch]'.") from None
    from experiments.pytorch_baseline.step import SETTINGS

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--setting", default="tuned")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    try:
        options, rest = parser.parse_known_args(list(argv[1:]))
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from error
    arguments = flags.parse([argv[0], *rest])
    for name, value, choices in (("setting", options.setting, SETTINGS), ("device", options.device, DEVICES)):
        if value not in choices:
            raise registry.unknown(f"--{name}", value, choices)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device=cuda: PyTorch sees no GPU here.")
    if not any(arg.lstrip("-").startswith("workdir") for arg in rest):
        raise ValueError("--workdir is missing: the default one is that of lt_adv.main.")
    if arguments.mode != "train":
        raise ValueError("The PyTorch baseline only trains; python -m lt_adv.main --mode=eval evaluates.")
    return arguments, options.setting, options.device


def train(arguments: flags.Arguments, setting: str, device: str) -> None:
    """Trains all epochs and writes checkpoints and metrics.

    Raises:
        FloatingPointError: the loss is not finite.
        ValueError: the config or the working directory cannot be used.
    """
    import torch

    from experiments.pytorch_baseline.step import Trainer
    from lt_adv.cli import schema, workdirs
    from lt_adv.cli.experiment import Experiment
    from lt_adv.training import metric_logging
    from lt_adv.training.checkpoint import Checkpoints

    config, workdir = arguments.config, arguments.workdir
    experiment = Experiment.from_config(config)
    if (workdir / "checkpoints").exists():
        raise ValueError(f"{workdir} has checkpoints, which the PyTorch baseline cannot resume: use another --workdir.")
    workdirs.compare(config, workdir, training=True)
    split = experiment.split
    schema.validate_for_split(config, split, 1)
    trainer = Trainer(config, split, setting=setting, device=device, seed=config.seed)
    with workdirs.claim(config, workdir):
        lines = metric_logging.JsonLines(workdir / "metrics.jsonl")
        epochs, per_epoch = config.optim.epochs, trainer.steps_per_epoch
        meta: dict[str, Any] = {
            "stage": f"0_train by PyTorch {torch.__version__}, {setting}, on {device}",
            "stages": 1,
            "total_steps": epochs * per_epoch,
            "class_counts": list(split.class_counts),
            "data_digest": split.digest,
        }
        metric_logging.console.print(
            f"{meta['stage']}  method {config.method.name}  model {config.model.name}  workdir {workdir}"
        )
        checkpoints = Checkpoints(workdir / "checkpoints" / "0_train", keep=config.checkpoint.keep)
        seconds = 0.0
        for epoch in range(1, epochs + 1):
            start = time.perf_counter()
            loss = float(torch.stack([trainer.step() for _ in range(per_epoch)]).mean())
            duration = time.perf_counter() - start
            seconds += duration
            if not math.isfinite(loss):
                raise FloatingPointError(f"The loss is {loss} in epoch {epoch}.")
            lines.add({"stage": meta["stage"], "step": trainer.steps, "epoch": epoch, "train/loss": loss})
            rate = per_epoch * config.optim.batch_size / duration
            metric_logging.console.print(f"epoch {epoch}/{epochs}  {rate:,.0f} img/s  loss {loss:.3f}")
            if epoch == epochs or epoch % config.checkpoint.every_epochs == 0:
                checkpoints.save(
                    trainer.steps, trainer.variables(), {"step": trainer.steps, "seconds": seconds, **meta}
                )
        checkpoints.close()


if __name__ == "__main__":
    sys.exit(main())

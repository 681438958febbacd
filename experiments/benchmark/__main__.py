"""Measures speed side by side in fresh processes and writes one JSON file per measurement.

    python -m experiments.benchmark step    --config=configs/robal.py:dataset=cifar10 [--config.x.y=z ...]
    python -m experiments.benchmark profile --config=...    time of a training step by operation
    python -m experiments.benchmark data    --config=...    the input pipeline alone, and the time to load the images
    python -m experiments.benchmark attack  --config=...    PGD through attacks.jit and as an eager loop in PyTorch
    python -m experiments.benchmark autoattack --config=... | --golden=...    AutoAttack in JAX and eager in PyTorch
    python -m experiments.benchmark libraries --config=... | --golden=...     attacks of lt_adv and of other libraries
    python -m experiments.benchmark start   --config=...    seconds from the command to the end of the first step
    python -m experiments.benchmark scaling --config=...    by batch size, depth, attack steps, devices, images

All measurements:
--runs=5           rounds; each round measures everything once, in turn
--seconds=20       seconds of timed steps per process, after the warm-up
--name=NAME        name of the result file [<kind>-<method>-<network>-<dtype>-<batch size>]
--out=PATH         folder of the result file [experiments/results/benchmark]

step:
--frameworks=...   any of jax, released, tuned; the last two are PyTorch and need the extra `torch`

attack:
--num-steps=...    [10,20,100]

autoattack:
--attacks=apgd-ce,square    [apgd-ce,apgd-t,fab-t,square: the standard version]
--alone            runs each attack on all images instead of on those that the attacks before it left robust
--images=..., --eps=..., --queries=...    test images [all], another radius, Square's queries [5000]
--workdir=PATH     attacks the last weights of this run; without it, the initial weights, labelled by the network itself
--golden=HEAD      attacks the digits network in tests/golden with this head, linear or cosine; implies --alone

libraries:
--libraries=...    any of lt_adv, loop (its forward and backward passes alone), foolbox-jax, foolbox-jax-jit (with the
                   network under jit), foolbox-torch, torchattacks, pyautoattack (the official AutoAttack)
--attacks=...      any of pgd, apgd-ce, apgd-t, fab-t, square; each runs alone on all images
--norms=...        linf, l2, l1 [linf,l1 with --golden, else linf]
--eps=...          a radius for each norm [those of the golden file or of the config]
--num-steps=20     of PGD
--images=..., --queries=..., --workdir=PATH, --golden=HEAD    as of autoattack

scaling:
--batch-size=..., --depth=..., --num-steps=..., --devices=..., --images=...    the values to measure, one changed at
                   a time; images are those of the training set

A failure is recorded with its reason, the remaining measurements continue, and the exit code is 1. Invalid arguments
give one line and exit code 2.
"""

import argparse
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.benchmark import libraries, measurements, record, summary, tables, target
from experiments.options import Parser, name, one_of, positive, run_command, some
from experiments.pytorch_baseline import ATTACKS, SETTINGS
from lt_adv.cli import flags

SCALED = ("--batch-size", "--depth", "--num-steps", "--devices", "--images")  # of `scaling`
FRAMEWORKS = ("jax", *SETTINGS)
# With --golden the processes read nothing but the batch size from the config.
GOLDEN = ("--config=configs/at.py:dataset=digits", "--config.eval.batch_size=500")


def folder(text: str) -> str:
    """Returns `text` if it names an existing folder, seen from the current directory as the processes see it."""
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {text!r}")
    return text


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str], Any]:
    """Returns (options, the arguments that define the config, the config).

    Raises:
        ValueError: one line, for an invalid command line.
    """
    positive_ints = some(positive(int))
    parser = Parser(prog="python -m experiments.benchmark")
    subparsers = parser.add_subparsers(dest="kind", required=True, metavar="/".join(measurements.MEASUREMENTS))
    for kind in measurements.MEASUREMENTS:
        sub = subparsers.add_parser(kind)
        sub.add_argument("--runs", type=positive(int), default=5)
        sub.add_argument("--seconds", type=positive(float), default=20.0)
        sub.add_argument("--name", type=name)
        sub.add_argument("--out", type=Path, default=record.RESULTS)
        if kind == "step":
            sub.add_argument("--frameworks", type=some(one_of("framework", FRAMEWORKS)), default=list(FRAMEWORKS))
        if kind == "attack":
            sub.add_argument("--num-steps", type=positive_ints, default=[10, 20, 100])
        if kind in ("autoattack", "libraries"):
            sub.add_argument("--golden", type=one_of("head", target.HEADS))
            sub.add_argument("--workdir", type=folder)
            sub.add_argument("--images", type=positive(int))
            sub.add_argument("--queries", type=positive(int), default=5000)
        if kind == "autoattack":
            sub.add_argument("--attacks", type=some(one_of("attack", ATTACKS)), default=tables.STANDARD.split("+"))
            sub.add_argument("--alone", action="store_true")
            sub.add_argument("--eps", type=positive(float))
        if kind == "libraries":
            names, of = list(libraries.LIBRARIES), libraries.ATTACKS
            sub.add_argument("--libraries", type=some(one_of("library", names)), default=names)
            sub.add_argument("--attacks", type=some(one_of("attack", of)), default=list(of))
            sub.add_argument("--norms", type=some(one_of("norm", libraries.NORMS)))
            sub.add_argument("--eps", type=lambda text: [positive(float)(part) for part in text.split(",")])
            sub.add_argument("--num-steps", type=positive(int), default=20)
        if kind == "scaling":
            for option in SCALED:
                sub.add_argument(option, type=positive_ints, default=[])
    options, rest = parser.parse_with_config(argv, r"--?(no)?config\b")
    if options.kind == "scaling" and not any(getattr(options, n[2:].replace("-", "_")) for n in SCALED):
        raise ValueError(f"scaling needs at least one of {', '.join(SCALED)}.")
    if getattr(options, "golden", None):
        if options.workdir or any(re.match(r"--?config(=|$)", argument) for argument in rest):
            raise ValueError("--golden brings its network and images: leave out --config and --workdir.")
        options.alone, options.name = True, options.name or f"{options.kind}-golden-{options.golden}"
        official_batches = ["--config.eval.batch_size=250"] if options.kind == "libraries" else []
        rest = [*GOLDEN, *official_batches, *rest]
    if options.kind == "libraries":
        options.radii = radii(options)
    return options, rest, flags.parse(["benchmark", *rest]).config


def radii(options: argparse.Namespace) -> dict[str, float | None]:
    """Returns norm -> radius of the measurement `libraries`; None is the radius of the config, which is in L-inf."""
    norms = options.norms or (["linf", "l1"] if options.golden else ["linf"])
    if options.eps:
        if len(options.eps) != len(norms):
            raise ValueError(f"--eps needs a radius for each of {', '.join(norms)}, got {len(options.eps)}.")
        return dict(zip(norms, options.eps, strict=True))
    if options.golden:
        return {norm: target.golden_radius(options.golden, norm) for norm in norms}
    if norms != ["linf"]:
        raise ValueError("The radius of a config is in L-inf: for other norms give --eps, a radius for each norm.")
    return {"linf": None}


def run(argv: Sequence[str]) -> int:
    options, config_arguments, config = parse(argv)
    from lt_adv.cli.experiment import Experiment  # imports jax: invalid arguments are refused first
    from lt_adv.evaluation.report import table

    Experiment.from_config(config)
    result = record.new(options.kind, argv, config)
    fields = result["config"]
    default_name = "-".join([options.kind, *(str(fields[n]) for n in ("method", "network", "dtype", "batch_size"))])
    path = options.out / f"{options.name or default_name}.json"
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a time limit still prints the results so far
    try:
        measurements.run(result, config_arguments, options, lambda: record.write(path, result))
    except KeyboardInterrupt:
        result["error"] = "stopped before the last round"
        record.write(path, result)
    print(table(*tables.table(options.kind, [result]), left=3))
    print(path)
    for line in summary.errors(result):
        print("Failed:", line, file=sys.stderr)
    return 1 if summary.errors(result) else 0


def main(argv: Sequence[str]) -> int:
    return run_command(run, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

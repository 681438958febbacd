"""How fast, measured side by side in fresh processes; one JSON file per measurement.

    python -m experiments.benchmark step    --config=configs/robal.py:dataset=cifar10 [--config.x.y=z ...]
    python -m experiments.benchmark profile --config=...    the operations a step spends its time on
    python -m experiments.benchmark data    --config=...    the input pipeline alone, and loading the images
    python -m experiments.benchmark attack  --config=...    PGD through attacks.jit and as the twin's eager loop
    python -m experiments.benchmark autoattack --config=... | --golden=...    AutoAttack, beside the twin's eager one
    python -m experiments.benchmark start   --config=...    seconds from the command to the first finished step
    python -m experiments.benchmark scaling --config=...    against batch size, depth, attack steps, devices

--runs=5           rounds; in each everything is measured once, in turn
--seconds=20       of timed steps in a process, after the warm-up
--name=NAME        of the file [<kind>-<method>-<network>-<dtype>-<batch size>]
--out=PATH         its folder [experiments/results/benchmark]
--frameworks=...   of step: jax, released, tuned, or some of them; the last two need the extra torch
--num-steps=...    of attack [10,20,100] and of scaling
--attacks=apgd-ce,square    of autoattack [apgd-ce,apgd-t,fab-t,square: the standard version]
--alone            each on all images, instead of one after the other on what is left
--images=..., --eps=..., --queries=...    of autoattack: test images [all], another radius, Square's queries [5000]
--workdir=PATH     of autoattack: a run whose last weights are attacked; without one the network is as it begins, and
                   the labels are its own predictions
--golden=HEAD      of autoattack: the digit network with that head in tests/golden, linear or cosine, each attack alone
--batch-size=..., --depth=..., --devices=...    of scaling

What fails is recorded with its reason, the rest goes on, and the exit code is 1 at the end; 2, after one line, for
arguments that cannot be meant.
"""

import argparse
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.benchmark import attacked, kinds, record, summary, tables
from experiments.options import Parser, name, one_of, positive, some
from lt_adv.cli import flags
from lt_adv.runtime import registry

FRAMEWORKS = ("jax", "released", "tuned")
ATTACKS = ("apgd-ce", "apgd-dlr", "apgd-t", "fab-t", "square")  # that the twin has
GOLDEN = ("--config=configs/at.py:dataset=digits", "--config.eval.batch_size=500")  # what else a process asks for


def folder(text: str) -> str:
    """One that is there, as the processes find it."""
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {text!r}")
    return text


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str], Any]:
    """(options, the arguments that make the config, the config); ValueError of one line for what is not clear."""
    whole = some(positive(int))
    parser = Parser(prog="python -m experiments.benchmark", allow_abbrev=False, add_help=False)
    chosen = parser.add_subparsers(dest="kind", required=True, metavar="/".join(kinds.KINDS), parser_class=Parser)
    for kind in kinds.KINDS:
        sub = chosen.add_parser(kind, allow_abbrev=False, add_help=False)
        sub.add_argument("--runs", type=positive(int), default=5)
        sub.add_argument("--seconds", type=positive(float), default=20.0)
        sub.add_argument("--name", type=name)
        sub.add_argument("--out", type=Path, default=record.RESULTS)
        if kind == "step":
            sub.add_argument("--frameworks", type=some(one_of("framework", FRAMEWORKS)), default=list(FRAMEWORKS))
        if kind == "attack":
            sub.add_argument("--num-steps", type=whole, default=[10, 20, 100])
        if kind == "autoattack":
            sub.add_argument("--attacks", type=some(one_of("attack", ATTACKS)), default=tables.STANDARD.split("+"))
            sub.add_argument("--alone", action="store_true")
            sub.add_argument("--golden", type=one_of("head", attacked.HEADS))
            sub.add_argument("--workdir", type=folder)
            sub.add_argument("--eps", type=positive(float))
            sub.add_argument("--images", type=positive(int))
            sub.add_argument("--queries", type=positive(int), default=5000)
        if kind == "scaling":
            for option in ("--batch-size", "--depth", "--num-steps", "--devices"):
                sub.add_argument(option, type=whole, default=[])
    options, rest = parser.parse_known_args(argv)
    if options.kind == "scaling" and not (options.batch_size or options.depth or options.num_steps or options.devices):
        raise ValueError("scaling needs at least one of --batch-size, --depth, --num-steps and --devices.")
    if getattr(options, "golden", None):
        if options.workdir or any(re.match(r"--?config(=|$)", given) for given in rest):
            raise ValueError("--golden has a network and images of its own: no --config and no --workdir beside it.")
        options.alone, options.name = True, options.name or f"autoattack-golden-{options.golden}"
        rest = [*GOLDEN, *rest]
    for given in rest:
        if given.startswith("-") and not re.match(r"--?(no)?config\b", given):
            known = [f"--{option.replace('_', '-')}" for option in vars(options) if option != "kind"]
            raise registry.unknown("option", given.partition("=")[0], [*known, "--config"])
    return options, rest, flags.parse(["benchmark", *rest]).config


def main(argv: Sequence[str]) -> int:
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    try:
        options, config_arguments, config = parse(argv)
        from lt_adv.cli import schema  # imports jax: bad arguments are answered before
        from lt_adv.evaluation.report import table

        schema.values(config)
    except ValueError as error:
        print("Error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    made = record.new(options.kind, argv, config)
    about = made["config"]
    usual = f"{options.kind}-{about['method']}-{about['network']}-{about['dtype']}-{about['batch_size']}"
    path = options.out / f"{options.name or usual}.json"
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a time limit: what was measured is shown all the same
    try:
        kinds.KINDS[options.kind](made, config_arguments, options, lambda: record.write(path, made))
    except KeyboardInterrupt:
        made["error"] = "stopped before the last round"
        record.write(path, made)
    print(table(*tables.TABLES[options.kind]([made]), left=3))
    print(path)
    for line in summary.errors(made):
        print("Failed:", line, file=sys.stderr)
    return 1 if summary.errors(made) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

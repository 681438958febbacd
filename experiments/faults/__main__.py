"""Short runs on digits are hurt on purpose, hundreds of times; each must end, bit for bit, as one that nothing befell.

    python -m experiments.faults

--faults=N         at least so many, every point equally often [ten for each point]
--points=A,B       some of the points alone [all that are possible here: a full and a read-only disk need a file system
                   that this process may mount]
--seed=0           of what is drawn
--digest=on|off    off: restored checkpoints are not held against their digest, and the campaign has to fail [on]
--name=NAME        of the file [digest-on or digest-off]
--out=PATH         its folder [experiments/results/faults]
--workdirs=PATH    where the runs are while they last [workdirs/faults]

A run takes a number of faults one after the other, each in a start of its own, and is then let go on to its end. Held
against the unbroken run are the state before every step, and in the end every array of the last checkpoint, the lines
of metrics.jsonl, every prediction, the exported network, and which files lie about.

What was done is written after each run. Interrupted, the same command goes on, as long as the code is the same. The
exit code is 1 if anything failed, 2, after one line, for arguments that cannot be meant.
"""

import argparse
import contextlib
import json
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmark import record
from experiments.faults import campaign, disk
from experiments.faults.points import POINTS, possible
from experiments.faults.run import Pair, Run
from experiments.options import Parser, name, one_of, positive, some
from lt_adv.cli import workdirs
from lt_adv.runtime.environment import code_digest, commit

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax is imported, here and in the runs

RESULTS = record.ROOT / "experiments" / "results" / "faults"
EACH = 10  # faults of a point


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="python -m experiments.faults", allow_abbrev=False, add_help=False)
    parser.add_argument("--faults", type=positive(int))
    parser.add_argument("--points", type=some(one_of("point", POINTS)))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--digest", type=one_of("choice", ("on", "off")), default="on")
    parser.add_argument("--name", type=name)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--workdirs", type=Path, default=Path("workdirs") / "faults")
    options = parser.parse_args(argv)
    if options.seed < 0:
        raise ValueError("--seed must not be negative.")
    return options


def begun(path: Path, made: dict[str, Any]) -> dict[str, Any]:
    """The record that was begun before with the same code and settings, or the new one."""
    if path.exists():
        found = json.loads(path.read_text())
        if all(found[entry] == made[entry] for entry in ("code", "drawn", "seed", "digest")):
            return found
    return made


def main(argv: Sequence[str]) -> int:
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    try:
        options = parse(argv)
    except ValueError as error:
        print("Error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    path = options.out / f"{options.name or f'digest-{options.digest}'}.json"
    folder = options.workdirs.absolute()
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(workdirs.locked(folder))  # against a second campaign
            can = possible(stack.enter_context(disk.mounted(folder / "disk")))
            if missing := [point for point in options.points or can if point not in can]:
                raise ValueError(f"{', '.join(missing)}: this process may not mount a file system.")
        except (ValueError, OSError) as error:
            print("Error:", error, file=sys.stderr)
            return 2
        points = options.points or can
        drawn = campaign.draw(points, options.faults or EACH * len(points), options.seed)
        made = begun(path, new(argv, options, drawn))
        try:
            made = go_on(made, folder, options, lambda: record.write(path, made))
        except KeyboardInterrupt:
            print("Interrupted: the same command goes on.", file=sys.stderr)
            return 130
    failed = [row for run in made["runs"] for row in run["faults"] if row["problems"]]
    print(f"{sum(map(len, drawn))} faults, {len(failed)} failed. {path}")
    return 1 if failed else 0


def new(argv: Sequence[str], options: argparse.Namespace, drawn: list[list[str]]) -> dict[str, Any]:
    return {
        "command": record.portable(shlex.join(["python", "-m", "experiments.faults", *argv])),
        "commit": commit(),
        "code": code_digest(),
        "machine": record.machine(),
        "versions": record.versions(),
        "seed": options.seed,
        "digest": options.digest == "on",
        "points": {},
        "drawn": drawn,
        "runs": [],
    }


def go_on(made: dict[str, Any], folder: Path, options: argparse.Namespace, write: Any) -> dict[str, Any]:
    """The runs that are still to be hurt; written after each."""
    data = folder / "digits.npz"
    campaign.write_digits(data)
    left = made["drawn"][len(made["runs"]) :]
    if not left:
        return made
    references: dict[type[Run], campaign.Reference] = {}
    for names in left:
        number = len(made["runs"])
        kind = Pair if POINTS[names[0]].processes == 2 else Run
        if kind not in references:
            whole = kind(folder / "disk", "unbroken", data)
            references[kind] = campaign.reference_run(whole)
            whole.remove()
        run = kind(folder / "disk", f"run-{number}", data, digest=made["digest"])

        def tell(row: dict[str, Any], number: int = number) -> None:
            verdict = "; ".join(row["problems"]) or "as it must"
            print(f"run {number + 1}/{len(made['drawn'])}  {row['point']:22}{row['done']}: {verdict}", flush=True)

        rows, end = campaign.inject_faults(
            run, names, np.random.default_rng([made["seed"], number]), references[kind], tell
        )
        run.remove()
        made["runs"].append({"end": end, "faults": rows})
        made["points"] = campaign.summary([row for done in made["runs"] for row in done["faults"]])
        write()
    return made


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell ignores the first for what runs in the background
        signal.signal(number, signal.default_int_handler)
    sys.exit(main(sys.argv[1:]))

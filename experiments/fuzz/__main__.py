"""Bad input, tried and tallied: what is neither accepted nor refused in one clear line is listed.

    python -m experiments.fuzz [--surface=all] [--inputs=300] [--seed=0] [--out=experiments/results]

--surface=NAME,...  some of: arguments, config, image_folder, npz, archive, weights, checkpoint, run_files
--inputs=N          of each surface; a quarter of them is valid by construction
--seed=N            which inputs: the same ones for the same seed
--seconds=N         that one may take [60]
--out=PATH          the tally goes to <out>/fuzz/<surface>.json

All inputs go through `lt_adv.main`, in a process of limited memory; where it hangs or dies the next input begins in a
new one. Training and attacks are not computed but where a surface says so. The exit code is 1 if there was anything but
accepted and refused.
"""

import argparse
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments.benchmark import record
from experiments.fuzz import tables
from experiments.options import Parser, one_of, positive, some
from lt_adv.evaluation.report import table
from lt_adv.runtime.environment import commit

START = 600  # seconds that a process may take to begin: one surface trains a small network first


def environment(folder: str) -> dict[str, str]:
    """Nothing outside of `folder` is anybody's business: home, caches and temporary files are there."""
    home = os.path.join(folder, "home")
    os.makedirs(home, exist_ok=True)
    places = dict.fromkeys(("HOME", "XDG_CACHE_HOME", "MPLCONFIGDIR", "TMPDIR"), home)
    compiled = {
        "JAX_COMPILATION_CACHE_DIR": os.path.join(home, "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    flags = "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=1"
    return {**os.environ, **places, **compiled, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


def outcomes(surface: str, seed: int, inputs: int, seconds: float, folder: str) -> Iterator[Any]:
    """Each input's outcome, in order; of one that hangs or kills its process, what is known of it."""
    from experiments.fuzz.cases import ELSE, Outcome

    number = 0
    while number < inputs:
        work = [surface, str(seed), str(number), str(inputs), folder]
        command = [sys.executable, "-m", "experiments.fuzz.worker", *work]
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment(folder)) as process:
            drawn: dict[str, Any] | None = None
            for line in _lines(process, START, seconds):
                said = json.loads(line)
                if "outcome" in said:
                    yield Outcome(**said["outcome"])
                    number, drawn = number + 1, None
                elif "kind" in said:
                    drawn = said
            ended = process.poll()
            process.kill()
            process.wait()
        if number == inputs:
            return
        if drawn is None:
            raise RuntimeError(f"The process of {surface} ended with {process.returncode} between two inputs.")
        died = f"the process died: {_ended(ended)}" if ended is not None else f"no answer in {seconds:g} s"
        yield Outcome(**drawn, answer=ELSE, line=died)
        number += 1


def _lines(process: subprocess.Popen, start: float, seconds: float) -> Iterator[bytes]:
    """What the process says, until it ends or is silent for too long."""
    assert process.stdout is not None
    limit, rest = start, b""
    while select.select([process.stdout], [], [], limit)[0]:
        limit = seconds
        new = os.read(process.stdout.fileno(), 1 << 16)
        if not new:
            process.wait()
            return
        *whole, rest = (rest + new).split(b"\n")
        yield from whole


def _ended(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """ValueError of one line for what is not clear."""
    parser = Parser(prog="python -m experiments.fuzz", allow_abbrev=False, add_help=False)
    choices = ("all", *tables.SURFACES)
    parser.add_argument("--surface", type=some(one_of("surface", choices)), default=["all"])
    parser.add_argument("--inputs", type=positive(int), default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=positive(float), default=60.0)
    parser.add_argument("--out", type=Path, default=record.RESULTS.parent)
    options = parser.parse_args(argv)
    options.surface = list(tables.SURFACES) if "all" in options.surface else options.surface
    return options


def main(argv: Sequence[str]) -> int:
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    try:
        options = parse(argv)
    except ValueError as error:
        print("Error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    from experiments.fuzz.cases import tally

    made = []
    for name in options.surface:
        command = f"python -m experiments.fuzz --surface={name} --inputs={options.inputs} --seed={options.seed}"
        about = {"surface": name, "command": command, "commit": commit(), "machine": record.machine()}
        with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
            tried = list(outcomes(name, options.seed, options.inputs, options.seconds, folder))
        made.append({**about, "versions": record.versions(), **tally(tried)})
        path = options.out / "fuzz" / f"{name}.json"
        record.write(path, made[-1])
        print(path)
    print(table(*tables.fuzz(made), left=2))
    return 1 if any(entry["else"] for entry in made) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""What the devices exchange in a training step, counted; and what that costs on large machines, on paper.

    python -m experiments.communication --config=configs/robal.py:dataset=digits [--devices=1,2,4,8] [--config...]

Each number of devices is a process with as many virtual ones; with shard_map, as pmap is the same program, and as a
sharded state needs it. The program is compiled with a state in whole copies and in shards, and its text is counted.
The networks of the papers (ResNet-18, WRN-34-10, on images of 32 x 32, ten attack steps) are traced, not compiled. And
real processes save a checkpoint together, and what each has written is weighed. What comes out goes to
experiments/results/communication/<name>.json, and from there, with the arithmetic of `paper`, into the README.

--devices=1,2,4,8   [1,2,4,8]
--hosts=1,2,4       processes that save a checkpoint together, a device each [1,2,4]
--name=NAME         of the file [communication]
--out=PATH          its folder [experiments/results/communication]
"""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from experiments.benchmark import record
from experiments.communication import checkpoints
from experiments.options import Parser, name, positive, some
from lt_adv.cli import flags
from lt_adv.main import one_line

RESULTS = Path(__file__).parents[1] / "results" / "communication"
STATES = {"whole": "()", "sharded": "('opt_state','average','params')"}
LARGE = ["--config.data.image_size=32", "--config.attack.num_steps=10"]  # as CIFAR is
NETWORKS = {
    "ResNet-18": [*LARGE, "--config.model.name=resnet18"],
    "WRN-34-10": [*LARGE, "--config.model.name=wide_resnet", "--config.model.depth=34", "--config.model.width=10"],
}


def launch(config: list[str], **options: Any) -> dict[str, Any]:
    command = [sys.executable, "-m", "experiments.communication.counts", json.dumps(options), *config]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"error": record.failure(done.returncode, done.stderr)}
    return json.loads(done.stdout.splitlines()[-1])


def main(argv: list[str]) -> int:
    parser = Parser(prog="python -m experiments.communication", allow_abbrev=False, add_help=False)
    parser.add_argument("--devices", type=some(positive(int)), default=[1, 2, 4, 8])
    parser.add_argument("--hosts", type=some(positive(int)), default=[1, 2, 4])
    parser.add_argument("--name", type=name, default="communication")
    parser.add_argument("--out", type=Path, default=RESULTS)
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    try:
        options, config = parser.parse_known_args(argv)
        flags.parse(["communication", *config])
    except ValueError as error:
        print("Error:", one_line(error), file=sys.stderr)
        return 2
    common = [*config, "--config.parallel=shard_map"]
    made: dict[str, Any] = {
        "command": record.portable(shlex.join(["python", "-m", "experiments.communication", *argv])),
        "commit": record.commit(),
        "machine": record.machine(),
        "versions": record.versions(),
        "compiled": {},
        "networks": {},
        "checkpoints": {},
    }
    path, code = options.out / f"{options.name}.json", 0
    for state, sharded in STATES.items():
        for devices in options.devices:
            found = launch([*common, f"--config.sharded={sharded}"], devices=devices, compile=True)
            made["compiled"][f"{state} {devices}"] = found
            print(f"{state} {devices}: {found.get('error', 'done')}", file=sys.stderr)
            code = code or int("error" in found)
            record.write(path, made)
    for state, sharded in STATES.items():
        for hosts in options.hosts:
            found = checkpoints.weigh([*common, "--config.average.name=ema", f"--config.sharded={sharded}"], hosts)
            made["checkpoints"][f"{state} {hosts}"] = found
            print(f"checkpoint, {state}, {hosts}: {found.get('error', 'done')}", file=sys.stderr)
            code = code or int("error" in found)
            record.write(path, made)
    for title, network in NETWORKS.items():
        found = launch([*common, *network], devices=options.devices[-1], compile=False)
        made["networks"][title] = found
        print(f"{title}: {found.get('error', 'done')}", file=sys.stderr)
        code = code or int("error" in found)
        record.write(path, made)
    print(path)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

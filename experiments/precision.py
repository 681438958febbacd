"""Whether bfloat16 moves trained accuracy: one config in three precisions, the same seeds, all evaluated in float32.

    python -m experiments.precision --name=robal-digits --config=configs/robal.py:dataset=digits [--seeds=0,1,2]
        [--config.x.y=z ...]

"attack" computes the training attack in bfloat16 and the update in float32, "all" both in bfloat16 (parameters,
statistics, logits and losses are float32 in each). Each run is `python -m lt_adv.main`; one that was interrupted goes
on. Accuracies go to experiments/results/precision/<name>.json, and from there into the README.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from lt_adv.cli import flags
from lt_adv.runtime import atomic_io
from lt_adv.runtime.environment import cores

RESULTS = Path(__file__).parent / "results" / "precision"
PRECISIONS = {
    "float32": [],
    "attack": ["--config.attack.dtype=bfloat16"],
    "all": ["--config.model.dtype=bfloat16"],
}
METRICS = ("eval/clean/balanced_accuracy", "eval/pgd20/balanced_accuracy", "eval/pgd20/accuracy_tail")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--name", required=True, help="of the file, and of the folder of the runs")
    options, config = parser.parse_known_args()
    try:
        flags.parse(["precision", *config])
    except ValueError as error:
        print("Error:", error, file=sys.stderr)
        return 2
    record: dict = {"config": config, "cores": cores(), "runs": []}
    for seed in options.seeds.split(","):
        for precision, extra in PRECISIONS.items():
            workdir = Path("workdirs") / "precision" / options.name / f"{precision}-{seed}"
            command = [sys.executable, "-m", "lt_adv.main", *config, *extra, f"--config.seed={seed}"]
            command += [f"--workdir={workdir}", "--config.eval.only=('pgd20',)"]
            subprocess.run(command, check=True)
            report = json.loads((workdir / "report.json").read_text())
            accuracies = {metric: report["metrics"][metric] for metric in METRICS}
            record["runs"].append({"precision": precision, "seed": seed, "metrics": accuracies})
            record |= {"commit": report["context"].get("commit"), "header": report["header"]}
    atomic_io.write_atomically(RESULTS / f"{options.name}.json", json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Compiles the training steps of docs/accelerators.md for accelerators that need not be there.

    python -m experiments.accelerators [--networks=resnet18,...] [--topologies=v5e:2x4,h200:8,...] [--fresh]

Each is one run of `python -m lt_adv.main --mode=compile`, whose compile.json becomes
experiments/results/compile/<network>-<topology>.json; those that exist are left out unless --fresh is given. A TPU
program takes one to ten minutes of two cores. Needs `pip install -e '.[train,tpu,cuda13]'` for all topologies.
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from lt_adv.compilation import topologies

RESULTS = Path(__file__).parent / "results" / "compile"
TOPOLOGIES = ("v5e:2x4", "v5e:16x16", "v5p:2x2x1", "v6e:2x4", "h100", "h200:8")
COUNTS = tuple(round(1280 * (5 / 1280) ** (c / 999)) for c in range(1000))  # the range of ImageNet-LT, exponential
IMAGENET = ("--config.data.name=npz", "--config.data.image_size=224", f"--config.data.class_counts={COUNTS}")


class Network(NamedTuple):
    title: str
    config: str
    batch_per_device: int
    overrides: tuple[str, ...] = ()


NETWORKS = {
    "resnet18": Network("ResNet-18, AT-BSL", "configs/at_bsl.py:dataset=cifar10", 128),
    "wrn-34-10": Network("WRN-34-10, RoBal", "configs/robal.py:dataset=cifar10", 64),
    "preact-resnet18-64px": Network("PreActResNet-18, RoBal, 64 px", "configs/robal.py:dataset=tiny_imagenet", 128),
    "resnet18-224px": Network(
        "ResNet-18, AT-BSL, 224 px, 1,000 classes", "configs/at_bsl.py:dataset=cifar10", 16, IMAGENET
    ),
}


def compile_step(name: str, topology: str) -> dict:
    """Returns compile.json of a network on a topology, with the command; raises CalledProcessError."""
    network, devices = NETWORKS[name], number_of_devices(topology)
    # CIFAR-10-LT has 13,996 images, which is the largest batch.
    batch_size = devices * (network.batch_per_device if devices <= 8 else min(network.batch_per_device, 32))
    command = ["python", "-m", "lt_adv.main", f"--config={network.config}", "--mode=compile", f"--topology={topology}"]
    command += [f"--config.optim.batch_size={batch_size}", "--config.model.dtype=bfloat16"]
    with tempfile.TemporaryDirectory() as workdir:
        arguments = [*command[1:], *network.overrides, f"--workdir={workdir}"]
        subprocess.run([sys.executable, *arguments], check=True, cwd=Path(__file__).parents[1])
        report = json.loads((Path(workdir) / "compile.json").read_text())
    return report | {"title": network.title, "command": shlex.join(command + ["..."] * bool(network.overrides))}


def number_of_devices(topology: str) -> int:
    """Returns the devices of "v5e:2x4", "h200:8" or "h100"."""
    number = 1
    for side in topologies.parse_name(topology)[1].split("x"):
        number *= int(side or 1)
    return number


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--topologies", default=",".join(TOPOLOGIES))
    parser.add_argument("--fresh", action="store_true", help="compile again what has a result")
    options = parser.parse_args()
    failed = []
    for name in options.networks.split(","):
        for topology in options.topologies.split(","):
            if name not in NETWORKS:
                parser.error(f"unknown network {name!r}; there are: {', '.join(NETWORKS)}")
            path = RESULTS / f"{name}-{topology.replace(':', '_')}.json"
            if path.exists() and not options.fresh:
                continue
            try:
                report = compile_step(name, topology)
            except subprocess.CalledProcessError:
                failed.append(path.stem)
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(report, indent=1) + "\n")
    if failed:
        print(f"Error: not compiled, see above: {', '.join(failed)}.", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""The tallies under experiments/results/fuzz/ as the README's table."""

from collections.abc import Mapping, Sequence
from typing import Any

SURFACES = {
    "arguments": "command line",
    "config": "config values",
    "image_folder": "folders of images",
    "npz": ".npz of images and labels",
    "archive": "archives of CIFAR and Tiny-ImageNet",
    "weights": "files of others' weights",
    "checkpoint": "checkpoints",
    "run_files": "other files of a run: records, metrics, config, baseline",
}


def fuzz(records: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    head = ["Surface", "Commit", "Inputs", "Valid", "Of these accepted", "Damaged and yet of use", "Refused cleanly"]
    rows = []
    for made in sorted(records, key=lambda made: list(SURFACES).index(made["surface"])):
        harmless = made["accepted"] - made["valid_accepted"]
        figures = (made["tried"], made["valid"], made["valid_accepted"], harmless, made["refused"], made["else"])
        rows.append([SURFACES[made["surface"]], (made["commit"] or "–")[:9], *(f"{figure:,}" for figure in figures)])
    return [*head, "Anything else"], rows

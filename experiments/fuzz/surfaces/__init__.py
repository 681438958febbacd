"""The kinds of input, by name."""

from collections.abc import Mapping

from experiments.fuzz.cases import Surface
from experiments.fuzz.surfaces import archive, arguments, checkpoint, config, image_folder, npz, run_files, weights

SURFACES: Mapping[str, type[Surface]] = {
    "arguments": arguments.Arguments,
    "config": config.Config,
    "image_folder": image_folder.ImageFolder,
    "npz": npz.Npz,
    "archive": archive.Archive,
    "weights": weights.Weights,
    "checkpoint": checkpoint.Checkpoint,
    "run_files": run_files.RunFiles,
}

"""Damages files between two starts. Each function chooses one of the files and returns a description of the damage."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

METADATA = ("_CHECKPOINT_METADATA", "commit_success.txt", "metadata", "_METADATA", "_sharding", "manifest.ocdbt")


def files_below(folder: Path) -> list[Path]:
    """Returns the files that are not empty, by folder and size: Orbax gives the files of arrays random names."""
    return sorted((path for path in folder.rglob("*") if path.is_file() and path.stat().st_size), key=_folder_and_size)


def _folder_and_size(path: Path) -> tuple[str, int]:
    return str(path.parent), path.stat().st_size


def _description(what: str, path: Path) -> str:
    return f"{'/'.join(path.parts[-3:-1])}/{path.name[:24]}: {what}"


def flip_bit(rng: np.random.Generator, files: Sequence[Path]) -> str:
    """Flips one bit."""
    path = files[rng.integers(len(files))]
    content = bytearray(path.read_bytes())
    position, bit = int(rng.integers(len(content))), int(rng.integers(8))
    content[position] ^= 1 << bit
    path.write_bytes(bytes(content))
    return _description(f"bit {bit} of byte {position} of {len(content)} flipped", path)


def truncate(rng: np.random.Generator, files: Sequence[Path]) -> str:
    """Truncates the file to a random length, or to 0."""
    path = files[rng.integers(len(files))]
    size = path.stat().st_size
    left = 0 if rng.random() < 0.25 else int(rng.integers(size))
    path.write_bytes(path.read_bytes()[:left])
    return _description(f"{left} of {size} bytes left", path)


def delete(rng: np.random.Generator, files: Sequence[Path]) -> str:
    """Deletes the file, or its folder."""
    path = files[rng.integers(len(files))]
    if path.parent.name in ("meta", "array_metadatas") and rng.random() < 0.5:
        shutil.rmtree(path.parent)
        return _description("its folder deleted", path)
    path.unlink()
    return _description("deleted", path)


def any_of(rng: np.random.Generator, files: Sequence[Path]) -> str:
    """Applies one of the functions above."""
    return (flip_bit, truncate, delete)[rng.integers(3)](rng, files)

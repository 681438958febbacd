"""Damage done to files between two starts; each function returns a description."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

METADATA = ("_CHECKPOINT_METADATA", "commit_success.txt", "metadata", "_METADATA", "_sharding", "manifest.ocdbt")


def below(folder: Path) -> list[Path]:
    """The files that hold anything, in a fixed order of their places (names of arrays' files are random)."""
    return sorted((path for path in folder.rglob("*") if path.is_file() and path.stat().st_size), key=_place)


def _place(path: Path) -> tuple[str, int]:
    return str(path.parent), path.stat().st_size


def _description(what: str, path: Path) -> str:
    return f"{'/'.join(path.parts[-3:-1])}/{path.name[:24]}: {what}"


def flip(rng: np.random.Generator, files: Sequence[Path]) -> str:
    """One bit of one file."""
    path = files[rng.integers(len(files))]
    content = bytearray(path.read_bytes())
    position, bit = int(rng.integers(len(content))), int(rng.integers(8))
    content[position] ^= 1 << bit
    path.write_bytes(bytes(content))
    return _description(f"bit {bit} of byte {position} of {len(content)} flipped", path)


def cut(rng: np.random.Generator, files: Sequence[Path]) -> str:
    """One file, somewhere, or to nothing."""
    path = files[rng.integers(len(files))]
    size = path.stat().st_size
    left = 0 if rng.random() < 0.25 else int(rng.integers(size))
    path.write_bytes(path.read_bytes()[:left])
    return _description(f"{left} of {size} bytes left", path)


def lose(rng: np.random.Generator, files: Sequence[Path]) -> str:
    """One file, or its folder."""
    path = files[rng.integers(len(files))]
    if path.parent.name in ("meta", "array_metadatas") and rng.random() < 0.5:
        shutil.rmtree(path.parent)
        return _description("its folder deleted", path)
    path.unlink()
    return _description("deleted", path)


def any_of(rng: np.random.Generator, files: Sequence[Path]) -> str:
    """One of the above."""
    return (flip, cut, lose)[rng.integers(3)](rng, files)

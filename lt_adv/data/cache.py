"""Cache of decoded data sets on disk: memory-mapped uint8 .npy files and a meta.json with their digests.

A cache folder is written under a temporary name and renamed when it is complete. Every load checks sizes, shapes and
dtypes, and the sha256 of arrays up to `FULL_CHECK_BYTES`; the digest of larger ones would take seconds.
"""

import contextlib
import errno
import io
import json
import logging
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from hashlib import sha256 as new_sha256
from pathlib import Path

import numpy as np

from lt_adv.data.dataset import (
    ARRAYS,
    ArrayInfo,
    Dataset,
    Source,
    Split,
    SplitReader,
    check_labels,
    digest_of,
    digest_splits,
    sha256,
)
from lt_adv.runtime import atomic_io

VERSION = 1
FULL_CHECK_BYTES = 512 << 20
STALE_SECONDS = 24 * 3600
log = logging.getLogger(__name__)


def folder_of(data_dir: Path, name: str, source: Source) -> Path:
    """Returns `<data_dir>/lt_adv_cache/<name>-<hash>`; the hash changes with the data and with `VERSION`."""
    identity = json.dumps([VERSION, name, source.identity], sort_keys=True)
    return data_dir / "lt_adv_cache" / f"{name.replace('/', '-')}-{new_sha256(identity.encode()).hexdigest()[:16]}"


def load(data_dir: Path, name: str, source: Source, limit: float = math.inf) -> Dataset:
    """Returns the data set from its cache; decodes it into the cache first if there is none or a damaged one.

    If there is no cache and the training images would take more than `limit` bytes, images that can be decoded one by
    one stay encoded (`images.LazyImages`).
    """
    class_names, splits, digest = load_splits(data_dir, name, source, limit)
    return Dataset(name, splits["train"], splits["test"], class_names, digest)


def load_splits(
    data_dir: Path, name: str, source: Source, limit: float = math.inf
) -> tuple[tuple[str, ...], dict[str, Split], str]:
    """Returns (class names, splits, digest) of a source with any splits; see `load`. `limit` is that of the first."""
    folder = folder_of(data_dir, name, source)
    if folder.exists():
        try:
            return _open(folder)
        except Exception as error:  # numpy raises many types for a damaged .npy
            log.warning("The cache %s is damaged (%s): it is rebuilt.", folder, atomic_io.message(error))
    class_names, readers = source.read()
    if invalid := [name for name in class_names if name != name.encode(errors="replace").decode()]:
        raise ValueError(f"The class name {invalid[0]!r} is not UTF-8, which reports need: rename the class.")
    if math.prod(next(iter(readers.values())).shape) > limit:
        encoded = {k: Split(r.image, r.label, r.index) for k, r in readers.items() if r.image is not None}
        if len(encoded) == len(readers):
            return class_names, encoded, digest_splits(class_names, encoded)
    try:
        _write(folder, class_names, readers)
    except OSError as error:
        size = sum(math.prod(r.shape) for r in readers.values()) >> 20
        raise ValueError(
            f"Cannot write the cache {folder} ({error.strerror or error}): set --config.data.data_dir to a writable "
            f"folder with {size + 1} MiB free."
        ) from error
    return _open(folder)


def _is_valid(folder: Path) -> bool:
    try:
        _open(folder)
    except Exception:  # as in `load`
        return False
    return True


def cached_arrays(
    data_dir: Path, name: str, identity: object, compute: Callable[[], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Returns small arrays from `<data_dir>/lt_adv_cache/<name>-<hash>.npz`.

    If the file is missing or damaged, the arrays are computed and written.
    """
    path = folder_of(data_dir, name, Source(identity, lambda: ((), {}))).with_suffix(".npz")
    try:
        with np.load(path, allow_pickle=False) as file:
            return {k: file[k] for k in file.files}
    except FileNotFoundError:
        pass
    except Exception as error:  # numpy raises many types for a damaged .npz
        log.warning("%s is damaged (%s): it is rebuilt.", path, atomic_io.reason(path, error, atomic_io.NPZ))
    arrays = compute()
    content = io.BytesIO()
    np.savez(content, **arrays)  # type: ignore[arg-type]
    with contextlib.suppress(OSError):  # without a writable folder they are computed each time
        atomic_io.write_atomically(path, content.getvalue())
    return arrays


def _open(folder: Path) -> tuple[tuple[str, ...], dict[str, Split], str]:
    meta = json.loads((folder / "meta.json").read_text())
    arrays = {}
    for file, expected in meta["arrays"].items():
        path = folder / f"{file}.npy"
        array = np.load(path, mmap_mode="r", allow_pickle=False)  # raises for a file that is too short
        if array.nbytes + array.offset != os.path.getsize(path):
            raise ValueError(f"{file}.npy has another size")
        if list(array.shape) != expected["shape"] or str(array.dtype) != expected["dtype"]:
            raise ValueError(f"{file}.npy is {array.dtype} {list(array.shape)}")
        if array.nbytes <= FULL_CHECK_BYTES and sha256(array) != expected["sha256"]:
            raise ValueError(f"{file}.npy has another digest")
        arrays[file] = array
    class_names = tuple(meta["class_names"])
    if digest_of(class_names, meta["arrays"]) != meta["digest"]:
        raise ValueError("meta.json has another digest")
    names = dict.fromkeys(file.rpartition("_")[0] for file in arrays)
    splits = {split: Split(*(arrays[f"{split}_{field}"] for field in ARRAYS)) for split in names}
    for split, content in splits.items():
        check_labels(content.label, len(content.image), len(class_names), f"split {split}")
    return class_names, splits, meta["digest"]


def _write(folder: Path, class_names: tuple[str, ...], readers: dict[str, SplitReader]) -> None:
    atomic_io.make_folder(folder.parent)
    _remove_stale(folder)
    size = sum(math.prod(r.shape) for r in readers.values())
    if size > shutil.disk_usage(folder.parent).free:  # fail before the disk is full
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        os.chmod(temporary, 0o777 & ~_umask())  # mkdtemp's 0700 would exclude other users of the data folder
        arrays: dict[str, ArrayInfo] = {}
        for split, reader in readers.items():
            path = temporary / f"{split}_image.npy"
            arrays[f"{split}_image"] = _write_array(path, reader.shape, "uint8", reader.blocks())
            for field in ("label", "index"):
                array = getattr(reader, field)
                path = temporary / f"{split}_{field}.npy"
                arrays[f"{split}_{field}"] = _write_array(path, array.shape, str(array.dtype), [array])
        meta = {"class_names": class_names, "arrays": arrays, "digest": digest_of(class_names, arrays)}
        (temporary / "meta.json").write_text(json.dumps(meta, indent=1))
        atomic_io.sync_tree(temporary)
        _publish(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_array(path: Path, shape: tuple[int, ...], dtype: str, blocks: Iterable[np.ndarray]) -> ArrayInfo:
    # A stream instead of a memory map, because a full disk kills a process that writes to a map.
    digest, rows = new_sha256(), 0
    with path.open("wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": tuple(shape)}
        np.lib.format.write_array_header_1_0(file, header)
        for block in blocks:
            if block.dtype != dtype or block.shape[1:] != tuple(shape[1:]):
                raise ValueError(f"Images decoded to {block.dtype} {block.shape[1:]}, not {dtype} {tuple(shape[1:])}.")
            data = np.ascontiguousarray(block).tobytes()
            file.write(data)
            digest.update(data)
            rows += len(block)
    if rows != shape[0]:
        raise ValueError(f"{rows} images were decoded instead of {shape[0]}.")
    return {"shape": list(shape), "dtype": dtype, "sha256": digest.hexdigest()}


def _publish(temporary: Path, folder: Path) -> None:
    """Renames the finished folder to its name and replaces a damaged one.

    A valid folder that a faster process has written is left in place: it has the same content and may be open.
    """
    if folder.exists() and not _is_valid(folder):
        # Moved before it is deleted, so that no process sees it half deleted. Open memory maps stay valid.
        old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            os.replace(folder, old)
        finally:
            shutil.rmtree(old, ignore_errors=True)
    try:
        os.rename(temporary, folder)
    except OSError:
        if not folder.exists():
            raise
    atomic_io.sync(folder.parent)


def _remove_stale(folder: Path) -> None:
    """Removes temporary folders of this cache that killed processes left more than a day ago."""
    for path in folder.parent.glob(f".{folder.name}.*"):
        with contextlib.suppress(FileNotFoundError):  # another process has just renamed it
            if time.time() - path.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(path, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

"""Decoded sets on disk: uint8 .npy files that are memory-mapped, and a meta.json with their digests.

A cache folder appears under its name only when it is complete (written beside, then renamed). At each start the sizes,
shapes and dtypes are checked, and the sha256 of every array up to `FULL_CHECK_BYTES`; larger image arrays, whose digest
would take seconds, are trusted beyond their size.
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
from collections.abc import Callable
from hashlib import sha256 as new_sha256
from pathlib import Path

import numpy as np

from lt_adv.data.dataset import ARRAYS, Dataset, Source, Split, SplitReader, digest_of, make_dataset, sha256
from lt_adv.runtime import atomic_io

VERSION = 1
FULL_CHECK_BYTES = 512 << 20
STALE_SECONDS = 24 * 3600
log = logging.getLogger(__name__)


def folder_of(data_dir: Path, name: str, source: Source) -> Path:
    """`<data_dir>/lt_adv_cache/<name>-<fingerprint>`; the fingerprint changes with the data and with `VERSION`."""
    identity = json.dumps([VERSION, name, source.identity], sort_keys=True)
    return data_dir / "lt_adv_cache" / f"{name.replace('/', '-')}-{new_sha256(identity.encode()).hexdigest()[:16]}"


def load(data_dir: Path, name: str, source: Source, limit: float = math.inf) -> Dataset:
    """The set from its cache; decoded first where there is none, or a damaged one (which one line of warning names).

    A set that is not there, and whose training images would take more than `limit` bytes, is left as it is where its
    images can be decoded one by one.
    """
    folder = folder_of(data_dir, name, source)
    if folder.exists():
        try:
            return _open(folder, name)
        except Exception as error:  # a damaged .npy fails in many ways
            log.warning("The cache %s is damaged (%s): it is rebuilt.", folder, atomic_io.message(error))
    class_names, decodings = source.read()
    if odd := [name for name in class_names if name != name.encode(errors="replace").decode()]:
        raise ValueError(f"The class name {odd[0]!r} is no UTF-8, as reports are written: rename the class.")
    if math.prod(decodings["train"].shape) > limit and all(d.image is not None for d in decodings.values()):
        return make_dataset(name, class_names, {k: Split(d.image, d.label, d.index) for k, d in decodings.items()})
    try:
        _write(folder, class_names, decodings)
    except OSError as error:
        size = sum(math.prod(d.shape) for d in decodings.values()) >> 20
        raise ValueError(
            f"Cannot write the cache {folder} ({error.strerror or error}); it needs a writable folder with "
            f"{size + 1} MiB free, which --config.data.data_dir names."
        ) from error
    return _open(folder, name)


def _is_whole(folder: Path) -> bool:
    try:
        _open(folder, folder.name)
    except Exception:  # as in load
        return False
    return True


def remembered(data_dir: Path, name: str, identity: object, compute: Callable[[], dict[str, np.ndarray]]) -> dict:
    """Small arrays that take long to find: from `<data_dir>/lt_adv_cache/<name>-<fingerprint>.npz`, written first where
    there is none or a damaged one."""
    path = folder_of(data_dir, name, Source(identity, lambda: ((), {}))).with_suffix(".npz")
    try:
        with np.load(path, allow_pickle=False) as file:
            return {k: file[k] for k in file.files}
    except FileNotFoundError:
        pass
    except Exception as error:  # a damaged zip fails in many ways
        log.warning("%s is damaged (%s): it is made again.", path, atomic_io.reason(path, error, atomic_io.NPZ))
    arrays = compute()
    content = io.BytesIO()
    np.savez(content, **arrays)
    with contextlib.suppress(OSError):  # where nothing can be written they are found anew next time
        atomic_io.write_atomically(path, content.getvalue())
    return arrays


def _open(folder: Path, name: str) -> Dataset:
    meta = json.loads((folder / "meta.json").read_text())
    arrays = {}
    for file, expected in meta["arrays"].items():
        array = np.load(folder / f"{file}.npy", mmap_mode="r", allow_pickle=False)  # refuses a file that is too short
        if array.nbytes + array.offset != os.path.getsize(folder / f"{file}.npy"):
            raise ValueError(f"{file}.npy has another size")
        if list(array.shape) != expected["shape"] or str(array.dtype) != expected["dtype"]:
            raise ValueError(f"{file}.npy is {array.dtype} {list(array.shape)}")
        if array.nbytes <= FULL_CHECK_BYTES and sha256(array) != expected["sha256"]:
            raise ValueError(f"{file}.npy has another digest")
        arrays[file] = array
    class_names = tuple(meta["class_names"])
    if digest_of(class_names, meta["arrays"]) != meta["digest"]:
        raise ValueError("meta.json has another digest")
    train, test = (Split(*(arrays[f"{split}_{field}"] for field in ARRAYS)) for split in ("train", "test"))
    return Dataset(name, train, test, class_names, meta["digest"])


def _write(folder: Path, class_names: tuple[str, ...], decodings: dict[str, SplitReader]) -> None:
    atomic_io.make_folder(folder.parent)
    _remove_stale(folder)
    needed = sum(math.prod(d.shape) for d in decodings.values())
    if needed > shutil.disk_usage(folder.parent).free:  # rather than to fill the disk first
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        os.chmod(temporary, 0o777 & ~_umask())  # mkdtemp's 0700 would lock out the others who share the data folder
        arrays = {}
        for split, d in decodings.items():
            arrays[f"{split}_image"] = _write_array(temporary / f"{split}_image.npy", d.shape, "uint8", d.blocks())
            for field in ("label", "index"):
                array = getattr(d, field)
                path = temporary / f"{split}_{field}.npy"
                arrays[f"{split}_{field}"] = _write_array(path, array.shape, str(array.dtype), [array])
        meta = {"class_names": class_names, "arrays": arrays, "digest": digest_of(class_names, arrays)}
        (temporary / "meta.json").write_text(json.dumps(meta, indent=1))
        atomic_io.sync_tree(temporary)
        _publish(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_array(path: Path, shape: tuple[int, ...], dtype: str, blocks) -> dict:
    # Written as a stream, not through a memory map, because a full disk kills a process that writes to a map.
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
    """Puts the finished folder in place of a damaged one. That of a process that was faster stays: it is the same, and
    may be open already."""
    if folder.exists() and not _is_whole(folder):
        # Moved aside first: deleted in place it would be half there for a while. Open memory maps stay valid.
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
    """Removes what killed runs have left of this cache; a folder a day old has no writer any more."""
    for path in folder.parent.glob(f".{folder.name}.*"):
        if time.time() - path.stat().st_mtime > STALE_SECONDS:
            shutil.rmtree(path, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

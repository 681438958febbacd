"""Atomic and durable writes of files and folders, and detection of file formats.

A file system may store a new name before the content behind it. The functions here therefore sync content to the disk
before they rename it, and sync the name before they return. Buckets need no sync.
"""

import errno
import io
import itertools
import os
import pathlib
import re
import shutil
import zipfile
from collections.abc import Mapping
from typing import BinaryIO

from etils import epath


def parse_path(text: str, option: str) -> epath.Path:
    """Returns `text` as a path; raises ValueError, which begins with the name of the `option`, for an invalid one."""
    try:
        text.encode()
        if "\0" not in text:
            return epath.Path(text)
        reason = "it contains a NUL byte"
    except UnicodeEncodeError:
        reason = "it is not UTF-8"
    except KeyError as error:  # epath's, for an unknown store
        reason = f"{error.args[0]} is not supported; buckets are gs://... or s3://..."
    raise ValueError(f"{option} {text!r} is not a valid path: {reason}.")


def sync(path: epath.PathLike) -> None:
    """Waits until the content of a file, or the names in a folder, are on the disk; raises OSError if that fails."""
    if "://" in os.fspath(path):
        return
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        # Folders without read permission, or on a file system that cannot sync folders, are left to the system.
        if error.errno not in (errno.EACCES, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP) or not os.path.isdir(path):
            raise


def sync_tree(folder: epath.PathLike) -> None:
    """Syncs a folder and everything below it."""
    for parent, _, names in os.walk(folder, topdown=False):
        for path in (*(os.path.join(parent, name) for name in names), parent):
            sync(path)


def make_folder(path: epath.PathLike) -> None:
    """Creates a folder and its missing parents, and syncs their names."""
    path = epath.Path(path)
    candidates = (path, *path.parents) if "://" not in os.fspath(path) else ()
    new = list(itertools.takewhile(lambda folder: not folder.exists(), candidates))
    path.mkdir(parents=True, exist_ok=True)
    for folder in new:
        sync(folder.parent)


def write_atomically(path: epath.PathLike, content: str | bytes) -> None:
    """Writes `content` to a temporary file and renames it to `path`; creates missing folders.

    After an error an old file of that name is unchanged, and no temporary file remains.

    Raises:
      OSError: the file cannot be written.
      ValueError: `path` is a folder.
    """
    path = epath.Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder, but a file must be written there: move the folder elsewhere.")
    make_folder(path.parent)
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except BaseException:  # including KeyboardInterrupt
        temporary.unlink(missing_ok=True)
        raise


def replace_folder(path: epath.PathLike, contents: Mapping[str, bytes]) -> None:
    """Replaces the folder `path` atomically by one with exactly these files (name -> content).

    After an error the old folder is unchanged, and no temporary folder remains.

    Raises:
      OSError: the folder cannot be written.
      ValueError: the old folder has a file that is not in `contents` and would be lost.
    """
    path = epath.Path(path)
    unexpected = sorted({file.name for file in path.iterdir()} - set(contents)) if path.exists() else []
    if unexpected:
        raise ValueError(f"{path} holds {unexpected[0]}, which would be lost: move it, or the folder, elsewhere.")
    new, old = (path.parent / f".{path.name}.{os.getpid()}.{suffix}" for suffix in ("tmp", "old"))
    try:
        make_folder(path.parent)
        new.mkdir()
        for name, content in contents.items():
            (new / name).write_bytes(content)
        sync_tree(new)
        if path.exists():
            path.rename(old)  # a folder cannot be renamed onto an existing one
        new.rename(path)
        sync(path.parent)
    except BaseException:  # including KeyboardInterrupt
        new.rmtree(missing_ok=True)
        if old.exists() and not path.exists():
            old.rename(path)
        raise
    old.rmtree(missing_ok=True)


def remove_partial_writes(folder: epath.PathLike) -> None:
    """Removes the temporary files and folders that killed processes have left below `folder` (not a bucket).

    If `replace_folder` was killed between its two renames, the old folder is restored. No other process may be writing
    below `folder`.
    """
    folder = pathlib.Path(folder)
    for path in list(folder.rglob(".*.old")):
        target = path.parent / path.name[1:].rsplit(".", 2)[0]
        shutil.rmtree(path) if target.exists() else path.rename(target)
    for path in list(folder.rglob(".*.tmp")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


NPZ, ZIP, DAMAGED_ZIP = "an .npz file of NumPy", "a zip archive", "a zip archive that is damaged or cut short"
TORCH, PICKLE = "a PyTorch file (torch.save)", "a pickle"
SAFETENSORS, GZIP, TEXT, JSON = "a safetensors file", "a gzip archive", "a text file", "a JSON file"
LFS = "a Git LFS pointer in place of the file: fetch it with git lfs pull"
ANNEX = "a git-annex pointer in place of the file: fetch it with git annex get"
POINTERS = (LFS, ANNEX)
SIGNATURES: Mapping[bytes, str] = {
    b"version https://git-lfs.github.com/spec/": LFS,
    b"version https://hawser.github.com/spec/": LFS,
    b"/annex/objects/": ANNEX,
    b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.": TORCH,  # before PyTorch 1.6
    b"\x93NUMPY": "a single array of NumPy (.npy)",
    b"\x1f\x8b": GZIP,
    b"BZh": "a bzip2 archive",
    b"\xfd7zXZ\0": "an xz archive",
    b"\x28\xb5\x2f\xfd": "a Zstandard archive",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!\x1a\x07": "a RAR archive",
    b"\x89HDF\r\n\x1a\n": "an HDF5 file",
    b"MATLAB 5.0 MAT-file": "a MATLAB file",
    b"GGUF": "a GGUF file",
    b"PAR1": "a Parquet file",
    b"%PDF-": "a PDF document",
    b"\x89PNG\r\n\x1a\n": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF8": "a GIF image",
}
HEAD = 1024  # bytes that are read to detect a format


def format_of(file: epath.PathLike | bytes) -> str | None:
    """Returns the format of a file, or of its content, such as "an HTML page"; None if it is not recognised.

    The member names of a zip archive are read as well. Nothing in the file is executed. Raises OSError if the file
    cannot be read.
    """
    with io.BytesIO(file) if isinstance(file, bytes) else epath.Path(file).open("rb") as stream:
        head = stream.read(HEAD)
        if not head:
            return "empty"
        if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
            return _format_of_zip(stream)
        size = stream.seek(0, os.SEEK_END)
    if matches := [description for signature, description in SIGNATURES.items() if head.startswith(signature)]:
        return matches[0]
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return PICKLE
    if head[257:262] == b"ustar":
        return "a tar archive"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "a WebP image"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8:
        return SAFETENSORS
    return _format_of_text(head)


def placeholder(folder: epath.PathLike) -> str | None:
    """Returns a description of the first Git LFS or git-annex pointer below `folder`, or None."""
    folder = epath.Path(folder)
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        pointer = placeholder(path) if path.is_dir() else None
        if path.is_file() and (file_format := format_of(path)) in POINTERS:
            pointer = f"{path} is {file_format}"
        if pointer:
            return pointer
    return None


def _format_of_zip(stream: BinaryIO) -> str:
    try:
        with zipfile.ZipFile(stream) as archive:
            names = archive.namelist()
    except Exception:  # zipfile raises many types for a damaged directory
        return DAMAGED_ZIP
    if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
        return "a TorchScript archive (torch.jit.save), which contains a program: save only the module's state_dict"
    if any(name.endswith(("serialized_exported_program.json", "archive_format")) for name in names):
        return "a program (torch.export.save): save only the module's state_dict"
    if any(name.endswith("/data.pkl") for name in names):
        return TORCH
    return NPZ if not names or any(name.endswith(".npy") for name in names) else ZIP


def _format_of_text(head: bytes) -> str | None:
    text = head.decode(errors="ignore" if len(head) == HEAD else "replace").lstrip("\ufeff")  # HEAD may cut a character
    if not all(character.isprintable() or character.isspace() for character in text) or "\ufffd" in text:
        return None
    if re.match(r"\s*<(!doctype html|html|head|body)|.*<html", text, re.IGNORECASE | re.DOTALL):
        return "an HTML page, as servers send in place of a file"
    if re.match(r"\s*<(\?xml|!--|\w+[ />])", text):
        return "an XML document"
    if re.match(r"\s*[{\[]", text):
        return JSON
    return f"{TEXT} that begins with {(text.split(chr(10)) or [''])[0].strip()[:60]!r}"


def reason(file: epath.PathLike | bytes, error: Exception, *expected: str) -> str:
    """Returns why a file cannot be read, in one line: its format if it is not an `expected` one, else the error."""
    try:
        file_format = format_of(file)
    except OSError:
        return message(error)
    if file_format is None and NPZ in expected:  # NumPy takes any other format for pickled objects
        return "it is not a zip archive, as an .npz file is"
    return f"it is {file_format}" if file_format and file_format not in expected else message(error)


def message(error: Exception) -> str:
    """Returns a reader's error message in one line.

    The advice of NumPy and PyTorch to load pickled objects, which may execute code, is replaced.
    """
    if re.search(r"pickle|weights_only", str(error), re.IGNORECASE):
        return "files with pickled objects are not read, because loading them can execute code"
    kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
    return f"{kind}{' '.join(str(error).split())[:300]}"

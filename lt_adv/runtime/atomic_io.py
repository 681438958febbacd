"""Files that others read while they are written, or after a kill or a power cut; and what kind a file is.

A file system may put a new name on the disk before what it stands for. So whatever gets its name here has reached the
disk before, and the name has when the function returns. A bucket's store sees to that by itself.
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

from etils import epath


def place(text: str, named: str) -> epath.Path:
    """The path that `text` says; ValueError, which begins with how it is `named`, for one that no file can have."""
    try:
        text.encode()
        if "\0" not in text:
            return epath.Path(text)
        reason = "there is a byte 0 in it"
    except UnicodeEncodeError:
        reason = "it is no UTF-8"
    except KeyError as error:  # epath's, for a store that it does not know
        reason = f"nothing is known of {error.args[0]}, where a bucket is gs://... or s3://..."
    raise ValueError(f"{named} {text!r} is no path: {reason}.")


def sync(path: epath.PathLike) -> None:
    """Wait until a file, or of a folder the names in it, has reached the disk. OSError where it cannot."""
    if "://" in os.fspath(path):
        return
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        # Folders that may not be read, or file systems that have no such call for folders: they write when they will.
        if error.errno not in (errno.EACCES, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP) or not os.path.isdir(path):
            raise


def sync_tree(folder: epath.PathLike) -> None:
    """`sync` for the folder and all that is in it."""
    for parent, _, names in os.walk(folder, topdown=False):
        for path in (*(os.path.join(parent, name) for name in names), parent):
            sync(path)


def make_folder(path: epath.PathLike) -> None:
    """The folder, and those above it that are missing."""
    path = epath.Path(path)
    above = (path, *path.parents) if "://" not in os.fspath(path) else ()
    new = list(itertools.takewhile(lambda folder: not folder.exists(), above))
    path.mkdir(parents=True, exist_ok=True)
    for folder in new:
        sync(folder.parent)


def write_atomically(path: epath.PathLike, content: str | bytes) -> None:
    """All of `content` or nothing: written under another name, then renamed. Makes the folder where it is missing.

    Errors: OSError where it cannot be written, ValueError where a folder stands there; an old file of that name stays,
    and nothing else is left behind.
    """
    path = epath.Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder, and a file is to be written there: move it elsewhere.")
    make_folder(path.parent)
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except BaseException:  # an interruption, too
        temporary.unlink(missing_ok=True)
        raise


def replace_folder(path: epath.PathLike, contents: Mapping[str, bytes]) -> None:
    """The folder `path` with these files and no others, whole or not at all: what was there before goes.

    Errors: ValueError where it holds what would not be written again, so that nothing of somebody else's is lost;
    OSError where it cannot be written; the old folder then stays, and nothing else is left behind.
    """
    path = epath.Path(path)
    strange = sorted({file.name for file in path.iterdir()} - set(contents)) if path.exists() else []
    if strange:
        raise ValueError(f"{path} holds {strange[0]}, which would be lost: move it, or the folder, elsewhere.")
    new, old = (path.parent / f".{path.name}.{os.getpid()}.{which}" for which in ("tmp", "old"))
    try:
        make_folder(path.parent)
        new.mkdir()
        for name, content in contents.items():
            (new / name).write_bytes(content)
        sync_tree(new)
        if path.exists():
            path.rename(old)  # a folder cannot be renamed to one that is there
        new.rename(path)
        sync(path.parent)
    except BaseException:  # an interruption, too
        new.rmtree(missing_ok=True)
        if old.exists() and not path.exists():
            old.rename(path)
        raise
    old.rmtree(missing_ok=True)


def clear(folder: epath.PathLike) -> None:
    """Remove below `folder`, which is no bucket's, what killed processes were writing with the functions above.

    A folder that was taken away for a new one, which then did not come, is put back. Nobody may be writing there now.
    """
    folder = pathlib.Path(folder)
    for path in list(folder.rglob(".*.old")):
        place = path.parent / path.name[1:].rsplit(".", 2)[0]
        shutil.rmtree(path) if place.exists() else path.rename(place)
    for path in list(folder.rglob(".*.tmp")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


NPZ, ZIP, DAMAGED_ZIP = "an .npz file of NumPy", "a zip archive", "a zip archive that is damaged or cut short"
TORCH, PICKLE = "a PyTorch file (torch.save)", "a pickle"
SAFETENSORS, GZIP, TEXT, JSON = "a safetensors file", "a gzip archive", "a text", "a text in JSON"
LFS = "a Git LFS pointer in place of the file: fetch it with git lfs pull"
ANNEX = "a git-annex pointer in place of the file: fetch it with git annex get"
POINTERS = (LFS, ANNEX)
SIGNATURES: Mapping[bytes, str] = {
    b"version https://git-lfs.github.com/spec/": LFS,
    b"version https://hawser.github.com/spec/": LFS,
    b"/annex/objects/": ANNEX,
    b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.": TORCH,  # as written before PyTorch 1.6
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
HEAD = 1024  # bytes that tell


def format_of(file: epath.PathLike | bytes) -> str | None:
    """What a file, or its content, is by its first bytes, such as "an HTML page"; None where they do not tell.

    Of a zip archive the names of its members are read as well. Nothing in the file is run. OSError where it cannot be
    read.
    """
    with io.BytesIO(file) if isinstance(file, bytes) else epath.Path(file).open("rb") as stream:
        head = stream.read(HEAD)
        if not head:
            return "empty"
        if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
            return _format_of_zip(stream)
        size = stream.seek(0, os.SEEK_END)
    if known := [what for start, what in SIGNATURES.items() if head.startswith(start)]:
        return known[0]
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
    """The first file below `folder` that is a pointer of Git LFS or git-annex, and what it is; None without any."""
    folder = epath.Path(folder)
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        pointer = placeholder(path) if path.is_dir() else None
        if path.is_file() and (what := format_of(path)) in POINTERS:
            pointer = f"{path} is {what}"
        if pointer:
            return pointer
    return None


def _format_of_zip(stream: io.IOBase) -> str:
    try:
        with zipfile.ZipFile(stream) as archive:  # type: ignore[call-overload]
            names = archive.namelist()
    except Exception:  # a damaged directory fails in many ways
        return DAMAGED_ZIP
    if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
        return "a TorchScript archive (torch.jit.save), which holds a program: save the module's state_dict alone"
    if any(name.endswith(("serialized_exported_program.json", "archive_format")) for name in names):
        return "a program (torch.export.save): save the module's state_dict alone"
    if any(name.endswith("/data.pkl") for name in names):
        return TORCH
    return NPZ if not names or any(name.endswith(".npy") for name in names) else ZIP


def _format_of_text(head: bytes) -> str | None:
    text = head.decode(errors="ignore" if len(head) == HEAD else "replace").lstrip("\ufeff")  # HEAD may cut a letter
    if not all(letter.isprintable() or letter.isspace() for letter in text) or "\ufffd" in text:
        return None
    if re.match(r"\s*<(!doctype html|html|head|body)|.*<html", text, re.IGNORECASE | re.DOTALL):
        return "an HTML page, such as servers send in place of a file"
    if re.match(r"\s*<(\?xml|!--|\w+[ />])", text):
        return "an XML document"
    if re.match(r"\s*[{\[]", text):
        return JSON
    return f"{TEXT} that begins with {(text.split(chr(10)) or [''])[0].strip()[:60]!r}"


def reason(file: epath.PathLike | bytes, error: Exception, *expected: str) -> str:
    """Why a file cannot be read, in one line: what it is, unless that is `expected`, else what `error` says."""
    try:
        what = format_of(file)
    except OSError:
        what = None
    return f"it is {what}" if what and what not in expected else message(error)


def message(error: Exception) -> str:
    """What an error of a reader says, in one line.

    NumPy's and PyTorch's errors recommend to load pickles, and so to run what is in them: that is not passed on.
    """
    if re.search(r"pickle|weights_only", str(error), re.IGNORECASE):
        return "only files without pickled objects are read, for to load those could run any program"
    kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
    return f"{kind}{' '.join(str(error).split())[:300]}"

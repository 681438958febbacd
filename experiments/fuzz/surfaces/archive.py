"""Archives of CIFAR-10, CIFAR-100 and Tiny-ImageNet: damaged, of another digest, with members that lead elsewhere.

Small ones of the same layout stand for the official ones, whose digest is changed to theirs, so that the reader meets
them; in a part of the inputs it is not, and the digest has to be noticed.
"""

import contextlib
import dataclasses
import gzip
import hashlib
import io
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from experiments.fuzz.box import Box
from experiments.fuzz.cases import Case, no_computation
from experiments.fuzz.draw import damaged, one
from experiments.fuzz.surfaces.arguments import ROOT
from experiments.fuzz.surfaces.image_folder import ARGUMENTS, bomb, picture
from lt_adv.data import archives

Members = dict[str, bytes]


def cifar10(rng: np.random.Generator) -> Members:
    def records(number: int) -> bytes:
        content = rng.integers(0, 256, (number, 3073)).astype(np.uint8)
        content[:, 0] = np.arange(number) % 10
        return content.tobytes()

    names = "\n".join(f"class{i}" for i in range(10)).encode()
    batches = {f"data_batch_{i}.bin": records(10) for i in range(1, 6)}
    return {**batches, "test_batch.bin": records(10), "batches.meta.txt": names}


def cifar100(rng: np.random.Generator) -> Members:
    def records() -> bytes:
        content = rng.integers(0, 256, (100, 3074)).astype(np.uint8)
        content[:, 1] = np.arange(100)
        return content.tobytes()

    names = "\n".join(f"fine{i}" for i in range(100)).encode()
    return {"train.bin": records(), "test.bin": records(), "fine_label_names.txt": names}


def tiny_imagenet(rng: np.random.Generator) -> Members:
    """With 200 classes of one training image each."""
    wnids = [f"n{i:08}" for i in range(200)]
    image = picture(rng, side=(64, 64), kind="JPEG")
    members = {"wnids.txt": "\n".join(wnids).encode(), "words.txt": b"n00000000\tcat, feline\nn00000001\tdog"}
    members |= {f"train/{wnid}/images/{wnid}_0.JPEG": image for wnid in wnids}
    members |= {f"val/images/val_{i}.JPEG": image for i in range(4)}
    annotations = "\n".join(f"val_{i}.JPEG\t{wnids[i]}\t0\t0\t62\t62" for i in range(4))
    return {**members, "val/val_annotations.txt": annotations.encode()}


MAKERS = {"cifar10": cifar10, "cifar100": cifar100, "tiny_imagenet": tiny_imagenet}


def tar(members: Mapping[str, bytes], strange: tuple[tarfile.TarInfo, bytes] | None = None) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as file:
        for name, content in members.items():
            member = tarfile.TarInfo(f"cifar/{name}")
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
        if strange:
            strange[0].size = len(strange[1])
            file.addfile(strange[0], io.BytesIO(strange[1]))
    return stream.getvalue()


def zipped(members: Mapping[str, bytes], strange: Mapping[str, bytes] | None = None) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(f"tiny-imagenet-200/{name}", content)
        for name, content in (strange or {}).items():
            file.writestr(name, content)
    return stream.getvalue()


class Archive:
    def __init__(self, shared: Path) -> None:
        del shared
        self._published: Mapping[str, archives.Archive] = {}

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        with no_computation(), mock.patch.dict(archives.ARCHIVES, self._published):
            yield

    def case(self, rng: np.random.Generator, box: Box, valid: bool) -> Case:
        name = one(rng, ("cifar10", "cifar10", "cifar100", "tiny_imagenet"))
        members = MAKERS[name](rng)
        kind, words, content, expected = "valid", name, self._packed(name, members), True
        if not valid:
            change = one(rng, (self._damaged, self._digest, self._elsewhere, self._members, self._members))
            kind, words, content, expected = change(rng, name, members, box)
        official = archives.ARCHIVES[name]
        path = box.data / "downloads" / "manual" / official.file
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
        changed = dataclasses.replace(official, size=len(content), sha256=hashlib.sha256(content).hexdigest())
        self._published = {name: official if kind == "another digest" else changed}
        argv = [f"--config={ROOT}/configs/at.py:dataset={name}", *ARGUMENTS, f"--workdir={box.run}"]
        argv += [f"--config.data.data_dir={box.data}"]
        return Case(kind, f"{name}: {words}", argv, expected, [str(path), official.file, "image"])

    def _packed(self, name: str, members: Members) -> bytes:
        return zipped(members) if name == "tiny_imagenet" else tar(members)

    def _damaged(self, rng: Any, name: str, members: Members, box: Box) -> tuple[str, str, bytes, bool | None]:
        what, content = damaged(rng, self._packed(name, members))
        return "damaged archive", what, content, None

    def _digest(self, rng: Any, name: str, members: Members, box: Box) -> tuple[str, str, bytes, bool | None]:
        """A whole archive that is not the official one."""
        return "another digest", "another digest", self._packed(name, members), False

    def _elsewhere(self, rng: Any, name: str, members: Members, box: Box) -> tuple[str, str, bytes, bool | None]:
        """A member whose name leads out of its folder, or that is no regular file."""
        where = one(rng, ("../evil", "../../../evil", f"{box.root}/outside/evil", "a/../../evil", "..\\evil"))
        if name == "tiny_imagenet":
            return "member elsewhere", where, zipped(members, {where: b"evil"}), False
        member = tarfile.TarInfo(where)
        kinds = {"file": tarfile.REGTYPE, "link": tarfile.SYMTYPE, "hard link": tarfile.LNKTYPE}
        kinds["device"] = tarfile.CHRTYPE
        kind = one(rng, list(kinds))
        member.type, member.linkname = kinds[kind], f"{box.root}/given"
        content = b"evil" if kind == "file" else b""
        return "member elsewhere", f"{kind} {where}", tar(members, (member, content)), False

    def _members(self, rng: Any, name: str, members: Members, box: Box) -> tuple[str, str, bytes, bool | None]:
        """A member that is missing, damaged, a link, or far larger than the archive."""
        texts = ["wnids.txt", "val/val_annotations.txt", "words.txt"]
        chosen = one(rng, list(members) if name != "tiny_imagenet" else texts)
        if name == "tiny_imagenet" and rng.integers(2):
            chosen = one(rng, [member for member in members if member.endswith("_0.JPEG")])
        kind = one(rng, ("missing", "damaged", "bomb", "link", "label"))
        content = members.pop(chosen)
        if kind == "missing":
            expected = chosen.startswith("train/") or chosen == "words.txt" or None
            return "missing member", chosen, self._packed(name, members), None if expected else False
        if kind == "link" and name != "tiny_imagenet":
            member = tarfile.TarInfo(f"cifar/{chosen}")
            member.type, member.linkname = tarfile.SYMTYPE, "/etc/hostname"
            return "link for a member", chosen, tar(members, (member, b"")), False
        if kind == "bomb":
            members[chosen] = bomb(1 << 15, 1 << 15) if chosen.endswith("JPEG") else bytes(1 << 28)
            packed = zipped(members) if name == "tiny_imagenet" else gzip.compress(gzip.decompress(tar(members)), 1)
            return "large member", chosen, packed, False if name != "tiny_imagenet" else None
        if kind == "label" and name != "tiny_imagenet" and chosen.endswith(".bin"):
            members[chosen] = b"\xff\xff" + content[2:]
            return "label too large", chosen, self._packed(name, members), False
        what, members[chosen] = damaged(rng, content)
        return "damaged member", f"{chosen}: {what}", self._packed(name, members), None

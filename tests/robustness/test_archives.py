"""Archives of CIFAR-10, CIFAR-100 and Tiny-ImageNet: damaged, with another digest, members outside of their folder.

The archives are small and have the official layout. The expected digest is set to theirs, so that they reach the
reader; with the official digest they must be refused.
"""

import contextlib
import dataclasses
import functools
import gzip
import hashlib
import io
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from unittest import mock

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lt_adv.data import archives
from tests.robustness.inputs import (
    ROOT,
    Case,
    Draw,
    attempt,
    choose,
    damaged,
    inputs,
    no_evaluation,
)
from tests.robustness.sandbox import Sandbox
from tests.robustness.test_image_folders import ARGUMENTS, bomb, picture

Members = dict[str, bytes]


def cifar10() -> Members:
    rng = np.random.default_rng(0)

    def records(number: int) -> bytes:
        content = rng.integers(0, 256, (number, 3073)).astype(np.uint8)
        content[:, 0] = np.arange(number) % 10
        return content.tobytes()

    names = "\n".join(f"class{i}" for i in range(10)).encode()
    batches = {f"data_batch_{i}.bin": records(10) for i in range(1, 6)}
    return {**batches, "test_batch.bin": records(10), "batches.meta.txt": names}


def cifar100() -> Members:
    rng = np.random.default_rng(0)

    def records() -> bytes:
        content = rng.integers(0, 256, (100, 3074)).astype(np.uint8)
        content[:, 1] = np.arange(100)
        return content.tobytes()

    names = "\n".join(f"fine{i}" for i in range(100)).encode()
    return {"train.bin": records(), "test.bin": records(), "fine_label_names.txt": names}


def tiny_imagenet() -> Members:
    """With 200 classes of one training image each."""
    wnids = [f"n{i:08}" for i in range(200)]
    image = picture(side=(64, 64), kind="JPEG")
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


@contextlib.contextmanager
def official_archives(archive: Mapping[str, archives.Archive]) -> Iterator[None]:
    with no_evaluation(), mock.patch.dict(archives.ARCHIVES, archive):
        yield


def case(draw: Draw, box: Sandbox, valid: bool) -> Case:
    name = choose(draw, ("cifar10", "cifar10", "cifar100", "tiny_imagenet"))
    members = MAKERS[name]()
    kind, description, content, expected = "valid", name, _packed(name, members), True
    if not valid:
        change = choose(draw, (_damaged, _digest, _outside, _members, _members))
        kind, description, content, expected = change(draw, name, members, box)
    official = archives.ARCHIVES[name]
    path = box.data / "downloads" / "manual" / official.file
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    changed = dataclasses.replace(official, size=len(content), sha256=hashlib.sha256(content).hexdigest())
    context = functools.partial(official_archives, {name: official if kind == "another digest" else changed})
    argv = [f"--config={ROOT}/configs/at.py:dataset={name}", *ARGUMENTS, f"--workdir={box.run}"]
    argv += [f"--config.data.data_dir={box.data}"]
    return Case(kind, f"{name}: {description}", argv, expected, [str(path), official.file, "image"], context)


def _packed(name: str, members: Members) -> bytes:
    return zipped(members) if name == "tiny_imagenet" else tar(members)


def _damaged(draw: Draw, name: str, members: Members, box: Sandbox) -> tuple[str, str, bytes, bool | None]:
    what, content = damaged(draw, _packed(name, members))
    return "damaged archive", what, content, None


def _digest(draw: Draw, name: str, members: Members, box: Sandbox) -> tuple[str, str, bytes, bool | None]:
    """An intact archive that is not the official one."""
    return "another digest", "another digest", _packed(name, members), False


def _outside(draw: Draw, name: str, members: Members, box: Sandbox) -> tuple[str, str, bytes, bool | None]:
    """Adds a member whose name leads out of its folder, or that is not a regular file."""
    where = choose(draw, ("../evil", "../../../evil", f"{box.root}/outside/evil", "a/../../evil", "..\\evil"))
    if name == "tiny_imagenet":
        return "member outside", where, zipped(members, {where: b"evil"}), False
    member = tarfile.TarInfo(where)
    kinds = {"file": tarfile.REGTYPE, "link": tarfile.SYMTYPE, "hard link": tarfile.LNKTYPE}
    kinds["device"] = tarfile.CHRTYPE
    kind = choose(draw, list(kinds))
    member.type, member.linkname = kinds[kind], f"{box.root}/input"
    content = b"evil" if kind == "file" else b""
    return "member outside", f"{kind} {where}", tar(members, (member, content)), False


def _members(draw: Draw, name: str, members: Members, box: Sandbox) -> tuple[str, str, bytes, bool | None]:
    """Changes a member: missing, damaged, a link, or far larger than the archive."""
    texts = ["wnids.txt", "val/val_annotations.txt", "words.txt"]
    chosen = choose(draw, list(members) if name != "tiny_imagenet" else texts)
    if name == "tiny_imagenet" and draw(st.booleans()):
        chosen = choose(draw, [member for member in members if member.endswith("_0.JPEG")])
    kind = choose(draw, ("missing", "damaged", "bomb", "link", "label"))
    content = members.pop(chosen)
    if kind == "missing":
        expected = chosen.startswith("train/") or chosen == "words.txt" or None
        return "missing member", chosen, _packed(name, members), None if expected else False
    if kind == "link" and name != "tiny_imagenet":
        member = tarfile.TarInfo(f"cifar/{chosen}")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/hostname"
        return "link for a member", chosen, tar(members, (member, b"")), False
    if kind == "bomb":
        members[chosen] = bomb(1 << 15, 1 << 15) if chosen.endswith("JPEG") else bytes(1 << 27)
        packed = zipped(members) if name == "tiny_imagenet" else gzip.compress(gzip.decompress(tar(members)), 1)
        return "large member", chosen, packed, False if name != "tiny_imagenet" else None
    if kind == "label" and name != "tiny_imagenet" and chosen.endswith(".bin"):
        members[chosen] = b"\xff\xff" + content[2:]
        return "label too large", chosen, _packed(name, members), False
    what, members[chosen] = damaged(draw, content)
    return "damaged member", f"{chosen}: {what}", _packed(name, members), None


@inputs(3)
@given(st.data())
def test_valid_archives_are_accepted(tmp_path, data):
    attempt(functools.partial(case, valid=True), data.draw, tmp_path)


@inputs(9)
@given(st.data())
def test_bad_archives_are_refused_in_one_line(tmp_path, data):
    attempt(functools.partial(case, valid=False), data.draw, tmp_path)

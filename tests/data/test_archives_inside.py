"""Archives with invalid members."""

import zipfile

import pytest

from lt_adv.data import archives, load
from tests.data.test_archives import cifar10, publish, tar  # noqa: F401


def archive_with(cifar10, **changes):  # noqa: F811
    batches, _ = cifar10
    files = {name: batch.tobytes() for name, batch in batches.items()}
    files["batches.meta.txt"] = "\n".join(f"class{i}" for i in range(10)).encode()
    return tar({**files, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_batch.bin": b""}, r"test_batch\.bin must hold images of 10 classes.*0 bytes"),
        ({"test_batch.bin": bytes(3074)}, r"test_batch\.bin must hold .* 3073 bytes each \(it has 3074 bytes"),
        ({"data_batch_1.bin": b"\x0a" + bytes(3072)}, r"data_batch_1\.bin must hold .* labels up to 10\)"),
        ({"batches.meta.txt": b"\xff"}, r"batches\.meta\.txt is not UTF-8 text"),
        ({"batches.meta.txt": b" ".join([b"a"] * 11)}, r"names 11 classes instead of 10"),
    ],
)
def test_cifar_with_an_invalid_member(tmp_path, publish, cifar10, changes, message):  # noqa: F811
    path = publish("cifar10", archive_with(cifar10, **changes))
    with pytest.raises(ValueError, match=message) as caught:
        load({"name": "cifar10", "data_dir": str(tmp_path)})
    assert str(path) in str(caught.value) and not (tmp_path / "lt_adv_cache").exists()


def test_member_that_is_too_large_is_not_read(tmp_path, publish, cifar10, monkeypatch):  # noqa: F811
    monkeypatch.setattr(archives, "MAX_MEMBER_BYTES", 5 * 3073)
    publish("cifar10", archive_with(cifar10, **{"readme.html": bytes(10**5)}))  # a member that is never read
    assert len(load({"name": "cifar10", "data_dir": str(tmp_path)}).train) == 15
    publish("cifar100", tar({"train.bin": bytes(10**5)}))
    with pytest.raises(ValueError, match="train.bin declares 100000 bytes, more than the maximum of 15365"):
        load({"name": "cifar100", "data_dir": str(tmp_path)})


@pytest.mark.parametrize(
    ("member", "content", "message"),
    [
        ("val/val_annotations.txt", b"", "no images of its classes"),
        (
            "val/val_annotations.txt",
            b"val_0.JPEG\tnowhere",
            "row .'val_0.JPEG', 'nowhere'. of val_annotations.txt is not an image",
        ),
        ("wnids.txt", b"", "is not an image and its class"),
        ("words.txt", b"\xff", "words.txt is not UTF-8 text"),
        ("train/n1/images/n1_0.JPEG", None, "no images of its classes"),
    ],
)
def test_tiny_imagenet_with_an_invalid_member(tmp_path, member, content, message):
    members = {"wnids.txt": b"n1", "words.txt": b"n1\tcat", "val/val_annotations.txt": b"val_0.JPEG\tn1\t0"}
    members |= {"train/n1/images/n1_0.JPEG": b"x", "val/images/val_0.JPEG": b"x", member: content}
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name, data in members.items():
            if data is not None:
                archive.writestr(f"tiny-imagenet-200/{name}", data)
    with pytest.raises(ValueError, match=message):
        archives.read_tiny_imagenet(tmp_path / "a.zip")

"""Archives that can be opened, and whose members are not what they should be."""

import zipfile

import pytest

from lt_adv.data import archives, load
from tests.data.test_archives import cifar10, publish, tar  # noqa: F401


def records_of(made, **changes):
    batches, _ = made
    files = {name: batch.tobytes() for name, batch in batches.items()}
    files["batches.meta.txt"] = "\n".join(f"class{i}" for i in range(10)).encode()
    return tar({**files, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_batch.bin": b""}, r"test_batch\.bin is not of images of 10 classes.*0 bytes"),
        ({"test_batch.bin": bytes(3074)}, r"test_batch\.bin is not of .* 3073 bytes each \(3074 bytes"),
        ({"data_batch_1.bin": b"\x0a" + bytes(3072)}, r"data_batch_1\.bin is not of .* labels up to 10\)"),
        ({"batches.meta.txt": b"\xff"}, r"batches\.meta\.txt is no text"),
        ({"batches.meta.txt": b" ".join([b"a"] * 11)}, r"names 11 classes, and there are 10"),
    ],
)
def test_cifar_with_another_member(tmp_path, publish, cifar10, changes, message):  # noqa: F811
    path = publish("cifar10", records_of(cifar10, **changes))
    with pytest.raises(ValueError, match=message) as caught:
        load({"name": "cifar10", "data_dir": str(tmp_path)})
    assert str(path) in str(caught.value) and not (tmp_path / "lt_adv_cache").exists()


def test_a_member_that_is_too_large_is_not_read(tmp_path, publish, cifar10, monkeypatch):  # noqa: F811
    monkeypatch.setattr(archives, "LARGEST", 5 * 3073)
    publish("cifar10", records_of(cifar10, **{"readme.html": bytes(10**5)}))  # nobody asks for this one
    assert len(load({"name": "cifar10", "data_dir": str(tmp_path)}).train) == 15
    publish("cifar100", tar({"train.bin": bytes(10**5)}))
    with pytest.raises(ValueError, match="train.bin claims 100000 bytes, more than the 15365 allowed"):
        load({"name": "cifar100", "data_dir": str(tmp_path)})


@pytest.mark.parametrize(
    ("member", "content", "message"),
    [
        ("val/val_annotations.txt", b"", "no images of its classes"),
        ("val/val_annotations.txt", b"val_0.JPEG\tnowhere", "says .'val_0.JPEG', 'nowhere'., which is no image"),
        ("wnids.txt", b"", "which is no image and its class"),
        ("words.txt", b"\xff", "words.txt is no text"),
        ("train/n1/images/n1_0.JPEG", None, "no images of its classes"),
    ],
)
def test_tiny_imagenet_with_another_member(tmp_path, member, content, message):
    members = {"wnids.txt": b"n1", "words.txt": b"n1\tcat", "val/val_annotations.txt": b"val_0.JPEG\tn1\t0"}
    members |= {"train/n1/images/n1_0.JPEG": b"x", "val/images/val_0.JPEG": b"x", member: content}
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name, each in members.items():
            if each is not None:
                archive.writestr(f"tiny-imagenet-200/{name}", each)
    with pytest.raises(ValueError, match=message):
        archives.read_tiny_imagenet(tmp_path / "a.zip")

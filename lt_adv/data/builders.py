"""TensorFlow-Datasets builders for CIFAR-10, CIFAR-100 and Tiny-ImageNet that do not need TensorFlow.

The builders of TensorFlow-Datasets need TensorFlow to prepare CIFAR, lose the original order by shuffling, and do not
include Tiny-ImageNet; these keep the original index of each image. Importing this module registers lt_adv_cifar10,
lt_adv_cifar100 and lt_adv_tiny_imagenet, which `tfds.data_source` can then read.
"""

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from lt_adv.data import archives

_CIFAR_CITATION = "Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009"


class _ArchiveBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Checks the sha256 of an official archive in the manual folder and reads it."""

    VERSION = tfds.core.Version(archives.VERSION)
    MANUAL_DOWNLOAD_INSTRUCTIONS = "The official archive as downloaded; `lt_adv.data.archives` lists its URL."
    DATASET: ClassVar[str]
    SIDE: ClassVar[int] = 32
    ENCODING: ClassVar[str] = "png"
    CLASSES: ClassVar[int]
    CITATION: ClassVar[str] = _CIFAR_CITATION

    def __init__(self, *, file_format: str = "array_record", **kwargs: Any) -> None:
        super().__init__(file_format=file_format, **kwargs)

    @property
    def _archive(self) -> archives.Archive:
        return archives.ARCHIVES[self.DATASET]

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(shape=(self.SIDE, self.SIDE, 3), encoding_format=self.ENCODING),
            "label": tfds.features.ClassLabel(num_classes=self.CLASSES),
            "index": tfds.features.Scalar(np.int64),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"{self._archive.file}, with the original index of each image.",
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
            homepage=self._archive.url.rsplit("/", 1)[0],
            citation=self.CITATION,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> archives.Splits:
        path = Path(dl_manager.manual_dir) / self._archive.file
        archives.check(self._archive, path)
        names, examples = self._read(path)
        archives.check_classes(path, names, self.CLASSES)
        self.info.features["label"].names = names
        return examples

    def _generate_examples(self) -> archives.Examples:
        raise AssertionError("_split_generators returns the examples of each split.")

    def _read(self, path: Path) -> tuple[list[str], archives.Splits]:
        raise NotImplementedError


def _cifar_examples(path: Path, coarse: bool) -> tuple[list[str], archives.Splits]:
    names, splits = archives.read_cifar(path, coarse)
    return names, {split: archives.encoded_examples(*arrays) for split, arrays in splits.items()}


class LtAdvCifar10(_ArchiveBuilder):
    """CIFAR-10."""

    DATASET = "cifar10"
    CLASSES = 10

    def _read(self, path: Path) -> tuple[list[str], archives.Splits]:
        return _cifar_examples(path, coarse=False)


class LtAdvCifar100(_ArchiveBuilder):
    """CIFAR-100 with the 100 fine labels."""

    DATASET = "cifar100"
    CLASSES = 100

    def _read(self, path: Path) -> tuple[list[str], archives.Splits]:
        return _cifar_examples(path, coarse=True)


class LtAdvTinyImagenet(_ArchiveBuilder):
    """Tiny-ImageNet: 200 classes of 500 training images, 64 x 64; "test" is the published validation set."""

    DATASET = "tiny_imagenet"
    CLASSES = 200
    SIDE = 64
    ENCODING = "jpeg"
    CITATION = "Le and Yang, Tiny ImageNet Visual Recognition Challenge, 2015"

    def _read(self, path: Path) -> tuple[list[str], archives.Splits]:
        return archives.read_tiny_imagenet(path)


BUILDERS = {builder.DATASET: builder for builder in (LtAdvCifar10, LtAdvCifar100, LtAdvTinyImagenet)}

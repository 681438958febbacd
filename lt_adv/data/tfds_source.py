"""Sets of TensorFlow-Datasets as a `Source`: the builders of this package and any image classification set by name.

Sets in array_record are read without TensorFlow. Reading tfrecord files and preparing built-in sets needs the extra
tfds-tf. TensorFlow-Datasets is not imported for sets of this package that are in the cache.
"""

import contextlib
import hashlib
import importlib.util
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lt_adv.data import archives, cache, images
from lt_adv.data.dataset import Source, SplitReader, array_reader, check_labels
from lt_adv.runtime import atomic_io, registry

if TYPE_CHECKING:
    import tensorflow_datasets as tfds  # takes seconds; functions import it

Record = Mapping[str, Any]  # feature -> value; images are encoded

NOT_IN_TFDS = ("digits", "image_folder", "npz")
LABEL_CACHE_BYTES = 1 << 30  # labels of larger splits are cached, because reading them reads all images
PEEK = 100  # records that are read to see whether a split has labels
NEEDS_TENSORFLOW = 'needs TensorFlow: pip install -e ".[tfds-tf]"'


def source(name: str, data_dir: Path, size: int | None, download: bool, test_split: str | None = None) -> Source:
    """Returns the source of a set in `archives.ARCHIVES` or of any image classification set of TensorFlow-Datasets.

    Args:
      name: of the data set.
      data_dir: folder of the prepared sets.
      size: side that images are scaled and cropped to; None leaves them unchanged.
      download: whether missing data may be downloaded.
      test_split: the split to evaluate on; None for test, or validation if there is no test split.

    Raises:
      ValueError: for an unknown name, or if TensorFlow is needed and not installed.
      FileNotFoundError: for missing data that may not be downloaded.
    """
    if name in archives.ARCHIVES:
        if test_split:
            raise ValueError(f"config.data.test_split: {name} has one test split, do not set it.")
        archive = archives.ARCHIVES[name]
        return Source([archives.VERSION, archive.sha256, size], partial(_read_archive, name, data_dir, size, download))
    with _one_line_errors(data_dir / name):
        builder = _prepared_builder(name, data_dir, download)
    identity = [_list_files(builder), size, *([test_split] if test_split else [])]
    return Source(identity, partial(_read, builder, size, data_dir, test_split))


@contextlib.contextmanager
def _one_line_errors(folder: Path) -> Iterator[None]:
    """Replaces the errors of a set that cannot be read by one line, which names a Git LFS or git-annex pointer."""
    try:
        yield
    except Exception as error:  # the readers raise many types
        if pointer := atomic_io.placeholder(folder):
            raise ValueError(f"{pointer}.") from error
        if not isinstance(error, RuntimeError):
            raise
        raise ValueError(f"{folder} is damaged ({atomic_io.message(error)}): prepare it again.") from error


def _read_archive(
    name: str, data_dir: Path, size: int | None, download: bool
) -> tuple[tuple[str, ...], dict[str, SplitReader]]:
    """Reads the prepared set; if there is none, reads CIFAR from its archive and prepares Tiny-ImageNet."""
    archive, manual = archives.ARCHIVES[name], data_dir / "downloads" / "manual"
    prepared = (data_dir / f"lt_adv_{name}" / archives.VERSION / "dataset_info.json").is_file()
    if not prepared:  # a prepared set does not need the archive
        path = archives.ensure_downloaded(archive, manual, download)
        if name in archives.CIFAR and size is None:
            return _read_cifar(name, path)
    from lt_adv.data import builders  # slow, so after the error for a missing archive

    builder = builders.BUILDERS[name](data_dir=data_dir)
    if not prepared:
        _prepare(builder, manual)
    return _read(builder, size, data_dir)


def _read_cifar(name: str, path: Path) -> tuple[tuple[str, ...], dict[str, SplitReader]]:
    """Reads the archive into arrays, without the encoding and decoding of a prepared set."""
    archives.check(archives.ARCHIVES[name], path)
    class_names, splits = archives.read_cifar(path, coarse=name == "cifar100")
    return tuple(class_names), {
        split: array_reader(image, label, np.arange(len(label))) for split, (image, label) in splits.items()
    }


def _prepare(builder: "tfds.core.DatasetBuilder", manual: Path) -> None:
    import tensorflow_datasets as tfds

    config = tfds.download.DownloadConfig(manual_dir=manual, try_download_gcs=False)
    try:
        builder.download_and_prepare(download_config=config)
    except (OSError, tfds.download.DownloadError) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise ValueError(
            f"Cannot prepare {builder.name} in {builder.data_dir} ({reason}): set --config.data.data_dir to a writable "
            "folder; sets that are not downloaded yet need the network."
        ) from error


def _prepared_builder(name: str, data_dir: Path, download: bool) -> "tfds.core.DatasetBuilder":
    """Returns the prepared builder of a set of TensorFlow-Datasets."""
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except (tfds.core.DatasetNotFoundError, ValueError) as error:
        known = [*NOT_IN_TFDS, *archives.ARCHIVES]
        message = (
            f"{registry.unknown('data set', name, known)} TensorFlow-Datasets has no image set of that name either."
        )
        raise ValueError(message) from error
    if not builder.is_prepared():
        if not _has_tensorflow():
            raise ValueError(f"{name} is not prepared in {data_dir}; preparing it {NEEDS_TENSORFLOW}.")
        if not download:
            raise FileNotFoundError(
                f"{name} is not prepared in {data_dir}: --config.data.download=True downloads and prepares it."
            )
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
        _prepare(builder, data_dir / "downloads" / "manual")
    builder = tfds.builder_from_directory(builder.data_path)  # with the features of the preparation
    if not _is_array_record(builder) and not _has_tensorflow():
        file_format = builder.info.file_format.value
        raise ValueError(f"{name} in {data_dir} is prepared as {file_format}; reading it {NEEDS_TENSORFLOW}.")
    return builder


def _list_files(builder: "tfds.core.DatasetBuilder") -> list[tuple[str, int, float]]:
    return sorted((f.name, f.stat().length, f.stat().mtime) for f in builder.data_path.iterdir())


def _has_tensorflow() -> bool:
    return importlib.util.find_spec("tensorflow") is not None


def _is_array_record(builder: "tfds.core.DatasetBuilder") -> bool:
    return builder.info.file_format.value == "array_record"


def _read(
    builder: "tfds.core.DatasetBuilder", size: int | None, data_dir: Path, test_split: str | None = None
) -> tuple[tuple[str, ...], dict[str, SplitReader]]:
    available = list(builder.info.splits)
    held_out = test_split or ("test" if "test" in available else "validation")
    if missing := {"train", held_out} - set(available):
        raise ValueError(f"{builder.name} has no split {sorted(missing)[0]}; it has {', '.join(available)}.")
    image, label = _feature_names(builder)
    with _one_line_errors(Path(builder.data_path)):
        test = _encoded(builder, held_out, image, label, data_dir)  # first, because it may have no labels
        splits = {"train": _encoded(builder, "train", image, label, data_dir), "test": test}
    height, width, channels = builder.info.features[image].shape
    if size is not None:
        height = width = size
    # With a declared shape the headers of the images are not read.
    declared = height is not None and width is not None and channels in (1, 3)
    shape = (height, width, channels) if declared else None
    return tuple(builder.info.features[label].names), images.split_readers(splits, size, shape)


def _feature_names(builder: "tfds.core.DatasetBuilder") -> tuple[str, str]:
    """Returns the names of the image and label features; raises ValueError for other than image classification sets."""
    import tensorflow_datasets as tfds

    features = dict(builder.info.features.items())
    supervised = builder.info.supervised_keys or ()
    names = []
    for kind in (tfds.features.Image, tfds.features.ClassLabel):
        keys = [k for k, feature in features.items() if type(feature) is kind]
        keys.sort(key=lambda k: k not in supervised)  # prefer the supervised keys
        if not keys:
            raise ValueError(f"{builder.name} is not an image classification set: it has no {kind.__name__} feature.")
        names.append(keys[0])
    image, label = names
    if features[label].num_classes is None:
        raise ValueError(f"{builder.name} does not declare the number of classes of its {label}.")
    return image, label


def _encoded(builder: "tfds.core.DatasetBuilder", split: str, image: str, label: str, data_dir: Path) -> images.Encoded:
    """Returns a split in the order of the original data, which TensorFlow-Datasets has shuffled."""
    records = _records(builder, split, image)

    def read_labels() -> dict[str, np.ndarray]:
        numbers, ids = [], []
        for record in records:
            numbers.append(int(record[label]))
            ids.append(record.get("index", record.get("id")))
        index = _original_indices(ids)
        order = np.argsort(index)
        return {"order": order, "label": np.array(numbers, np.int64)[order], "index": index[order]}

    split_info = builder.info.splits[split]
    identity = [builder.info.full_name, split, list(split_info.shard_lengths), split_info.num_bytes]
    if split_info.num_bytes > LABEL_CACHE_BYTES and not isinstance(records, list):
        name = f"{builder.name}-{split}-labels"
        columns = cache.cached_arrays(data_dir, name, [identity, _list_files(builder)], read_labels)
    else:
        columns = read_labels()
    order, index = columns["order"], columns["index"]
    classes = builder.info.features[label].num_classes
    unlabelled = columns["label"].min(initial=0) < 0
    advice = _advice(builder, split, image, label) if unlabelled else ""
    check_labels(columns["label"], len(order), classes, f"{builder.name}, split {split}", advice)
    digest = hashlib.sha256(json.dumps(identity).encode() + columns["label"].astype("<i8").tobytes())

    def read(positions: Sequence[int]) -> list[bytes]:
        rows = [int(order[p]) for p in positions]
        read_rows = getattr(records, "__getitems__", None)  # of a data source: faster than one record after the other
        return [record[image] for record in (read_rows(rows) if read_rows else [records[i] for i in rows])]

    names = [f"{builder.name}/{split} image {i}" for i in index]
    return images.Encoded(names, read, columns["label"], index, digest.hexdigest())


def _records(builder: "tfds.core.DatasetBuilder", split: str, image: str) -> Sequence[Record]:
    """Returns the records of a split, or of a slice of one, with encoded images."""
    import tensorflow_datasets as tfds

    decoders = {image: tfds.decode.SkipDecoding()}
    if _is_array_record(builder):
        return builder.as_data_source(split, decoders=decoders)
    return list(tfds.as_numpy(builder.as_dataset(split=split, decoders=decoders)))


def _advice(builder: "tfds.core.DatasetBuilder", split: str, image: str, label: str) -> str:
    """Returns the remedy for a split without labels."""
    if split == "train":
        return " Training needs labels: choose another set."
    others = [s for s in builder.info.splits if s not in ("train", split)]
    first_records = {s: f"{s}[:{min(PEEK, builder.info.splits[s].num_examples)}]" for s in others}
    labelled = [s for s in others if all(record[label] >= 0 for record in _records(builder, first_records[s], image))]
    if not labelled:
        return f" Only the split train of {builder.name} has labels: choose another set."
    return f" Choose a split that has labels: --config.data.test_split={labelled[0]}."


def _original_indices(ids: Sequence[object]) -> np.ndarray:
    """Returns the ids as int64, with texts that end in `_<number>` (train_16399) by that number.

    If the ids are anything else or not unique, returns the order of the records.
    """
    texts = [i.decode(errors="replace") if isinstance(i, bytes) else str(i) for i in ids]
    numbers = [int(match[1]) for text in texts if (match := re.fullmatch(r"(?:.*_)?(\d+)", text))]
    if len(set(numbers)) == len(ids):
        return np.array(numbers, np.int64)
    return np.arange(len(ids), dtype=np.int64)

"""Sets of TensorFlow-Datasets as a `Source`: our own builders, and any other image classification set by name.

A set in array_record is read without TensorFlow. What needs it, tfrecord files and the preparation of built-in sets,
needs the extra tfds-tf. TensorFlow-Datasets itself is not imported for our own sets when the cache has them.
"""

import contextlib
import hashlib
import importlib.util
import json
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lt_adv.data import archives, cache, images
from lt_adv.data.dataset import Source, SplitReader, labels
from lt_adv.runtime import atomic_io, registry

EMBEDDED = ("digits", "image_folder", "npz")
LONG_PASS = 1 << 30  # bytes of a split from which on its labels are written down: they lie among the images
PEEK = 100  # records that tell whether a split has labels
NEEDS_TENSORFLOW = 'needs TensorFlow: pip install -e ".[tfds-tf]"'


def source(name: str, data_dir: Path, size: int | None, download: bool, test_split: str | None = None) -> Source:
    """The set called `name`: one of `archives.ARCHIVES`, or any image classification set of TensorFlow-Datasets.

    `test_split` is the split to evaluate on: test where there is one, else validation.

    ValueError for an unknown name or missing TensorFlow, FileNotFoundError for data that is not there and not to be
    downloaded.
    """
    if name in archives.ARCHIVES:
        if test_split:
            raise ValueError(f"config.data.test_split: {name} has one test split, leave it out.")
        archive = archives.ARCHIVES[name]
        return Source([archives.VERSION, archive.sha256, size], partial(_read_own, name, data_dir, size, download))
    with _readable(data_dir / name):
        builder = _other(name, data_dir, download)
    identity = [_files(builder), size, *([test_split] if test_split else [])]
    return Source(identity, partial(_read, builder, size, data_dir, test_split))


@contextlib.contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """One line for a set that cannot be read: which of its files is a pointer, where that is why."""
    try:
        yield
    except Exception as error:  # the readers have no exception in common
        if pointer := atomic_io.placeholder(folder):
            raise ValueError(f"{pointer}.") from error
        if not isinstance(error, RuntimeError):
            raise
        raise ValueError(f"{folder} is damaged ({atomic_io.message(error)}): prepare it again.") from error


def _read_own(name: str, data_dir: Path, size: int | None, download: bool):
    archive, manual = archives.ARCHIVES[name], data_dir / "downloads" / "manual"
    prepared = (data_dir / f"lt_adv_{name}" / archives.VERSION / "dataset_info.json").is_file()
    if not prepared:  # once it is, the archive is not needed any more
        archives.ensure_downloaded(archive, manual, download)
    from lt_adv.data import builders  # slow, hence after the answer to a missing archive

    builder = builders.BUILDERS[name](data_dir=data_dir)
    if not prepared:
        _prepare(builder, manual)
    return _read(builder, size, data_dir)


def _prepare(builder: Any, manual: Path) -> None:
    import tensorflow_datasets as tfds

    config = tfds.download.DownloadConfig(manual_dir=manual, try_download_gcs=False)
    try:
        builder.download_and_prepare(download_config=config)
    except (OSError, tfds.download.DownloadError) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise ValueError(
            f"Cannot prepare {builder.name} in {builder.data_dir} ({reason}); it needs a folder it can write to, "
            "which --config.data.data_dir names, and for a set that is not there yet the network."
        ) from error


def _other(name: str, data_dir: Path, download: bool) -> Any:
    """The prepared builder of a set that is not ours."""
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except (tfds.core.DatasetNotFoundError, ValueError) as error:
        known = [*EMBEDDED, *archives.ARCHIVES]
        message = (
            f"{registry.unknown('data set', name, known)} TensorFlow-Datasets has no image set of that name either."
        )
        raise ValueError(message) from error
    if not builder.is_prepared():
        if not _has_tensorflow():
            raise ValueError(f"{name} is not prepared in {data_dir}, and preparing it {NEEDS_TENSORFLOW}.")
        if not download:
            raise FileNotFoundError(
                f"{name} is not prepared in {data_dir}: --config.data.download=True downloads and prepares it."
            )
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
        _prepare(builder, data_dir / "downloads" / "manual")
    builder = tfds.builder_from_directory(builder.data_path)  # with the features it was prepared with
    if not _is_array_record(builder) and not _has_tensorflow():
        file_format = builder.info.file_format.value
        raise ValueError(f"{name} in {data_dir} is prepared as {file_format}, and reading that {NEEDS_TENSORFLOW}.")
    return builder


def _files(builder: Any) -> list[tuple[str, int, float]]:
    return sorted((f.name, f.stat().length, f.stat().mtime) for f in builder.data_path.iterdir())


def _has_tensorflow() -> bool:
    return importlib.util.find_spec("tensorflow") is not None


def _is_array_record(builder: Any) -> bool:
    return builder.info.file_format.value == "array_record"


def _read(
    builder: Any, size: int | None, data_dir: Path, test_split: str | None = None
) -> tuple[tuple[str, ...], dict[str, SplitReader]]:
    there = list(builder.info.splits)
    held_out = test_split or ("test" if "test" in there else "validation")
    if missing := {"train", held_out} - set(there):
        raise ValueError(f"{builder.name} has no split {sorted(missing)[0]}; it has {', '.join(there)}.")
    image, label = _feature_names(builder)
    with _readable(Path(builder.data_path)):
        test = _encoded(builder, held_out, image, label, data_dir)  # first: it is the one that may have no labels
        splits = {"train": _encoded(builder, "train", image, label, data_dir), "test": test}
    height, width, channels = builder.info.features[image].shape
    if size is not None:
        height = width = size
    # What the set declares spares a pass over all headers.
    known = height is not None and width is not None and channels in (1, 3)
    shape = (height, width, channels) if known else None
    return tuple(builder.info.features[label].names), images.decodings(splits, size, shape)


def _feature_names(builder: Any) -> tuple[str, str]:
    """The names of the image and of the label; ValueError where the set is not for image classification."""
    import tensorflow_datasets as tfds

    features = dict(builder.info.features.items())
    supervised = builder.info.supervised_keys or ()
    found = []
    for kind in (tfds.features.Image, tfds.features.ClassLabel):
        keys = [k for k, feature in features.items() if type(feature) is kind]
        keys.sort(key=lambda k: k not in supervised)  # the one for supervised learning first
        if not keys:
            raise ValueError(f"{builder.name} is no image classification set: it has no {kind.__name__} feature.")
        found.append(keys[0])
    if features[found[1]].num_classes is None:
        raise ValueError(f"{builder.name} does not say how many classes its {found[1]} has.")
    return found[0], found[1]


def _encoded(builder: Any, split: str, image: str, label: str, data_dir: Path) -> images.Encoded:
    """A split in the order of the original data, which TensorFlow-Datasets shuffles."""
    records = _records(builder, split, image)

    def find() -> dict[str, np.ndarray]:
        numbers, ids = [], []
        for record in records:
            numbers.append(int(record[label]))
            ids.append(record.get("index", record.get("id")))
        index = _original_indices(ids)
        order = np.argsort(index)
        return {"order": order, "label": np.array(numbers, np.int64)[order], "index": index[order]}

    about = builder.info.splits[split]
    identity = [builder.info.full_name, split, list(about.shard_lengths), about.num_bytes]
    long = about.num_bytes > LONG_PASS and not isinstance(records, list)
    name = f"{builder.name}-{split}-labels"
    found = cache.remembered(data_dir, name, [identity, _files(builder)], find) if long else find()
    order, index = found["order"], found["index"]
    classes = builder.info.features[label].num_classes
    unlabelled = found["label"].min(initial=0) < 0
    advice = _advice(builder, split, image, label) if unlabelled else ""
    labels(found["label"], len(order), classes, f"{builder.name}, split {split}", advice)
    seen = hashlib.sha256(json.dumps(identity).encode() + found["label"].astype("<i8").tobytes())

    def read(positions: Sequence[int]) -> list[bytes]:
        chosen = [int(order[p]) for p in positions]
        batch = [records[i] for i in chosen] if isinstance(records, list) else records.__getitems__(chosen)
        return [record[image] for record in batch]

    names = [f"{builder.name}/{split} image {i}" for i in index]
    return images.Encoded(names, read, found["label"], index, seen.hexdigest())


def _records(builder: Any, split: str, image: str) -> Sequence[Any]:
    """The records of a split, or of a slice of one, with images as they are encoded."""
    import tensorflow_datasets as tfds

    decoders = {image: tfds.decode.SkipDecoding()}
    if _is_array_record(builder):
        return builder.as_data_source(split, decoders=decoders)
    return list(tfds.as_numpy(builder.as_dataset(split=split, decoders=decoders)))


def _advice(builder: Any, split: str, image: str, label: str) -> str:
    """What to do about a split without labels."""
    if split == "train":
        return " Without labels nothing can be trained: take another set."
    others = [s for s in builder.info.splits if s not in ("train", split)]
    first = {s: f"{s}[:{min(PEEK, builder.info.splits[s].num_examples)}]" for s in others}
    labelled = [s for s in others if all(record[label] >= 0 for record in _records(builder, first[s], image))]
    if not labelled:
        return f" Choose a set that has labels in more than its split train; {builder.name} has not."
    return f" Choose a split that has labels: --config.data.test_split={labelled[0]}."


def _original_indices(ids: list[Any]) -> np.ndarray:
    """int64: numbers as they are, texts that end in `_<number>` (train_16399) by it, else the order of the records."""
    texts = [i.decode(errors="replace") if isinstance(i, bytes) else str(i) for i in ids]
    matches = [re.fullmatch(r"(?:.*_)?(\d+)", text) for text in texts]
    if all(matches):
        index = np.array([int(match[1]) for match in matches], np.int64)
        if len(np.unique(index)) == len(index):
            return index
    return np.arange(len(ids), dtype=np.int64)

"""Records of an evaluation: one row per test image, from which all metrics, tables and plots are computed.

A record directory is `<directory>/records/<digest>/`. It holds `header.json`, one `batch-00000.npz` per batch (object
stores cannot append), and one `column-<name>.npz` for an attack that runs on all images at once, AutoAttack. The digest
is that of the header (protocol, seed, weights, images, code, jax, device): an evaluation with the same header resumes;
one with another header writes to another directory, so that records of different evaluations are never mixed.
"""

import dataclasses
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import numpy as np
from etils import epath

from lt_adv.runtime import atomic_io

WORST = "worst"
CLEAN = "clean"

Header = Mapping[str, Any]  # the content of header.json
Columns = Mapping[str, np.ndarray]  # name -> one value per image


@dataclasses.dataclass(frozen=True)
class Records:
    """Predicted classes of every test image: `clean` and one column per attack, int32 [n], with label and index.

    A prediction is -1 where the logits are not finite; it counts as wrong. `notes` maps an attack to the notes of
    AutoAttack on its result.
    """

    header: Header
    index: np.ndarray
    label: np.ndarray
    clean: np.ndarray
    attacks: Mapping[str, np.ndarray]
    notes: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        columns = {"index": self.index, "clean": self.clean, **self.attacks}
        wrong = [name for name, column in columns.items() if column.shape != self.label.shape]
        if wrong or self.label.ndim != 1:
            raise ValueError(f"Record columns must be [n] like the labels; check {', '.join(wrong) or 'label'}.")

    def __len__(self) -> int:
        return len(self.label)

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(self.header["class_names"])

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def conditions(self) -> tuple[str, ...]:
        """Conditions under which accuracy is defined: clean, each attack, worst."""
        return (CLEAN, *self.attacks, WORST)

    def prediction(self, condition: str) -> np.ndarray:
        """Returns predicted classes [n], clean or under an attack; the worst case has no single prediction."""
        return self.clean if condition == CLEAN else self.attacks[condition]

    def correct(self, condition: str) -> np.ndarray:
        """bool [n]: classified correctly under the condition; `worst` means clean and under every attack."""
        if condition == WORST:
            return np.logical_and.reduce([self.correct(name) for name in (CLEAN, *self.attacks)])
        return self.prediction(condition) == self.label

    @property
    def natural_error(self) -> np.ndarray:
        """bool [n]: wrong on the clean image."""
        return ~self.correct(CLEAN)

    @property
    def boundary_error(self) -> np.ndarray:
        """bool [n]: correct on the clean image and wrong under some attack."""
        return self.correct(CLEAN) & ~self.correct(WORST)

    @property
    def robust_error(self) -> np.ndarray:
        """bool [n]: wrong in the worst case, which is either a natural or a boundary error."""
        return ~self.correct(WORST)

    def count(self, values: np.ndarray) -> np.ndarray:
        """Returns int [num_classes]: the images of each class where `values` (bool [n]) is True."""
        return np.bincount(self.label[values], minlength=self.num_classes)

    @property
    def images_per_class(self) -> np.ndarray:
        return np.bincount(self.label, minlength=self.num_classes)

    def take(self, rows: np.ndarray) -> "Records":
        """Returns the records of some rows (positions or a mask), with the same header."""
        attacks = {name: column[rows] for name, column in self.attacks.items()}
        return Records(self.header, self.index[rows], self.label[rows], self.clean[rows], attacks, self.notes)


class Examples(TypedDict):
    """Clean and adversarial images of one attack, for the report's grid."""

    attack: str
    eps: float
    clean: np.ndarray  # float [n, h, w, c]
    adversarial: np.ndarray  # float [n, h, w, c]
    label: np.ndarray  # int [n]
    clean_prediction: np.ndarray  # int [n]
    prediction: np.ndarray  # int [n], on the adversarial images


def _json_default(value: object) -> object:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"Cannot store a {type(value).__name__} in JSON.")


def as_json(tree: object) -> Any:
    """Returns `tree` as JSON reads it back (lists, dicts, numbers, strings), to be compared with stored JSON."""
    return json.loads(json.dumps(tree, default=_json_default))


def digest(header: Header) -> str:
    """Returns twelve hexadecimal digits of the SHA-256 of a header or other JSON."""
    return hashlib.sha256(json.dumps(as_json(header), sort_keys=True).encode()).hexdigest()[:12]


def record_directory(directory: epath.PathLike, header: Header) -> epath.Path:
    """Returns the directory of the records with this header."""
    return epath.Path(directory) / "records" / digest(header)


def write_header(directory: epath.PathLike, header: Header) -> None:
    atomic_io.write_atomically(epath.Path(directory) / "header.json", json.dumps(as_json(header), indent=1))


def read_header(directory: epath.PathLike) -> dict[str, Any] | None:
    """Returns the header of a record directory, None when it is missing; ValueError when it is damaged."""
    path = epath.Path(directory) / "header.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"Record file {path} is damaged ({type(error).__name__}).") from error


def batch_path(directory: epath.PathLike, number: int) -> epath.Path:
    return epath.Path(directory) / f"batch-{number:05d}.npz"


def write_batch(directory: epath.PathLike, number: int, columns: Columns) -> None:
    """Writes one batch of rows; attack columns are named `attack/<name>`, so that no name can clash."""
    buffer = io.BytesIO()
    np.savez(buffer, **columns)  # type: ignore[arg-type]
    atomic_io.write_atomically(batch_path(directory, number), buffer.getvalue())


def read_batch(directory: epath.PathLike, number: int) -> dict[str, np.ndarray] | None:
    """Returns the columns of one batch, None when it is missing; ValueError when the file is damaged or invalid."""
    path = batch_path(directory, number)
    if (columns := _read(path)) is not None:
        _check(directory, path, {name: column for name, column in columns.items() if name not in ("index", "label")})
    return columns


def _read(path: epath.Path) -> dict[str, np.ndarray] | None:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    try:  # zip has a checksum per column; damaged files raise many types of errors
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except Exception as error:
        raise ValueError(f"Record file {path} is damaged ({type(error).__name__}).") from error


def column_path(directory: epath.PathLike, name: str) -> epath.Path:
    return epath.Path(directory) / f"column-{name}.npz"


def write_column(directory: epath.PathLike, name: str, prediction: np.ndarray, notes: Sequence[str] = ()) -> None:
    """Writes the predictions and notes of an attack that runs on all images at once."""
    buffer = io.BytesIO()
    np.savez(buffer, prediction=prediction, notes=np.array(notes, dtype=np.str_))
    atomic_io.write_atomically(column_path(directory, name), buffer.getvalue())


def read_column(directory: epath.PathLike, name: str) -> np.ndarray | None:
    """Returns the predictions of a column, None when it is missing; ValueError when the file is damaged or invalid."""
    path = column_path(directory, name)
    if (columns := _read(path)) is None:
        return None
    if set(columns) != {"prediction", "notes"}:
        raise ValueError(f"Record file {path} holds other columns.")
    _check(directory, path, {"prediction": columns["prediction"]})
    return columns["prediction"]


def read_notes(directory: epath.PathLike, name: str) -> tuple[str, ...]:
    """Returns the notes of a column that `read_column` has accepted."""
    columns = _read(column_path(directory, name)) or {}
    return tuple(str(note) for note in columns.get("notes", ()))


def _check(directory: epath.PathLike, path: epath.Path, columns: Columns) -> None:
    """Raises ValueError unless the columns hold classes of the directory's header, one for each image."""
    header = read_header(directory)
    classes, images = (len(header["class_names"]), header["images"]) if header else (np.inf, None)
    for name, column in columns.items():
        fits = column.ndim == 1 and (name != "prediction" or images in (None, len(column)))
        if not fits or column.dtype.kind not in "iu":
            raise ValueError(f"Record file {path} holds {column.dtype} {column.shape} where predictions should be.")
        if column.size and not -1 <= column.min() <= column.max() < classes:  # -1: logits that are not finite
            raise ValueError(f"Record file {path} holds predictions of classes that do not exist.")


def assemble(
    header: Header,
    batches: Sequence[Columns],
    full_columns: Columns,
    notes: Mapping[str, tuple[str, ...]],
) -> Records:
    """Returns the records, from the columns of all batches in order and those of attacks on all images at once."""
    columns = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    columns |= {f"attack/{name}": column for name, column in full_columns.items()}
    attacks = {name: columns[f"attack/{name}"] for name in header["attacks"]}
    return Records(header, columns["index"], columns["label"], columns["clean"], attacks, notes)


def read_records(directory: epath.PathLike) -> Records:
    """Returns the records of a record directory, or of a directory that holds exactly one.

    Raises:
      FileNotFoundError: when there are no records.
      ValueError: when there are several record directories, or when files are missing (the evaluation was interrupted)
        or damaged.
    """
    record_dir = epath.Path(directory)
    if not (record_dir / "header.json").exists():
        parent = record_dir / "records"
        directories = sorted(path for path in parent.iterdir() if path.is_dir()) if parent.exists() else []
        if not directories:
            raise FileNotFoundError(f"No evaluation records in {record_dir}; run --mode=eval first.")
        if len(directories) > 1:
            names = ", ".join(map(str, directories))
            raise ValueError(f"{parent} holds records under several headers; name one of: {names}.")
        record_dir = directories[0]
    header = read_header(record_dir)
    if header is None:
        raise FileNotFoundError(f"No header.json in {record_dir}; run --mode=eval again.")
    numbers = range(-(-header["images"] // header["batch_size"]))
    batches = [batch for number in numbers if (batch := read_batch(record_dir, number)) is not None]
    if missing := len(numbers) - len(batches):
        raise ValueError(f"{record_dir}: {missing} of {len(numbers)} batches are missing; run the evaluation again.")
    columns: dict[str, np.ndarray] = {}
    for name in header["attacks"]:
        if f"attack/{name}" not in batches[0]:
            if (column := read_column(record_dir, name)) is None:
                raise ValueError(f"{record_dir}: {name} is missing; run the evaluation again.")
            columns[name] = column
    return assemble(header, batches, columns, {name: read_notes(record_dir, name) for name in columns})

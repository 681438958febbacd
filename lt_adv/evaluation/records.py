"""Records: one row per test image, from which every table and plot follows by arithmetic.

On disk a record folder is `<directory>/records/<digest>/`: `header.json`, one `batch-00000.npz` per batch (stores
cannot append), and one `column-<name>.npz` for an attack that takes all images at once, AutoAttack. Its name is a
digest of the whole header (protocol, seed, weights, images, code, jax, device), so rows made under different headers
can never meet: the same header finds its folder and resumes, any other starts its own.
"""

import dataclasses
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from lt_adv.runtime import atomic_io

WORST = "worst"
CLEAN = "clean"


@dataclasses.dataclass(frozen=True)
class Records:
    """Predicted classes of every test image: `clean` and one column per attack, int32 [n], with label and index.

    A prediction is -1 where the logits were not finite, which is wrong whatever the label. `notes` are what AutoAttack
    said of its result, by the attack's name.
    """

    header: Mapping[str, Any]
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
        """What accuracy can be asked for: clean, each attack, worst."""
        return (CLEAN, *self.attacks, WORST)

    def prediction(self, condition: str) -> np.ndarray:
        """Predicted classes [n] under `clean` or an attack (the worst case has no single prediction)."""
        return self.clean if condition == CLEAN else self.attacks[condition]

    def correct(self, condition: str) -> np.ndarray:
        """bool [n]: right under the condition; `worst` = right clean and under every attack."""
        if condition == WORST:
            return np.logical_and.reduce([self.correct(name) for name in (CLEAN, *self.attacks)])
        return self.prediction(condition) == self.label

    @property
    def natural_error(self) -> np.ndarray:
        """bool [n]: wrong on the clean image."""
        return ~self.correct(CLEAN)

    @property
    def boundary_error(self) -> np.ndarray:
        """bool [n]: right on the clean image and wrong under some attack."""
        return self.correct(CLEAN) & ~self.correct(WORST)

    @property
    def robust_error(self) -> np.ndarray:
        """bool [n]: wrong in the worst case = natural or boundary error, which exclude each other."""
        return ~self.correct(WORST)

    def count(self, values: np.ndarray) -> np.ndarray:
        """Images of each class for which `values` (bool [n]) holds: int [num_classes]."""
        return np.bincount(self.label[values], minlength=self.num_classes)

    @property
    def images_per_class(self) -> np.ndarray:
        return np.bincount(self.label, minlength=self.num_classes)

    def take(self, rows: np.ndarray) -> "Records":
        """The same records for some rows only (positions or a mask); the header is kept as it is."""
        attacks = {name: column[rows] for name, column in self.attacks.items()}
        return Records(self.header, self.index[rows], self.label[rows], self.clean[rows], attacks, self.notes)


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"Cannot store a {type(value).__name__} in JSON.")


def plain(tree: Any) -> Any:
    """`tree` as JSON holds it (lists, dicts, numbers, strings), so that what is compared is what is stored."""
    return json.loads(json.dumps(tree, default=_plain))


def digest(header: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits that stand for the whole header."""
    return hashlib.sha256(json.dumps(plain(header), sort_keys=True).encode()).hexdigest()[:12]


def folder(directory: epath.PathLike, header: Mapping[str, Any]) -> epath.Path:
    """Where the records under `header` belong."""
    return epath.Path(directory) / "records" / digest(header)


def write_header(where: epath.PathLike, header: Mapping[str, Any]) -> None:
    atomic_io.write_atomically(epath.Path(where) / "header.json", json.dumps(plain(header), indent=1))


def read_header(where: epath.PathLike) -> dict[str, Any] | None:
    """The header of a record folder, None where there is none; ValueError where it is damaged."""
    path = epath.Path(where) / "header.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"Record file {path} is damaged ({type(error).__name__}).") from error


def batch_path(where: epath.PathLike, number: int) -> epath.Path:
    return epath.Path(where) / f"batch-{number:05d}.npz"


def write_batch(where: epath.PathLike, number: int, columns: Mapping[str, np.ndarray]) -> None:
    """One batch of rows; attack columns are stored as `attack/<name>` so that no name can clash."""
    buffer = io.BytesIO()
    np.savez(buffer, **columns)
    atomic_io.write_atomically(batch_path(where, number), buffer.getvalue())


def read_batch(where: epath.PathLike, number: int) -> dict[str, np.ndarray] | None:
    """The columns of one batch, None where it is missing; ValueError where the file is damaged or cannot be true."""
    path = batch_path(where, number)
    if (found := _read(path)) is not None:
        _check(where, path, {name: column for name, column in found.items() if name not in ("index", "label")})
    return found


def _read(path: epath.Path) -> dict[str, np.ndarray] | None:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    try:  # the zip container carries a checksum per column; a damaged one fails in many ways
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except Exception as error:
        raise ValueError(f"Record file {path} is damaged ({type(error).__name__}).") from error


def column_path(where: epath.PathLike, name: str) -> epath.Path:
    return epath.Path(where) / f"column-{name}.npz"


def write_column(where: epath.PathLike, name: str, prediction: np.ndarray, notes: Sequence[str] = ()) -> None:
    """The predictions on all images under an attack that is not run batch by batch, and what it said of them."""
    buffer = io.BytesIO()
    np.savez(buffer, prediction=prediction, notes=np.array(notes, dtype=np.str_))
    atomic_io.write_atomically(column_path(where, name), buffer.getvalue())


def read_column(where: epath.PathLike, name: str) -> np.ndarray | None:
    """A column, None where it is missing; ValueError where the file is damaged or cannot be true."""
    path = column_path(where, name)
    if (found := _read(path)) is None:
        return None
    if set(found) != {"prediction", "notes"}:
        raise ValueError(f"Record file {path} holds other columns.")
    _check(where, path, {"prediction": found["prediction"]})
    return found["prediction"]


def read_notes(where: epath.PathLike, name: str) -> tuple[str, ...]:
    """The notes of a column that `read_column` can read."""
    found = _read(column_path(where, name)) or {}
    return tuple(str(note) for note in found.get("notes", ()))


def _check(where: epath.PathLike, path: epath.Path, columns: Mapping[str, np.ndarray]) -> None:
    """ValueError unless the columns are classes of the header beside them, one for each image of the file."""
    header = read_header(where)
    classes, images = (len(header["class_names"]), header["images"]) if header else (np.inf, None)
    for name, column in columns.items():
        fits = column.ndim == 1 and (name != "prediction" or images in (None, len(column)))
        if not fits or column.dtype.kind not in "iu":
            raise ValueError(f"Record file {path} holds {column.dtype} {column.shape} where predictions should be.")
        if column.size and not -1 <= column.min() <= column.max() < classes:  # -1: the logits were not finite
            raise ValueError(f"Record file {path} holds predictions of classes that do not exist.")


def assemble(
    header: Mapping[str, Any],
    batches: list[dict[str, np.ndarray]],
    whole: Mapping[str, np.ndarray],
    notes: Mapping[str, tuple[str, ...]],
) -> Records:
    """Records from the columns of all batches, in order, and the columns of attacks on all images at once."""
    columns = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    columns |= {f"attack/{name}": column for name, column in whole.items()}
    attacks = {name: columns[f"attack/{name}"] for name in header["attacks"]}
    return Records(header, columns["index"], columns["label"], columns["clean"], attacks, notes)


def read(directory: epath.PathLike) -> Records:
    """Complete records from a record folder, or from a directory that holds exactly one.

    Errors: FileNotFoundError where there are none; ValueError where there are several folders to choose from, where
    batches are missing (the evaluation was interrupted) or damaged.
    """
    where = epath.Path(directory)
    if not (where / "header.json").exists():
        parent = where / "records"
        found = sorted(path for path in parent.iterdir() if path.is_dir()) if parent.exists() else []
        if not found:
            raise FileNotFoundError(f"No evaluation records in {where}; run --mode=eval first.")
        if len(found) > 1:
            raise ValueError(f"{parent} holds records under several headers; name one: {', '.join(map(str, found))}.")
        where = found[0]
    header = read_header(where)
    if header is None:
        raise FileNotFoundError(f"No header.json in {where}; run --mode=eval again.")
    batches = [read_batch(where, number) for number in range(-(-header["images"] // header["batch_size"]))]
    missing = sum(batch is None for batch in batches)
    if missing:
        raise ValueError(f"{where}: {missing} of {len(batches)} batches are missing; run the evaluation again.")
    whole = {name: read_column(where, name) for name in header["attacks"] if f"attack/{name}" not in batches[0]}
    if missing := [name for name, column in whole.items() if column is None]:
        raise ValueError(f"{where}: {', '.join(missing)} is missing; run the evaluation again.")
    return assemble(header, batches, whole, {name: read_notes(where, name) for name in whole})

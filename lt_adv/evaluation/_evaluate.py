"""Predictions on clean and adversarial test images, written batch by batch, so that an evaluation can resume."""

import functools
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lt_adv import data
from lt_adv.attacks import autoattack, checks, initialization, norms, objectives
from lt_adv.evaluation import attack_specs, metrics, plots, progress, records
from lt_adv.evaluation.attack_specs import Apply, AttackSpec, Variables
from lt_adv.evaluation.records import CLEAN, WORST, Columns, Examples, Header, Records
from lt_adv.runtime import distributed

EXAMPLES = 10  # columns of the report's grid of images
TOLERANCE = 1e-6  # for rounding, in units of the [0, 1] pixel range


def balanced_subset(label: np.ndarray, per_class: int, seed: int = 0) -> np.ndarray:
    """Returns positions, ascending, of `per_class` images of every class that has images: int64 [k].

    The subset depends on the labels and the seed alone (NumPy's frozen legacy stream); a smaller one is a subset of a
    larger one.

    Raises:
      ValueError: when such a class has fewer than `per_class` images.
    """
    label = np.asarray(label)
    classes, counts = np.unique(label, return_counts=True)
    if not 0 < per_class <= counts.min():
        raise ValueError(f"No balanced subset of {per_class} per class: classes have {counts.min()} images or more.")
    legacy = np.random.RandomState(seed)
    chosen = [legacy.permutation(np.flatnonzero(label == c))[:per_class] for c in classes]
    return np.sort(np.concatenate(chosen)).astype(np.int64)


Measured = tuple[jax.Array, tuple[jax.Array, jax.Array]]  # predictions [b], (distances [b], excesses [b])


@functools.lru_cache(maxsize=64)
def _predict_and_measure(apply: Apply, norm: str, mesh: Mesh) -> Callable[[Variables, jax.Array, jax.Array], Measured]:
    """Returns jitted (variables, x, x_adv) -> (predictions [b], (distances from x [b], excesses over [0, 1] [b])).

    The maximum over images is taken on the host: a maximum across devices loses NaNs.
    """

    def predict_and_measure(variables: Variables, x: jax.Array, x_adv: jax.Array) -> Measured:
        logits = apply(variables, x_adv)
        distance = norms.get(norm).length(x_adv - x).reshape(len(x))
        excess = jnp.maximum(-x_adv, x_adv - 1.0).reshape(len(x), -1).max(-1)
        return objectives.prediction(checks.check_logits(logits, x)), (distance, excess)

    return jax.jit(predict_and_measure, out_shardings=NamedSharding(mesh, PartitionSpec()))


@jax.jit
def _example_keys(key: jax.Array, name: jax.Array, index: jax.Array) -> jax.Array:
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, name), index)


@jax.jit
def _pixels(image: jax.Array) -> jax.Array:
    """Returns images in [0, 1] as float32: uint8 divided by 255, floating images as they are."""
    pixels = image.astype(jnp.float32)
    return pixels if jnp.issubdtype(image.dtype, jnp.floating) else pixels / 255.0


def _check_bounds(name: str, options: AttackSpec, distances: np.ndarray, excesses: np.ndarray) -> None:
    """Raises ValueError unless every image lies in the ball and in [0, 1]; a NaN raises too."""
    distance, excess = distances.max(), excesses.max()
    eps = options.get("eps", 0.0)
    # A sum over pixels accumulates the float32 rounding of each, in proportion to its size.
    tolerance = TOLERANCE if options.get("norm", "linf") == "linf" else 10 * TOLERANCE * max(eps, 1)
    if not distance <= eps + tolerance:
        raise ValueError(f"{name}: an adversarial image is {distance:.9g} away from its clean image, eps is {eps!r}.")
    if not excess <= TOLERANCE:
        raise ValueError(f"{name}: an adversarial image leaves [0, 1] by {excess:.3g}.")


class _Runner:
    """Runs the network and its attacks on the devices of a mesh, one padded batch at a time."""

    def __init__(self, key: jax.Array, apply: Apply, variables: Variables, mesh: Mesh) -> None:
        self.host_arguments = (initialization.threefry(key), apply, variables)
        self.apply, self.mesh = apply, mesh
        self.shard = NamedSharding(mesh, PartitionSpec("data"))
        replicated = distributed.replicated(mesh)
        self.key, self.variables = distributed.device_put((self.host_arguments[0], variables), replicated)

    def pad_and_shard(self, rows: np.ndarray, size: int) -> jax.Array:
        """Returns rows padded to `size` by copies of the first and split over the devices."""
        rows = np.concatenate([rows, np.broadcast_to(rows[:1], (size - len(rows), *rows.shape[1:]))])
        return distributed.device_put(rows, self.shard)

    def batch(self, split: data.Split, rows: slice | np.ndarray, size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns (x, y, index) of rows of the split, padded to `size` rounded up to a multiple of the devices."""
        size = -(-size // self.mesh.size) * self.mesh.size
        columns = (np.asarray(split.image[rows]), split.label[rows].astype(np.int32), split.index[rows])
        image, label, index = (
            self.pad_and_shard(column, size) for column in (*columns[:2], columns[2].astype(np.uint32))
        )
        return _pixels(image), label, index

    def attack(self, name: str, spec: AttackSpec, x: jax.Array, y: jax.Array, index: jax.Array) -> jax.Array:
        """Returns x_adv. The key of an image is fold_in(fold_in(key, crc32(name)), index), in any batch."""
        return attack_specs.jit_attack(self.apply, spec)(self.keys(name, index), self.variables, x, y)

    def keys(self, name: str, index: jax.Array | np.ndarray) -> jax.Array:
        """Returns one key per image, for one attack."""
        return _example_keys(self.key, np.uint32(zlib.crc32(name.encode())), index)

    def predict(self, name: str, options: AttackSpec, x: jax.Array, x_adv: jax.Array, images: int) -> np.ndarray:
        """Returns predictions on the first `images` of x_adv, after the radius check; the rest is padding."""
        predict_and_measure = _predict_and_measure(self.apply, options.get("norm", "linf"), self.mesh)
        results = predict_and_measure(self.variables, x, x_adv)
        prediction, measures = jax.tree.map(lambda column: np.asarray(column)[:images], results)
        _check_bounds(name, options, *measures)
        return prediction


def check_names(attacks: Iterable[str]) -> None:
    """Raises ValueError if an attack has a name that the report uses."""
    if reserved := {CLEAN, WORST} & set(attacks):
        names = " or ".join(sorted(reserved))
        raise ValueError(f"An attack cannot be called {names}: the report uses this name; rename the attack.")


def evaluate(
    key: jax.Array,
    apply: Apply,
    variables: Variables,
    split: data.Split,
    *,
    attacks: Mapping[str, AttackSpec],
    batch_size: int,
    directory: epath.PathLike | None,
    header: Header,
    mesh: Mesh,
    class_names: Sequence[str],
    console: rich.console.Console | None = None,
) -> Records:
    """Returns predictions on every image of `split`, clean and under each attack.

    The result depends neither on `batch_size` nor on the devices: batches are padded, and keys belong to images. Each
    batch is written to `directory/records/<digest of the header>` when it is done. Batches on disk are not computed
    again, unless they are damaged, which prints a warning. Programs are compiled once per `apply` object. An image
    whose logits are not finite gets the prediction -1 and counts as wrong.

    Args:
      key: one typed key.
      apply: (variables, x [b, h, w, c] in [0, 1]) -> logits [b, C], the network with its post-hoc adjustment.
      variables: the first argument of `apply`.
      split: image [n, h, w, c], uint8 or floating in [0, 1], label [n], index [n].
      attacks: column name -> `{"attack": "pgd", "eps": ..., ...}` (see `attack_specs.resolve`).
      batch_size: images per batch.
      directory: where records are written; None writes nothing.
      header: entries of the header that the caller knows.
      mesh: devices, with axis "data".
      class_names: names of the C classes.
      console: for progress and warnings; stderr by default.

    Raises:
      ValueError: for a bad attack entry, when an attack leaves its ball or [0, 1] (tolerance 1e-6; for the radius in L2
        and L1 1e-5 max(eps, 1)), or when no logit of the first batch is finite.
    """
    console = console or rich.console.Console(stderr=True, markup=False)
    check_names(attacks)
    if not len(split.label) or batch_size < 1:
        raise ValueError(f"Nothing to evaluate: {len(split.label)} images in batches of {batch_size}.")
    if len(split.label) < jax.process_count():
        raise ValueError(f"{len(split.label)} images are too few for {jax.process_count()} processes: take fewer.")
    header = attack_specs.make_header(
        header,
        key=key,
        variables=variables,
        split=split,
        specs=attacks,
        batch_size=batch_size,
        devices=list(mesh.devices.flat),
        class_names=tuple(class_names),
    )
    options = {name: attack_specs.resolve(spec)[1] for name, spec in attacks.items()}
    batched = [name for name, spec in attacks.items() if not attack_specs.needs_all_images(spec)]
    passes = {CLEAN: 1} | {name: 1 + options[name].get("num_steps", 1) for name in batched}  # per image
    record_dir = None if directory is None else records.record_directory(directory, header)
    batch_slices = [slice(i, min(i + batch_size, len(split.label))) for i in range(0, len(split.label), batch_size)]
    batches = {} if record_dir is None else _read_batches(record_dir, header, split, batch_slices, batched, console)
    runner = _Runner(key, apply, variables, mesh)
    done = sum(len(batch["index"]) for batch in batches.values())
    with progress.meter(console, passes, len(split.label), done) as meter:
        for number, rows in enumerate(batch_slices):
            if number in batches:
                continue
            x, y, index = runner.batch(split, rows, batch_size)
            label = np.asarray(split.label[rows], np.int32)
            columns: dict[str, np.ndarray] = {"index": np.asarray(split.index[rows], np.int64), "label": label}
            for name in (CLEAN, *batched):
                x_adv = x if name == CLEAN else runner.attack(name, attacks[name], x, y, index)
                prediction = runner.predict(name, options.get(name, {}), x, x_adv, len(label))
                if number == 0 and name == CLEAN and (prediction < 0).all():
                    raise ValueError(f"clean: the logits of {len(label)} images are not finite; check the weights.")
                columns[CLEAN if name == CLEAN else f"attack/{name}"] = prediction
                meter.count(name, int((prediction == label).sum()), len(label), passes[name])
            if record_dir is not None and distributed.is_primary():
                records.write_batch(record_dir, number, columns)
            batches[number] = columns
    full_columns: dict[str, np.ndarray] = {}
    notes: dict[str, tuple[str, ...]] = {}
    for name in (name for name in attacks if name not in batched):
        full_columns[name], notes[name] = _full_column(
            runner, name, attacks[name], split, batch_size, record_dir, console
        )
    return records.assemble(header, [batches[number] for number in range(len(batch_slices))], full_columns, notes)


def _read_full_column(
    record_dir: epath.Path | None, name: str, console: rich.console.Console
) -> tuple[np.ndarray, tuple[str, ...]] | None:
    """Returns predictions and notes on disk; None where they are missing, or damaged, which prints a warning."""
    if record_dir is None:
        return None
    try:
        column = records.read_column(record_dir, name)
    except ValueError as error:
        console.print(f"warning: {error} It is computed again.", highlight=False, soft_wrap=True)
        return None
    return None if column is None else (column, records.read_notes(record_dir, name))


def _full_column(
    runner: _Runner,
    name: str,
    spec: AttackSpec,
    split: data.Split,
    batch_size: int,
    record_dir: epath.Path | None,
    console: rich.console.Console,
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Returns predictions and notes of an attack that runs on all images at once, AutoAttack."""
    stored = _read_full_column(record_dir, name, console)
    if distributed.all_true(stored is not None) and stored:
        return stored
    options = attack_specs.resolve(spec)[1]
    batch_slices = [slice(i, i + batch_size) for i in range(0, len(split.label), batch_size)]
    x = np.concatenate([np.asarray(_pixels(np.asarray(split.image[rows]))) for rows in batch_slices])
    local = distributed.local_rows(len(x))  # each process uses its own devices
    local_runner = _Runner(*runner.host_arguments, distributed.local(runner.mesh))
    journal = f"{jax.process_index()} of {jax.process_count()}" if jax.process_count() > 1 else ""
    result = autoattack(
        local_runner.keys(name, split.index.astype(np.uint32)[local]),
        jax.tree_util.Partial(local_runner.apply, local_runner.variables),
        x[local],
        split.label[local],
        **options,
        batch_size=batch_size // jax.process_count() or 1,
        resume=record_dir and record_dir / name / journal,
        progress=lambda line: console.print(f"{name}   {line}", highlight=False, soft_wrap=True),
        devices=list(local_runner.mesh.devices.flat),
    )
    x_adv_all, prediction = distributed.all_gather((result.x_adv, result.prediction), len(x))
    notes = tuple(note for note in result.notes if "not finite" not in note)  # `find_warnings` counts them
    for note in notes:
        console.print(f"warning: {note}", highlight=False, soft_wrap=True)
    for rows in batch_slices:
        x_adv = runner.pad_and_shard(x_adv_all[rows], -(-batch_size // runner.mesh.size) * runner.mesh.size)
        images = len(split.label[rows])
        runner.predict(name, options, runner.pad_and_shard(x[rows], len(x_adv)), x_adv, images)
    if record_dir is not None and distributed.is_primary():
        records.write_column(record_dir, name, prediction, notes)
        (record_dir / name).rmtree()
    return prediction, notes


def examples(
    key: jax.Array,
    apply: Apply,
    variables: Variables,
    split: data.Split,
    results: Records,
    *,
    attack: str,
    spec: AttackSpec,
    class_counts: Sequence[int] | None,
    mesh: Mesh,
) -> Examples:
    """Returns clean and adversarial images for the report's grid, from the most to the least frequent class.

    Up to `EXAMPLES` classes, evenly spaced by rank. Each is shown by its first image that is correct without and wrong
    under the attack, or by its first image if there is none. Keys belong to images, so these are the adversarial images
    of the records. Without class counts the classes are in the order of their numbers.
    """
    ranked = metrics.by_frequency(class_counts, results.num_classes)
    ranked = ranked[np.isin(ranked, results.label)]
    ranked = ranked[np.unique(np.linspace(0, len(ranked) - 1, EXAMPLES).round().astype(int))]
    broken = results.correct(CLEAN) & ~results.correct(attack)
    # argmax takes the first broken image of a class (value 2), or else its first image (value 1).
    rows = np.array([np.argmax((results.label == c) * (1 + broken)) for c in ranked])
    runner = _Runner(key, apply, variables, mesh)
    x, y, index = runner.batch(split, rows, len(rows))
    x_adv = runner.attack(attack, spec, x, y, index)
    return {
        "attack": attack,
        "eps": attack_specs.resolve(spec)[1]["eps"],
        "clean": np.asarray(x)[: len(rows)],
        "adversarial": np.asarray(x_adv)[: len(rows)],
        "label": results.label[rows],
        "clean_prediction": results.clean[rows],
        "prediction": results.attacks[attack][rows],
    }


def main_examples(
    key: jax.Array,
    apply: Apply,
    variables: Variables,
    split: data.Split,
    results: Records,
    *,
    specs: Mapping[str, AttackSpec],
    class_counts: Sequence[int] | None,
    mesh: Mesh,
) -> Examples | None:
    """Returns `examples` of the attack that the plots show; None if no attack runs batch by batch."""
    shown = plots.main_attack([name for name, spec in specs.items() if not attack_specs.needs_all_images(spec)])
    if shown is None:
        return None
    return examples(
        key, apply, variables, split, results, attack=shown, spec=specs[shown], class_counts=class_counts, mesh=mesh
    )


def _read_batches(
    record_dir: epath.Path,
    header: Header,
    split: data.Split,
    batch_slices: Sequence[slice],
    batched: Sequence[str],
    console: rich.console.Console,
) -> dict[int, Columns]:
    """Returns the batches on disk by number; a damaged one is left out with a warning."""
    try:
        stored = records.read_header(record_dir)
    except ValueError as error:
        console.print(f"warning: {error} It is written again.", highlight=False, soft_wrap=True)
        stored = None
    if stored not in (None, header):
        raise ValueError(f"{record_dir} holds records under another header (edited by hand?); move it away.")
    if stored is None and distributed.is_primary():
        records.write_header(record_dir, header)
    batches: dict[int, Columns] = {}
    for number, rows in enumerate(batch_slices):
        try:
            batch = records.read_batch(record_dir, number)
            if batch is not None:
                batches[number] = _validated(batch, batched, split, rows, records.batch_path(record_dir, number))
        except ValueError as error:
            console.print(f"warning: {error} It is computed again.", highlight=False, soft_wrap=True)
    # A shared file may be visible to one process before another.
    complete = distributed.elementwise_all(np.isin(np.arange(len(batch_slices)), list(batches)))
    return {number: batches[number] for number in np.flatnonzero(complete).tolist()}


def _validated(batch: Columns, batched: Sequence[str], split: data.Split, rows: slice, path: epath.Path) -> Columns:
    """Returns the batch, or raises ValueError where its columns or images are not those expected."""
    label, index = split.label[rows], split.index[rows]
    names = {"index", "label", CLEAN, *(f"attack/{name}" for name in batched)}
    if set(batch) != names or any(column.shape != label.shape for column in batch.values()):
        raise ValueError(f"Record file {path} holds other columns.")
    if not (np.array_equal(batch["index"], index) and np.array_equal(batch["label"], label)):
        raise ValueError(f"Record file {path} holds other images.")
    return batch

"""Predictions on clean and attacked test images, recorded batch by batch and resumed where they stopped."""

import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lt_adv.attacks import autoattack, checks, initialization, objectives
from lt_adv.evaluation import attack_specs, progress, records
from lt_adv.evaluation.records import CLEAN, WORST, Records
from lt_adv.runtime import distributed

EXAMPLES = 10  # columns of the report's picture grid
TOLERANCE = 1e-6  # rounding allowed on top of the radius, in units of the [0, 1] pixel range


def balanced_subset(label: np.ndarray, per_class: int, seed: int = 0) -> np.ndarray:
    """Positions, ascending, of `per_class` images of every class: int64 [per_class * num_classes].

    Fixed by the labels and the seed (NumPy's frozen legacy stream) and nested: a smaller subset lies in a larger one.
    Errors: ValueError where a class has fewer than `per_class` images.
    """
    label = np.asarray(label)
    counts = np.bincount(label)
    if not 0 < per_class <= counts.min():
        raise ValueError(f"No balanced subset of {per_class} per class: classes have {counts.min()} images or more.")
    legacy = np.random.RandomState(seed)
    chosen = [legacy.permutation(np.flatnonzero(label == c))[:per_class] for c in range(len(counts))]
    return np.sort(np.concatenate(chosen)).astype(np.int64)


@functools.lru_cache(maxsize=64)
def _judge(apply: Callable, norm: str, mesh: Mesh) -> Callable:
    """Jitted (variables, x, x_adv) -> (predictions [b], how far x_adv of each image is from x and outside the box).

    Images are reduced to one figure each; over images the host reduces, for a maximum across devices loses NaNs.
    """

    def judge(variables, x, x_adv):
        logits = apply(variables, x_adv)
        delta = (x_adv - x).reshape(len(x), -1)
        size = jnp.abs(delta).max(-1) if norm == "linf" else jnp.linalg.norm(delta, axis=-1)
        outside = jnp.maximum(-x_adv, x_adv - 1.0).reshape(len(x), -1).max(-1)
        return objectives.prediction(checks.check_logits(logits, x)), (size, outside)

    return jax.jit(judge, out_shardings=NamedSharding(mesh, PartitionSpec()))


@jax.jit
def _example_keys(key: jax.Array, name: jax.Array, index: jax.Array) -> jax.Array:
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, name), index)


@jax.jit
def _pixels(image: jax.Array) -> jax.Array:
    return image.astype(jnp.float32) / 255.0


def _check(name: str, options: Mapping[str, Any], size: np.ndarray, outside: np.ndarray) -> None:
    """Raise unless every image lies in the ball and the box; written so that a NaN raises too."""
    size, outside = size.max(), outside.max()
    eps = options.get("eps", 0.0)
    # A norm over many pixels also adds up the rounding of each of them to float32.
    tolerance = TOLERANCE if options.get("norm", "linf") == "linf" else 10 * TOLERANCE
    if not size <= eps + tolerance:
        raise ValueError(f"{name}: an adversarial image is {size:.9g} away from its clean image, eps is {eps!r}.")
    if not outside <= TOLERANCE:
        raise ValueError(f"{name}: an adversarial image leaves [0, 1] by {outside:.3g}.")


class _Runner:
    """Network and data on the mesh: attacks and judges one padded batch at a time."""

    def __init__(self, key, apply, variables, mesh: Mesh) -> None:
        self.given, self.apply, self.mesh = (initialization.threefry(key), apply, variables), apply, mesh
        self.shard = NamedSharding(mesh, PartitionSpec("data"))
        self.key, self.variables = distributed.put((self.given[0], variables), distributed.replicated(mesh))

    def put(self, rows: np.ndarray, size: int) -> jax.Array:
        """Rows padded to `size` by repeating the first, in shards; the padding's results are cut off afterwards."""
        rows = np.concatenate([rows, np.broadcast_to(rows[:1], (size - len(rows), *rows.shape[1:]))])
        return distributed.put(rows, self.shard)

    def batch(self, split: Any, rows: slice | np.ndarray, size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(x, y, index) of some rows of the split, padded to a multiple of the devices that holds `size`."""
        size = -(-size // self.mesh.size) * self.mesh.size
        columns = (np.asarray(split.image[rows]), split.label[rows].astype(np.int32), split.index[rows])
        image, label, index = (self.put(column, size) for column in (*columns[:2], columns[2].astype(np.uint32)))
        return _pixels(image), label, index

    def attack(self, name: str, spec: Mapping[str, Any], x, y, index) -> jax.Array:
        """x_adv; the key of an image is fold_in(fold_in(key, crc32(name)), index), whatever batch it comes in."""
        return attack_specs.compiled(self.apply, spec)(self.keys(name, index), self.variables, x, y)

    def keys(self, name: str, index) -> jax.Array:
        """One key per image, for one attack."""
        return _example_keys(self.key, np.uint32(zlib.crc32(name.encode())), index)

    def judge(self, name: str, options: Mapping[str, Any], x, x_adv, images: int) -> np.ndarray:
        """Predictions on the first `images` of x_adv, after the radius check; the rest is padding."""
        prediction, facts = _judge(self.apply, options.get("norm", "linf"), self.mesh)(self.variables, x, x_adv)
        prediction, facts = jax.tree.map(lambda fact: np.asarray(fact)[:images], (prediction, facts))
        _check(name, options, *facts)
        return prediction


def evaluate(
    key: jax.Array,
    apply: Callable[[Any, jax.Array], jax.Array],
    variables: Any,
    split: Any,
    *,
    attacks: Mapping[str, Mapping[str, Any]],
    batch_size: int,
    directory: epath.PathLike | None,
    header: Mapping[str, Any],
    mesh: Mesh,
    class_names: Sequence[str],
    console: rich.console.Console | None = None,
) -> Records:
    """Records of every image of `split` (uint8 image [n, h, w, c], label [n], index [n]), clean and under each attack.

    `apply(variables, x [b, h, w, c] in [0, 1]) -> logits [b, C]` is the network with its post-hoc adjustment. `attacks`
    maps a column name to `{"attack": "pgd", "eps": ..., ...}` (protocol.resolve). Batches are padded, nothing is
    dropped, and the result depends neither on `batch_size` nor on the devices of `mesh` (axis "data"). Each batch is
    written to `directory/records/<digest of the header>` as soon as it is done; batches found there are not computed
    again, damaged ones are, with a warning line. `directory=None` writes nothing. Compiled programs are kept per
    `apply` object: pass the same one again and nothing is compiled twice. Errors: ValueError for a bad attack entry,
    when an attack leaves its ball or [0, 1] (tolerance 1e-6), or when no logit of the first batch is finite. An image
    whose logits are not finite counts as wrong, with the prediction -1.
    """
    console = console or rich.console.Console(stderr=True, markup=False)
    if reserved := {CLEAN, WORST} & set(attacks):
        raise ValueError(f"An attack cannot be called {' or '.join(sorted(reserved))}: the report uses the name.")
    if not len(split.label) or batch_size < 1:
        raise ValueError(f"Nothing to evaluate: {len(split.label)} images in batches of {batch_size}.")
    if len(split.label) < jax.process_count():
        raise ValueError(f"{len(split.label)} images are too few for {jax.process_count()} processes: take fewer.")
    header = attack_specs.header(
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
    pieces = [name for name, spec in attacks.items() if not attack_specs.takes_all(spec)]
    work = {CLEAN: 1} | {name: 1 + options[name].get("num_steps", 1) for name in pieces}
    where = None if directory is None else records.folder(directory, header)
    parts = [slice(i, min(i + batch_size, len(split.label))) for i in range(0, len(split.label), batch_size)]
    found = {} if where is None else _resume(where, header, split, parts, pieces, console)
    runner = _Runner(key, apply, variables, mesh)
    done = sum(len(batch["index"]) for batch in found.values())
    with progress.meter(console, work, len(split.label), done) as meter:
        for number, rows in enumerate(parts):
            if number in found:
                continue
            x, y, index = runner.batch(split, rows, batch_size)
            label = np.asarray(split.label[rows], np.int32)
            columns = {"index": np.asarray(split.index[rows], np.int64), "label": label}
            for name in (CLEAN, *pieces):
                x_adv = x if name == CLEAN else runner.attack(name, attacks[name], x, y, index)
                prediction = runner.judge(name, options.get(name, {}), x, x_adv, len(label))
                if number == 0 and name == CLEAN and (prediction < 0).all():
                    raise ValueError(f"clean: the logits of {len(label)} images are not finite; check the weights.")
                columns[CLEAN if name == CLEAN else f"attack/{name}"] = prediction
                meter.count(name, int((prediction == label).sum()), len(label), work[name])
            if where is not None and distributed.is_primary():
                records.write_batch(where, number, columns)
            found[number] = columns
    columns, notes = {}, {}
    for name in (name for name in attacks if name not in pieces):
        columns[name], notes[name] = _column(runner, name, attacks[name], split, batch_size, where, console)
    return records.assemble(header, [found[number] for number in range(len(parts))], columns, notes)


def _column(
    runner: _Runner, name: str, spec: Mapping[str, Any], split: Any, batch_size: int, where: epath.Path | None, console
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Predictions under an attack that looks at all images at once, AutoAttack, and its notes."""
    column = None
    if where is not None:
        try:
            column = records.read_column(where, name)
        except ValueError as error:
            console.print(f"warning: {error} It is computed again.", highlight=False, soft_wrap=True)
    if distributed.agree(column is not None):
        return column, records.read_notes(where, name)
    options = attack_specs.resolve(spec)[1]
    parts = [slice(i, i + batch_size) for i in range(0, len(split.label), batch_size)]
    x = np.concatenate([np.asarray(_pixels(np.asarray(split.image[rows]))) for rows in parts])
    mine = distributed.local_rows(len(x))  # each process drives its own devices
    here = _Runner(*runner.given, distributed.local(runner.mesh))
    journal = f"{jax.process_index()} of {jax.process_count()}" if jax.process_count() > 1 else ""
    result = autoattack(
        here.keys(name, split.index.astype(np.uint32)[mine]),
        jax.tree_util.Partial(here.apply, here.variables),
        x[mine],
        split.label[mine],
        **options,
        batch_size=batch_size // jax.process_count() or 1,
        resume=where and where / name / journal,
        progress=lambda line: console.print(f"{name}   {line}", highlight=False, soft_wrap=True),
        devices=list(here.mesh.devices.flat),
    )
    x_adv_all, prediction = distributed.gather((result.x_adv, result.prediction), len(x))
    notes = tuple(note for note in result.notes if "not finite" not in note)  # the records count these
    for note in notes:
        console.print(f"warning: {note}", highlight=False, soft_wrap=True)
    for rows in parts:
        x_adv = runner.put(x_adv_all[rows], -(-batch_size // runner.mesh.size) * runner.mesh.size)
        images = len(split.label[rows])
        runner.judge(name, options, runner.put(x[rows], len(x_adv)), x_adv, images)
    if where is not None and distributed.is_primary():
        records.write_column(where, name, prediction, notes)
        (where / name).rmtree()
    return prediction, notes


def examples(
    key: jax.Array,
    apply: Callable[[Any, jax.Array], jax.Array],
    variables: Any,
    split: Any,
    results: Records,
    *,
    attack: str,
    spec: Mapping[str, Any],
    class_counts: Sequence[int],
    mesh: Mesh,
) -> dict[str, Any]:
    """Adversarial images for the report's grid, from the most to the least frequent class.

    Up to `EXAMPLES` classes, evenly spaced by rank; of each the first image that is right clean and wrong under the
    attack, or its first image where there is none. Keys belong to images, so these are the very images of the records.
    """
    ranked = np.argsort(-np.asarray(class_counts), kind="stable")
    ranked = ranked[np.isin(ranked, results.label)]
    ranked = ranked[np.unique(np.linspace(0, len(ranked) - 1, EXAMPLES).round().astype(int))]
    broken = results.correct(CLEAN) & ~results.correct(attack)
    # argmax finds the first True; ranking broken images above the others of the class prefers those.
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


def _resume(
    where: epath.Path, header, split, parts: list[slice], pieces: list[str], console
) -> dict[int, dict[str, np.ndarray]]:
    """The batches already on disk, by number; a damaged one is left out with a warning line."""
    try:
        known = records.read_header(where)
    except ValueError as error:
        console.print(f"warning: {error} It is written again.", highlight=False, soft_wrap=True)
        known = None
    if known not in (None, header):
        raise ValueError(f"{where} holds records under another header (edited by hand?); move it away.")
    if known is None and distributed.is_primary():
        records.write_header(where, header)
    found = {}
    for number, rows in enumerate(parts):
        try:
            batch = records.read_batch(where, number)
            if batch is not None:
                found[number] = _expected(batch, pieces, split, rows, records.batch_path(where, number))
        except ValueError as error:
            console.print(f"warning: {error} It is computed again.", highlight=False, soft_wrap=True)
    seen = distributed.in_all(
        np.isin(np.arange(len(parts)), list(found))
    )  # one may see a file that another does not yet
    return {number: found[number] for number in np.flatnonzero(seen).tolist()}


def _expected(batch, pieces: list[str], split, rows: slice, path: epath.Path) -> dict[str, np.ndarray]:
    """The batch if it has the columns and images it must have, else ValueError."""
    label, index = split.label[rows], split.index[rows]
    names = {"index", "label", CLEAN, *(f"attack/{name}" for name in pieces)}
    if set(batch) != names or any(column.shape != label.shape for column in batch.values()):
        raise ValueError(f"Record file {path} holds other columns.")
    if not (np.array_equal(batch["index"], index) and np.array_equal(batch["label"], label)):
        raise ValueError(f"Record file {path} holds other images.")
    return batch

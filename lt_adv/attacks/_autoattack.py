"""AutoAttack: an ensemble of parameter-free attacks. Each attacks the images that the ones before it did not break."""

import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh
from jax.typing import ArrayLike

from lt_adv.attacks import _base, _expectation, checks, continuous_batching, journal, norms
from lt_adv.attacks import result as _result
from lt_adv.attacks._apgd import build_apgd, build_apgd_targeted
from lt_adv.attacks._base import IterativeAttack
from lt_adv.attacks._expectation import Expectation
from lt_adv.attacks._fab import build_fab, build_fab_targeted
from lt_adv.attacks._square import build_square, unsupported
from lt_adv.attacks.initialization import example_keys
from lt_adv.attacks.objectives import dlr, logit_margin, stable_cross_entropy, targeted_dlr, targeted_logit_margin
from lt_adv.attacks.signatures import Bounds, KeyedLogitsFn, LogitsFn, Objective, TargetedObjective

VERSIONS = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
}
ATTACKS = ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square")
NUM_SAMPLES = 20  # draws of a randomised network in the version "rand", unless it is an expectation
APGD = frozenset({"apgd-ce", "apgd-dlr", "apgd-t"})
DEPENDENCE = 0.01  # relative to the largest logit; the rounding of a bfloat16 network stays below it
SQUARE_SHARE = 0.002  # of the images: if Square alone breaks more, and more than two, gradients are in doubt
PROGRESS_SECONDS = 30.0  # between two lines of progress


class Result(NamedTuple):
    """Result of AutoAttack in numpy arrays, one row per image in the order of x.

    Attributes:
      x_adv: like x: a point that is classified wrongly; x itself if the attacks did not break the image.
      robust: bool [n], whether x_adv is classified as y, in batches of `batch_size`.
      correct: bool [n], whether x is classified as y.
      prediction: int32 [n], class of x_adv; -1 where the logits are not finite.
      broken_by: int32 [n], index in `accuracy` of the attack that broke the image; 0 clean, -1 none.
      accuracy: "clean", then the accuracy after each attack, in [0, 1].
      evaluations: attack -> number of forward passes and of gradients, over all images.
      notes: deviations from the version, and reasons to doubt the result.
    """

    x_adv: np.ndarray
    robust: np.ndarray
    correct: np.ndarray
    prediction: np.ndarray
    broken_by: np.ndarray
    accuracy: dict[str, float]
    evaluations: dict[str, tuple[int, int]]
    notes: tuple[str, ...]

    def __repr__(self) -> str:  # also what a notebook shows
        return _result.as_table(self)

    def to_dict(self) -> dict[str, Any]:
        """Returns the numbers without images, for JSON: see `result.to_dict`."""
        return _result.to_dict(self)


@jax.transfer_guard("allow")  # it moves images between host and devices by design
def autoattack(
    key: Array,
    logits_fn: LogitsFn | KeyedLogitsFn | Expectation,
    x: ArrayLike,
    y: ArrayLike,
    *,
    eps: ArrayLike,
    norm: str = "linf",
    version: str | Sequence[str] = "standard",
    batch_size: int = 256,
    num_queries: int = 5000,
    bounds: Bounds = (0.0, 1.0),
    resume: str | Path | None = None,
    progress: Callable[[str], None] | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Result:
    """AutoAttack on any number of images. Not traceable: it drives compiled attacks from the host.

    The version "standard" runs APGD on cross-entropy, APGD on the targeted DLR and targeted FAB (nine targets each, or
    all wrong classes if there are fewer), and Square. "plus" adds APGD on the DLR and untargeted FAB; APGD on
    cross-entropy, APGD on the DLR and FAB have five restarts. "rand" is for randomised networks: APGD on cross-entropy
    and on the DLR, averaged over the draws of an `expectation`, by default 20. A sequence of names from `ATTACKS` runs
    these, without restarts. In L1, APGD on cross-entropy has five restarts, and APGD on the targeted DLR has five
    targets except in "plus".

    Args:
      key: one typed key, or one per image [n]. The result depends neither on `batch_size` nor on the devices.
      logits_fn: x [batch, ...] -> logits [batch, classes]; for "rand" an `expectation`, or (x, keys) -> logits with one
        key per image.
        Arrays that it closes over become arguments of the compiled programs, which are freed after the call.
        `jax.tree_util.Partial(apply, variables)` keeps the programs of the last eight functions `apply`, so that
        another call, with any variables, does not compile.
      x: images [n, ...], float32 or float64, inside `bounds`. Square needs images [n, height, width(, channels)] or, in
        L-inf, vectors [n, d]; for other shapes it is left out, with a line in `notes`.
      y: labels, integers [n].
      eps: radius, a scalar or [n], in the units of x. In L-inf also one radius for each entry, an array with the
        dimensions of x that broadcasts to it: 0 where a feature must not change.
      norm: "linf", "l2" or "l1".
      version: "standard", "plus", "rand", or a sequence of attacks.
      batch_size: images attacked at once, rounded up to a multiple of the number of devices, each of which computes its
        share alone.
      num_queries: queries of Square.
      bounds: (low, high), the range of valid pixels.
      resume: None, or a directory (a path, or an `etils.epath.Path` for a bucket) in which finished images are saved.
        After an interruption the same call resumes from there. A directory belongs to one call.
      progress: called with one line of text about every 30 seconds and after each attack.
      devices: devices to use; by default all of this process.

    Returns:
      A `Result`. For fewer than four classes a targeted logit margin replaces the targeted DLR, and for two classes a
      logit margin replaces the DLR, with a line in `notes`. An image whose logits are not finite, clean or attacked,
      counts as wrong, and `notes` has their number: mask a class with a large negative logit instead of infinity.
      `notes` also warns if the logits of an image depend on its batch, because the attacks assume independent images,
      if they are probabilities, and if Square, which needs no gradient, broke more than 0.2 % of the images, and more
      than two, that the other attacks left.
      `evaluations` counts all steps in occupied slots: a broken image is counted until its slot is refilled.

    Raises:
      ValueError: for arguments that do not fit, and for a `resume` directory of another call.

    Examples:
      >>> logits_fn = lambda x: x @ jnp.array([[1.0, -1.0], [-1.0, 1.0]])
      >>> x, y = jnp.array([[0.5, 0.375], [1.0, 0.0]]), jnp.array([0, 0])
      >>> result = attacks.autoattack(jax.random.key(0), logits_fn, x, y, eps=0.125, version=("apgd-ce", "square"))
      >>> result.accuracy
      {'clean': 1.0, 'apgd-ce': 0.5, 'square': 0.5}
      >>> result.robust
      array([False,  True])

    References:
      Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
      attacks", ICML 2020; "Mind the box: l1-APGD for sparse adversarial attacks on image classifiers", ICML 2021.
      Differs from the released code: keys belong to images; an image is not attacked any further once it is broken, by
      FAB too; with fewer than ten classes, all wrong classes are targets. The mean probabilities over all draws of a
      randomised network decide whether a point is classified wrongly, instead of a single draw, and those over new
      draws whether an attack has broken the image.
    """
    names = attacks_of(version)
    checks.check_real("x", x)
    checks.check_real("y, the labels,", y)
    x, y = np.asarray(x), np.asarray(y)
    bounds = _base.check(x, y, bounds)
    batch_size, num_queries = checks.count("batch_size", batch_size), checks.count("num_queries", num_queries)
    if not len(x) or not batch_size:
        raise ValueError(f"Nothing to attack: {len(x)} images in batches of {batch_size}.")
    norms.get(norm)
    norms.check_length("eps", eps, len(x), image=x.shape[1:] if norm == "linf" else None)
    radius = np.asarray(eps, x.dtype)
    radius = np.broadcast_to(radius, x.shape if radius.ndim == x.ndim > 1 else len(x))
    names, notes = _supported(names, norm, x.shape[1:])
    keys = example_keys(key, len(x))
    if version == "rand" and not isinstance(logits_fn, Expectation):
        logits_fn = Expectation(logits_fn, NUM_SAMPLES)  # type: ignore[arg-type]
    function, num_samples = _expectation.split(logits_fn)
    random = num_samples is not None
    if random and not set(names) <= APGD:
        raise ValueError(
            f"{', '.join(name for name in names if name not in APGD)} cannot attack a randomised network: use "
            f'version="rand", or a sequence of {", ".join(sorted(APGD))}.'
        )
    network = continuous_batching.network(function, x[0], min(batch_size, len(x)), num_samples, devices)

    def logits_of(points: np.ndarray, rows: np.ndarray, draw: int) -> np.ndarray:
        """Computes logits for the images `rows`, or mean probabilities over the draws number `draw`."""
        return continuous_batching.scores(
            network, points, continuous_batching.fold_in_numbers(keys[rows], np.uint32(len(ATTACKS) + draw))
        )

    all_rows = np.arange(len(x))
    clean = logits_of(x, all_rows, 0)
    iterative_attacks, replacements = _build_attacks(names, clean.shape[-1], norm, bounds, num_samples, num_queries)
    notes.extend(replacements)
    checks.check_labels(y, len(x), clean.shape[-1])
    dependence = continuous_batching.batch_dependence(
        network, x, continuous_batching.fold_in_numbers(keys, np.uint32(len(ATTACKS))), clean
    )
    if dependence > DEPENDENCE:
        notes.append(
            "The logits of an image change with the other images of its batch, by up to "
            f"{100 * dependence:.3g} % of its largest logit: the attacks assume independent images, and this result "
            "depends on the batches. Is the network in training mode?"
        )
    ranking = np.argsort(-clean, axis=-1, kind="stable")
    x_adv, prediction = x.copy(), _predictions(clean)
    if (undefined := np.sum(prediction < 0)) > 0:
        notes.append(f"The logits of {undefined} clean images are not finite: they count as wrong.")
    if not random and (clean >= 0).all() and (np.abs(clean.sum(-1) - 1) < 1e-5).all():
        notes.append(
            "logits_fn returns probabilities: the objectives apply a second softmax, and gradients vanish. Return the "
            "logits."
        )
    correct = prediction == y
    broken_by = np.where(correct, -1, 0).astype(np.int32)
    accuracy, evaluations = {"clean": float(correct.mean())}, {}
    call = journal.digest(x, y, radius, jax.random.key_data(keys), (names, norm, bounds, num_queries, num_samples))
    log = journal.open_journal(resume, call, clean)
    report = progress or (lambda _: None)

    for index, (name, attack) in enumerate(iterative_attacks.items(), start=1):
        rows = np.flatnonzero(broken_by == -1)
        remaining, broken, steps = np.isin(all_rows, rows), np.zeros(len(x), bool), 0
        resumed, start = log.read(index), time.perf_counter()
        last_report, num_resumed = start, sum(len(done.rows) for done in resumed)
        new = continuous_batching.run(
            attack,
            continuous_batching.network(function, x[0], _num_slots(len(rows), batch_size), num_samples, devices),
            np.setdiff1d(rows, np.concatenate([done.rows for done in resumed])) if resumed else rows,
            keys=continuous_batching.fold_in_numbers(keys, np.uint32(ATTACKS.index(name))),
            x=x,
            y=y.astype(np.int32),
            eps=radius,
            targets=ranking[:, 1:] if name.endswith("-t") else ranking[:, :1],
        )
        for done in itertools.chain(resumed, _recorded(new, log, index, network.slots)):
            x_adv[done.rows[done.broken]] = done.x_adv
            broken[done.rows[done.broken]], remaining[done.rows] = True, False
            steps += int(done.steps.sum())
            if time.perf_counter() - last_report > PROGRESS_SECONDS:
                last_report, tried = time.perf_counter(), len(rows) - remaining.sum()
                seconds = (last_report - start) / max(tried - num_resumed, 1) * remaining.sum()
                robust, left = 100 * (len(rows) - broken.sum()) / len(x), _duration(seconds)
                report(f"{name}: {tried:,} of {len(rows):,} images, robust so far {robust:.2f} %, {left} left")
        if broken.any():  # evaluated again by the program of the final result: on the boundary rounding decides
            broken_rows = np.flatnonzero(broken)
            prediction[broken_rows] = _predictions(logits_of(x_adv[broken_rows], broken_rows, index))
            broken[broken_rows] = prediction[broken_rows] != y[broken_rows]
        x_adv[rows[~broken[rows]]] = x[rows[~broken[rows]]]
        broken_by[broken] = index
        accuracy[name] = float((broken_by == -1).mean())
        evaluations[name] = (steps * attack.forwards, steps * attack.gradients)
        report(f"{name}: robust {100 * accuracy[name]:.2f} % after {_duration(time.perf_counter() - start)}")

    if not random:
        prediction = _predictions(logits_of(x_adv, all_rows, 0))
    if (undefined := np.sum(correct & (prediction < 0))) > 0:
        notes.append(f"The logits of {undefined} adversarial images are not finite: they count as wrong.")
    if "square" in names and set(names) - {"square"}:
        by_square = np.sum(broken_by == 1 + names.index("square"))
        if by_square > max(SQUARE_SHARE * len(x), 2):
            notes.append(
                f"Square broke {by_square} images that attacks with gradients did not: does the network mask its "
                "gradients?"
            )
    robust = prediction == y
    accuracy[names[-1]] = float(robust.mean())
    return Result(x_adv, robust, correct, prediction, broken_by, accuracy, evaluations, tuple(notes))


def _predictions(logits: np.ndarray) -> np.ndarray:
    """Like `objectives.prediction`, for logits on the host."""
    return np.where(np.isfinite(logits).all(-1), logits.argmax(-1), -1).astype(np.int32)


def _supported(names: tuple[str, ...], norm: str, shape: tuple[int, ...]) -> tuple[tuple[str, ...], list[str]]:
    """Returns the attacks that support examples of this shape, and a note if one is left out."""
    reason = unsupported(norm, shape) if "square" in names else ""
    if not reason:
        return names, []
    if names == ("square",):
        raise ValueError(f"square needs {reason}.")
    return tuple(name for name in names if name != "square"), [f"square is left out: it needs {reason}."]


def attacks_of(version: str | Sequence[str]) -> tuple[str, ...]:
    """Returns the attacks of a version or of a sequence of names; ValueError for unknown ones."""
    if isinstance(version, str) and version not in VERSIONS:
        raise ValueError(f"Unknown version {version!r}. There are: {', '.join(VERSIONS)}, or a sequence of attacks.")
    names = VERSIONS[version] if isinstance(version, str) else tuple(version)
    for name in names:
        if name not in ATTACKS:
            raise ValueError(f"Unknown attack {name!r}. There are: {', '.join(ATTACKS)}.")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"version must name attacks, each once, got {names}.")
    return names


@functools.lru_cache  # the programs of an attack are cached by its identity
def _build_attacks(
    names: tuple[str, ...], classes: int, norm: str, bounds: Bounds, num_samples: int | None, num_queries: int
) -> tuple[dict[str, IterativeAttack], tuple[str, ...]]:
    """Returns the attacks by name, and a note for each objective replaced because of few classes."""
    if classes < 2:
        raise ValueError(f"There is nothing to attack: logits_fn returns logits of {classes} class.")
    plus = names == VERSIONS["plus"]
    restarts, ce_restarts = 5 if plus else 1, 5 if plus or norm == "l1" else 1
    num_targets, notes = min(9, classes - 1), []
    apgd_targets = min(5, num_targets) if norm == "l1" and not plus else num_targets
    ratio: Objective = dlr
    targeted_ratio: TargetedObjective = targeted_dlr
    if classes < 3 and "apgd-dlr" in names:
        ratio = logit_margin
        notes.append("apgd-dlr: the DLR needs three classes; the logit margin replaces it.")
    if classes < 4 and "apgd-t" in names:
        targeted_ratio = targeted_logit_margin
        notes.append("apgd-t: the targeted DLR needs four classes; the targeted logit margin replaces it.")
    builders: dict[str, Callable[[], IterativeAttack]] = {
        "apgd-ce": lambda: build_apgd(stable_cross_entropy, norm, 100, ce_restarts, 0.75, num_samples, bounds),
        "apgd-dlr": lambda: build_apgd(ratio, norm, 100, restarts, 0.75, num_samples, bounds),
        "apgd-t": lambda: build_apgd_targeted(targeted_ratio, norm, 100, apgd_targets, 0.75, num_samples, bounds),
        "fab": lambda: build_fab(classes, norm, 100, restarts, 0.1, 1.05, 0.9, bounds),
        "fab-t": lambda: build_fab_targeted(norm, 100, num_targets, 0.1, 1.05, 0.9, bounds),
        "square": lambda: build_square(logit_margin, norm, num_queries, 0.8, bounds),
    }
    return {name: builders[name]() for name in names}, tuple(notes)


class AbstractProgram(NamedTuple):
    """A program that `autoattack` calls, for `function.trace(*arguments)`, and how often if no image is broken."""

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    calls: int  # for `batch_size` images


def abstract_programs(
    logits_fn: LogitsFn,
    x: jax.ShapeDtypeStruct,
    num_classes: int,
    mesh: Mesh,
    *,
    norm: str = "linf",
    version: str | Sequence[str] = "standard",
    num_queries: int = 5000,
) -> Iterator[AbstractProgram]:
    """Yields the program of each attack of `autoattack`, for devices that need not exist.

    Args:
      logits_fn: a `jax.tree_util.Partial` whose arrays are shapes.
      x: shape of a batch of images.
      num_classes: classes of the logits.
      mesh: devices, with axis "slots".
      norm, version, num_queries: as of `autoattack`.
    """
    names, _ = _supported(attacks_of(version), norm, x.shape[1:])
    iterative_attacks, _ = _build_attacks(names, num_classes, norm, (0.0, 1.0), None, num_queries)
    for name, attack in iterative_attacks.items():
        function, arguments = continuous_batching.abstract_advance(attack, logits_fn, x, mesh)
        calls = attack.num_rounds * -(-attack.num_steps // max(continuous_batching.steps_per_call(attack), 1))
        yield AbstractProgram(name, function, arguments, calls)


def _num_slots(images: int, batch_size: int) -> int:
    """Returns the smallest number of slots that needs no more waves, rounded up by an eighth at most.

    It leaves few slots idle and leads to few different shapes.
    """
    waves = max(-(-images // batch_size), 1)
    size = max(-(-images // waves), 1)
    step = 2 ** max(size.bit_length() - 4, 0)
    return min(-(-size // step) * step, batch_size)


def _recorded(
    results: Iterator[continuous_batching.Done], log: journal.Journal, index: int, minimum: int
) -> Iterator[continuous_batching.Done]:
    """Yields the results and writes them to the journal."""
    for done in results:
        log.add(index, done, minimum)
        yield done
    log.flush(index)


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.1f} s"

"""AutoAttack: an ensemble of parameter-free attacks, each on the images that all before it have left."""

import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lt_adv.attacks import _base, continuous_batching, inputs, journal, norms
from lt_adv.attacks._apgd import apgd_program, apgd_targeted_program
from lt_adv.attacks._base import Bounds, Iterated
from lt_adv.attacks._fab import fab_program, fab_targeted_program
from lt_adv.attacks._square import square_program, unsupported
from lt_adv.attacks.initialization import example_keys
from lt_adv.attacks.objectives import dlr, logit_margin, stable_cross_entropy, targeted_dlr, targeted_logit_margin

VERSIONS = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
}
ATTACKS = ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square")
DRAWS = 20  # of a randomised network, for each gradient of the version "rand"
DEPENDENCE = 0.01  # of the largest logit: more than the rounding of a network in bfloat16
SECONDS = 30.0  # between two lines of progress


class Result(NamedTuple):
    """What AutoAttack leaves, in numpy arrays, one row per image in the order of x."""

    x_adv: np.ndarray  # like x: a point that is classified wrongly, or x itself where none was found
    robust: np.ndarray  # bool [n]: whether logits_fn, in batches of `batch_size`, says y of x_adv; a random one said it
    correct: np.ndarray  # bool [n]: whether it classifies x as y
    prediction: np.ndarray  # int32 [n]: of x_adv; -1 where the logits are not finite
    broken_by: np.ndarray  # int32 [n]: the attack that broke the image, by its place in `accuracy`; 0 clean, -1 none
    accuracy: dict[str, float]  # "clean", then after each attack, in [0, 1]
    evaluations: dict[str, tuple[int, int]]  # attack -> forward passes that images asked for, and how many gradients
    notes: tuple[str, ...]  # what was done otherwise than the version says, and what makes the result doubtful


@jax.transfer_guard("allow")  # it moves images between host and devices by design
def autoattack(
    key: Array,
    logits_fn: Callable[..., Array],
    x: Any,
    y: Any,
    *,
    eps: float,
    norm: str = "linf",
    version: str | Sequence[str] = "standard",
    batch_size: int = 256,
    num_queries: int = 5000,
    bounds: Bounds = (0.0, 1.0),
    resume: Any = None,
    progress: Callable[[str], None] | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Result:
    """AutoAttack on any number of images. Not traceable: it drives compiled attacks from the host.

    The version "standard" is APGD on cross-entropy, APGD on the targeted ratio and targeted FAB (nine targets each, or
    as many as there are), and Square. "plus" adds APGD on the ratio and untargeted FAB, with five
    restarts of these three. "rand" is for randomised networks: APGD on both, gradients averaged over 20 draws;
    logits_fn is then called as logits_fn(x, keys), one key per image. A sequence of names out of `ATTACKS` runs these,
    without restarts.

    Args:
      key: one typed key, or one per image [n]. The result depends on it alone, neither on `batch_size` nor on devices.
      logits_fn: x [batch, ...] -> logits [batch, classes]. Arrays it closes over become arguments of the compiled
        programs, which are freed after the call. `jax.tree_util.Partial(apply, variables)` keeps them, for the last
        eight functions `apply`, so that another call compiles nothing, whatever the variables.
      x: images [n, ...], floating, inside `bounds`. Square needs images [n, height, width(, channels)] or, in L-inf,
        vectors [n, d]; for other shapes it is left out, which `notes` says.
      y: labels, integers [n].
      eps: radius, in units of the [0, 1] pixel range.
      norm: "linf" or "l2".
      batch_size: images that are attacked at once, rounded up to a multiple of the devices.
      num_queries: of Square.
      resume: None, or a directory (a path, or an `etils.epath.Path` for a store) that keeps what is done; the same call
        goes on from there after an interruption. Each directory is of one call.
      progress: called with one line of text now and then.
      devices: all of this process by default.

    Returns:
      a Result. With fewer than four classes the targeted ratio does not exist, and with two the ratio: differences of
      logits take their place, which `notes` says. An image with logits that are not finite counts as wrong, clean or
      attacked, and `notes` says how many there are: mask a class with a large negative logit, not with infinity.
      `notes` also says where a few images have other logits in a batch of themselves: the attacks take images to be
      independent.

    Raises:
      ValueError: for unknown names or values that cannot be meant, a `resume` directory of another call.

    Reference: Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse
    parameter-free attacks", ICML 2020.
    Evaluations are those of slots at work: of an image that is broken, up to the next look at the slots.
    Differs from the released code: keys belong to images; an image is left as soon as it is broken, FAB's too; with
    fewer than ten classes all wrong ones are targets.
    """
    names = attacks_of(version)
    inputs.check_real("x", x)
    inputs.check_real("y, the labels,", y)
    x, y = np.asarray(x), np.asarray(y)
    bounds = _base.check(x, y, bounds)
    batch_size, num_queries = inputs.count("batch_size", batch_size), inputs.count("num_queries", num_queries)
    if not len(x) or not batch_size:
        raise ValueError(f"Nothing to attack: {len(x)} images in batches of {batch_size}.")
    norms.get(norm)
    norms.check_length("eps", eps, 1)
    radius = np.broadcast_to(np.asarray(norms.per_example(eps, jnp.asarray(x[:1]))).ravel(), len(x))
    names, notes = _supported(names, norm, x.shape[1:])
    keys, random = example_keys(key, len(x)), version == "rand"
    network = continuous_batching.network(logits_fn, x[0], min(batch_size, len(x)), random, devices)

    def judge(points: np.ndarray, rows: np.ndarray, number: int) -> np.ndarray:
        """Logits of some images' points; of a random network each judgement is a draw of its own."""
        return continuous_batching.logits(
            network, points, continuous_batching.example_keys(keys[rows], np.uint32(len(ATTACKS) + number))
        )

    everyone = np.arange(len(x))
    clean = judge(x, everyone, 0)
    programs, changes = _programs(names, clean.shape[-1], norm, bounds, random, num_queries)
    notes.extend(changes)
    inputs.check_labels(y, len(x), clean.shape[-1])
    change = continuous_batching.dependence(
        network, x, continuous_batching.example_keys(keys, np.uint32(len(ATTACKS))), clean
    )
    if change > DEPENDENCE:
        notes.append(
            f"The logits of an image change with the other images of its batch, by up to {100 * change:.3g} % of its "
            "largest logit: the attacks take images to be independent, and this result depends on the batches. Is the "
            "network in training mode?"
        )
    ranking = np.argsort(-clean, axis=-1, kind="stable")
    x_adv, prediction = x.copy(), _predictions(clean)
    if (undefined := np.sum(prediction < 0)) > 0:
        notes.append(f"The logits of {undefined} clean images are not finite: they count as wrong.")
    correct = prediction == y
    broken_by = np.where(correct, -1, 0).astype(np.int32)
    accuracy, evaluations = {"clean": float(correct.mean())}, {}
    call = journal.digest(x, y, radius, jax.random.key_data(keys), (names, norm, bounds, num_queries))
    log = journal.open_(resume, call, clean)
    say = progress or (lambda _: None)

    for number, (name, attack) in enumerate(programs.items(), start=1):
        rows = np.flatnonzero(broken_by == -1)
        left, hit, steps = np.isin(everyone, rows), np.zeros(len(x), bool), 0
        known, start = log.read(number), time.perf_counter()
        told, before = start, sum(len(done.rows) for done in known)
        fresh = continuous_batching.run(
            attack,
            continuous_batching.network(logits_fn, x[0], _even(len(rows), batch_size), random, devices),
            np.setdiff1d(rows, np.concatenate([done.rows for done in known])) if known else rows,
            keys=continuous_batching.example_keys(keys, np.uint32(ATTACKS.index(name))),
            x=x,
            y=y.astype(np.int32),
            eps=radius,
            targets=ranking[:, 1:] if name.endswith("-t") else ranking[:, :1],
        )
        for done in itertools.chain(known, _kept(fresh, log, number, network.slots)):
            x_adv[done.rows[done.broken]] = done.x_adv
            hit[done.rows[done.broken]], left[done.rows] = True, False
            steps += int(done.steps.sum())
            if time.perf_counter() - told > SECONDS:
                told, tried = time.perf_counter(), len(rows) - left.sum()
                remaining = (told - start) / max(tried - before, 1) * left.sum()
                robust = 100 * (len(rows) - hit.sum()) / len(x)
                say(
                    f"{name}: {tried:,} of {len(rows):,} images, robust so far {robust:.2f} %, "
                    f"{_minutes(remaining)} left"
                )
        if hit.any():  # judged again by the program that has the last word: rounding decides on the very boundary
            found = np.flatnonzero(hit)
            prediction[found] = _predictions(judge(x_adv[found], found, number))
            hit[found] = prediction[found] != y[found]
        x_adv[rows[~hit[rows]]] = x[rows[~hit[rows]]]
        broken_by[hit] = number
        accuracy[name] = float((broken_by == -1).mean())
        evaluations[name] = (steps * attack.forwards, steps * attack.gradients)
        say(f"{name}: robust {100 * accuracy[name]:.2f} % after {_minutes(time.perf_counter() - start)}")

    if not random:
        prediction = _predictions(judge(x_adv, everyone, 0))
    if (undefined := np.sum(correct & (prediction < 0))) > 0:
        notes.append(f"The logits of {undefined} adversarial images are not finite: they count as wrong.")
    robust = prediction == y
    accuracy[names[-1]] = float(robust.mean())
    return Result(x_adv, robust, correct, prediction, broken_by, accuracy, evaluations, tuple(notes))


def _predictions(logits: np.ndarray) -> np.ndarray:
    """`objectives.prediction` of logits on the host."""
    return np.where(np.isfinite(logits).all(-1), logits.argmax(-1), -1).astype(np.int32)


def _supported(names: tuple[str, ...], norm: str, shape: tuple[int, ...]) -> tuple[tuple[str, ...], list[str]]:
    """The attacks that examples of this shape can be attacked with, and a note where one is left out."""
    reason = unsupported(norm, shape) if "square" in names else ""
    if not reason:
        return names, []
    if names == ("square",):
        raise ValueError(f"square needs {reason}.")
    return tuple(name for name in names if name != "square"), [f"square is left out: it needs {reason}."]


def attacks_of(version: str | Sequence[str]) -> tuple[str, ...]:
    """The attacks of a version, or those of a sequence of names; ValueError for unknown ones."""
    if isinstance(version, str) and version not in VERSIONS:
        raise ValueError(f"Unknown version {version!r}. There are: {', '.join(VERSIONS)}, or a sequence of attacks.")
    names = VERSIONS[version] if isinstance(version, str) else tuple(version)
    for name in names:
        if name not in ATTACKS:
            raise ValueError(f"Unknown attack {name!r}. There are: {', '.join(ATTACKS)}.")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"version must name attacks, each once, got {names}.")
    return names


@functools.lru_cache  # jax.jit remembers a program by the attack, as an object
def _programs(
    names: tuple[str, ...], classes: int, norm: str, bounds: Bounds, random: bool, num_queries: int
) -> tuple[dict[str, Iterated], tuple[str, ...]]:
    """The attacks by name, and what had to be changed for a small number of classes."""
    if classes < 2:
        raise ValueError(f"There is nothing to attack in {classes} class.")
    restarts = 5 if names == VERSIONS["plus"] else 1
    eot, targets, notes = DRAWS if random else None, min(9, classes - 1), []
    ratio, targeted_ratio = dlr, targeted_dlr
    if classes < 3 and "apgd-dlr" in names:
        ratio = logit_margin
        notes.append("apgd-dlr: the ratio needs three classes; the difference of logits takes its place.")
    if classes < 4 and "apgd-t" in names:
        targeted_ratio = targeted_logit_margin
        notes.append("apgd-t: the targeted ratio needs four classes; the difference of logits takes its place.")
    build = {
        "apgd-ce": lambda: apgd_program(stable_cross_entropy, norm, 100, restarts, 0.75, eot, bounds),
        "apgd-dlr": lambda: apgd_program(ratio, norm, 100, restarts, 0.75, eot, bounds),
        "apgd-t": lambda: apgd_targeted_program(targeted_ratio, norm, 100, targets, 0.75, eot, bounds),
        "fab": lambda: fab_program(classes, norm, 100, restarts, 0.1, 1.05, 0.9, bounds),
        "fab-t": lambda: fab_targeted_program(norm, 100, targets, 0.1, 1.05, 0.9, bounds),
        "square": lambda: square_program(logit_margin, norm, num_queries, 0.8, bounds),
    }
    return {name: build[name]() for name in names}, tuple(notes)


def _even(images: int, batch_size: int) -> int:
    """As few slots as attack the images in as few waves, rounded up by an eighth at most: few idle, and few shapes."""
    waves = max(-(-images // batch_size), 1)
    size = max(-(-images // waves), 1)
    step = 2 ** max(size.bit_length() - 4, 0)
    return min(-(-size // step) * step, batch_size)


def _kept(
    fresh: Iterator[continuous_batching.Done], log: journal.Journal, number: int, least: int
) -> Iterator[continuous_batching.Done]:
    """What gets done, kept in the journal."""
    for done in fresh:
        log.add(number, done, least)
        yield done
    log.flush(number)


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.1f} s"

"""Plain facts about one network, by which `verdicts` tells robustness from attacks that fail.

An attack that fails for a reason of its own (saturated logits, a gradient that is zero, a forward pass that is random)
looks like robustness in a table. Each column of the facts is an attack that some such reason does not stop.
"""

import functools
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lt_adv import attacks
from lt_adv.attacks._autoattack import attacks_of
from lt_adv.attacks.checks import check_images, check_logits
from lt_adv.attacks.cpu_convolutions import with_fast_cpu_convolutions
from lt_adv.attacks.initialization import threefry

# How far the largest logit leads, in the median, when PGD looks at the rescaled logits. Relative to the network's own
# scale, so that no temperature, however large or small, lies outside the sweep.
LEADS = (0.01, 0.1, 1.0, 10.0, 100.0)
LSA_SCALE = 10.0
QUERIES = 1000  # of Square: masks show by then, and what it would still find others have found
IMAGES = 500  # probed: three standard errors of a difference between them are at most seven points

Network = tuple[Callable[[Any, jax.Array], jax.Array], Any]  # (apply, variables)


class Programs(NamedTuple):
    """Compiled once for an `apply`, whatever the variables, radius, step size and logit scale."""

    # Whether the input gradient is exactly zero, as three programs: in one, the product that a network may end in (a
    # temperature) is fused into the loss, and its rounding error is all that is left of the gradient.
    logits: Callable[..., Any]  # (variables, x) -> logits, in at least float32
    slope: Callable[..., Any]  # (logits, y) -> the gradient of CE(z) in z
    zero: Callable[..., Any]  # (variables, x, slope) -> bool [b]
    right: Callable[..., Any]  # (variables, x, y) -> bool [b]
    pgd: Callable[..., Any]  # (keys, variables, x, y, eps, step_size, logit_scale) -> x_adv
    cw: Callable[..., Any]  # (keys, variables, x, y, eps, step_size) -> x_adv
    square: Callable[..., Any]  # (keys, variables, x, y, eps) -> x_adv


@functools.lru_cache(maxsize=16)
def _programs(apply: Callable, norm: str, num_steps: int, queries: int) -> Programs:
    def logits(variables, x):
        return check_logits(apply(variables, x), x)

    def slope(logits, y):
        return jax.grad(lambda logits: attacks.cross_entropy(logits, y).sum())(logits)

    def zero(variables, x, slope):
        gradient = with_fast_cpu_convolutions(jax.grad(lambda x: (apply(variables, x) * slope).sum()))(x)
        return (gradient == 0).reshape(len(x), -1).all(-1)

    def right(variables, x, y):
        return attacks.prediction(check_logits(apply(variables, x), x)) == y

    def pgd(key, variables, x, y, eps, step_size, logit_scale):
        objective = functools.partial(attacks.cross_entropy, logit_scale=logit_scale)
        options = {"eps": eps, "step_size": step_size, "num_steps": num_steps, "norm": norm}
        return attacks.pgd(key, functools.partial(apply, variables), x, y, objective=objective, **options)

    def cw(key, variables, x, y, eps, step_size):
        options = {"eps": eps, "step_size": step_size, "num_steps": num_steps, "norm": norm}
        return attacks.cw(key, functools.partial(apply, variables), x, y, **options)

    def square(key, variables, x, y, eps):
        network = functools.partial(apply, variables)
        return attacks.square(key, network, x, y, eps=eps, num_queries=queries, norm=norm)

    return Programs(*map(jax.jit, (logits, slope, zero, right, pgd, cw, square)))


def probe(
    key: jax.Array,
    apply: Callable[[Any, jax.Array], jax.Array],
    variables: Any,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    eps: float,
    step_size: float,
    num_steps: int = 20,
    norm: str = "linf",
    queries: int = QUERIES,
    batch_size: int = 256,
    mesh: Mesh | None = None,
    transfer: Network | None = None,
    autoattack: str | Sequence[str] = (),
) -> dict[str, Any]:
    """Facts about a network on some hundreds of images, as JSON holds them; `verdict` compares those of two networks.

    `label` and, in `right`, a string with a "1" for every image that is right:
      clean
      pgd20, lsa, cw20: PGD on CE(z) and on CE(10 z), and on the margin; the number is `num_steps`
      scale_L: PGD on CE(a z), a = L / `logit_lead`, for every L of `LEADS`
      square: `queries` queries, no gradient; or `autoattack` in its place, where a version of it is asked for
      transfer: PGD examples made on another network, where one is given
      radius_2, radius_4, ...: pgd20 at so many times the radius and step; the last is the whole box
    `zero_gradient` is such a string, too: images whose gradient of CE(z) is exactly zero in every pixel. `logit_lead`:
    the largest logit minus the second, in the median over the images. `logits_change`: the largest difference between
    the logits of two passes, as a share of the largest logit. `probabilities`: no logit is negative, and those of
    each image add up to one. `batch_change`: as `logits_change`, of the first image between its batch and a batch of
    nothing but itself. `not_finite`: clean images whose logits are not finite; they count as wrong. `protocol` holds
    the arguments.

    Args:
      key: one typed key; image i draws from fold_in(fold_in(key, crc32(attack)), i), whatever the batch and devices.
      apply, variables: (variables, x [b, h, w, c] in [0, 1]) -> logits [b, C], any traceable function.
      images, labels: [n, h, w, c], floating in [0, 1] or uint8; integers [n].
      eps, step_size: of pgd20, in units of the [0, 1] pixel range.
      mesh: its first axis shares the batch; by default one device.
      transfer: (apply, variables) of a plain network, the baseline. For the baseline's own facts that is itself, which
        makes this column another start of pgd20 and so says how much that can find.
      autoattack: a version, or names of its attacks.
    """
    key, images, labels = threefry(key), np.asarray(images), np.asarray(labels, np.int32)
    if images.ndim != 4 or labels.shape != images.shape[:1] or not len(labels):
        raise ValueError(f"images [n, h, w, c] and labels [n] are needed, got {images.shape} and {labels.shape}.")
    check_images(_pixels(images), (0.0, 1.0))
    version = list(attacks_of(autoattack)) if autoattack else []
    mesh = mesh or Mesh(np.array(jax.devices()[:1]), ("data",))
    shard = NamedSharding(mesh, PartitionSpec(mesh.axis_names[0]))
    variables, source = jax.device_put((variables, transfer and transfer[1]), NamedSharding(mesh, PartitionSpec()))
    programs = _programs(apply, norm, num_steps, queries)
    size = -(-min(batch_size, len(labels)) // mesh.size) * mesh.size
    parts = [np.minimum(np.arange(i, i + size), len(labels) - 1) for i in range(0, len(labels), size)]
    batches = [jax.device_put((_pixels(images[rows]), labels[rows]), shard) for rows in parts]
    columns: dict[str, np.ndarray] = {}

    def whole(values: Sequence[Any]) -> np.ndarray:
        return np.concatenate([np.asarray(part) for part in values])[: len(labels)]

    def keys(name: str, rows: np.ndarray) -> jax.Array:
        return jax.device_put(_keys(key, np.uint32(zlib.crc32(name.encode())), rows), shard)

    def attacked(attack: Callable, name: str, variables: Any, *options: float) -> list[jax.Array]:
        return [
            attack(keys(name, rows), variables, *batch, *options) for rows, batch in zip(parts, batches, strict=True)
        ]

    def judged(points: Sequence[jax.Array]) -> np.ndarray:
        pairs = zip(points, batches, strict=True)
        return whole([programs.right(variables, x_adv, y) for x_adv, (_, y) in pairs])

    seen, again = ([programs.logits(variables, x) for x, _ in batches] for _ in range(2))
    logits = whole(seen)
    finite = np.isfinite(logits).all(-1)
    if logits.shape[-1] < 2 or not finite.any():
        raise ValueError(f"Logits must be finite, of two classes or more; got {logits.shape[-1]} classes.")
    slopes = [programs.slope(z, y) for z, (_, y) in zip(seen, batches, strict=True)]
    zero = whole([programs.zero(variables, x, slope) for (x, _), slope in zip(batches, slopes, strict=True)])
    change = max(_difference(whole(again), logits), _python_change(apply, variables, batches[0][0][:2]))
    row = int(finite.argmax())
    alone = jax.device_put(np.repeat(_pixels(images[row : row + 1]), size, axis=0), shard)
    batch_change = _difference(np.asarray(programs.logits(variables, alone)), logits[row : row + 1])
    largest = max(np.abs(logits[finite]).max(), np.finfo(np.float32).tiny)
    second, first = np.partition(logits[finite], -2)[:, -2:].T
    lead = float(np.median(first - second))
    sweep = {f"scale_{name:g}": name / lead for name in LEADS} if lead > 0 else {}

    columns["clean"] = finite & (logits.argmax(-1) == labels)
    for name, scale in {f"pgd{num_steps}": 1.0, "lsa": LSA_SCALE, **sweep}.items():
        columns[name] = judged(attacked(programs.pgd, "pgd", variables, eps, step_size, scale))
    columns[f"cw{num_steps}"] = judged(attacked(programs.cw, "cw", variables, eps, step_size))
    if version:
        columns["autoattack"] = attacks.autoattack(
            _keys(key, np.uint32(zlib.crc32(b"autoattack")), np.arange(len(labels))),
            jax.tree_util.Partial(apply, variables),
            whole([x for x, _ in batches]),
            labels,
            eps=eps,
            norm=norm,
            version=version,
            batch_size=size,
            devices=list(mesh.devices.flat),
        ).robust
    else:
        columns["square"] = judged(attacked(programs.square, "square", variables, eps))
    if transfer is not None:
        foreign = _programs(transfer[0], norm, num_steps, queries)
        columns["transfer"] = judged(attacked(foreign.pgd, "transfer", source, eps, step_size, 1.0))
    radii = _radii(eps, 1.0 if norm == "linf" else math.sqrt(images[0].size))
    for times in radii:
        longer = (eps * times, step_size * times, 1.0)
        columns[f"radius_{times:g}"] = judged(attacked(programs.pgd, "pgd", variables, *longer))

    return {
        "protocol": {
            "images": len(labels), "eps": eps, "step_size": step_size, "num_steps": num_steps, "norm": norm,
            "queries": queries, "autoattack": version,
            "radii": [eps, *(eps * times for times in radii)], "leads": list(LEADS) if sweep else [],
        },
        "label": labels.tolist(),
        "classes": logits.shape[-1],
        "logits_change": float(change / largest),
        "batch_change": float(batch_change / largest),
        "not_finite": int((~finite).sum()),
        "probabilities": bool((logits >= 0).all() and (np.abs(logits.sum(-1) - 1) < 1e-5).all()),
        "logit_lead": lead,
        "scales": sweep,
        "zero_gradient": packed(zero),
        "right": {name: packed(column) for name, column in columns.items()},
    }  # fmt: skip


def probed(label: np.ndarray, images: int = IMAGES) -> np.ndarray:
    """Positions, ascending, of `images` images with every class as often as the others, as far as it has images.

    Fixed by the labels (NumPy's frozen legacy stream, seed 0).
    """
    label = np.asarray(label)
    shuffled = np.random.RandomState(0).permutation(len(label))
    place = np.empty(len(label), int)  # of an image among those of its class
    for c in np.unique(label):
        members = shuffled[label[shuffled] == c]
        place[members] = np.arange(len(members))
    return np.sort(np.lexsort((shuffled, place))[:images])


def packed(values: np.ndarray) -> str:
    """bool [n] -> "0110..."; in JSON a line instead of n."""
    return "".join("01"[int(value)] for value in values)


def unpacked(text: str) -> np.ndarray:
    """ "0110..." -> bool [n]"""
    return np.frombuffer(text.encode(), np.uint8) == ord("1")


def rows(facts: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The columns of `right` as bool [n]. An example that breaks an image at some radius is one at any larger radius,
    too, so under `radius_*` an image is right only if it is so at all smaller radii.
    """
    found = {name: unpacked(text) for name, text in facts["right"].items()}
    standing = found[f"pgd{facts['protocol']['num_steps']}"]
    for name in (name for name in found if name.startswith("radius_")):
        standing = found[name] = found[name] & standing
    return found


@functools.partial(jax.jit)
def _keys(key: jax.Array, name: jax.Array, index: jax.Array) -> jax.Array:
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, name), index)


def _pixels(images: np.ndarray) -> np.ndarray:
    return images.astype(np.float32) / 255 if images.dtype == np.uint8 else images.astype(np.float32)


def _radii(eps: float, most: float) -> list[float]:
    """2, 4, 8, ... as long as so many times eps is well below `most`, then the factor that makes it `most`."""
    times, found = 2.0, []
    while times * eps < 0.75 * most:
        found.append(times)
        times *= 2
    return [*found, most / eps] if eps < most else found


def _python_change(apply: Callable, variables: Any, x: jax.Array) -> float:
    """The same without jit, for randomness that a trace would freeze: a generator of NumPy's, a counter."""
    first, second = (np.asarray(check_logits(apply(variables, x), x)) for _ in range(2))
    return _difference(first, second)


def _difference(a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference between logits that are finite on both sides."""
    both = np.isfinite(a) & np.isfinite(b)
    return float(np.where(both, np.abs(np.where(both, a, 0) - np.where(both, b, 0)), 0).max())

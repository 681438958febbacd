"""Diagnostics of gradient masking: several attacks on one network, some of which succeed under each form of masking.

A network masks its gradients if attacks that follow them fail although adversarial examples exist. Its gradients are
then obfuscated: shattered (zero or meaningless), stochastic (the forward pass is random) or vanishing (saturated
logits), and gradient attacks overestimate its robustness. `verdict` compares the diagnostics with those of a baseline.

References: Athalye, Carlini and Wagner, "Obfuscated gradients give a false sense of security", ICML 2018; Carlini et
al., "On evaluating adversarial robustness", 2019 (the checks of section 3).
"""

import functools
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypedDict

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lt_adv import attacks
from lt_adv.attacks._autoattack import attacks_of
from lt_adv.attacks.checks import check_images, check_logits
from lt_adv.attacks.convolutions import with_fast_convolutions
from lt_adv.attacks.initialization import threefry
from lt_adv.evaluation.attack_specs import Apply, Variables

# PGD attacks logits that are rescaled so that the median lead, the largest logit minus the second, has these values.
# Leads and not factors: the sweep then covers networks of any temperature.
LEADS = (0.01, 0.1, 1.0, 10.0, 100.0)
LSA_SCALE = 10.0
QUERIES = 1000  # of Square; enough to reveal masking, more queries add little to the other attacks
ORDERS = {"linf": np.inf, "l2": 2, "l1": 1}  # of the norms
IMAGES = 500  # three standard errors of a difference in accuracy are then at most seven points

Array = jax.Array
Network = tuple[Apply, Variables]


class Protocol(TypedDict):
    """The arguments of `run_diagnostics` that the diagnostics depend on."""

    images: int
    eps: float
    step_size: float
    num_steps: int
    norm: str
    queries: int
    autoattack: list[str]
    radii: list[float]
    leads: list[float]


class Diagnostics(TypedDict):
    """The result of `run_diagnostics`, which describes the entries."""

    protocol: Protocol
    label: list[int]
    classes: int
    logits_change: float
    batch_change: float
    not_finite: int
    probabilities: bool
    logit_lead: float
    scales: dict[str, float]
    zero_gradient: str
    correct: dict[str, str]


class Programs(NamedTuple):
    """Compiled functions of one `apply`; variables, radius, step size and logit scale are arguments."""

    # The test for a zero input gradient takes three programs. In a single one XLA fuses the last product of the network
    # (a temperature) into the loss, and a gradient that should be zero becomes the rounding error of that product.
    logits: Callable[[Variables, Array], Array]  # (variables, x) -> logits, in at least float32
    logit_gradient: Callable[[Array, Array], Array]  # (logits, y) -> the gradient of CE(z) in z
    zero_gradient: Callable[[Variables, Array, Array], Array]  # (variables, x, logit_gradient) -> bool [b]
    is_correct: Callable[[Variables, Array, Array], Array]  # (variables, x, y) -> bool [b]
    pgd: Callable[..., Array]  # (keys, variables, x, y, eps, step_size, logit_scale) -> x_adv
    cw: Callable[..., Array]  # (keys, variables, x, y, eps, step_size) -> x_adv
    square: Callable[..., Array]  # (keys, variables, x, y, eps) -> x_adv


@functools.lru_cache(maxsize=16)
def _programs(apply: Apply, norm: str, num_steps: int, queries: int) -> Programs:
    def logits(variables: Variables, x: Array) -> Array:
        return check_logits(apply(variables, x), x)

    def logit_gradient(logits: Array, y: Array) -> Array:
        return jax.grad(lambda logits: attacks.cross_entropy(logits, y).sum())(logits)

    def zero_gradient(variables: Variables, x: Array, logit_gradient: Array) -> Array:
        gradient = with_fast_convolutions(jax.grad(lambda x: (apply(variables, x) * logit_gradient).sum()))(x)
        return (gradient == 0).reshape(len(x), -1).all(-1)

    def is_correct(variables: Variables, x: Array, y: Array) -> Array:
        return attacks.prediction(check_logits(apply(variables, x), x)) == y

    def pgd(
        key: Array, variables: Variables, x: Array, y: Array, eps: float, step_size: float, logit_scale: float
    ) -> Array:
        objective = functools.partial(attacks.cross_entropy, logit_scale=logit_scale)
        network = functools.partial(apply, variables)
        return attacks.pgd(
            key, network, x, y, eps=eps, step_size=step_size, num_steps=num_steps, norm=norm, objective=objective
        )

    def cw(key: Array, variables: Variables, x: Array, y: Array, eps: float, step_size: float) -> Array:
        network = functools.partial(apply, variables)
        return attacks.cw(key, network, x, y, eps=eps, step_size=step_size, num_steps=num_steps, norm=norm)

    def square(key: Array, variables: Variables, x: Array, y: Array, eps: float) -> Array:
        network = functools.partial(apply, variables)
        return attacks.square(key, network, x, y, eps=eps, num_queries=queries, norm=norm)

    return Programs(
        logits=jax.jit(logits),
        logit_gradient=jax.jit(logit_gradient),
        zero_gradient=jax.jit(zero_gradient),
        is_correct=jax.jit(is_correct),
        pgd=jax.jit(pgd),
        cw=jax.jit(cw),
        square=jax.jit(square),
    )


def run_diagnostics(
    key: Array,
    apply: Apply,
    variables: Variables,
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
) -> Diagnostics:
    """Returns the diagnostics of a network on some hundreds of images, as JSON.

    `correct` maps a column to a string with a "1" for every image that is classified correctly. The columns:
      clean
      pgd20, lsa, cw20: PGD on CE(z), on CE(10 z) and on the margin; the number is `num_steps`
      scale_L: PGD on CE(a z), a = L / `logit_lead`, for every L of `LEADS`; none where `logit_lead` is 0
      square: `queries` queries, no gradient; replaced by `autoattack` where a version of it is given
      transfer: PGD examples of another network, where one is given
      radius_2, radius_4, ...: PGD at this multiple of the radius and step; the last radius covers the full pixel range

    The other entries:
      label: the labels of the images
      zero_gradient: such a string, with "1" where the gradient of CE(z) is exactly zero in every pixel
      logit_lead: the largest logit minus the second, median over the images
      logits_change: the largest difference between the logits of two forward passes, as a share of the largest logit
      batch_change: the same between the first image in its batch and in a batch of copies of itself
      probabilities: whether no logit is negative and those of each image add up to one
      not_finite: the number of clean images whose logits are not finite; they count as wrong
      protocol: the arguments

    Args:
      key: one typed key. Image i uses fold_in(fold_in(key, crc32(attack)), i): batches and devices do not matter.
      apply: any traceable function (variables, x [b, h, w, c] in [0, 1]) -> logits [b, C].
      variables: the first argument of `apply`.
      images: [n, h, w, c], floating in [0, 1] or uint8.
      labels: integers [n].
      eps: radius, in units of the [0, 1] pixel range.
      step_size: step size of PGD, in the same units.
      num_steps: steps of PGD and CW.
      norm: a norm of the attacks, such as "linf".
      queries: queries of Square.
      batch_size: images per batch, rounded up to a multiple of the devices.
      mesh: devices; batches are split over its first axis. One device by default.
      transfer: (apply, variables) of the baseline. For the diagnostics of the baseline this is the baseline itself; the
        column then holds PGD from a second random start, and its gain over the first start is the noise of this test.
      autoattack: a version of AutoAttack, or names of its attacks.

    Raises:
      ValueError: for images and labels of different lengths, images outside [0, 1], a radius that is not above 0, fewer
        than two classes, or when no logit is finite.
    """
    key, images, labels = threefry(key), np.asarray(images), np.asarray(labels, np.int32)
    if images.ndim != 4 or labels.shape != images.shape[:1] or not len(labels):
        raise ValueError(f"images [n, h, w, c] and labels [n] are needed, got {images.shape} and {labels.shape}.")
    check_images(pixels(images), (0.0, 1.0))
    if not eps > 0:
        raise ValueError(f"The radius of the gradient-masking checks must be above 0, not {eps}.")
    version = list(attacks_of(autoattack)) if autoattack else []
    mesh = mesh or Mesh(np.array(jax.devices()[:1]), ("data",))
    shard = NamedSharding(mesh, PartitionSpec(mesh.axis_names[0]))
    replicated = NamedSharding(mesh, PartitionSpec())
    variables, transfer_variables = jax.device_put((variables, transfer and transfer[1]), replicated)
    programs = _programs(apply, norm, num_steps, queries)
    size = -(-min(batch_size, len(labels)) // mesh.size) * mesh.size
    batch_rows = [np.minimum(np.arange(i, i + size), len(labels) - 1) for i in range(0, len(labels), size)]
    batches = [jax.device_put((pixels(images[rows]), labels[rows]), shard) for rows in batch_rows]
    correct: dict[str, np.ndarray] = {}

    def concatenate(batch_values: Sequence[Array]) -> np.ndarray:
        return np.concatenate([np.asarray(values) for values in batch_values])[: len(labels)]

    def keys(name: str, rows: np.ndarray) -> Array:
        return jax.device_put(_keys(key, np.uint32(zlib.crc32(name.encode())), rows), shard)

    def run_attack(attack: Callable[..., Array], name: str, variables: Variables, *options: float) -> list[Array]:
        return [
            attack(keys(name, rows), variables, *batch, *options)
            for rows, batch in zip(batch_rows, batches, strict=True)
        ]

    def is_correct(x_adv: Sequence[Array]) -> np.ndarray:
        pairs = zip(x_adv, batches, strict=True)
        return concatenate([programs.is_correct(variables, points, y) for points, (_, y) in pairs])

    first_pass, second_pass = ([programs.logits(variables, x) for x, _ in batches] for _ in range(2))
    logits = concatenate(first_pass)
    finite = np.isfinite(logits).all(-1)
    if logits.shape[-1] < 2 or not finite.any():
        raise ValueError(f"Logits must be finite, of two classes or more; got {logits.shape[-1]} classes.")
    gradients = [programs.logit_gradient(z, y) for z, (_, y) in zip(first_pass, batches, strict=True)]
    zero_gradient = concatenate(
        [programs.zero_gradient(variables, x, gradient) for (x, _), gradient in zip(batches, gradients, strict=True)]
    )
    logits_change = max(
        _largest_difference(concatenate(second_pass), logits), _change_without_jit(apply, variables, batches[0][0][:2])
    )
    row = int(finite.argmax())
    copies = jax.device_put(np.repeat(pixels(images[row : row + 1]), size, axis=0), shard)
    batch_change = _largest_difference(np.asarray(programs.logits(variables, copies)), logits[row : row + 1])
    largest = max(np.abs(logits[finite]).max(), np.finfo(np.float32).tiny)
    second, first = np.partition(logits[finite], -2)[:, -2:].T
    logit_lead = float(np.median(first - second))
    scales = {f"scale_{lead:g}": lead / logit_lead for lead in LEADS} if logit_lead > 0 else {}

    correct["clean"] = finite & (logits.argmax(-1) == labels)
    for name, scale in {f"pgd{num_steps}": 1.0, "lsa": LSA_SCALE, **scales}.items():
        correct[name] = is_correct(run_attack(programs.pgd, "pgd", variables, eps, step_size, scale))
    correct[f"cw{num_steps}"] = is_correct(run_attack(programs.cw, "cw", variables, eps, step_size))
    if version:
        correct["autoattack"] = attacks.autoattack(
            _keys(key, np.uint32(zlib.crc32(b"autoattack")), np.arange(len(labels))),
            jax.tree_util.Partial(apply, variables),
            concatenate([x for x, _ in batches]),
            labels,
            eps=eps,
            norm=norm,
            version=version,
            batch_size=size,
            devices=list(mesh.devices.flat),
        ).robust
    else:
        correct["square"] = is_correct(run_attack(programs.square, "square", variables, eps))
    if transfer is not None:
        transfer_programs = _programs(transfer[0], norm, num_steps, queries)
        x_adv = run_attack(transfer_programs.pgd, "transfer", transfer_variables, eps, step_size, 1.0)
        correct["transfer"] = is_correct(x_adv)
    radii = _radius_factors(eps, float(np.linalg.norm(np.ones(images[0].size), ORDERS[norm])))
    for factor in radii:
        x_adv = run_attack(programs.pgd, "pgd", variables, eps * factor, step_size * factor, 1.0)
        correct[f"radius_{factor:g}"] = is_correct(x_adv)

    return {
        "protocol": {
            "images": len(labels), "eps": eps, "step_size": step_size, "num_steps": num_steps, "norm": norm,
            "queries": queries, "autoattack": version,
            "radii": [eps, *(eps * factor for factor in radii)], "leads": list(LEADS),
        },
        "label": labels.tolist(),
        "classes": logits.shape[-1],
        "logits_change": float(logits_change / largest),
        "batch_change": float(batch_change / largest),
        "not_finite": int((~finite).sum()),
        "probabilities": bool((logits >= 0).all() and (np.abs(logits.sum(-1) - 1) < 1e-5).all()),
        "logit_lead": logit_lead,
        "scales": scales,
        "zero_gradient": bits_to_text(zero_gradient),
        "correct": {name: bits_to_text(column) for name, column in correct.items()},
    }  # fmt: skip


def balanced_sample(label: np.ndarray, num_images: int = IMAGES) -> np.ndarray:
    """Returns positions, ascending, of `num_images` images with equally many of every class.

    All images are taken of a class with too few. The choice depends on the labels alone (NumPy's frozen legacy
    stream, seed 0).
    """
    label = np.asarray(label)
    shuffled = np.random.RandomState(0).permutation(len(label))
    rank = np.empty(len(label), int)  # of an image among those of its class
    for c in np.unique(label):
        members = shuffled[label[shuffled] == c]
        rank[members] = np.arange(len(members))
    return np.sort(np.lexsort((shuffled, rank))[:num_images])


def bits_to_text(values: np.ndarray) -> str:
    """Returns "0110..." for bool [n]: in JSON one line instead of n."""
    return "".join("01"[int(value)] for value in values)


def text_to_bits(text: str) -> np.ndarray:
    """Returns bool [n] for "0110..."."""
    return np.frombuffer(text.encode(), np.uint8) == ord("1")


def correct_by_attack(diagnostics: Diagnostics) -> dict[str, np.ndarray]:
    """Returns the columns of `correct` as bool [n].

    An adversarial example at one radius is also one at any larger radius: under `radius_*` an image counts as correct
    only if it is correct at all smaller radii.
    """
    columns = {name: text_to_bits(text) for name, text in diagnostics["correct"].items()}
    robust = columns[f"pgd{diagnostics['protocol']['num_steps']}"]
    for name in (name for name in columns if name.startswith("radius_")):
        robust = columns[name] = columns[name] & robust
    return columns


@functools.partial(jax.jit)
def _keys(key: Array, name: Array, index: Array) -> Array:
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, name), index)


def pixels(images: np.ndarray) -> np.ndarray:
    return images.astype(np.float32) / 255 if images.dtype == np.uint8 else images.astype(np.float32)


def _radius_factors(eps: float, largest_radius: float) -> list[float]:
    """Returns 2, 4, 8, ... while the radius is well below `largest_radius`, and the factor that reaches it."""
    factor, factors = 2.0, []
    while factor * eps < 0.75 * largest_radius:
        factors.append(factor)
        factor *= 2
    return [*factors, largest_radius / eps] if eps < largest_radius else factors


def _change_without_jit(apply: Apply, variables: Variables, x: Array) -> float:
    """Returns the largest difference between two eager passes.

    Under jit, randomness from outside JAX (NumPy's generator, a counter) would be a constant.
    """
    first, second = (np.asarray(check_logits(apply(variables, x), x)) for _ in range(2))
    return _largest_difference(first, second)


def _largest_difference(a: np.ndarray, b: np.ndarray) -> float:
    """Returns the largest absolute difference between logits that are finite in both arrays."""
    both = np.isfinite(a) & np.isfinite(b)
    return float(np.where(both, np.abs(np.where(both, a, 0) - np.where(both, b, 0)), 0).max())

"""Robust accuracy against the radius, from the distance of the nearest adversarial example of each image."""

import dataclasses
import functools
import importlib
import inspect
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from lt_adv.attacks import _base, checks, norms, tracing
from lt_adv.attacks._apgd import apgd
from lt_adv.attacks._fmn import fmn
from lt_adv.attacks._minimum_norm import MinimumNormAttack
from lt_adv.attacks.initialization import example_keys
from lt_adv.attacks.signatures import Bounds, LogitsFn

NORM_NAMES = {"linf": "L-inf", "l2": "L2", "l1": "L1"}
CHECKED_SHARES = (0.75, 0.5, 0.25)  # of the clean accuracy, at which `check_radii` are chosen


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class RobustnessCurve:
    """Robust accuracy against the radius. Accuracies are in [0, 1]; `print` shows a table.

    Attributes:
      norm: "linf", "l2" or "l1".
      attack: name of the minimum-norm attack.
      radii: [r], increasing.
      accuracy: [r], share of the images that neither the minimum-norm attack nor APGD broke within each radius.
      distances: [n], the smallest radius at which each image was broken: 0 where the clean image is classified wrongly,
        infinity where no adversarial example was found. (distances > eps).mean() is the accuracy at any other radius.
      checked_radii: [c], the radii at which APGD ran.
      attack_accuracy: [c], the accuracy there under the minimum-norm attack alone.
      apgd_accuracy: [c], the accuracy there under APGD alone. Where it is clearly lower than that of the minimum-norm
        attack, this one did not find the nearest adversarial examples: the curve between the checked radii is too high.
    """

    norm: str
    attack: str
    radii: np.ndarray
    accuracy: np.ndarray
    distances: np.ndarray
    checked_radii: np.ndarray
    attack_accuracy: np.ndarray
    apgd_accuracy: np.ndarray

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as lists, numbers and strings, for `json.dumps`; an infinite distance becomes None."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        result = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in fields.items()}
        result["distances"] = [None if np.isinf(distance) else distance for distance in self.distances.tolist()]
        return result

    def __repr__(self) -> str:  # also what a notebook shows
        alone = {
            radius: (f"{100 * attack:.2f}", f"{100 * apgd:.2f}")
            for radius, attack, apgd in zip(self.checked_radii, self.attack_accuracy, self.apgd_accuracy, strict=True)
        }
        lines = [("radius", "robust %", *((f"{self.attack} alone", "apgd alone") if alone else ()))]
        for radius in np.union1d(self.radii, self.checked_radii):
            lines.append((f"{radius:.6g}", f"{100 * np.mean(self.distances > radius):.2f}", *alone.get(radius, ())))
        widths = [max(len(line[column]) for line in lines if column < len(line)) for column in range(len(lines[0]))]
        table = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=False)) for line in lines]
        norm, images, missing = NORM_NAMES[self.norm], len(self.distances), int(np.isinf(self.distances).sum())
        first = f"Robust accuracy of {images:,} images, {norm}; median distance {np.median(self.distances):.4g}"
        last = [f"No adversarial example was found for {missing:,} images."] if missing else []
        return "\n".join([first, *table, *last])

    def plot(self, ax: Any = None) -> Any:
        """Draws the curve, and crosses for the accuracy under APGD alone.

        Args:
          ax: axes of Matplotlib; by default those of a new figure.

        Returns:
          The axes.

        Raises:
          ImportError: if `ax` is None and Matplotlib is not installed.
        """
        if ax is None:
            try:
                ax = importlib.import_module("matplotlib.pyplot").subplots()[1]
            except ModuleNotFoundError:
                raise ImportError("RobustnessCurve.plot needs Matplotlib: pip install matplotlib.") from None
        ax.plot(
            self.radii, 100 * self.accuracy, label=f"{self.attack} and apgd" if self.checked_radii.size else self.attack
        )
        if self.checked_radii.size:
            ax.plot(self.checked_radii, 100 * self.apgd_accuracy, "x", label="apgd alone")
        ax.set_xlabel(f"radius ({NORM_NAMES[self.norm]})")
        ax.set_ylabel("robust accuracy in %")
        ax.set_ylim(0, 100)
        ax.legend()
        return ax


@jax.transfer_guard("allow")  # it moves images between host and devices by design
def robustness_curve(
    key: Array,
    logits_fn: LogitsFn,
    x: ArrayLike,
    y: ArrayLike,
    radii: Sequence[float] | np.ndarray,
    *,
    norm: str = "linf",
    attack: MinimumNormAttack = fmn,
    check_radii: Sequence[float] | np.ndarray | None = None,
    batch_size: int = 256,
    bounds: Bounds = (0.0, 1.0),
    progress: Callable[[str], None] | None = None,
) -> RobustnessCurve:
    """Robust accuracy against the radius, mean_i [d_i > eps], d_i the distance of the nearest adversarial example.

    One run of a minimum-norm attack gives the distances, so that the curve costs as much for a hundred radii as for
    one. Distances that are found are upper bounds, and so is the curve. At a few radii APGD on the cross-entropy, 100
    steps, attacks all images that are classified correctly; the distance of an image that it breaks is at most this
    radius. Not traceable: it drives compiled attacks from the host, on all devices of this process.

    Args:
      key: one typed key, or one per image [n]. The result depends neither on `batch_size` nor on the devices.
      logits_fn: x [batch, ...] -> logits [batch, classes]. Arrays that it closes over become arguments of the compiled
        programs, which are freed after the call.
      x: images [n, ...], float32 or float64, inside `bounds`.
      y: labels, integers [n].
      radii: radii of the curve, in the units of x.
      norm: "linf", "l2" or "l1".
      attack: a minimum-norm attack, attack(key, logits_fn, x, y, norm=..., bounds=...) -> (x_adv, distance), with
        options bound by functools.partial: `fmn`, `ddn` (for L2), `deepfool`, `minimum_norm(fab)`. The default takes
        one gradient for each of its 100 steps and knows all three norms; `minimum_norm(fab)` costs one gradient per
        class and step.
      check_radii: radii at which APGD checks the curve; () for none. By default those up to three of `radii` at which
        the accuracy is nearest to three, two and one quarter of the clean accuracy.
      batch_size: images attacked at once, rounded up to a multiple of the number of devices.
      bounds: (low, high), the range of valid pixels.
      progress: called with one line of text after each attack.

    Returns:
      A `RobustnessCurve`. It never rises, and at radius 0 it is the clean accuracy.

    Raises:
      ValueError: for arguments that do not fit.

    Examples:
      >>> logits_fn = lambda x: x @ jnp.array([[1.0, -1.0], [-1.0, 1.0]])
      >>> x, y = jnp.array([[0.5, 0.375], [1.0, 0.0], [0.25, 0.75]]), jnp.array([0, 0, 0])
      >>> curve = attacks.robustness_curve(jax.random.key(0), logits_fn, x, y, [0.0, 0.25, 0.75], check_radii=[0.25])
      >>> curve.accuracy
      array([0.667, 0.333, 0.   ])
      >>> print(curve)
      Robust accuracy of 3 images, L-inf; median distance 0.0625
      radius  robust %  fmn alone  apgd alone
           0     66.67
        0.25     33.33      33.33       33.33
        0.75      0.00
    """
    checks.check_real("x", x)
    checks.check_real("y, the labels,", y)
    x, y = np.asarray(x), np.asarray(y)
    bounds = _base.check(x, y, bounds)
    norms.get(norm)
    if not len(x):
        raise ValueError("There are no images.")
    batch_size = checks.count("batch_size", batch_size, minimum=1)
    radii = _radii("radii", radii)
    if not radii.size:
        raise ValueError("radii must be at least one radius, got none.")
    checked = None if check_radii is None else _radii("check_radii", check_radii)
    if not callable(attack) or "norm" not in inspect.signature(attack).parameters:
        raise ValueError(f"attack must be a minimum-norm attack, such as attacks.fmn, got {attack!r}.")
    run = _batches(logits_fn, x, y.astype(np.int32), example_keys(key, len(x)), batch_size)
    name, report = _name(attack), progress or (lambda _: None)

    def smallest(keys: Array, x: Array, y: Array, _: Array) -> Array:
        return attack(keys, logits_fn, x, y, norm=norm, bounds=bounds).distance

    def is_broken(keys: Array, x: Array, y: Array, eps: Array) -> Array:
        x_adv = apgd(keys, logits_fn, x, y, eps=eps, norm=norm, bounds=bounds)
        return _base.is_wrong(checks.check_logits(logits_fn(x_adv), x), y)

    start = time.perf_counter()
    attacked = run(smallest)(np.arange(len(x)), np.inf).astype(np.float64)
    report(f"{name}: median distance {np.median(attacked):.4g} after {time.perf_counter() - start:.0f} s")
    clean = np.flatnonzero(attacked > 0)
    if checked is None:
        checked = _steepest(radii, attacked)
    check, distances, apgd_accuracy = run(is_broken), attacked.copy(), []
    for radius in checked:
        broken = np.zeros(len(x), bool)
        broken[clean] = check(clean, radius)
        apgd_accuracy.append((clean.size - broken.sum()) / len(x))
        distances[broken] = np.minimum(distances[broken], radius)
        report(f"apgd at {radius:.6g}: robust {100 * apgd_accuracy[-1]:.2f} %")
    return RobustnessCurve(
        norm, name, radii, _accuracy(distances, radii), distances, checked, _accuracy(attacked, checked),
        np.asarray(apgd_accuracy, np.float64),
    )  # fmt: skip


def _accuracy(distances: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """Returns the share of the distances that exceed each radius."""
    return np.asarray([np.mean(distances > radius) for radius in radii], np.float64)


def _radii(name: str, radii: Sequence[float] | np.ndarray) -> np.ndarray:
    """Returns radii in increasing order, each once; ValueError for what is no list of radii."""
    checks.check_real(name, radii)
    values = np.asarray(radii, np.float64)
    if values.ndim != 1 or not np.all(np.isfinite(values) & (values >= 0)):
        raise ValueError(f"{name} must be a list of finite radii that are not negative, got {radii}.")
    return np.unique(values)


def _steepest(radii: np.ndarray, distances: np.ndarray) -> np.ndarray:
    """Returns the positive radii at which the accuracy is nearest to CHECKED_SHARES of the clean accuracy."""
    positive = radii[radii > 0]
    if not positive.size:
        return positive
    accuracy, clean = _accuracy(distances, positive), np.mean(distances > 0)
    return np.unique([positive[np.argmin(np.abs(accuracy - share * clean))] for share in CHECKED_SHARES])


def _name(attack: MinimumNormAttack) -> str:
    while isinstance(attack, functools.partial):
        attack = attack.func
    return getattr(attack, "__name__", type(attack).__name__)


def _batches(
    logits_fn: LogitsFn, x: np.ndarray, y: np.ndarray, keys: Array, batch_size: int
) -> Callable[[Callable[..., Array]], Callable[[np.ndarray, float], np.ndarray]]:
    """Returns run(function)(rows, eps): function(keys, x, y, eps) -> [batch] for the images `rows`, batch by batch.

    A function is compiled once, for a batch of fixed size that is distributed over the devices of this process.
    """
    mesh = Mesh(np.asarray(jax.local_devices()), ("batch",))
    per_device = -(-min(batch_size, len(x)) // mesh.size)
    size, over_batch, everywhere = per_device * mesh.size, PartitionSpec("batch"), PartitionSpec()

    def struct(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((per_device, *shape), dtype)

    images = struct(x.shape[1:], x.dtype)
    types = (struct((), keys.dtype), images, struct((), y.dtype), struct((), x.dtype))
    logits: Any = jax.eval_shape(lambda x: checks.check_logits(logits_fn(x), x), images)
    checks.check_labels(y, len(x), logits.shape[-1])

    def run(function: Callable[..., Array]) -> Callable[[np.ndarray, float], np.ndarray]:
        traced, consts = tracing.trace(function, *types)
        mapped = jax.shard_map(
            traced, mesh=mesh, in_specs=(everywhere, *[over_batch] * 4), out_specs=over_batch, check_vma=False
        )  # a function that was traced before does not say over which mesh axes its values vary
        program, consts = jax.jit(mapped), jax.device_put(consts, NamedSharding(mesh, everywhere))

        def call(rows: np.ndarray, eps: float) -> np.ndarray:
            results = [np.zeros(0, x.dtype)]
            for start in range(0, len(rows), size):
                batch = rows[np.minimum(np.arange(start, start + size), len(rows) - 1)]  # the last one repeats its end
                arrays = (keys[batch], x[batch], y[batch], np.full(size, eps, x.dtype))
                results.append(np.asarray(program(consts, *jax.device_put(arrays, NamedSharding(mesh, over_batch)))))
            return np.concatenate(results)[: len(rows)]

        return call

    return run

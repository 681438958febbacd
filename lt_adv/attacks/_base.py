"""The common form of AutoAttack's attacks: one rolled loop over independent examples.

An attack is `init`, which does not evaluate the network, and `step`, which evaluates it once or twice. The row of an
example in the state holds everything that its next step needs, including the number of steps taken. Examples at
different steps can therefore share a batch, and `continuous_batching` refills the slots of finished examples.
"""

from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from lt_adv.attacks import _expectation, checks, norms, tracing
from lt_adv.attacks._expectation import FIRST_DRAW
from lt_adv.attacks.convolutions import with_fast_convolutions
from lt_adv.attacks.hoisting import hoist
from lt_adv.attacks.initialization import example_keys, fold_in
from lt_adv.attacks.objectives import prediction
from lt_adv.attacks.signatures import Bounds, KeyedLogitsFn


class State(Protocol):
    """State of an attack: a NamedTuple of arrays, one row per example."""

    @property
    def key(self) -> Array:
        """[b]"""

    @property
    def steps_taken(self) -> Array:
        """int32 [b]"""

    @property
    def broken(self) -> Array:
        """bool [b]: whether a point of the ball is classified wrongly"""

    @property
    def x_adv(self) -> Array:
        """[b, ...]: that point; otherwise the strongest one by the measure of the attack"""


class AscentState(State, Protocol):
    """State of an attack that maximises an objective."""

    @property
    def x(self) -> Array:
        """[b, ...]: images"""

    @property
    def y(self) -> Array:
        """int32 [b]: labels"""

    @property
    def target(self) -> Array:
        """int32 [b]: target classes"""

    @property
    def point(self) -> Array:
        """[b, ...]: the next point to evaluate"""


StateT = TypeVar("StateT", bound=State)
Tree = TypeVar("Tree")  # a pytree of arrays


class IterativeAttack(NamedTuple, Generic[StateT]):
    """An attack as a pair of functions `init` and `step`, like an optimizer of optax."""

    # (keys [b], x, y, target [b], eps [b] or like x, round [b]) -> state; no forward pass
    init: Callable[..., StateT]
    step: Callable[[KeyedLogitsFn, StateT], StateT]
    num_steps: int  # steps of one round
    num_rounds: int  # restarts, or targets
    random: bool = False  # whether the network is randomised
    forwards: int = 1  # forward passes of one step
    gradients: int = 1  # backward passes of one step
    saved_fields: tuple[str, ...] = ()  # with them and `init` a paused state is restored; () if they are too large


def check(x: Array | np.ndarray, y: Array | np.ndarray, bounds: Sequence[ArrayLike]) -> Bounds:
    """Returns the bounds as floats; ValueError unless images and labels are valid."""
    low, high = checks.check_bounds(bounds)
    checks.check_images(x, (low, high))
    checks.check_labels(y, len(x))
    return low, high


def logits_of(logits_fn: KeyedLogitsFn, x: Array, keys: Array) -> Array:
    """Returns the checked logits of x, see `checks.check_logits`."""
    return checks.check_logits(logits_fn(x, keys), x)


def value_and_gradient(value: Callable[[Array], tuple[Array, Array]], x: Array) -> tuple[Array, Array, Array]:
    """Returns (values [b], scores, gradient of the sum of values [b, ...]) for value(x) -> (values, scores).

    A gradient entry that is not finite counts as zero.
    """

    def total(x: Array) -> tuple[Array, tuple[Array, Array]]:
        values, scores = value(x)
        checks.check_values(values, x)
        return jnp.sum(values), (values, scores)  # a sum, so that the gradients of examples are independent

    (_, (values, scores)), gradient = with_fast_convolutions(jax.value_and_grad(total, has_aux=True))(x)
    return lax.stop_gradient((values, scores, norms.finite(gradient)))


def evaluate_objective(
    objective: Callable[[Array, AscentState], Array],
    logits_fn: KeyedLogitsFn,
    state: AscentState,
    num_samples: int | None,
    targeted: bool = False,
) -> tuple[Array, Array, Array]:
    """Returns (objective [b], whether the goal is reached [b], gradient [b, ...]) at `state.point`.

    The goal is a prediction other than y or, if `targeted`, the target. With `num_samples` draws of a randomised
    network, objective and gradient are means, and the mean probabilities make the prediction.
    """

    def draw(keys: Array) -> tuple[Array, Array, Array]:
        def value(x: Array) -> tuple[Array, Array]:
            logits = logits_of(logits_fn, x, keys)
            return objective(logits, state), logits if num_samples is None else jax.nn.softmax(logits)

        return value_and_gradient(value, state.point)

    if num_samples is None:
        value, scores, gradient = draw(state.key)
    else:
        keys = fold_in(state.key, state.steps_taken)
        value, scores, gradient = _expectation.mean_over_draws(draw, num_samples, state.point, keys)
    return finite_values(value, state.x), reaches_goal(scores, state.y, state.target, targeted), gradient


def finite_values(values: Array, x: Array) -> Array:
    """Makes values of an objective finite, in the type of x, so that they can be compared; NaN becomes the smallest."""
    limit = float(jnp.finfo(x.dtype).max)
    return jnp.nan_to_num(values.astype(x.dtype), nan=-limit, posinf=limit, neginf=-limit)


def is_wrong(logits: Array, y: Array) -> Array:
    """Whether the prediction differs from y, bool [b]; always true where logits are not finite."""
    return prediction(logits) != y


def reaches_goal(logits: Array, y: Array, target: Array, targeted: bool) -> Array:
    """Whether the prediction differs from y or, if `targeted`, is the target: bool [b]."""
    return prediction(logits) == target if targeted else is_wrong(logits, y)


def expand_mask(mask: Array, rows: Array) -> Array:
    """Reshapes a mask [b] to broadcast against `rows` [b, ...]."""
    return mask.reshape(mask.shape + (1,) * (rows.ndim - mask.ndim))


def where_rows(mask: Array, new: Tree, old: Tree) -> Tree:
    """Selects the rows of the tree `new` where `mask` [b] is true, and those of `old` elsewhere."""

    def pick(new: Array, old: Array) -> Array:
        return jnp.where(expand_mask(mask, new), new, old)

    return jax.tree.map(pick, new, old)


def rows_equal(a: Array, b: Array) -> Array:
    """Whether each row of `a` equals that of `b`, bool [b]."""
    return jnp.all((a == b).reshape(len(a), -1), axis=1)


def random_directions(keys: Array, x: Array, norm: norms.Norm) -> Array:
    """Returns one random displacement of length one per example, [b, ...]."""
    noise = jax.vmap(lambda key: norm.sample(key, x.shape[1:], x.dtype))(keys)
    return noise / jnp.maximum(norm.length(noise), jnp.finfo(x.dtype).tiny)  # a sample can be zero


def attack_batch(
    build: Callable[[int], IterativeAttack[StateT]],
    key: Array,
    logits_fn: Callable[..., Array],
    x: Array,
    y: Array,
    eps: ArrayLike,
    *,
    num_samples: int | None = None,
    allow_infinite: bool = False,
    targets: Array | None = None,
    eps_per_entry: bool = False,
) -> Array:
    """Runs all rounds of an attack on one batch; traceable.

    An image that is classified wrongly, or with `targets` as its target, is not attacked. Without `targets`, target r
    of an image is the class with the (r + 2)-th largest clean logit. Round r of an example uses fold_in(its key, r).

    Args:
      build: number of classes -> the attack.
      key: one key, or one per example.
      logits_fn: the network, x -> logits or, with `num_samples`, (x, keys) -> logits of one draw.
      x: images.
      y: labels.
      eps: radius, scalar or [batch].
      num_samples: draws of a randomised network that the attack averages over.
      allow_infinite: whether eps may be infinite.
      targets: None, or the target of each example in every round; the goal of the attack is then this prediction.
      eps_per_entry: whether eps may be one radius for each entry, which the state then has in the shape of x.

    Returns:
      x_adv, for an image that is not broken its strongest point.
    """
    y = y.astype(jnp.int32)
    keyed_logits_fn = (lambda x, _: logits_fn(x)) if num_samples is None else logits_fn
    norms.check_length("eps", eps, x.shape[0], allow_infinite, x.shape[1:] if eps_per_entry else None)
    if targets is not None:
        targets = checks.as_array("targets", targets)
        checks.check_labels(targets, len(x), name="targets")

    def attack_rounds() -> Array:
        keys = example_keys(key, x.shape[0])
        varies = jnp.zeros_like(x).reshape(len(x), -1).sum(axis=1)  # varies over the same mesh axes as x
        radius = norms.per_example(eps, x)
        per_entry = np.ndim(eps) == x.ndim > 1
        radius = radius + jnp.zeros_like(x) if per_entry else radius.reshape(-1) + varies
        logits = _expectation.scores(keyed_logits_fn, num_samples, x, fold_in(keys, FIRST_DRAW))
        classes = logits.shape[-1]
        if classes < 2:
            raise ValueError(f"logits_fn must return logits of at least two classes, got {classes}.")
        checks.check_labels(y, len(x), classes)
        if targets is not None:
            checks.check_labels(targets, len(x), classes, name="targets")
        goal = None if targets is None else targets.astype(jnp.int32)
        ranking, attack = jnp.argsort(-logits, axis=-1).astype(jnp.int32), build(classes)

        step_logits_fn = hoist(keyed_logits_fn, x, keys)

        def one_round(r: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            x_adv, broken = carry
            round_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, r)
            target = jnp.take(ranking, (r + 1) % classes, axis=-1)  # ignored by untargeted attacks
            target = (target if goal is None else goal) + varies.astype(jnp.int32)
            state = attack.init(round_keys, x, y, target, radius, jnp.full_like(y, r))
            state = lax.fori_loop(0, attack.num_steps, lambda _, state: attack.step(step_logits_fn, state), state)
            return where_rows(broken, x_adv, state.x_adv), broken | state.broken

        broken = is_wrong(logits, y) if goal is None else reaches_goal(logits, y, goal, True)
        carry = lax.stop_gradient((x, broken))
        return lax.fori_loop(0, attack.num_rounds, one_round, carry)[0]

    return tracing.run_compiled(attack_rounds, key, x, y, eps, targets)

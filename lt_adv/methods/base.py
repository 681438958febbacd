"""The interface of a method: a frozen dataclass whose fields are the hyper-parameters."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from lt_adv import attacks
from lt_adv.runtime import registry

Array = jax.Array
Params = Any  # pytree of arrays
MethodState = Mapping[str, Array]
Config = Any  # ml_collections.ConfigDict
Objective = Callable[[Array, Array], Array]  # (logits, y) -> [b], which the attack maximizes
T = TypeVar("T")
FIDELITIES = ("paper", "released_code")
ATTACKS = ("pgd", "fgsm", "fgsm_rs", "n_fgsm")  # `config.attack.name`


@dataclasses.dataclass(frozen=True)
class DataInfo:
    """Static facts of the training set: numpy, never traced.

    Attributes:
      class_counts: [classes], of the training images without the validation split. Integers, unless extra images are
        part of them (`config.data.extra_prior`).
      steps_per_epoch: number of steps.
      epochs: number of epochs of the stage.
      image_shape: (height, width, channels).
      num_features: size of the penultimate layer.
    """

    class_counts: np.ndarray
    steps_per_epoch: int
    epochs: int
    image_shape: tuple[int, ...]
    num_features: int

    @property
    def num_classes(self) -> int:
        return len(self.class_counts)


@struct.dataclass
class Batch:
    """One device's share of a batch.

    `eps` and `step_size` are those of the config. An add-on may rescale them for `perturb`, not for `loss`. The weights
    are for `loss`, and None unless an add-on sets them.

    Attributes:
      image: float [b, h, w, c] in [0, 1].
      label: int [b].
      index: int [b], position in the original data set; negative for extra images (`config.data.extra`).
      eps: float [b].
      step_size: float [b].
      x_init: starting point of the attack; an add-on may set it in place of `start`.
      weight: float [b]; every method multiplies the cross-entropy of each example by it, see `weighted`.
      divergence_weight: float [b]; method trades multiplies its KL divergence by it.
    """

    image: Array
    label: Array
    index: Array
    eps: Array
    step_size: Array
    x_init: Array | None = None
    weight: Array | None = None
    divergence_weight: Array | None = None

    def weighted(self, values: Array) -> Array:
        """Returns `values`, the cross-entropy of each example [b] or what takes its place, times `weight`."""
        return values if self.weight is None else self.weight * values


@struct.dataclass
class TrainProgress:
    """The step and epoch of training: traced scalars, counted from 0 within the stage."""

    step: Array
    epoch: Array
    steps_per_epoch: int = struct.field(pytree_node=False)
    epochs: int = struct.field(pytree_node=False)

    @classmethod
    def at(cls, step: Array, info: DataInfo) -> "TrainProgress":
        """Returns the progress at step `step` of a stage."""
        return cls(step, step // info.steps_per_epoch, info.steps_per_epoch, info.epochs)


class Net(Protocol):
    """The network, as a method calls it: `net(x, train=True)` or `net(x, train=False)`, see `__call__`.

    Attributes:
      params: the parameters.
      info: facts of the training set.
      teacher: the network of `Stage.teacher` in evaluation mode, or None.
    """

    params: Params
    info: DataInfo
    teacher: Callable[[Array], tuple[Array, dict[str, Array]]] | None

    def __call__(self, x: Array, *, train: bool) -> tuple[Array, dict[str, Array]]:
        """Returns (logits [b, classes], {"features": [b, features]}).

        With `train=False`, batch norm normalizes by its running statistics and they do not change: the mode of attacks.
        With `train=True` it normalizes by those of the batch, over all devices, and the running statistics advance, in
        the order of the calls.
        """

    def with_params(self, params: Params) -> "Net":
        """Returns the same network with other parameters; it shares the running statistics."""

    def without_updates(self) -> "Net":
        """Returns the same network, whose calls do not advance the running statistics."""

    def with_batch_statistics(self) -> "Net":
        """Returns the same network in training mode, which normalizes by the statistics of the batch.

        `train=False` has no effect, and dropout is active, with the same mask in every call. The calls do not advance
        the running statistics. Where these are frozen (`Stage.freeze_batch_stats`), the network stays in evaluation
        mode.
        """

    def gather(self, tree: T) -> T:
        """Returns the batch of all devices, in its global order: for losses that are not a plain mean over examples."""

    def mean(self, tree: T) -> T:
        """Returns the average over devices; no gradient flows through it."""


class LossOutput(NamedTuple):
    """The result of `Method.loss`. The training step computes the metric "accuracy" from `logits`.

    Attributes:
      loss: scalar; the step averages its gradient over the devices.
      logits: float [b, classes], whose argmax is the prediction that "accuracy" counts.
      metrics: name -> per-example values [b], or a mean over this device's share.
      method_state: the new `method_state`; None leaves it unchanged.
    """

    loss: Array
    logits: Array
    metrics: Mapping[str, Array] = {}
    method_state: MethodState | None = None


class ValidationResult(NamedTuple):
    """The network on the validation split under PGD-20, in evaluation mode; see `training.epoch_update.Validation`.

    Attributes:
      confusion: float [classes, classes], the share of the images of class i that are predicted as class j.
      features: float [classes, features], the mean features of the adversarial images of each class.
    """

    confusion: Array
    features: Array

    @property
    def accuracy(self) -> Array:
        """The accuracy of each class, [classes]."""
        return jnp.diagonal(self.confusion)


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of training. A method with several stages (a teacher, then a student) lists them in `stages`.

    Attributes:
      method: the method of the stage.
      epochs: number of epochs.
      name: name in logs and checkpoints.
      overrides: config entries of this stage, {"data.sampler": "class_aware"}.
      init: "fresh", "previous" (the stage before), or the working directory of a run whose parameters are merged by
        name.
      freeze: regular expression over the paths of parameters that are not trained, "backbone/.*".
      freeze_batch_stats: whether batch norm normalizes by its running statistics, which do not change.
      teacher: "previous" if `net.teacher` is the final network of the stage before.
    """

    method: "Method"
    epochs: int
    name: str = "train"
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    init: str = "fresh"
    freeze: str | None = None
    freeze_batch_stats: bool = False
    teacher: str | None = None


def hyper_parameter(
    default: T, interval: str = "", *, choices: Collection[str] = (), released_code: T | None = None
) -> T:
    """Returns a dataclass field whose value `Method` checks.

    Args:
        default: the default value.
        interval: the numbers that are allowed, such as "(0, 1]"; whole numbers if the default is an integer.
        choices: the values that are allowed, instead of an interval.
        released_code: the default with `fidelity="released_code"`, if it differs. The method then replaces None by the
            default of its fidelity; any other value is used in both.
    """
    by_fidelity = {"paper": default, "released_code": default if released_code is None else released_code}
    field: Any = dataclasses.field(
        default=default if released_code is None else None,
        metadata={**by_fidelity, "interval": interval, "choices": choices},
    )
    return field


def _check(path: str, value: object, rule: Mapping[str, Any]) -> None:
    """Raises ValueError unless `rule`, the metadata of a `hyper_parameter`, allows the value of the entry `path`."""
    if rule["interval"]:
        registry.check_number(path, value, rule["interval"], type(rule["paper"]))
    if rule["choices"] and value not in rule["choices"]:
        raise registry.unknown(path, value, rule["choices"])


@dataclasses.dataclass(frozen=True)
class Method:
    """Base class of all methods: PGD as inner attack, one stage, no state. A subclass overrides `loss`, rarely more.

    `attack` is the search of the inner maximization: "pgd", "fgsm" (one step of eps from the image), "fgsm_rs" or
    "n_fgsm" of `lt_adv.attacks`. The objective is that of the method. `num_steps`, `start` and the step size of the
    config are options of "pgd".

    `fidelity` is "paper" or "released_code", which also reproduces the peculiarities of the authors' code that the
    docstring of the method lists.
    """

    compounding_schedule: ClassVar[bool] = False  # the released code compounds the drops; see `optimizer.schedule`
    no_attack: ClassVar[bool] = False  # `perturb` runs no attack
    released_start: ClassVar[str | None] = None  # start of the attack in the released code, if it differs

    num_steps: int = 10  # of the inner attack
    start: str = "uniform"  # of the inner attack
    fidelity: str = "paper"
    attack: str = "pgd"
    noise: float = 2.0  # of "n_fgsm", in units of eps
    relative_step_size: float | None = None  # of "fgsm_rs" and "n_fgsm", in units of eps; None is that of their papers

    def __post_init__(self) -> None:
        if self.fidelity not in FIDELITIES:
            raise registry.unknown("config.fidelity", self.fidelity, FIDELITIES)
        registry.check_number("config.attack.num_steps", self.num_steps, "[0, inf)", int)
        if self.attack not in ATTACKS:
            raise registry.unknown("config.attack.name", self.attack, ATTACKS)
        if self.no_attack and self.attack != "pgd":
            raise ValueError(f"config.attack.name is {self.attack!r}, but config.method has no attack: leave it out.")
        for field in dataclasses.fields(self):
            if field.metadata:  # of `hyper_parameter`
                if field.default is None and getattr(self, field.name) is None:
                    object.__setattr__(self, field.name, field.metadata[self.fidelity])
                _check(f"config.{self._section}.{field.name}", getattr(self, field.name), field.metadata)

    @property
    def _section(self) -> str:
        """Returns the section of the config that holds the hyper-parameters."""
        return "method"

    @property
    def attack_start(self) -> str:
        """Returns the start of the inner attack: `released_start`, if set, with `fidelity="released_code"`."""
        return (self.fidelity == "released_code" and self.released_start) or self.start

    def init_state(self, info: DataInfo) -> MethodState:
        """Returns the initial `method_state`: arrays that are part of the train state. By default there are none."""
        del info
        return {}

    def init_params(self, params: Params, info: DataInfo) -> Params:
        """Returns the initial parameters {"backbone", "head"}, for an initialization that depends on `info`.

        Parameters of another run or stage are merged in afterwards. By default `params` is returned.
        """
        del info
        return params

    def perturb(self, key: Array, net: Net, batch: Batch, method_state: MethodState, progress: TrainProgress) -> Array:
        """Returns adversarial examples [b, h, w, c]: by default those of `attack` on the cross-entropy, `train=False`.

        `key` is one key per example [b], so that the result does not depend on the number of devices.
        """
        del method_state, progress
        return self.maximize(key, net, batch, batch.label)

    def maximize(
        self, key: Array, net: Net, batch: Batch, y: Array, *, objective: Objective = attacks.cross_entropy
    ) -> Array:
        """Returns the result of `attack` on `objective(logits, y)`, the inner maximization of most methods."""

        def logits_fn(x: Array) -> Array:
            return net(x, train=False)[0]

        arguments, eps = (key, logits_fn, batch.image, y), batch.eps
        step_size = None if self.relative_step_size is None else self.relative_step_size * eps
        if self.attack == "fgsm":
            return attacks.fgsm(*arguments, eps=eps, objective=objective)
        if self.attack == "fgsm_rs":
            return attacks.fgsm_rs(*arguments, eps=eps, step_size=step_size, objective=objective)
        if self.attack == "n_fgsm":
            return attacks.n_fgsm(*arguments, eps=eps, noise=self.noise, step_size=step_size, objective=objective)
        return attacks.pgd(
            *arguments,
            eps=eps,
            step_size=batch.step_size,
            num_steps=self.num_steps,
            start=self.attack_start,
            objective=objective,
            x_init=batch.x_init,
        )

    def loss(
        self, key: Array, net: Net, batch: Batch, x_adv: Array, method_state: MethodState, progress: TrainProgress
    ) -> LossOutput:
        """Returns the loss of this device's share of the batch, for the gradient; `key` is one key per example [b]."""
        raise NotImplementedError

    def epoch_end(self, method_state: MethodState, progress: TrainProgress) -> MethodState:
        """Returns `method_state` after the last step of an epoch."""
        del progress
        return method_state

    @property
    def feedback_every(self) -> int:
        """Returns the number of epochs between two calls of `feedback`; 0 if there are none."""
        return 0

    def feedback(self, method_state: MethodState, result: ValidationResult, info: DataInfo) -> MethodState:
        """Returns `method_state` after an epoch, from the accuracy on the validation split; pure, and jitted.

        The config needs a validation split, `config.data.validation_per_class`.
        """
        raise NotImplementedError

    def stages(self, config: Config) -> tuple[Stage, ...]:
        """Returns the stages, in order: by default one, which starts from the run `config.init_from` if that is set."""
        return (Stage(method=self, epochs=config.optim.epochs, init=config.init_from or "fresh"),)

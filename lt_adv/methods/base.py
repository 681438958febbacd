"""The contract every method keeps: a file with one frozen dataclass, whose fields are the hyper-parameters."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import numpy as np
from flax import struct

from lt_adv import attacks
from lt_adv.runtime import registry

Array = jax.Array
MethodState = Any
FIDELITIES = ("paper", "released_code")


@dataclasses.dataclass(frozen=True)
class DataInfo:
    """What is known of the training set before the first step. Static: numpy, never traced."""

    class_counts: np.ndarray  # int [classes], after a validation cut
    steps_per_epoch: int
    epochs: int
    image_shape: tuple[int, ...]
    num_features: int  # of the penultimate layer

    @property
    def num_classes(self) -> int:
        return len(self.class_counts)


@struct.dataclass
class Batch:
    """One device's share of a batch. `eps` and `step_size` come from the config, so that a wrapper can rescale them for
    `perturb`; a loss sees them as the config has them.
    """

    image: Array  # float [b, h, w, c] in [0, 1]
    label: Array  # int [b]
    index: Array  # int [b], of the original data set
    eps: Array  # float [b]
    step_size: Array  # float [b]
    x_init: Array | None = None  # where the attack starts, set by a wrapper; otherwise the method's own start


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
    """All of the network that a method may touch."""

    params: Any
    info: DataInfo
    teacher: Callable[[Array], tuple[Array, dict[str, Array]]] | None

    def __call__(self, x: Array, *, train: bool) -> tuple[Array, dict[str, Array]]:
        """Returns (logits [b, classes], {"features": [b, features]}).

        With `train=False`, batch norm normalizes by its running statistics and they do not change: the mode of attacks.
        With `train=True` it normalizes by those of the batch, over all devices, and the running statistics advance, in
        the order of the calls.
        """

    def with_params(self, params: Any) -> "Net":
        """Returns the same network with other parameters; it shares the running statistics."""

    def without_updates(self) -> "Net":
        """Returns the same network, whose calls do not advance the running statistics."""

    def with_batch_statistics(self) -> "Net":
        """Returns the same network, which normalizes by the statistics of the batch with `train=False` too.

        Its calls do not advance the running statistics.
        """

    def gather(self, tree: Any) -> Any:
        """Returns the batch of all devices, in its global order: for losses that are not a plain mean over examples."""

    def mean(self, tree: Any) -> Any:
        """Returns the average over devices; no gradient flows through it."""


class LossOutput(NamedTuple):
    """The result of `Method.loss`. The training step computes the metric "accuracy" from `logits`."""

    loss: Array  # scalar; the step averages its gradient over the devices
    logits: Array  # float [b, classes], whose argmax is the prediction that "accuracy" counts
    metrics: Mapping[str, Array] = {}  # name -> per-example values [b], or a mean over this device's share
    method_state: Any = None  # the new `method_state`; None leaves it unchanged


@dataclasses.dataclass(frozen=True)
class Stage:
    """One trace of training. A method with several stages (a teacher, then a student) lists them in `stages`.

    `overrides` are config paths to values ({"data.sampler": "class_aware"}) that hold in this stage alone. `init` is
    "fresh", "previous" (the stage before) or the path of another run's working directory, whose parameters are merged
    by name. `freeze` is a regular expression over parameter paths ("backbone/.*"). `teacher` may be "previous": the
    last state of the stage before, frozen, as `net.teacher`.
    """

    method: "Method"
    epochs: int
    name: str = "train"
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    init: str = "fresh"
    freeze: str | None = None
    freeze_batch_stats: bool = False
    teacher: str | None = None


def check_fidelity(path: str, value: Any) -> None:
    """Raises ValueError unless `value`, of the config entry `path`, is one of FIDELITIES."""
    if value == "published":
        raise ValueError(f"{path} = 'published' is now called 'paper'.")
    if value not in FIDELITIES:
        raise registry.unknown(path, value, FIDELITIES)


def by_fidelity(*, paper: Any, released_code: Any) -> Any:
    """A dataclass field with a default for each fidelity, for an option whose value in the released code differs.

    It is filled in when the method is made, for None too. A value that is given holds in either fidelity.
    """
    return dataclasses.field(default=None, metadata={"paper": paper, "released_code": released_code})


@dataclasses.dataclass(frozen=True)
class Method:
    """Adversarial training with defaults that a paper overrides: perturb, loss, and rarely more.

    `num_steps` and `start` belong to the inner attack. `fidelity` is "paper" (the sane reading) or "released_code"
    (its quirks, as the method's docstring lists them).
    """

    compounding_schedule: ClassVar[bool] = False  # whether the released code's learning rate compounds (training.optim)
    no_attack: ClassVar[bool] = False  # whether `perturb` is without an attack
    released_start: ClassVar[str | None] = None  # of the attack in the released code, where it is another

    num_steps: int = 10
    start: str = "uniform"
    fidelity: str = "paper"

    def __post_init__(self):
        check_fidelity("config.fidelity", self.fidelity)
        if self.num_steps < 0:
            raise ValueError(f"config.attack.num_steps must not be negative, not {self.num_steps}.")
        for field in dataclasses.fields(self):
            if self.fidelity in field.metadata and getattr(self, field.name) is None:
                object.__setattr__(self, field.name, field.metadata[self.fidelity])

    @property
    def attack_start(self) -> str:
        """Where the inner attack starts: `start`, unless the released code is followed and has another."""
        return (self.fidelity == "released_code" and self.released_start) or self.start

    def init_state(self, info: DataInfo) -> MethodState:
        """Arrays that live in the train state, saved and resumed. None of them by default."""
        del info
        return {}

    def init_params(self, params: Any, info: DataInfo) -> Any:
        """Fresh parameters {"backbone", "head"} as training begins with them: for starts that depend on `info`.

        They come before anything of another run or stage is merged in. As the network has them by default.
        """
        del info
        return params

    def perturb(self, key: Array, net: Net, batch: Batch, method_state: MethodState, progress: TrainProgress) -> Array:
        """Training examples, [b, h, w, c]: PGD on the cross-entropy of the evaluation-mode network by default.

        `key` is one key per example [b], so that nothing depends on the number of devices.
        """
        del method_state, progress
        return self.pgd(key, net, batch, batch.label)

    def pgd(self, key: Array, net: Net, batch: Batch, y: Array, *, objective: Any = attacks.cross_entropy) -> Array:
        """The inner attack, shared by the methods: `y` is whatever `objective(logits, y)` compares the logits with."""
        return attacks.pgd(
            key,
            lambda x: net(x, train=False)[0],
            batch.image,
            y,
            eps=batch.eps,
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
        """`method_state` after the last step of an epoch."""
        del progress
        return method_state

    def stages(self, config: Any) -> tuple[Stage, ...]:
        """What is trained, in order: one stage by default, from `config.init_from` where that names a finished run."""
        return (Stage(method=self, epochs=config.optim.epochs, init=config.init_from or "fresh"),)

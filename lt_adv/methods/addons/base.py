"""Base class of add-ons: it delegates everything to the inner method."""

import dataclasses
from typing import ClassVar

from lt_adv.methods.base import (
    Array,
    Batch,
    Config,
    DataInfo,
    LossOutput,
    Method,
    MethodState,
    Net,
    Params,
    Stage,
    TrainProgress,
    ValidationResult,
)


@dataclasses.dataclass(frozen=True)
class AddOn(Method):
    """A method around an inner method, to which it delegates by default.

    The fields of `Method` (`attack`, `num_steps`, `start`, `fidelity` ...) are copied from the inner method. An add-on
    overrides `perturb` or `loss`, and wraps every stage of the inner method, except those without an attack if
    `needs_attack`.

    The `method_state` is that of the inner method, and the entries of the add-on, whose names begin with its name. An
    add-on that has entries of its own takes them out with `split_state` before it calls the inner method, whose new
    state has no others.
    """

    needs_attack: ClassVar[bool] = False

    num_steps: int = dataclasses.field(init=False)
    start: str = dataclasses.field(init=False)
    fidelity: str = dataclasses.field(init=False)
    attack: str = dataclasses.field(init=False)
    noise: float = dataclasses.field(init=False)
    relative_step_size: float | None = dataclasses.field(init=False)
    inner: Method

    def __post_init__(self) -> None:
        for name in Method.__annotations__:
            object.__setattr__(self, name, getattr(self.inner, name))
        super().__post_init__()
        if self.needs_attack and self.no_attack:
            raise ValueError(
                f"config.addons: {self._section!r} changes the training attack, and config.method has none."
            )

    @property
    def _section(self) -> str:
        return type(self).__module__.rsplit(".", 1)[-1]

    @property
    def innermost(self) -> Method:
        """Returns the method inside all add-ons."""
        return self.inner.innermost if isinstance(self.inner, AddOn) else self.inner

    def split_state(self, method_state: MethodState) -> tuple[dict[str, Array], dict[str, Array]]:
        """Returns the entries of this add-on, by name without its own, and those of the inner method."""
        prefix = f"{self._section}_"
        own = {name.removeprefix(prefix): value for name, value in method_state.items() if name.startswith(prefix)}
        return own, {name: value for name, value in method_state.items() if not name.startswith(prefix)}

    def join_state(self, own: MethodState, inner: MethodState) -> MethodState:
        """Returns the `method_state` with the entries of this add-on and those of the inner method."""
        return {**inner, **{f"{self._section}_{name}": value for name, value in own.items()}}

    def init_state(self, info: DataInfo) -> MethodState:
        return self.inner.init_state(info)

    def init_params(self, params: Params, info: DataInfo) -> Params:
        return self.inner.init_params(params, info)

    def perturb(self, key: Array, net: Net, batch: Batch, method_state: MethodState, progress: TrainProgress) -> Array:
        return self.inner.perturb(key, net, batch, method_state, progress)

    def loss(
        self, key: Array, net: Net, batch: Batch, x_adv: Array, method_state: MethodState, progress: TrainProgress
    ) -> LossOutput:
        return self.inner.loss(key, net, batch, x_adv, method_state, progress)

    def epoch_end(self, method_state: MethodState, progress: TrainProgress) -> MethodState:
        return self.inner.epoch_end(method_state, progress)

    @property
    def feedback_every(self) -> int:
        return self.inner.feedback_every

    def feedback(self, method_state: MethodState, result: ValidationResult, info: DataInfo) -> MethodState:
        own, inner = self.split_state(method_state)
        return self.join_state(own, self.inner.feedback(inner, result, info))

    def stages(self, config: Config) -> tuple[Stage, ...]:
        return tuple(
            stage
            if self.needs_attack and stage.method.no_attack
            else dataclasses.replace(stage, method=dataclasses.replace(self, inner=stage.method))
            for stage in self.inner.stages(config)
        )

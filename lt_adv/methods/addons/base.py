"""Base class of add-ons: it delegates everything to the inner method."""

import dataclasses

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
    overrides `perturb` or `loss`, and wraps every stage of the inner method.
    """

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

    @property
    def _section(self) -> str:
        return type(self).__module__.rsplit(".", 1)[-1]

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
        return self.inner.feedback(method_state, result, info)

    def stages(self, config: Config) -> tuple[Stage, ...]:
        return tuple(
            dataclasses.replace(stage, method=dataclasses.replace(self, inner=stage.method))
            for stage in self.inner.stages(config)
        )

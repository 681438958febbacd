"""The interface of the training loop's hooks, for logging, validation, checkpoints, and code outside this package."""

import dataclasses
from collections.abc import Sequence

from lt_adv.training.stage_builder import ResolvedStage, StageProgram
from lt_adv.training.train_state import TrainState


@dataclasses.dataclass
class LogEvent:
    """The run after a step whose metrics are fetched: a log step, or the one at which SIGTERM stops training.

    Attributes:
      stage: the compiled stage.
      state: the train state after the step.
      step: number of steps taken in the stage.
      epoch: epoch of the last step, from 1.
      epoch_ended: whether it was the last step of its epoch.
      is_log_step: whether metrics are logged after this step.
      stopping: whether SIGTERM has arrived, so that training stops here.
      metrics: "train/loss" and others; a hook may add entries for the hooks after it.
      images_per_second: speed since the last event.
      seconds: training time over all stages, without the time of hooks.
    """

    stage: StageProgram
    state: TrainState
    step: int
    epoch: int
    epoch_ended: bool
    is_log_step: bool
    stopping: bool
    metrics: dict[str, float]
    images_per_second: float
    seconds: float

    @property
    def is_last_step(self) -> bool:
        return self.step == self.stage.resolved.num_steps


class Hook:
    """A hook of the training loop; a subclass overrides what it needs.

    Hooks are called on all processes, those passed to `loop.train` after those of the loop. An exception ends the run.
    A stage that was finished before the run was resumed is skipped.

        class PrintLoss(Hook):
            def on_log(self, event):
                print(event.step, event.metrics["train/loss"])
    """

    def on_train_start(self, stages: Sequence[ResolvedStage]) -> None:
        """Called once, before anything is compiled."""

    def on_stage_start(self, stage: StageProgram, state: TrainState) -> None:
        """Called before the first step of a stage; `state.step` is 0, or that of the checkpoint that it resumes."""

    def on_step(self, stage: StageProgram, state: TrainState) -> None:
        """Called before each step, which donates `state`. Reading an array of it waits for the step before."""

    def on_log(self, event: LogEvent) -> None:
        """Called after each log step."""

    def on_stage_end(self, stage: StageProgram, state: TrainState) -> None:
        """Called after the last step of a stage, not if training stops before."""

"""The interface of the training loop's hooks, for logging, validation, checkpoints, and code outside this package."""

import dataclasses
from collections.abc import Sequence

from lt_adv.training.stage_builder import ResolvedStage, StageProgram
from lt_adv.training.train_state import TrainState


@dataclasses.dataclass
class LogEvent:
    """The run after a step whose metrics are fetched: a log step, or the one at which SIGTERM stops training."""

    stage: StageProgram
    state: TrainState
    step: int  # number of steps taken in the stage
    epoch: int  # of the last step, from 1
    epoch_ended: bool
    is_log_step: bool
    stopping: bool  # SIGTERM has arrived: training stops here
    metrics: dict[str, float]  # "train/loss" and others; a hook may add entries for the hooks after it
    images_per_second: float  # since the last event
    seconds: float  # of training, over all stages; without hooks

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

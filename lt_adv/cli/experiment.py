"""What a config determines, computed once and handed down: method, stages, data, class counts, devices."""

import dataclasses
import functools
import json
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lt_adv import data
from lt_adv.cli import schema, workdirs
from lt_adv.data import extra
from lt_adv.data.extra import Extra
from lt_adv.methods import Method, Stage
from lt_adv.runtime import distributed, environment
from lt_adv.training import metric_logging, sharding, stage_builder
from lt_adv.training.stage_builder import ResolvedStage


@dataclasses.dataclass(frozen=True, eq=False)
class Experiment:
    """A valid config and what follows from it.

    `Experiment.from_config` validates the config without reading data or touching a device. The data set, its
    long-tailed split, the mesh and the resolved stages are computed when they are first used, and only once.

    Attributes:
      config: the config.
      method: the configured method, without add-ons.
      stages: the stages of the method, inside the add-ons.
      stage_configs: the config of each stage: `config` with the overrides of the stage.
    """

    config: ConfigDict
    method: Method
    stages: tuple[Stage, ...]
    stage_configs: tuple[ConfigDict, ...]

    @classmethod
    def from_config(cls, config: ConfigDict, *, stages: tuple[Stage, ...] | None = None, **known: Any) -> "Experiment":
        """Returns the experiment of a config.

        Args:
          config: see docs/configuration.md.
          stages: stages instead of those of the configured method.
          **known: `dataset`, `extra` or `mesh`, in place of those of the config.

        Raises:
          ValueError: an entry is missing, unknown, out of range, or has no effect.
        """
        schema.validate_entries(config)
        method = stage_builder.create_method(config)
        stages = stage_builder.create_stages(method, config) if stages is None else stages
        stage_configs = tuple(schema.stage_config(config, stage) for stage in stages)
        schema.validate(config, stages)
        experiment = cls(config, method, stages, stage_configs)
        vars(experiment).update(known)  # a cached property has its value here
        return experiment

    @functools.cached_property
    def dataset(self) -> data.Dataset:
        return data.load(self.config.data)

    @functools.cached_property
    def split(self) -> data.LongTailed:
        """The long-tailed training set, the validation split and the test split."""
        return data.long_tailed(self.dataset, self.config.data)

    @functools.cached_property
    def extra(self) -> Extra | None:
        """The extra training images. Only training reads them."""
        held_out = {"validation": self.split.validation, "test": self.split.test}
        return extra.load(self.dataset, self.config.data, {k: split for k, split in held_out.items() if split})

    @functools.cached_property
    def mesh(self) -> Mesh:
        """All devices of all processes; of the CPU devices of a single process, the first `config.cpu_devices`."""
        devices = jax.devices()
        if devices[0].platform == "cpu" and not distributed.is_distributed():
            devices = devices[: self.config.cpu_devices]
        return sharding.make_mesh(devices)

    @functools.cached_property
    def resolved_stages(self) -> tuple[ResolvedStage, ...]:
        """The stages with their data.

        Raises:
          ValueError: a stage cannot be trained on its data or on these devices.
        """
        resolved = []
        for number, (stage, config) in enumerate(zip(self.stages, self.stage_configs, strict=True)):
            same_data = config.data.to_dict() == self.config.data.to_dict()
            split = self.split if same_data else data.long_tailed(self.dataset, config.data)
            schema.validate_for_split(config, split, self.mesh.size)
            resolved.append(
                stage_builder.resolve(number, len(self.stages), stage, config, split, self.mesh.size, self.extra)
            )
        return tuple(resolved)

    @property
    def uses_external_weights(self) -> bool:
        """Whether `config.init_from` names a file of external weights instead of a run."""
        return schema.uses_external_weights(self.config)

    def connect(self) -> None:
        """Configures JAX and connects to the other processes; from here on only the primary process prints.

        Raises:
          ValueError: the processes of a run have different configs.
        """
        environment.prepare(self.config.optim.batch_size, self.config.cpu_devices)
        metric_logging.console.quiet = not distributed.is_primary()
        entries = workdirs.immutable_entries(self.config.to_dict())
        distributed.assert_same_everywhere("The config", json.dumps(entries, sort_keys=True))

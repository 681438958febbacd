"""One training step in PyTorch: as in the authors' code, and as fast as we can make it in PyTorch."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import torch
from torch import Tensor

from experiments.pytorch_baseline import SETTINGS, attack, methods, models, weights
from experiments.pytorch_baseline.data import Batches
from lt_adv.cli import schema
from lt_adv.data import LongTailed
from lt_adv.runtime import registry
from lt_adv.training import optimizer, stage_builder

SUPPORTED = {  # entry of the config -> supported values, of which the first is the default
    "data.sampler": ("uniform",),
    "data.augment": ("none", "crop_flip"),
    "average.name": ("none",),
    "model.dropout": (0.0,),
    "addons": ((),),
    "attack.name": ("pgd",),
}


class Trainer:
    """Network, data and optimiser of `config` in PyTorch; `step()` trains on one batch.

    released  eager and float32, every forward of the authors' code (`methods.RELEASED`), attack as a Python loop,
              torch.optim.SGD, PyTorch's defaults (on a GPU these allow TF32 in convolutions).
    tuned     each forward once, parameters frozen during the attack, torch.compile, fused SGD; bfloat16 autocast around
              the backbone on a GPU, and on a CPU if config.model.dtype is "bfloat16". On a GPU also channels_last, TF32
              for float32, cudnn.benchmark, and the full step as one CUDA graph.

    Both keep the uint8 images on the device and draw, crop and flip there, which is faster than the authors' DataLoader
    on the host. Logits and losses are at least float32; model.dtype "float64" makes everything float64, for
    comparisons. Other dtypes of the config are ignored. Batches and starts are random and differ from those of lt_adv.

    Start the process with JAX_PLATFORMS=cpu, or JAX reserves most of the GPU's memory for the learning rate.

    Args:
        config: a config of lt_adv.
        split: the long-tailed data.
        setting: "released" or "tuned".
        device: "cpu" or "cuda".
        variables: flax variables to start from; by default new weights from `seed`.
        seed: of the weights, batches and starts.
        compiled: False leaves out torch.compile and the CUDA graph.

    Raises:
        ValueError: the PyTorch baseline does not support the config.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        split: LongTailed,
        *,
        setting: str,
        device: str,
        variables: Any = None,
        seed: int = 0,
        compiled: bool = True,
    ):
        if setting not in SETTINGS:
            raise registry.unknown("setting of the PyTorch baseline:", setting, SETTINGS)
        self.options = options_of(config)
        self.device, self._tuned = torch.device(device), setting == "tuned"
        self.steps, self.steps_per_epoch = 0, stage_builder.steps_per_epoch(config, split, 1)
        self._rates = learning_rates(config, self.options, self.steps_per_epoch)
        self._radius = {"eps": config.attack.eps, "step_size": config.attack.step_size}
        on_gpu, use_float64 = self.device.type == "cuda", config.model.dtype == "float64"
        dtype = torch.float64 if use_float64 else torch.float32
        self._autocast = self._tuned and not use_float64 and (on_gpu or config.model.dtype == "bfloat16")
        self._layout = torch.channels_last if self._tuned and on_gpu else torch.contiguous_format
        if self._tuned and on_gpu:
            torch.backends.cudnn.benchmark = True
            torch.set_float32_matmul_precision("high")

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = models.create(config.model, len(split.class_names), split.train.image.shape[-1])
        self.model.to(self.device, dtype).to(memory_format=self._layout)
        if variables is not None:
            self.model.load_state_dict(weights.to_torch(variables))
        self._counts = torch.tensor(split.class_counts, dtype=dtype, device=self.device)
        self._generator = torch.Generator(self.device).manual_seed(seed)
        pad = config.data.pad if config.data.augment == "crop_flip" else 0
        self._batches = Batches(split.train, config.optim.batch_size, pad=pad, generator=self._generator, dtype=dtype)
        # A CUDA graph sees changes of a rate only if it is on the device; PyTorch's kernel needs float32.
        rate = torch.tensor(self._rates[0], device=self.device) if self._tuned and on_gpu else self._rates[0]
        self._optimiser = torch.optim.SGD(
            self.model.parameters(),
            lr=rate,
            momentum=config.optim.momentum,
            weight_decay=config.optim.weight_decay,
            nesterov=config.optim.nesterov,
            fused=True if self._tuned else None,
        )
        self._method = (methods.SHARED if self._tuned else methods.RELEASED)[config.method.name]
        compiled, jit = compiled and self._tuned, functools.partial(torch.compile, fullgraph=True, dynamic=False)
        parts = (self._attack_target, self._attack_objective, self._training_loss)
        self._target, self._objective, self._loss = map(jit, parts) if compiled else parts
        self._update = Graphed(self._eager_update) if compiled and on_gpu else self._eager_update

    def step(self) -> Tensor:
        """Trains on the next batch and returns the loss on the device, without waiting for it."""
        image, label = self._batches.draw()
        noise = attack.starting_noise(image, self.options.attack_start, self._radius["eps"], self._generator)
        return self.step_on(image, label, noise)

    def step_on(self, image: Tensor, label: Tensor, noise: Tensor) -> Tensor:
        """Trains on images [b, c, h, w] in [0, 1] and labels [b]; the attack starts at `image + noise`."""
        rate, (group,) = self._rates[min(self.steps, len(self._rates) - 1)], self._optimiser.param_groups
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
        self.steps += 1
        image, noise = (a.contiguous(memory_format=self._layout) for a in (image, noise))
        return self._update(image, label, noise)

    def variables(self) -> dict[str, Any]:
        """Returns the weights and running statistics as flax variables of numpy arrays."""
        return weights.to_flax(self.model.state_dict())

    def _logits(self, x: Tensor) -> Tensor:
        if not self._autocast:
            return self.model(x)
        # The autocast cache would keep casts between calls, which breaks a CUDA graph.
        with torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False):
            features = self.model.backbone(x)
        return self.model.head(features)

    def _attack_target(self, image: Tensor, label: Tensor) -> Tensor:
        return self._method.target(self._logits, image, label)

    def _attack_objective(self, x_adv: Tensor, target: Tensor) -> Tensor:
        return self._method.objective(self._logits, x_adv, target)

    def _training_loss(self, image: Tensor, x_adv: Tensor, label: Tensor) -> Tensor:
        return self._method.loss(self._logits, image, x_adv, label, self.options, self._counts)

    def _eager_update(self, image: Tensor, label: Tensor, noise: Tensor) -> Tensor:
        self.model.eval().requires_grad_(not self._tuned)
        target = self._target(image, label)
        x_adv = attack.pgd(
            lambda x: self._objective(x, target), image, noise, num_steps=self.options.num_steps, **self._radius
        )
        self.model.train().requires_grad_(True)
        self._optimiser.zero_grad()
        loss = self._loss(image, x_adv, label)
        loss.backward()
        self._optimiser.step()
        return loss.detach()


class Graphed:
    """`update(*tensors) -> loss` as one CUDA graph.

    The first three calls run eagerly on a side stream: they compile, choose algorithms and allocate buffers. The fourth
    call records the graph, which computes nothing, and replays it, as all later calls do. Shapes must stay the same.
    """

    WARM_UP = 3

    def __init__(self, update: Callable[..., Tensor]):
        self._run, self._calls = update, 0

    def __call__(self, *inputs: Tensor) -> Tensor:
        self._calls += 1
        if self._calls <= self.WARM_UP:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                loss = self._run(*inputs)
            torch.cuda.current_stream().wait_stream(side)
            return loss
        if self._calls == self.WARM_UP + 1:
            self._inputs = [a.clone() for a in inputs]
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._loss = self._run(*self._inputs)
        for buffer, new in zip(self._inputs, inputs, strict=True):
            buffer.copy_(new)
        self._graph.replay()
        return self._loss.clone()


def options_of(config: ml_collections.ConfigDict) -> Any:
    """Returns the method of lt_adv, whose fields are the hyper-parameters.

    Raises:
        ValueError: the PyTorch baseline does not support the config.
    """
    name = config.method.name
    if name not in methods.SHARED:
        raise registry.unknown("method of the PyTorch baseline:", name, methods.SHARED)
    entries = schema.flatten(config.to_dict())
    for entry, supported in SUPPORTED.items():
        if entries.get(entry, supported[0]) not in supported:
            choices = " or ".join(map(repr, supported))
            raise ValueError(f"config.{entry} = {entries[entry]!r}: the PyTorch baseline supports only {choices}.")
    (stage,) = stage_builder.create_stages(stage_builder.create_method(config), config)
    return stage.method


def learning_rates(config: ml_collections.ConfigDict, options: Any, steps_per_epoch: int) -> list[float]:
    """Returns the learning rate of every step of the run, from the schedule of lt_adv."""
    compounding = options.compounding_schedule and config.fidelity == "released_code"
    with jax.enable_x64(True):  # PyTorch takes the rate as a double
        rate = optimizer.schedule(config.optim, steps_per_epoch, config.optim.epochs, compounding)
        steps = jnp.arange(config.optim.epochs * steps_per_epoch)
        return np.asarray(jax.vmap(lambda step: jnp.asarray(rate(step), float))(steps)).tolist()

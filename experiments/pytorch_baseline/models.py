"""The networks of lt_adv.models in PyTorch: image [batch, channels, height, width] -> logits [batch, classes].

Layers and their names are the same, so `weights` only transposes kernels.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lt_adv import models
from lt_adv.models import heads, resnet, wide_resnet
from lt_adv.models.layers import residual_plan


def conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)


def relu(x: Tensor) -> Tensor:
    return F.relu(x, inplace=True)  # of sums and batch norms, whose gradients do not need their outputs


def pool(x: Tensor) -> Tensor:
    return x.mean((2, 3), dtype=torch.promote_types(x.dtype, torch.float32))


class Block(nn.Module):
    """Two 3x3 convolutions, batch norm and ReLU after each."""

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, width, 3, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width, 3), nn.BatchNorm2d(width)
        self.projects = stride != 1 or inputs != width
        if self.projects:
            self.shortcut, self.shortcut_bn = conv(inputs, width, 1, stride), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(relu(self.bn1(self.conv1(x)))))
        return relu((self.shortcut_bn(self.shortcut(x)) if self.projects else x) + y)


class PreActivationBlock(nn.Module):
    """Batch norm and ReLU before each of two 3x3 convolutions; a projection starts from the activated input."""

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv(inputs, width, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), conv(width, width, 3)
        self.projects = stride != 1 or inputs != width
        if self.projects:
            self.shortcut = conv(inputs, width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = relu(self.bn1(x))
        return (self.shortcut(y) if self.projects else x) + self.conv2(relu(self.bn2(self.conv1(y))))


class ResNet(nn.Module):
    """Stem, stages of residual blocks and pooling; the last batch norm comes after the stem or after the blocks."""

    def __init__(self, block: type[nn.Module], stem: int, widths: tuple[int, ...], blocks: int, channels: int):
        super().__init__()
        self.conv1 = conv(channels, stem, 3)
        self.preactivated = block is PreActivationBlock
        inputs, self.names = stem, []
        for name, width, stride in residual_plan(widths, blocks):
            self.add_module(name, block(inputs, width, stride))
            self.names.append(name)
            inputs = width
        if self.preactivated:
            self.bn = nn.BatchNorm2d(inputs)
        else:
            self.bn1 = nn.BatchNorm2d(stem)
        self.features = inputs

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        if not self.preactivated:
            x = relu(self.bn1(x))
        for name in self.names:
            x = getattr(self, name)(x)
        return pool(relu(self.bn(x)) if self.preactivated else x)


class Cosine(nn.Module):
    """z_c = s (f / |f|^eta) . (w_c / (|w_c|^eta + gamma)), as `lt_adv.models.heads.Cosine`."""

    def __init__(self, features: int, num_classes: int, scale: float, gamma: float, eta: float):
        super().__init__()
        self.scale, self.gamma, self.eta = scale, gamma, eta
        self.weight = nn.Parameter(torch.empty(num_classes, features).uniform_(-(features**-0.5), features**-0.5))

    def forward(self, features: Tensor) -> Tensor:
        directions = features / length(features) ** self.eta
        return self.scale * F.linear(directions, self.weight / (length(self.weight) ** self.eta + self.gamma))


def length(x: Tensor) -> Tensor:
    """Returns the Euclidean length of each row, 1 for a row of zeros."""
    squares = (x * x).sum(-1, keepdim=True)
    return torch.where(squares > 0, squares, 1).sqrt()


class Classifier(nn.Module):
    """Backbone and head; logits are at least float32 if the head runs outside of autocast."""

    def __init__(self, backbone: ResNet, head: nn.Module):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


def create(config: Mapping[str, Any], num_classes: int, channels: int = 3) -> Classifier:
    """Returns the network of `config.model` in float32, initialised from torch's global generator.

    Names, options, defaults, initial distributions and errors are those of `lt_adv.models.create`.

    Raises:
        ValueError: the PyTorch baseline does not have the head, or does not normalise images.
    """
    flax_model = models.create(config, num_classes)
    if flax_model.mean:
        raise ValueError(
            "The PyTorch baseline takes pixels in [0, 1]: leave config.model.mean and config.model.std out."
        )
    backbone = _backbone(flax_model.backbone, channels)
    return Classifier(backbone, _head(flax_model.head, backbone.features, num_classes))


def _backbone(flax_backbone: Any, channels: int) -> ResNet:
    if isinstance(flax_backbone, wide_resnet.WideResNet):
        widths = (16 * flax_backbone.width, 32 * flax_backbone.width, 64 * flax_backbone.width)
        network = ResNet(PreActivationBlock, 16, widths, (flax_backbone.depth - 4) // 6, channels)
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
        return network
    # Convolutions keep PyTorch's default initialisation, U(+-1/sqrt(fan_in)).
    block = PreActivationBlock if isinstance(flax_backbone, resnet.PreActResNet18) else Block
    return ResNet(block, resnet.WIDTHS[0], resnet.WIDTHS, 2, channels)


def _head(flax_head: Any, features: int, num_classes: int) -> nn.Module:
    if isinstance(flax_head, heads.Cosine):
        return Cosine(features, num_classes, flax_head.scale, flax_head.gamma, flax_head.eta)
    if isinstance(flax_head, heads.Linear):
        return nn.Linear(features, num_classes, bias=flax_head.use_bias)
    raise ValueError(f"The PyTorch baseline has linear and cosine heads, not {type(flax_head).__name__}.")

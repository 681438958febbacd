"""The networks of lt_adv.models in PyTorch: image [batch, channels, height, width] -> logits [batch, classes].

The same layers under the same names, so that `weights` only has to turn kernels around.
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
    return F.relu(x, inplace=True)  # only ever of a sum or a batch norm, whose gradients do not need their result


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
    """Stem, stages of residual blocks and pooling; the batch norm outside the blocks stands where the blocks' do."""

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
    """Euclidean length of each row, 1 for a row of zeros."""
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
    """The network of `config.model`, in float32; its first weights come from torch's global generator.

    Names, options, defaults and the errors about them are those of `lt_adv.models.create`, initial distributions too;
    ValueError for a head that the twin does not have.
    """
    described = models.create(config, num_classes)
    backbone = _backbone(described.backbone, channels)
    return Classifier(backbone, _head(described.head, backbone.features, num_classes))


def _backbone(like: Any, channels: int) -> ResNet:
    if isinstance(like, wide_resnet.WideResNet):
        widths = (16 * like.width, 32 * like.width, 64 * like.width)
        network = ResNet(PreActivationBlock, 16, widths, (like.depth - 4) // 6, channels)
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
        return network
    # Convolutions stay as PyTorch makes them, U(+-1/sqrt(fan_in)).
    block = PreActivationBlock if isinstance(like, resnet.PreActResNet18) else Block
    return ResNet(block, resnet.WIDTHS[0], resnet.WIDTHS, 2, channels)


def _head(like: Any, features: int, num_classes: int) -> nn.Module:
    if isinstance(like, heads.Cosine):
        return Cosine(features, num_classes, like.scale, like.gamma, like.eta)
    if isinstance(like, heads.Linear):
        return nn.Linear(features, num_classes, bias=like.use_bias)
    raise ValueError(f"The PyTorch twin has linear and cosine heads, no {type(like).__name__}.")

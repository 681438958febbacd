"""Batches drawn and augmented on the device, where the uint8 images stay."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lt_adv.data import Split


class Batches:
    """Draws full batches (image [b, c, h, w] in [0, 1], label [b]) from a new permutation in every epoch."""

    def __init__(self, split: Split, batch_size: int, *, pad: int, generator: torch.Generator, dtype: torch.dtype):
        device = generator.device
        self._image = torch.tensor(split.image, device=device)
        self._label = torch.tensor(split.label, dtype=torch.int64, device=device)
        self._size, self._pad, self._generator, self._dtype = batch_size, pad, generator, dtype
        self._rows: list[Tensor] = []

    def draw(self) -> tuple[Tensor, Tensor]:
        """Returns the next batch; with `pad` > 0 zero-padded, randomly cropped and flipped with probability 1/2."""
        if not self._rows:
            order = torch.randperm(len(self._label), generator=self._generator, device=self._label.device)
            num_used = len(order) // self._size * self._size
            self._rows = list(order[:num_used].split(self._size))
        rows = self._rows.pop()
        image = self._image[rows]
        if self._pad:
            image = pad_crop_flip(image, self._pad, self._generator)
        return image.permute(0, 3, 1, 2).to(self._dtype) / 255, self._label[rows]


def pad_crop_flip(image: Tensor, pad: int, generator: torch.Generator) -> Tensor:
    """Crops and flips [b, h, w, c] with one gather; shape and dtype stay the same."""
    (batch, height, width, _), device = image.shape, image.device
    offset = torch.randint(2 * pad + 1, (2, batch, 1), generator=generator, device=device)
    flip = torch.rand(batch, 1, generator=generator, device=device) < 0.5
    row = offset[0] + torch.arange(height, device=device)
    column = torch.arange(width, device=device)
    column = offset[1] + torch.where(flip, column.flip(0), column)
    padded = F.pad(image, (0, 0, pad, pad, pad, pad))
    example = torch.arange(batch, device=device)[:, None, None]
    return padded[example, row[:, :, None], column[:, None, :]]

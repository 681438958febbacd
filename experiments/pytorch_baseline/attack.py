"""PGD in the L-inf ball as a Python loop around torch.autograd.grad. Pixels are in [0, 1], radii in the same units."""

from collections.abc import Callable

import torch
from torch import Tensor

GAUSSIAN_SCALE = 0.001


def starting_noise(x: Tensor, start: str, eps: float, generator: torch.Generator) -> Tensor:
    """Returns noise [b, c, h, w] for the start `x + noise`; starts as in `lt_adv.attacks.initialization`."""
    noise = torch.empty_like(x)
    if start == "uniform":
        return noise.uniform_(-eps, eps, generator=generator)
    if start == "one_sided":
        return noise.uniform_(0, eps, generator=generator)
    if start == "gaussian":
        return noise.normal_(0, GAUSSIAN_SCALE, generator=generator)
    if start == "zero":
        return noise.zero_()
    raise ValueError(f"Unknown start {start!r}. There are: zero, uniform, one_sided, gaussian.")


def pgd(
    objective: Callable[[Tensor], Tensor], x: Tensor, noise: Tensor, *, eps: float, step_size: float, num_steps: int
) -> Tensor:
    """Returns adversarial images: x_{t+1} = clip(x_t + a sign(grad objective(x_t))), x_0 = x + noise.

    The clip projects onto the ball around x, then onto the box. As in `lt_adv.attacks.pgd` the start is not clipped
    before the first step. No gradient flows through the result.

    Args:
        objective: x -> scalar, the sum over the images; the caller sets the mode of the network.
    """
    low, high = x - eps, x + eps
    x_adv = x + noise
    for _ in range(num_steps):
        x_adv.requires_grad_()
        (gradient,) = torch.autograd.grad(objective(x_adv), x_adv)
        x_adv = (x_adv.detach() + step_size * gradient.sign()).clamp(low, high).clamp(0, 1)
    return x_adv if num_steps else x_adv.clamp(low, high).clamp(0, 1)

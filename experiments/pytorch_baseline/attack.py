"""PGD in the L-inf ball, a Python loop around torch.autograd.grad. Pixels in [0, 1], lengths in units of that range."""

from collections.abc import Callable

import torch
from torch import Tensor

GAUSSIAN_SCALE = 0.001


def starting_noise(like: Tensor, start: str, eps: float, generator: torch.Generator) -> Tensor:
    """Noise added to the images before the first step, of their shape; starts as in `lt_adv.attacks.initialization`."""
    noise = torch.empty_like(like)
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
    """x_{t+1} = clip(x_t + a sign(grad objective(x_t))), into the ball around x, then into the box; x_0 = x + noise.

    `objective` is a scalar, a sum over the images; which mode the network is in is the caller's business. As in
    `lt_adv.attacks.pgd` the start is not clipped before the first step. No gradient flows through the result.
    """
    low, high = x - eps, x + eps
    x_adv = x + noise
    for _ in range(num_steps):
        x_adv.requires_grad_()
        (gradient,) = torch.autograd.grad(objective(x_adv), x_adv)
        x_adv = (x_adv.detach() + step_size * gradient.sign()).clamp(low, high).clamp(0, 1)
    return x_adv if num_steps else x_adv.clamp(low, high).clamp(0, 1)

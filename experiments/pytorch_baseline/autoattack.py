"""AutoAttack in the L-inf ball, eager, with the same computations as the released code.

Each attack, and each target of an attack, takes all its steps on a full batch of the images that are still robust; only
Square drops an image at the query that breaks it, and has one window for the full batch. Left out are repeated
computations of the released code: logits of clean images, and the check of points that were not broken.

`x` is [batch, channels, height, width] in [0, 1], `eps` in units of that range, `y` and `target` are int64 [batch].
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

NUM_STEPS, TARGETS, QUERIES = 100, 9, 5000
RHO = 0.75  # APGD halves its step if a smaller share of the steps since the last checkpoint raised the objective
ALPHA_MAX, ETA, BETA = 0.1, 1.05, 0.9  # FAB's pull towards the image, overshooting, and step back
P_INIT = 0.8  # share of the pixels in Square's first windows; it is halved at each of these queries
HALVINGS = (11, 51, 201, 501, 1001, 2001, 4001, 6001, 8001)

Objective = Callable[[Tensor, Tensor, Tensor], Tensor]  # (logits, y, target) -> [batch], maximised


class CountingNetwork:
    """A network [b, c, h, w] -> logits that counts images: all forward passes, and those with a gradient."""

    def __init__(self, net: Callable[[Tensor], Tensor]):
        self._net, self.forwards, self.gradients = net, 0, 0

    def logits(self, x: Tensor) -> Tensor:
        self.forwards += len(x)
        with torch.no_grad():
            return self._net(x)

    def gradient(self, x: Tensor, value: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Returns (value(logits) [b], logits, gradient of the summed values [b, ...])."""
        self.forwards += len(x)
        self.gradients += len(x)
        x = x.detach().requires_grad_()
        logits = self._net(x)
        values = value(logits)
        (gradient,) = torch.autograd.grad(values.sum(), x)
        return values.detach(), logits.detach(), gradient


class AttackResult(NamedTuple):
    """The result of one run of an attack, per image."""

    broken: Tensor  # bool [b]
    wrong: Tensor  # the last (APGD), nearest (FAB) or first (Square) misclassified point, if any
    best: Tensor  # the point with the largest objective, and that objective
    value: Tensor


class Result(NamedTuple):
    robust: Tensor  # bool [n]: no attack succeeded
    accuracy: dict[str, float]  # "clean", then after each attack
    evaluations: dict[str, tuple[int, int]]  # attack -> (forward passes of single images, those with a gradient)


def select_logit(logits: Tensor, index: Tensor) -> Tensor:
    return logits.gather(1, index[:, None])[:, 0]


def cross_entropy(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, y, reduction="none")


def dlr(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """(max_{j != y} z_j - z_y) / (z_(1) - z_(3) + 1e-12)"""
    top = logits.topk(3).values
    other = torch.where(select_logit(logits, y) == top[:, 0], top[:, 1], top[:, 0])
    return (other - select_logit(logits, y)) / (top[:, 0] - top[:, 2] + 1e-12)


def targeted_dlr(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """(z_t - z_y) / (z_(1) - (z_(3) + z_(4)) / 2 + 1e-12)"""
    top = logits.topk(4).values
    return (select_logit(logits, target) - select_logit(logits, y)) / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12)


def check_points(num_steps: int) -> dict[int, int]:
    """Returns step -> steps since the previous check: first 22 % of all, then 3 % less each time, at least 6 %."""
    window, minimum, decrement = (max(int(share * num_steps), 1) for share in (0.22, 0.06, 0.03))
    windows, step = {}, window
    while step <= num_steps:
        windows[step] = window
        window = max(window - decrement, minimum)
        step += window
    return windows


def where_rows(mask: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Returns the rows of `new` where `mask` [b] is true, and those of `old` elsewhere."""
    return torch.where(mask.view(-1, *[1] * (new.ndim - 1)), new, old)


def on_boundary(x: Tensor, eps: float, generator: torch.Generator) -> Tensor:
    """Returns a random point on the boundary of the L-inf ball around each image, clipped to the box."""
    noise = torch.empty_like(x).uniform_(-1, 1, generator=generator)
    return (x + eps * noise / noise.abs().amax((1, 2, 3), keepdim=True)).clamp(0, 1)


def apgd(
    net: CountingNetwork, objective: Objective, x: Tensor, y: Tensor, target: Tensor, start: Tensor, eps: float
) -> AttackResult:
    """Runs Auto-PGD from `start`: NUM_STEPS steps, with a gradient at the start and after each step."""
    low, high, checks = (x - eps).clamp_min(0), (x + eps).clamp_max(1), check_points(NUM_STEPS)
    point, last, size = start, start, torch.full_like(x[:, :1, :1, :1], 2 * eps)
    best, best_value, best_gradient, wrong = start, torch.full_like(size[:, 0, 0, 0], -torch.inf), x, start
    broken, rises = torch.zeros_like(y, dtype=torch.bool), torch.zeros_like(y)
    # As released, the first step is compared with a value of zero, not with the start's.
    before, checked, halved = torch.zeros_like(best_value), best_value, ~broken
    for step in range(NUM_STEPS + 1):
        value, logits, gradient = net.gradient(point, lambda logits: objective(logits, y, target))
        miss, better = logits.argmax(-1) != y, value > best_value
        broken, wrong = broken | miss, where_rows(miss, point, wrong)
        best, best_gradient = where_rows(better, point, best), where_rows(better, gradient, best_gradient)
        best_value = torch.where(better, value, best_value)
        if step:
            rises, before = rises + (value > before), value
        else:
            checked = value
        if window := checks.get(step):
            halved = (rises <= RHO * window) | (~halved & (checked >= best_value))
            size, checked, rises = where_rows(halved, size / 2, size), best_value, torch.zeros_like(rises)
            point, gradient = where_rows(halved, best, point), where_rows(halved, best_gradient, gradient)
        share = 0.75 if step else 1.0
        ahead = (point + size * gradient.sign()).clamp(low, high)
        new = (point + (ahead - point) * share + (point - last) * (1 - share)).clamp(low, high)
        point, last = new, point
    return AttackResult(broken, wrong, best, best_value)


def fab(net: CountingNetwork, x: Tensor, y: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Runs targeted FAB; returns (misclassified point nearest to x, its distance, infinity without one)."""
    point, nearest, distance = x, x, torch.full_like(x[:, 0, 0, 0], torch.inf)
    for _ in range(NUM_STEPS):
        value, _, w = net.gradient(point, lambda logits: select_logit(logits, target) - select_logit(logits, y))
        gap = value + ((x - point) * w).sum((1, 2, 3))  # the plane is <w, p> = <w, point> - value
        deltas = to_plane(torch.cat((point, x)), torch.cat((w, w)), torch.cat((value, gap)))
        norms = deltas.abs().amax((1, 2, 3), keepdim=True).clamp_min(1e-8)
        (point_delta, x_delta), (point_norm, x_norm) = deltas.chunk(2), norms.chunk(2)
        alpha = (point_norm / (point_norm + x_norm)).clamp_max(ALPHA_MAX)
        point = ((point + ETA * point_delta) * (1 - alpha) + (x + ETA * x_delta) * alpha).clamp(0, 1)
        miss, length = net.logits(point).argmax(-1) != y, (point - x).abs().amax((1, 2, 3))
        nearer = miss & (length < distance)
        nearest, distance = where_rows(nearer, point, nearest), torch.where(nearer, length, distance)
        point = where_rows(miss, x + (point - x) * BETA, point)
    return nearest, distance


def to_plane(point: Tensor, w: Tensor, value: Tensor) -> Tensor:
    """Projects onto the plane: returns the d of smallest max |d_i| inside the box with <w, d> = -value.

    Where the plane does not meet the box, d points towards the nearest corner. |d_i| = min(t, room_i) with room_i the
    distance to the box; in ascending order of the rooms, t is at least the last room for which the sum of
    |w_i| min(room, room_i) does not exceed |value|.
    """
    flat, w = point.flatten(1), w.flatten(1)
    direction = -w.sign() * torch.where(value >= 0, 1, -1)[:, None]
    room, weight, total = torch.where(direction > 0, 1 - flat, flat), w.abs(), value.abs()[:, None]
    caps, order = room.sort()
    sorted_ = weight.gather(1, order)
    used = F.pad((sorted_ * caps).cumsum(1), (1, 0))  # [b, d + 1], the part of `total` covered by pixels at the box
    free = F.pad(sorted_.flip(1).cumsum(1).flip(1), (0, 1))  # the weight of the other pixels
    at_box = (used[:, :-1] + free[:, :-1] * caps <= total).sum(1, keepdim=True)
    used, free = used.gather(1, at_box), free.gather(1, at_box)
    level = torch.where(free > 0, (total - used) / free, torch.inf)
    return (direction * torch.minimum(room, level)).view_as(point)


def square(
    net: CountingNetwork, x: Tensor, y: Tensor, eps: float, queries: int, generator: torch.Generator
) -> AttackResult:
    """Runs Square: random stripes, then one window of +-2 eps per query, the same for all images still robust."""
    channels, height, width = x.shape[1:]
    low, high = (x - eps).clamp_min(0), (x + eps).clamp_max(1)
    best = (x + eps * random_signs((len(x), channels, 1, width), x, generator)).clamp(0, 1)
    value, broken = logit_margin(net.logits(best), y)
    for query in range(queries):
        left = (~broken).nonzero()[:, 0]
        if not len(left):
            break
        share = P_INIT / 2 ** sum(query >= halving for halving in HALVINGS)
        side = max(round((share * height * width) ** 0.5), 1)
        row, column = (
            int(torch.randint(max(length - side, 1), (), generator=generator, device=x.device))
            for length in (height, width)
        )
        window = torch.zeros_like(x[0])
        window[:, row : row + side, column : column + side] = 2 * eps * random_signs((channels, 1, 1), x, generator)
        point = (best[left] + window).clamp(low[left], high[left])
        new_value, miss = logit_margin(net.logits(point), y[left])
        accepted = miss | (new_value > value[left])
        best[left[accepted]], value[left[accepted]], broken[left] = point[accepted], new_value[accepted], miss
    return AttackResult(broken, best, best, value)


def random_signs(shape: Sequence[int], x: Tensor, generator: torch.Generator) -> Tensor:
    """Returns random signs of `shape` with the device and dtype of `x`."""
    return torch.randint(2, tuple(shape), generator=generator, device=x.device).to(x.dtype) * 2 - 1


def logit_margin(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (max_{j != y} z_j - z_y, whether the prediction is not y)."""
    others = logits.scatter(1, y[:, None], -torch.inf).amax(1)
    return others - select_logit(logits, y), logits.argmax(-1) != y


def run_attack(
    name: str, net: CountingNetwork, x: Tensor, y: Tensor, ranking: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """Runs an attack on one batch; returns (broken [b], misclassified points).

    `ranking` [b, classes] sorts the classes by the logit of the clean image, the largest first.
    """
    eps, generator, queries = options["eps"], options["generator"], options["queries"]
    if name == "square":
        return square(net, x, y, eps, queries, generator)[:2]
    if name in ("apgd-ce", "apgd-dlr"):
        objective = {"apgd-ce": cross_entropy, "apgd-dlr": dlr}[name]
        return apgd(net, objective, x, y, y, on_boundary(x, eps, generator), eps)[:2]
    broken, wrong = torch.zeros_like(y, dtype=torch.bool), x.clone()
    for r in range(1, min(TARGETS, ranking.shape[1] - 1) + 1):
        left = (~broken).nonzero()[:, 0]
        if not len(left):
            break
        x_left, y_left, target = x[left], y[left], ranking[left, r]
        if name == "apgd-t":
            start = on_boundary(x_left, eps, generator)
            hit, point = apgd(net, targeted_dlr, x_left, y_left, target, start, eps)[:2]
        else:
            point, distance = fab(net, x_left, y_left, target)
            hit = distance <= eps
        broken[left], wrong[left[hit]] = hit, point[hit]
    return broken, wrong


def autoattack(
    net: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    attacks: Sequence[str],
    batch_size: int,
    generator: torch.Generator,
    queries: int = QUERIES,
) -> Result:
    """Runs `attacks` one after the other on the images still robust, `batch_size` at a time."""
    parts = torch.arange(len(y), device=y.device).split(batch_size)
    clean = torch.cat([CountingNetwork(net).logits(x[rows]) for rows in parts])
    if clean.shape[1] < 4:
        raise ValueError(f"AutoAttack needs at least four classes, the network has {clean.shape[1]}.")
    ranking, robust = clean.argsort(descending=True, stable=True), clean.argmax(-1) == y
    accuracy, evaluations = {"clean": robust.double().mean().item()}, {}
    for name in attacks:
        counting_net = CountingNetwork(net)
        for rows in robust.nonzero()[:, 0].split(batch_size):
            options = {"eps": eps, "generator": generator, "queries": queries}
            broken, wrong = run_attack(name, counting_net, x[rows], y[rows], ranking[rows], **options)
            if broken.any():  # as the released code: check the returned points with the network
                robust[rows[broken]] = CountingNetwork(net).logits(wrong[broken]).argmax(-1) == y[rows[broken]]
        accuracy[name] = robust.double().mean().item()
        evaluations[name] = (counting_net.forwards, counting_net.gradients)
    return Result(robust, accuracy, evaluations)

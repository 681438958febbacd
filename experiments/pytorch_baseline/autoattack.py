"""AutoAttack in the L-inf ball: what the released code computes, eager, in batches of the images that are left.

Every attack takes all its steps on the whole batch, broken images too; targets come one after the other, each on what
those before it left; Square alone drops an image at the query that breaks it. The steps are those of
`lt_adv.attacks`, with one window for the whole batch in Square, as released. Left out is what the released code
computes more than once: logits of clean images, and the check of points that were not broken.

`x` is [batch, channels, height, width] in [0, 1], `eps` in units of that range, `y` and `target` are int64 [batch].
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

NUM_STEPS, TARGETS, QUERIES = 100, 9, 5000
RHO = 0.75  # APGD's step halves where fewer of the steps since the last check point raised the objective
ALPHA_MAX, ETA, BETA = 0.1, 1.05, 0.9  # FAB's pull towards the image, overshooting, and step back
P_INIT = 0.8  # share of the pixels in Square's first windows, and the proposals from which on it is halved once more
HALVINGS = (11, 51, 201, 501, 1001, 2001, 4001, 6001, 8001)

Objective = Callable[[Tensor, Tensor, Tensor], Tensor]  # (logits, y, target) -> [batch], maximised


class Network:
    """A network [b, c, h, w] -> logits that counts the images it sees, and those it gives a gradient for."""

    def __init__(self, net: Callable[[Tensor], Tensor]):
        self._net, self.forwards, self.gradients = net, 0, 0

    def logits(self, x: Tensor) -> Tensor:
        self.forwards += len(x)
        with torch.no_grad():
            return self._net(x)

    def gradient(self, x: Tensor, value: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """(value(logits) [b], logits, gradient of the values' sum [b, ...])"""
        self.forwards += len(x)
        self.gradients += len(x)
        x = x.detach().requires_grad_()
        logits = self._net(x)
        values = value(logits)
        (gradient,) = torch.autograd.grad(values.sum(), x)
        return values.detach(), logits.detach(), gradient


class Found(NamedTuple):
    """Of each image, what one run of an attack found."""

    broken: Tensor  # bool [b]
    wrong: Tensor  # the last (APGD), nearest (FAB) or first (Square) wrong point, where there is one
    best: Tensor  # the point with the largest objective, and that
    value: Tensor


class Result(NamedTuple):
    robust: Tensor  # bool [n]: no attack broke it
    accuracy: dict[str, float]  # "clean", then after each attack
    evaluations: dict[str, tuple[int, int]]  # attack -> forward passes of one image, how many of them with a gradient


def at(logits: Tensor, index: Tensor) -> Tensor:
    return logits.gather(1, index[:, None])[:, 0]


def cross_entropy(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, y, reduction="none")


def dlr(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """(max_{j != y} z_j - z_y) / (z_(1) - z_(3) + 1e-12)"""
    top = logits.topk(3).values
    other = torch.where(at(logits, y) == top[:, 0], top[:, 1], top[:, 0])
    return (other - at(logits, y)) / (top[:, 0] - top[:, 2] + 1e-12)


def targeted_dlr(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """(z_t - z_y) / (z_(1) - (z_(3) + z_(4)) / 2 + 1e-12)"""
    top = logits.topk(4).values
    return (at(logits, target) - at(logits, y)) / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12)


def check_points(num_steps: int) -> dict[int, int]:
    """Step -> steps since the check before it: after 22 % of all, then ever 3 % sooner, down to 6 %."""
    window, least, less = (max(int(share * num_steps), 1) for share in (0.22, 0.06, 0.03))
    found, step = {}, window
    while step <= num_steps:
        found[step] = window
        window = max(window - less, least)
        step += window
    return found


def where(mask: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """The rows of `new` where `mask` [b] holds, those of `old` elsewhere."""
    return torch.where(mask.view(-1, *[1] * (new.ndim - 1)), new, old)


def on_boundary(x: Tensor, eps: float, generator: torch.Generator) -> Tensor:
    noise = torch.empty_like(x).uniform_(-1, 1, generator=generator)
    return (x + eps * noise / noise.abs().amax((1, 2, 3), keepdim=True)).clamp(0, 1)


def apgd(net: Network, objective: Objective, x: Tensor, y: Tensor, target: Tensor, start: Tensor, eps: float) -> Found:
    """One run of Auto-PGD from `start`: NUM_STEPS steps, and a gradient at each of the points and at the start."""
    low, high, checks = (x - eps).clamp_min(0), (x + eps).clamp_max(1), check_points(NUM_STEPS)
    point, last, size = start, start, torch.full_like(x[:, :1, :1, :1], 2 * eps)
    best, best_value, best_gradient, wrong = start, torch.full_like(size[:, 0, 0, 0], -torch.inf), x, start
    broken, rises = torch.zeros_like(y, dtype=torch.bool), torch.zeros_like(y)
    # As released, the first step is compared with a value of zero, not with the start's.
    before, checked, halved = torch.zeros_like(best_value), best_value, ~broken
    for step in range(NUM_STEPS + 1):
        value, logits, gradient = net.gradient(point, lambda logits: objective(logits, y, target))
        miss, better = logits.argmax(-1) != y, value > best_value
        broken, wrong = broken | miss, where(miss, point, wrong)
        best, best_gradient = where(better, point, best), where(better, gradient, best_gradient)
        best_value = torch.where(better, value, best_value)
        if step:
            rises, before = rises + (value > before), value
        else:
            checked = value
        if window := checks.get(step):
            halved = (rises <= RHO * window) | (~halved & (checked >= best_value))
            size, checked, rises = where(halved, size / 2, size), best_value, torch.zeros_like(rises)
            point, gradient = where(halved, best, point), where(halved, best_gradient, gradient)
        share = 0.75 if step else 1.0
        ahead = (point + size * gradient.sign()).clamp(low, high)
        new = (point + (ahead - point) * share + (point - last) * (1 - share)).clamp(low, high)
        point, last = new, point
    return Found(broken, wrong, best, best_value)


def fab(net: Network, x: Tensor, y: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """One run of targeted FAB: (the wrong point nearest to x, how far away it is, infinity without one)."""
    point, nearest, distance = x, x, torch.full_like(x[:, 0, 0, 0], torch.inf)
    for _ in range(NUM_STEPS):
        value, _, w = net.gradient(point, lambda logits: at(logits, target) - at(logits, y))
        gap = value + ((x - point) * w).sum((1, 2, 3))  # the plane is <w, p> = <w, point> - value
        ways = to_plane(torch.cat((point, x)), torch.cat((w, w)), torch.cat((value, gap)))
        lengths = ways.abs().amax((1, 2, 3), keepdim=True).clamp_min(1e-8)
        (here, home), (here_length, home_length) = ways.chunk(2), lengths.chunk(2)
        alpha = (here_length / (here_length + home_length)).clamp_max(ALPHA_MAX)
        point = ((point + ETA * here) * (1 - alpha) + (x + ETA * home) * alpha).clamp(0, 1)
        miss, length = net.logits(point).argmax(-1) != y, (point - x).abs().amax((1, 2, 3))
        nearer = miss & (length < distance)
        nearest, distance = where(nearer, point, nearest), torch.where(nearer, length, distance)
        point = where(miss, x + (point - x) * BETA, point)
    return nearest, distance


def to_plane(point: Tensor, w: Tensor, value: Tensor) -> Tensor:
    """The d of smallest max |d_i| inside the box with <w, d> = -value; else towards the box's nearest corner.

    |d_i| = min(t, room_i): with the rooms in ascending order, t lies behind the last of them that leaves the sum of
    |w_i| min(room, room_i) at |value| or below.
    """
    flat, w = point.flatten(1), w.flatten(1)
    way = -w.sign() * torch.where(value >= 0, 1, -1)[:, None]
    room, weight, total = torch.where(way > 0, 1 - flat, flat), w.abs(), value.abs()[:, None]
    caps, order = room.sort()
    sorted_ = weight.gather(1, order)
    used = F.pad((sorted_ * caps).cumsum(1), (1, 0))  # [b, d + 1], by those that are met
    free = F.pad(sorted_.flip(1).cumsum(1).flip(1), (0, 1))  # the weight of all others
    met = (used[:, :-1] + free[:, :-1] * caps <= total).sum(1, keepdim=True)
    used, free = used.gather(1, met), free.gather(1, met)
    level = torch.where(free > 0, (total - used) / free, torch.inf)
    return (way * torch.minimum(room, level)).view_as(point)


def square(net: Network, x: Tensor, y: Tensor, eps: float, queries: int, generator: torch.Generator) -> Found:
    """Square: the stripes of the start, then a window of +-2 eps at each query, one for all images that are left."""
    channels, height, width = x.shape[1:]
    low, high = (x - eps).clamp_min(0), (x + eps).clamp_max(1)
    best = (x + eps * signs((len(x), channels, 1, width), x, generator)).clamp(0, 1)
    value, broken = margin(net.logits(best), y)
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
        window[:, row : row + side, column : column + side] = 2 * eps * signs((channels, 1, 1), x, generator)
        point = (best[left] + window).clamp(low[left], high[left])
        found, miss = margin(net.logits(point), y[left])
        kept = miss | (found > value[left])
        best[left[kept]], value[left[kept]], broken[left] = point[kept], found[kept], miss
    return Found(broken, best, best, value)


def signs(shape: Sequence[int], like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randint(2, tuple(shape), generator=generator, device=like.device).to(like.dtype) * 2 - 1


def margin(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(max_{j != y} z_j - z_y, whether the prediction is not y)"""
    others = logits.scatter(1, y[:, None], -torch.inf).amax(1)
    return others - at(logits, y), logits.argmax(-1) != y


def run(name: str, net: Network, x: Tensor, y: Tensor, ranking: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """(broken, wrong points) of one batch; `ranking` [b, classes] has the likeliest class of the clean image first."""
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


ATTACKS = ("apgd-ce", "apgd-dlr", "apgd-t", "fab-t", "square")


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
    """`attacks`, names out of ATTACKS, one after the other on the images that are left, `batch_size` at a time."""
    parts = torch.arange(len(y), device=y.device).split(batch_size)
    clean = torch.cat([Network(net).logits(x[rows]) for rows in parts])
    if clean.shape[1] < 4:
        raise ValueError(f"The PyTorch twin's attacks compare four classes, there are {clean.shape[1]}.")
    ranking, robust = clean.argsort(descending=True, stable=True), clean.argmax(-1) == y
    accuracy, evaluations = {"clean": robust.double().mean().item()}, {}
    for name in attacks:
        counted = Network(net)
        for rows in robust.nonzero()[:, 0].split(batch_size):
            options = {"eps": eps, "generator": generator, "queries": queries}
            broken, wrong = run(name, counted, x[rows], y[rows], ranking[rows], **options)
            if broken.any():  # the network has the last word on what is handed back
                robust[rows[broken]] = Network(net).logits(wrong[broken]).argmax(-1) == y[rows[broken]]
        accuracy[name] = robust.double().mean().item()
        evaluations[name] = (counted.forwards, counted.gradients)
    return Result(robust, accuracy, evaluations)

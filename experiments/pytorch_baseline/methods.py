"""AT, AT-BSL, TRADES and RoBal: the objective that the attack maximises and the loss that training minimises.

`net(x)` returns logits, in evaluation mode inside the attack and in training mode in the loss. `options` is the method
of lt_adv/methods, whose fields are the hyper-parameters. `class_counts` [classes] has the dtype of the logits.

SHARED runs each forward once, in the order of lt_adv. RELEASED runs every forward of the authors' code, with the same
loss and gradient but more updates of the running statistics: RoBal runs x_adv, x, x, x_adv (the second for a clean
cross-entropy of weight 0, which is differentiated nevertheless), TRADES runs x, x_adv, x, and x in each attack
step.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Network = Callable[[Tensor], Tensor]


class Method(NamedTuple):
    target: Callable[[Network, Tensor, Tensor], Tensor]  # (net, x, y) -> target of the objective
    objective: Callable[[Network, Tensor, Tensor], Tensor]  # (net, x_adv, target) -> sum over the images
    loss: Callable[..., Tensor]  # (net, x, x_adv, y, options, class_counts) -> mean over the images


def label(net: Network, x: Tensor, y: Tensor) -> Tensor:
    return y


def cross_entropy(net: Network, x_adv: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(net(x_adv), y, reduction="sum")


def image(net: Network, x: Tensor, y: Tensor) -> Tensor:
    return x


def clean_probabilities(net: Network, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return F.softmax(net(x), -1)


def divergence(net: Network, x_adv: Tensor, clean: Tensor) -> Tensor:
    return F.kl_div(F.log_softmax(net(x_adv), -1), clean, reduction="sum")


def divergence_from_image(net: Network, x_adv: Tensor, x: Tensor) -> Tensor:
    logits = net(x_adv)
    return F.kl_div(F.log_softmax(logits, -1), F.softmax(net(x), -1), reduction="sum")


def kl(p_logits: Tensor, q_logits: Tensor, epsilon: float = 0.0) -> Tensor:
    """Returns the mean over images of KL(p || q) = sum_c p_c (log p_c - log(q_c + epsilon)), gradient through both."""
    log_q = (F.softmax(q_logits, -1) + epsilon).log() if epsilon else F.log_softmax(q_logits, -1)
    return F.kl_div(log_q, F.log_softmax(p_logits, -1), reduction="batchmean", log_target=True)


def at(net: Network, x: Tensor, x_adv: Tensor, y: Tensor, options: Any, class_counts: Tensor) -> Tensor:
    return F.cross_entropy(net(x_adv), y)


def at_bsl(net: Network, x: Tensor, x_adv: Tensor, y: Tensor, options: Any, class_counts: Tensor) -> Tensor:
    return F.cross_entropy(net(x_adv) + class_counts.log(), y)


def trades(net: Network, x: Tensor, x_adv: Tensor, y: Tensor, options: Any, class_counts: Tensor) -> Tensor:
    clean, logits = net(x), net(x_adv)
    if options.fidelity == "released_code":
        with torch.no_grad():  # only updates the running statistics
            net(x)
    return F.cross_entropy(clean, y) + options.beta * kl(clean, logits)


def trades_released(net: Network, x: Tensor, x_adv: Tensor, y: Tensor, options: Any, class_counts: Tensor) -> Tensor:
    natural, logits = F.cross_entropy(net(x), y), net(x_adv)
    return natural + options.beta * kl(net(x), logits)


def margin_loss(logits: Tensor, y: Tensor, options: Any, class_counts: Tensor) -> Tensor:
    """Cross-entropy of u_y = s (z_y - m) - tau_m log(n_y / n_min) + tau_b log pi_y, u_j = s z_j + tau_b log pi_j."""
    margins = options.scale * options.margin + options.tau_m * (class_counts / class_counts.min()).log()
    prior = options.tau_b * (class_counts / class_counts.sum()).log()
    u = options.scale * logits - margins * F.one_hot(y, len(class_counts)) + prior
    return F.cross_entropy(u, y)


def log_epsilon(options: Any) -> float:
    """Returns the epsilon in the logarithm of RoBal's regulariser, which is 0 but in its released code."""
    return 1e-12 if options.fidelity == "released_code" else 0.0


def robal(net: Network, x: Tensor, x_adv: Tensor, y: Tensor, options: Any, class_counts: Tensor) -> Tensor:
    logits, clean = net(x_adv), net(x)
    if options.fidelity == "released_code":
        with torch.no_grad():  # only updates the running statistics
            net(x)
            net(x_adv)
    divergence = kl(clean, logits, log_epsilon(options))
    return margin_loss(logits, y, options, class_counts) + options.beta * divergence


def robal_released(net: Network, x: Tensor, x_adv: Tensor, y: Tensor, options: Any, class_counts: Tensor) -> Tensor:
    margin, natural = margin_loss(net(x_adv), y, options, class_counts), F.cross_entropy(net(x), y)
    clean, logits = net(x), net(x_adv)
    return margin + 0.0 * natural + options.beta * kl(clean, logits, log_epsilon(options))


SHARED: Mapping[str, Method] = {
    "at": Method(label, cross_entropy, at),
    "at_bsl": Method(label, cross_entropy, at_bsl),
    "robal": Method(label, cross_entropy, robal),
    "trades": Method(clean_probabilities, divergence, trades),
}
RELEASED: Mapping[str, Method] = {
    **SHARED,
    "robal": Method(label, cross_entropy, robal_released),
    "trades": Method(image, divergence_from_image, trades_released),
}

"""Attacks of foolbox, torchattacks and the official AutoAttack on a PyTorch network."""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from experiments.benchmark.libraries import PGD, Case, Outcome
from experiments.benchmark.timing import measure, timed, torch_device

NORM_NAMES = {"linf": "Linf", "l2": "L2", "l1": "L1"}  # of torchattacks and AutoAttack
STEPS, TARGETS = 100, 9  # of the standard version of AutoAttack


class Network(torch.nn.Module):
    """A network that counts the images of its forward and backward passes."""

    def __init__(self, net: Callable[[Tensor], Tensor], device: str):
        super().__init__()
        self.net, self.forwards, self.gradients = net, 0, 0
        # torchattacks takes the device from a parameter, foolbox asks for a module in evaluation mode.
        self.device_of = torch.nn.Parameter(torch.zeros((), device=device), requires_grad=False)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        logits, number = self.net(x), len(x)
        self.forwards += number

        def count(_: Tensor) -> None:
            self.gradients += number

        if logits.requires_grad:
            logits.register_hook(count)
        return logits

    def read(self) -> list[int]:
        """Returns the counts and sets them to zero."""
        counts = [self.forwards, self.gradients]
        self.forwards = self.gradients = 0
        return counts


def run(library: str, config: Any, case: Case) -> Outcome:
    _, device, wait = torch_device()
    target = case.target
    net = Network(target.torch(device), device)
    x = torch.tensor(target.image, device=device).permute(0, 3, 1, 2).contiguous()
    clean = predictions(net, x, case.batch_size)
    label = clean.cpu().numpy() if target.label is None else target.label
    y = torch.tensor(label, dtype=torch.int64, device=device)
    torch.manual_seed(case.seed)
    attack = ATTACKS[library](net, case, device)

    def call() -> Tensor:
        x_adv = attack(x, y)
        wait(x_adv)
        return x_adv

    if case.attack == PGD:
        times, x_adv = measure(lambda: attack(x, y), wait, case.seconds)
        net.read()
        call()
    else:
        warm_up = [timed(lambda: gradient(net, x[: case.batch_size], wait))[0] for _ in range(2)]
        net.read()
        seconds, x_adv = timed(call)
        times = {"ms": [1e3 * seconds], "compile_seconds": max(0.0, warm_up[0] - warm_up[1])}
    evaluations = net.read()
    attacked = predictions(net, x_adv, case.batch_size).cpu().numpy()
    points = x_adv.detach().permute(0, 2, 3, 1).cpu().numpy()
    return Outcome(times, evaluations, label, clean.cpu().numpy(), points, attacked)


def predictions(net: Network, x: Tensor, batch_size: int) -> Tensor:
    with torch.no_grad():
        return torch.cat([net(batch).argmax(-1) for batch in x.split(batch_size)])


def gradient(net: Network, x: Tensor, wait: Callable[[Any], None]) -> None:
    """Computes a gradient: the first one initialises libraries."""
    x = x.clone().requires_grad_()
    wait(torch.autograd.grad(net(x).amax(-1).sum(), x))


def foolbox(net: Network, case: Case, device: str) -> Callable[[Tensor, Tensor], Tensor]:
    module = importlib.import_module("foolbox")
    model = module.models.PyTorchModel(net, bounds=(0, 1), device=device)
    attack_type = {"linf": module.attacks.LinfPGD, "l2": module.attacks.L2PGD}[case.norm]
    attack = attack_type(abs_stepsize=case.step_size, steps=case.num_steps)
    return lambda x, y: attack(model, x, y, epsilons=case.target.eps)[1]


def torchattacks(net: Network, case: Case, device: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The settings of its AutoAttack, but with as many steps as the official version; its default is ten."""
    module = importlib.import_module("torchattacks")
    if case.attack == PGD:
        pgd = {"linf": module.PGD, "l2": module.PGDL2}[case.norm]
        return pgd(net, eps=case.target.eps, alpha=case.step_size, steps=case.num_steps)
    common = {"norm": NORM_NAMES[case.norm], "eps": case.target.eps, "seed": case.seed}
    attacks = {
        "apgd-ce": lambda: module.APGD(net, steps=STEPS, loss="ce", **common),
        "apgd-t": lambda: module.APGDT(net, steps=STEPS, n_classes=TARGETS + 1, **common),
        "fab-t": lambda: module.FAB(
            net, steps=STEPS, multi_targeted=True, n_classes=TARGETS + 1, **common
        ),
        "square": lambda: module.Square(net, n_queries=case.queries, resc_schedule=False, **common),
    }  # fmt: skip
    attack = attacks[case.attack]()
    return lambda x, y: torch.cat([
        attack(*batch) for batch in zip(x.split(case.batch_size), y.split(case.batch_size), strict=True)
    ])  # fmt: skip


def official(net: Network, case: Case, device: str) -> Callable[[Tensor, Tensor], Tensor]:
    module = importlib.import_module("pyautoattack")
    ensemble = module.AutoAttack(
        net, norm=NORM_NAMES[case.norm], eps=case.target.eps, seed=case.seed, version="standard", device=device
    )
    ensemble.attacks_to_run, ensemble.square.n_queries = [case.attack], case.queries
    return lambda x, y: ensemble.run_standard_evaluation(x, y, batch_size=case.batch_size)[0]


ATTACKS = {"foolbox-torch": foolbox, "torchattacks": torchattacks, "pyautoattack": official}

"""Attacks of lt_adv and of other libraries on the same network: the tasks of the measurement `libraries`."""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.benchmark import target as targets
from experiments.benchmark.timing import torch_device

PGD = "pgd"
AUTOATTACK = ("apgd-ce", "apgd-t", "fab-t", "square")
ATTACKS = (PGD, *AUTOATTACK)
NORMS = {"linf": "L-inf", "l2": "L2", "l1": "L1"}
TOLERANCE = 1e-5  # of a distance, relative to the radius, and of a pixel
LOGITS_TOLERANCE = 1e-5  # relative to the largest logit


class Library(NamedTuple):
    """A library, and its attacks that take the same steps as those of lt_adv."""

    title: str
    framework: str  # "jax" or "torch"
    attacks: Mapping[str, Sequence[str]]  # norm -> attacks
    package: str = ""  # on PyPI, under the name of the module; "" for this repository
    install: str = ""  # arguments of pip install


PGD_ALONE = dict.fromkeys(("linf", "l2"), (PGD,))
FOOLBOX: Mapping[str, Any] = {"attacks": PGD_ALONE, "package": "foolbox", "install": "foolbox==3.3.4"}
# The L1 attacks of foolbox take other steps, and torchattacks has none. pyautoattack is the official code on PyPI.
LIBRARIES: Mapping[str, Library] = {
    "lt_adv": Library("lt_adv", "jax", {"linf": ATTACKS, "l2": ATTACKS, "l1": AUTOATTACK}),
    "loop": Library("passes alone, JAX", "jax", PGD_ALONE),
    "foolbox-jax": Library("foolbox, JAX", "jax", **FOOLBOX),
    "foolbox-jax-jit": Library("foolbox, JAX, network under jit", "jax", **FOOLBOX),
    "foolbox-torch": Library("foolbox, PyTorch", "torch", **FOOLBOX),
    "torchattacks": Library(
        "torchattacks", "torch", dict.fromkeys(("linf", "l2"), ATTACKS), "torchattacks", "--no-deps torchattacks==3.5.1"
    ),
    "pyautoattack": Library(
        "official AutoAttack", "torch", dict.fromkeys(NORMS, AUTOATTACK), "pyautoattack", "pyautoattack==0.2.0"
    ),
}


class Case(NamedTuple):
    """What an attack gets."""

    target: targets.Target  # `eps` is the radius in the norm
    attack: str
    norm: str
    num_steps: int  # of PGD
    queries: int  # of Square
    batch_size: int  # of the attacks of AutoAttack; PGD attacks all images at once
    seed: int
    seconds: float  # for which PGD is timed

    @property
    def step_size(self) -> float:
        return self.target.eps / 4


class Outcome(NamedTuple):
    """What an attack returns, in numpy arrays."""

    times: Mapping[str, Any]  # "ms" and "compile_seconds", see `timing.measure`
    evaluations: Sequence[int]  # forward passes and gradients of single images
    label: np.ndarray  # [n]; predictions of the network if the target has no labels
    clean: np.ndarray  # [n], class of each image
    x_adv: np.ndarray | None = None  # [n, h, w, c]; None if the loop is not an attack
    attacked: np.ndarray | None = None  # [n], class of x_adv


def missing(name: str) -> str:
    """Returns one line that names what to install for a library, "" if it is there."""
    library = LIBRARIES[name]
    if not library.package or importlib.util.find_spec(library.package):
        return ""
    return f"{library.package} is not installed: pip install {library.install}"


def library_attack(
    config: Any, *, library: str, attack: str, norm: str, num_steps: int, queries: int, seconds: float, **options: Any
) -> dict[str, Any]:
    """Times one attack of a library; `options` are the keyword arguments of `make_target`."""
    if problem := missing(library):
        raise ImportError(problem)
    run: Callable[[str, Any, Case], Outcome]
    if LIBRARIES[library].framework == "jax":
        from experiments.benchmark.libraries_jax import run
    else:
        torch_device()  # its message names the extra
        from experiments.benchmark.libraries_torch import run
    target = targets.make_target(config, **options)
    case = Case(target, attack, norm, num_steps, queries, config.eval.batch_size, config.eval.seed, seconds)
    return summarise(case, run(library, config, case))


def summarise(case: Case, outcome: Outcome) -> dict[str, Any]:
    """Returns the result of an attack as plain data.

    An image is robust if it and its adversarial example are classified as its label. An adversarial example outside the
    ball or the range of pixels does not count; "outside" is their number. "robust" is hexadecimal, one bit per image in
    their order.
    """
    correct = outcome.clean == outcome.label
    forwards, gradients = outcome.evaluations
    result: dict[str, Any] = {
        **outcome.times,
        "images": len(correct),
        "eps": case.target.eps,
        "accuracy": {"clean": float(correct.mean())},
        "evaluations": {case.attack: [forwards, gradients]},
    }
    if outcome.x_adv is None:
        return result
    length = distance(outcome.x_adv - case.target.image, case.norm)
    flat = outcome.x_adv.reshape(len(outcome.x_adv), -1)
    outside = length > case.target.eps * (1 + TOLERANCE)
    outside |= (flat.min(1) < -TOLERANCE) | (flat.max(1) > 1 + TOLERANCE) | ~np.isfinite(flat).all(1)
    robust = correct & (outside | (outcome.attacked == outcome.label))
    result["accuracy"][case.attack] = float(robust.mean())
    return result | {"outside": int(outside.sum()), "robust": np.packbits(robust).tobytes().hex()}


def distance(difference: np.ndarray, norm: str) -> np.ndarray:
    """Returns the length of each row of [n, ...] in float64."""
    flat = difference.reshape(len(difference), -1).astype(np.float64)
    return np.linalg.norm(flat, ord={"linf": np.inf, "l2": 2, "l1": 1}[norm], axis=1)


def logits_difference(config: Any, **options: Any) -> dict[str, float]:
    """Returns the largest difference between the logits of the JAX and the PyTorch network, relative to the largest.

    Raises:
        ValueError: it is larger than `LOGITS_TOLERANCE`: the networks are not the same.
    """
    torch, device, _ = torch_device()
    import jax

    target = targets.make_target(config, **options)
    apply, net, difference, largest = jax.jit(target.apply), target.torch(device), 0.0, 0.0
    for x in np.split(target.image, range(config.eval.batch_size, len(target.image), config.eval.batch_size)):
        jax_logits = np.asarray(apply(target.variables, x))
        torch_logits = net(torch.tensor(x, device=device).permute(0, 3, 1, 2).contiguous()).detach().cpu().numpy()
        difference = max(difference, float(abs(jax_logits - torch_logits).max()))
        largest = max(largest, float(abs(jax_logits).max()))
    if not difference <= LOGITS_TOLERANCE * largest:
        raise ValueError(f"The logits of the JAX and the PyTorch network differ by {difference:.3g} of {largest:.3g}.")
    return {"difference": difference / largest}

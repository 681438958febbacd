"""RoBal: scale-invariant classifier, margins in training, boundary adjustment at inference.

Paper      Wu et al., CVPR 2021
Command    python -m lt_adv.main --config=configs/robal.py:dataset=cifar10,variant=N
Arguments  dataset, variant (N: natural accuracy first, R: robustness first), epochs
Expected   CIFAR-10-LT ratio 50, WRN-28-10, RobustLT's re-run on its own splits: clean 72.73, PGD-20 32.29,
           CW 31.29, AutoAttack 28.92;
           CIFAR-10-LT ratio 50, WRN-34-10, read off RoBal's figure, attack not named:
           clean 74.58, robust 32.04 and clean 75.52, robust 31.72 (presumably R and N)
"""

from configs import common

# (margin, tau_b, tau_m, gamma, beta) and (scale, tau_p) at inference; None: no boundary adjustment.
VARIANTS = {
    ("cifar10", "N"): ((0.1, 1.2, 0.0, 1 / 32, 6.0), (10.0, 0.1)),
    ("cifar10", "R"): ((0.1, 1.5, 0.3, 1 / 32, 6.0), None),
    ("cifar100", "N"): ((0.2, 0.0, 0.0, 1 / 32, 3.0), (10.0, 1.5)),
    ("cifar100", "R"): ((0.3, 0.0, 0.0, 1 / 16, 6.0), (10.0, 1.7)),
}


def get_config(arg=None):
    a = common.parse(arg, dataset="cifar10", variant="N", epochs=0)
    dataset, variant = a["dataset"], a["variant"]
    if variant not in ("N", "R"):
        raise ValueError(f"config argument variant={variant}: RoBal has the variants N and R.")
    # Ours, for sets that are not in the paper: CIFAR-100's values for Tiny-ImageNet, CIFAR-10's for all others.
    nearest = (
        dataset if dataset in ("cifar10", "cifar100") else ("cifar100" if dataset == "tiny_imagenet" else "cifar10")
    )
    (margin, tau_b, tau_m, gamma, beta), inference = VARIANTS[nearest, variant]
    c = common.robal_study(dataset, a["epochs"])
    c.method = {"name": "robal", "margin": margin, "scale": 10.0, "tau_b": tau_b, "tau_m": tau_m, "beta": beta}
    c.model.head = {"name": "cosine_plus", "scale": 1.0, "gamma": gamma}
    if inference:
        c.eval.adjustment = {"name": "boundary", "scale": inference[0], "tau_p": inference[1]}
    return c

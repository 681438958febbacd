"""The attacks of the evaluation by name, as plain data: for configs and for `lt_adv.evaluation`."""

from typing import Any


def standard_attacks(eps: float, step_size: float) -> dict[str, dict[str, Any]]:
    """Returns the evaluation attacks of the papers' tables at one radius. LSA is PGD on CE(10 z)."""
    pgd = {"attack": "pgd", "eps": eps, "step_size": step_size, "start": "uniform"}
    return {
        "fgsm": {"attack": "fgsm", "eps": eps, "start": "zero"},
        "pgd20": {**pgd, "num_steps": 20},
        "pgd100": {**pgd, "num_steps": 100},
        "mim20": {**pgd, "attack": "mim", "num_steps": 20},
        "cw20": {**pgd, "attack": "cw", "num_steps": 20},
        "lsa": {**pgd, "num_steps": 20, "logit_scale": 10.0},
        "autoattack": {"attack": "autoattack", "eps": eps, "version": "standard"},
    }

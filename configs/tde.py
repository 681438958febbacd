"""TDE: a cosine head, and the effect of the mean feature direction removed at inference.

Paper      Tang et al., NeurIPS 2020; protocol of Wu et al., CVPR 2021
Command    python -m lt_adv.main --config=configs/tde.py:dataset=cifar10
Arguments  dataset, epochs
Expected   CIFAR-10-LT ratio 50, WRN-34-10, read off RoBal's figure, attack not named:
           clean 71.16, robust 30.48
"""

from configs import common


def get_config(arg=None):
    a = common.parse(arg, dataset="cifar10", epochs=0)
    c = common.robal_study(a["dataset"], a["epochs"])
    c.method = {"name": "tde", "mu": 0.9}
    c.model.head = {"name": "cosine_plus", "scale": 16.0, "gamma": 1 / 32}
    c.eval.adjustment = {"name": "tde", "alpha": 0.1}
    return c
